"""Legal arguments for the tests of errors, which then make one of them wrong."""

import torch

from tests.errors import ones

Q, K, V = ones(2, 4, 5, 8), ones(2, 2, 7, 8), ones(2, 2, 7, 6)
MERGED = (ones(4, 5, 8), ones(4, 7, 8), ones(4, 7, 6))
PACKED = (ones(1, 4, 5, 8), ones(1, 2, 7, 8), ones(1, 2, 7, 6))
OFFSETS_Q, OFFSETS_K = torch.tensor([0, 2, 5]), torch.tensor([0, 3, 7])
TRUE = ones(1).bool()
