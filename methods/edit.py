"""Editing by instruction with LADD (arXiv 2403.12015, its section on applications): "make it blue".

The network is told the instruction c and the picture z to edit, c* = (c, z). The target x_0 is z
after the edit. Two trainings, both those of methods/inpaint.py, with the true x_0.

Ours: exact pairs of the built-in shapes, which are drawn twice with one thing changed.

    python -m methods.edit --preset nano --from runs/nano
    python sample.py runs/nano-edit --init-image a.png --prompt "make it blue"
"""

import dataclasses

import numpy as np
import torch

import data
import ladd
from lib.conditions import tell
from lib.parallel import leave
from lib.settings import refuse, setting
from lib.streams import uniform
from methods import inpaint

# Edit k < 4 changes attribute k: size, colour, shape, background. The others move the shape.
CHANGES = ("make it {0}", "make it {1}", "make it a {2}", "make the background {3}")
MOVES = dict(left=(5, 0.0), right=(5, 1.0), up=(6, 0.0), down=(6, 1.0))  # column of u, its value
EDITS = (*CHANGES, *(f"move it {way}" for way in MOVES))


class Pairs(data.Shapes):
    """Pictures of one shape after an edit, with the picture before it as their condition.

    A caption is the instruction, and has the attributes of the picture after it."""

    def __init__(self, height, width, seed):
        super().__init__(height, width, seed, pairs=False)
        self.captions = []
        for row in self.labels.tolist():
            words = [v[i] for v, i in zip(self.attributes.values(), row, strict=True)]
            self.captions += [sentence.format(*words) for sentence in EDITS]
        self.labels = self.labels.repeat_interleave(len(EDITS), dim=0)

    def edited(self, index, held_out=False):
        """What the pictures before and after are drawn of: u, values, twice; caption (B,)."""
        u, values = self.choose(index, held_out)
        seed, stream = (0, "edits, held out") if held_out else (self.seed, "edits")
        random = uniform(seed, stream, index, 2)
        edit = (random[:, 0] * len(EDITS)).astype(np.int64)
        size, colour, shape, background, pattern = values
        third = (random[:, 1] * 6).astype(np.int64)  # of the six colours that are not in it
        for taken in np.sort([colour, background], axis=0):
            third += third >= taken
        other = (shape + 1 + (random[:, 1] * 3).astype(np.int64)) % 4
        new = (1 - size, third, other, third)
        after = [np.where(edit == k, new[k], values[k]) for k in range(len(new))] + [pattern]
        place = u.copy()
        for k, (column, value) in enumerate(MOVES.values(), len(CHANGES)):
            place[edit == k, column] = value
        return (u, values), (place, after), self.rows[tuple(after)] * len(EDITS) + edit

    def batch(self, index, held_out=False):
        _, after, caption = self.edited(index, held_out)
        return self.draw(*after), torch.from_numpy(caption)

    def condition(self, index, held_out=False):
        before, *_ = self.edited(index, held_out)
        return data.to_float(self.draw(*before))

    told = tell

    def region(self, index, held_out=False):
        before, after, _ = self.edited(index, held_out)
        return (self.draw(*before) != self.draw(*after)).any(dim=1, keepdim=True)


@dataclasses.dataclass(frozen=True)
class Settings(inpaint.Settings):
    tune_iterations: int = setting(1500, "updates of the teacher", low=1, scales=True, smoke=2)
    condition_channels = 3  # of the picture to edit

    def __post_init__(self):
        super().__post_init__()
        if self.data != "shapes":
            refuse(self, "data", "pairs of pictures are drawn of the built-in shapes alone")

    def conditioned(self, dataset):
        return Pairs(*dataset.size, self.seed)


tune, distil = inpaint.tune, inpaint.distil


if __name__ == "__main__":
    leave(ladd.main(distil=distil, method="edit", kind=Settings))
