"""What a network is told of images beside their captions: a picture to edit, to fill, to enlarge.

A data set that has such a condition has it as a function, condition(index, held_out=False)
-> (B, C', H, W) in [-1, 1], and region(index, held_out=False) -> (B, 1, H, W) bool, the pixels that
the network is to make; and `told = tell`.
"""

from typing import NamedTuple

import torch

from lib.machine import moved


class Told(NamedTuple):
    """The features of B captions, and the condition of B images."""

    context: torch.Tensor  # (B, M, D_c)
    pooled: torch.Tensor  # (B, D_p)
    condition: torch.Tensor  # (B, C', H, W)


def tell(dataset, text, index):
    return Told(*text, moved(dataset.condition(index), text.context.device))
