"""Dropout (Srivastava et al. 2014) whose random numbers are cheap on a CPU.

PyTorch draws a 53-bit number for every element on one thread, a good part of a small training step. Sixteen bits
decide as well: four elements share one 64-bit draw, and the probability is exact to 1/65,536.
`bench/dropout.py` compares the two.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import dropout

LEVELS = 1 << 16


class Dropout(nn.Module):
    """Zeroes elements with probability p and scales the others by 1 / (1 - p), in training mode alone.

    Args:
        p: probability, from 0 to below 1.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """The input, thinned out."""
        if not self.training or self.p == 0:
            return x
        if x.device.type != "cpu":
            return dropout(x, self.p)
        return (x * (1 / (1 - self.p))).masked_fill(drop_mask(x.shape, self.p), 0.0)

    def extra_repr(self) -> str:
        """For printing the network."""
        return f"p={self.p}"


def drop_mask(shape: torch.Size, p: float) -> Bool[Tensor, "*shape"]:
    """True with probability p, from PyTorch's generator for the CPU."""
    count = shape.numel()
    draws = torch.empty((count + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    dropped = min(round(p * LEVELS), LEVELS - 1)
    return (draws.view(torch.int16)[:count] < dropped - LEVELS // 2).view(shape)
