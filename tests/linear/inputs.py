"""Legal arguments for the tests of errors, which then make one of them wrong."""

import torch

from tests.errors import ones

Q, K, V = ones(2, 4, 7, 8), ones(2, 2, 7, 8), ones(2, 2, 7, 6)
MERGED = (ones(4, 7, 8), ones(4, 7, 8), ones(4, 7, 6))
PACKED = (ones(1, 4, 7, 8), ones(1, 2, 7, 8), ones(1, 2, 7, 6))
OFFSETS = torch.tensor([0, 3, 7])
STATE, KEY_SUM = ones(2, 4, 8, 6), ones(2, 4, 8)
TOKEN = (ones(2, 4, 1, 8), ones(2, 2, 1, 8), ones(2, 2, 1, 6))
TRUE = ones(1).bool()
