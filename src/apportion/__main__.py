"""`python -m apportion` is the command line; `torchrun ... -m apportion` starts it on several devices."""

import sys

from apportion.cli import main

sys.exit(main())
