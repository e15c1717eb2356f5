"""Draws docs/architecture.png: one batch of LADD, the network, its joint block, a head.

python -m tools.architecture            draws it, from nano's networks as they run (matplotlib)
python -m tools.architecture --check    compares its numbers with those of the code; status 1 if not

Every shape and number is read off a pass of `nano`, and is kept in the PNG as text, too.
"""

import json
import sys
from itertools import pairwise
from pathlib import Path
from unittest import mock

import torch
from PIL import Image

import ladd
import mmdit
from data import Text
from discriminator import Discriminator
from lib.errors import Parser, UsageError, exit_status

PICTURE = Path(__file__).resolve().parent.parent / "docs" / "architecture.png"
IMAGE, TEXT, CONDITION = ("#dbe9f8", "#2f6fb4"), ("#dcf0e1", "#2e8653"), ("#fcefcb", "#b5840f")
FROZEN, HEADS, PLAIN = ("#e9edf1", "#7c8896"), ("#ebe1f7", "#7a4fb5"), ("white", "#1f2a37")


def shape_of(tensor):
    return "×".join(map(str, tensor.shape))


def read_code():
    """Follows a batch of nano through the code. -> {what: shape, number or words}"""
    s = ladd.parse(["--preset", "nano", "--device", "cpu"])[0]
    with torch.device("meta"):  # tensors without data
        student, teacher = mmdit.MMDiT(**s.model()), mmdit.MMDiT(**s.model()).requires_grad_(False)
        networks = dict(student=student, teacher=teacher, heads=Discriminator(**s.head_sizes()))
        x0, t = torch.empty(s.batch, s.channels, *s.size), torch.empty(s.batch)
        c, y = torch.empty(s.batch, s.text_length, s.text_dim), torch.empty(s.batch, s.text_dim)
    block, last = student.joint_blocks[0], student.joint_blocks[-1].context_block
    n = dict(x0=shape_of(x0), t=shape_of(t), c=shape_of(c), y=shape_of(y), depth=s.depth)
    n |= dict(taps=list(s.tapped), levels=len(s.levels), weight=s.distill_weight)
    n |= dict(qk_norm=s.qk_norm, vectors=block.x_block.chunks, last_vectors=last.chunks)

    def note(name):
        def hook(_, given, made):
            n[name] = shape_of(made)
            if torch.is_tensor(given[0]):
                n[f"{name} in"] = shape_of(given[0])

        return hook

    for network in (student, networks["heads"]):
        for name, module in network.named_modules():
            if not list(module.children()) or name.endswith(("embedder", "final_layer", "heads.0")):
                module.register_forward_hook(note(name))
    with mock.patch.object(mmdit, "attention", wraps=mmdit.attention) as attention:
        losses = ladd.losses(*networks.values(), ladd.Batch(x0, Text(c, y), t, x0, t, t, x0, x0), s)
    n |= dict(attention=shape_of(attention.call_args.args[0]), logits=shape_of(losses.on_real))
    for loss, value in (("L_D", losses.d), ("L_G", losses.g)):
        value.backward(retain_graph=True)
        for name, network in networks.items():
            n[f"{name} weights"] = sum(p.numel() for p in network.parameters())
            n[f"{loss} to {name}"] = any(p.grad is not None for p in network.parameters())
            network.zero_grad()
    return n


# ---------------------------------------------------------------------------------------------
# Drawing
# ---------------------------------------------------------------------------------------------


class Sheet:
    """A picture of boxes and arrows, in units of a column and a row; rows go downwards."""

    def __init__(self, columns, rows):
        try:
            from matplotlib.figure import Figure
        except ImportError:
            raise UsageError("matplotlib is missing: pip install matplotlib") from None
        self.figure = Figure(figsize=(2.3 * columns, 1.1 * rows), dpi=100)
        self.axes = self.figure.add_axes((0, 0, 1, 1), xlim=(0, columns), ylim=(rows, 0))
        self.axes.axis("off")

    def heading(self, x, y, text):
        self.axes.text(x, y, text, fontsize=20, va="center")

    def box(self, x, y, colour, text):
        """A box with words, around (x, y). -> what `join` takes"""
        fill, edge = colour
        shape = dict(boxstyle="round,pad=0.6", facecolor=fill, edgecolor=edge, linewidth=1.5)
        middle = dict(ha="center", va="center", bbox=shape)
        return self.axes.text(x, y, text, fontsize=12.5, linespacing=1.5, **middle)

    def arrow(self, colour, a, b, words=""):
        """A straight arrow from a to b: boxes, or points."""
        ...

    def join(self, colour, *boxes):
        """Arrows from box to box."""
        for a, b in pairwise(boxes):
            style = dict(arrowstyle="-|>", color=colour[1], linewidth=1.8, mutation_scale=18)
            ends = dict(patchA=a.get_bbox_patch(), patchB=b.get_bbox_patch(), shrinkA=0, shrinkB=0)
            self.axes.annotate("", b.get_position(), a.get_position(), arrowprops=style | ends)


def draw_batch(sheet, n):
    """The path of one batch; the numbers are those of ladd.py's box."""
    sheet.heading(0.1, 0.4, "One batch of LADD")
    weights = {name: f"{n[name + ' weights'] / 1e6:.2f} M weights" for name in ("student", "heads")}
    features = f"{len(n['taps'])} × {n['heads.0 in']}\nof blocks {n['taps']}"
    x0 = sheet.box(0.5, 3.6, IMAGE, f"$x_0$, the teacher's\nsamples\n{n['x0']}")
    noised = sheet.box(0.5, 1.6, IMAGE, f"1   $x_t$\n{n['x0']}\nt of {n['levels']} levels")
    student = sheet.box(1.5, 1.6, IMAGE, f"student $v_\\theta$\n{weights['student']}\nlearns")
    guess = sheet.box(2.5, 1.6, IMAGE, f"2   $\\hat{{x}}_0$\n{n['x0']}\n$x_t - t\\,v$")
    fake = sheet.box(3.5, 1.6, IMAGE, f"3   $\\hat{{x}}_0$ noised\n{n['x0']}\nto $\\hat{{t}}$")
    real = sheet.box(3.5, 3.6, IMAGE, f"3   $x_0$ noised\n{n['x0']}\nto the same $\\hat{{t}}$")
    teacher = sheet.box(4.5, 2.6, FROZEN, "frozen teacher\nas the student\nwas at first")
    f = sheet.box(5.5, 1.6, IMAGE, f"4   f\n{features}")
    r = sheet.box(5.5, 3.6, IMAGE, f"4   r\n{features}")
    heads = sheet.box(6.5, 2.6, HEADS, f"heads D\n{weights['heads']}\nlearn")
    on_fake = sheet.box(7.5, 1.6, HEADS, f"6   D(f)\n{n['logits']}\n$L_G$: −mean")
    on_real = sheet.box(7.5, 3.6, HEADS, f"5   D(r), D(f)\n{n['logits']}\n$L_D$: hinge")
    sheet.join(PLAIN, x0, noised, student, guess, fake, teacher, f, heads, on_fake)
    sheet.join(PLAIN, x0, real, teacher, r, heads, on_real)


def main(argv=None):
    sheet, n = Sheet(8, 16), read_code()
    draw_batch(sheet, n)
    sheet.figure.savefig("/tmp/w/mine/arch.png", metadata=dict(numbers=json.dumps(n)))


if __name__ == "__main__":
    sys.exit(main())
