"""What a network is told of images beside their captions: a picture to edit, to fill, to enlarge.

A data set that has such a condition has it as a function, condition(index, held_out=False)
-> (B, C', H, W) in [-1, 1], and region(index, held_out=False) -> (B, 1, H, W) bool, the pixels that
the network is to make; and `told = tell`. Of a picture to fill the region is a mask: boxes or
strokes that cover 10 to 60 % of it.
"""

from typing import NamedTuple

import numpy as np
import torch

from lib.machine import moved
from lib.streams import rng


class Told(NamedTuple):
    """The features of B captions, and the condition of B images."""

    context: torch.Tensor  # (B, M, D_c)
    pooled: torch.Tensor  # (B, D_p)
    condition: torch.Tensor  # (B, C', H, W)


def tell(dataset, text, index):
    return Told(*text, moved(dataset.condition(index), text.context.device))


def hide(x0, mask):
    """What inpainting is told: x_0 where it is known, and the mask. -> (B, C + 1, H, W)"""
    return torch.cat([x0 * ~mask, mask.to(x0.dtype)], dim=1)


def paste(x0, known):
    """A picture with the pixels that `hide` has left, exactly; x0 (B, C, H, W) elsewhere."""
    return torch.where(known[:, -1:] > 0, x0, known[:, :-1])


def random_masks(seed, stream, index, size):
    """One mask for every number. -> (B, 1, H, W) bool, from (seed, stream, number) alone"""
    masks = [random_mask(*size, rng(seed, stream, int(i))) for i in index]
    return torch.from_numpy(np.stack(masks))[:, None]


def random_mask(height, width, random):
    """Boxes, or strokes, until 10 to 50 % are covered; what would cover more than 60 % is left out.
    -> (H, W) bool"""
    piece = box if random.random() < 0.5 else stroke
    goal, mask = random.uniform(0.1, 0.5), np.zeros((height, width), bool)
    while mask.mean() < goal:
        more = mask | piece(height, width, random)
        if more.mean() <= 0.6:
            mask = more
    return mask


def box(height, width, random):
    down, across = random.integers(1, height // 2 + 2), random.integers(1, width // 2 + 2)
    top, left = random.integers(0, height - down + 1), random.integers(0, width - across + 1)
    mask = np.zeros((height, width), bool)
    mask[top : top + down, left : left + across] = True
    return mask


def stroke(height, width, random):
    """What is nearer to a line between two points than half the width of a brush."""
    (y0, y1), (x0, x1) = random.uniform(0, height, 2), random.uniform(0, width, 2)
    y, x = np.indices((height, width)) + 0.5
    length = max((y1 - y0) ** 2 + (x1 - x0) ** 2, 1e-9)
    along = (((y - y0) * (y1 - y0) + (x - x0) * (x1 - x0)) / length).clip(0, 1)
    distance = np.hypot(y - y0 - along * (y1 - y0), x - x0 - along * (x1 - x0))
    return distance <= min(height, width) * random.uniform(0.05, 0.12)
