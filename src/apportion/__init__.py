"""Sparse autoencoders that spend their sparsity budget where it is needed."""
