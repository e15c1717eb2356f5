"""Diagrams of boxes and arrows, by matplotlib, which nothing else of a diagram's program needs."""

import io
from itertools import pairwise

from PIL import Image, PngImagePlugin

from lib.errors import UsageError
from lib.files import replacing

# Fill and edge of a box; arrows have the colour of the edge.
BLUE, GREEN, YELLOW = ("#dbe9f8", "#2f6fb4"), ("#dcf0e1", "#2e8653"), ("#fcefcb", "#b5840f")
GREY, VIOLET, RED = ("#e9edf1", "#7c8896"), ("#ebe1f7", "#7a4fb5"), ("white", "#d1495b")
WHITE = ("white", "#1f2a37")


class Diagram:
    """A picture in units of a column and a row; rows go downwards."""

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

    def note(self, x, y, text, **style):
        return self.axes.text(x, y, text, fontsize=13, ha="center", va="center", **style)

    def box(self, x, y, colour, text):
        """A box around (x, y) with centred text. -> what `join` takes"""
        shape = dict(boxstyle="round,pad=0.5", facecolor=colour[0], edgecolor=colour[1])
        return self.note(x, y, text, linespacing=1.5, bbox=shape)

    def boxes(self, x, y, right, down, colour, *texts):
        """Boxes in a row or a column, joined by arrows."""
        made = [self.box(x + i * right, y + i * down, colour, t) for i, t in enumerate(texts)]
        self.join(colour, *made)
        return made

    def join(self, colour, *boxes, bend="arc3"):
        """Arrows from box to box. bend: a `connectionstyle` of matplotlib"""
        style = dict(arrowstyle="-|>", color=colour[1], linewidth=1.8, mutation_scale=18)
        style |= dict(connectionstyle=bend, shrinkA=0, shrinkB=0)
        for a, b in pairwise(boxes):
            ends = dict(patchA=a.get_bbox_patch(), patchB=b.get_bbox_patch())
            self.axes.annotate("", b.get_position(), a.get_position(), arrowprops=style | ends)

    def save(self, path, **notes):
        """Writes a PNG that carries the notes as text."""
        with io.BytesIO() as drawn, replacing(path) as file:
            self.figure.savefig(drawn, format="png")
            info = PngImagePlugin.PngInfo()
            for key, value in notes.items():
                info.add_itxt(key, value)
            picture = Image.open(drawn).convert("RGB").quantize(256, dither=Image.Dither.NONE)
            picture.save(file, "PNG", pnginfo=info, optimize=True)
