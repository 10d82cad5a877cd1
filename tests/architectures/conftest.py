import torch

# These problems are tiny; on a busy machine nearly all the time would go into waiting for a second thread.
torch.set_num_threads(1)
