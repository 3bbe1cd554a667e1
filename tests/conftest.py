"""One thread, as in the workers: the families' norms compute in float32, and more threads add in another order."""

import torch

torch.set_num_threads(1)
