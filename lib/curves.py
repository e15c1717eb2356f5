"""curves.png of a run folder: the numbers of log.jsonl over the updates, a panel for each.

Drawn with Pillow alone, in a few milliseconds, so that every run has it.
"""

import math

from PIL import Image, ImageDraw

from lib.parallel import rank
from lib.pictures import save_png

TOGETHER = {"d_fake": "d_real", "grad_norm_heads": "grad_norm"}  # in the panel of the other
LEFT_OUT = {"stage", "step", "images_per_s", "skipped", "seconds"}
COLOURS = ("#1f77b4", "#d62728")
WIDE, HIGH, EDGE = 360, 150, 26  # a panel in pixels; EDGE: what is left for text above and below


def panels_of(rows):
    """Rows of a log -> {(stage, panel): {number: [(step, value), …]}}, in the order of the log."""
    panels = {}
    for row in (row for row in rows if "step" in row):
        for name, value in row.items():
            if name not in LEFT_OUT and isinstance(value, (int, float)) and math.isfinite(value):
                lines = panels.setdefault((row.get("stage"), TOGETHER.get(name, name)), {})
                lines.setdefault(name, []).append((row["step"], value))
    return panels


def draw_panel(stage, lines):
    """One panel: a coloured line for each number, its newest value, and the ends of both axes."""
    sheet = Image.new("RGB", (WIDE, HIGH), "white")
    draw, points = ImageDraw.Draw(sheet), [point for line in lines.values() for point in line]
    last = max(1, *(step for step, _ in points))
    low, high = min(value for _, value in points), max(value for _, value in points)
    left, right, top, bottom = 56, WIDE - 10, EDGE, HIGH - EDGE

    def place(step, value):
        share = (value - low) / (high - low) if high > low else 0.5
        return left + (right - left) * step / last, bottom - (bottom - top) * share

    draw.rectangle((left, top, right, bottom), outline="#bbbbbb")
    for y, value in ((top, high), (bottom, low)):
        draw.text((left - 4, y), f"{value:.3g}", "#555555", anchor="rm", font_size=11)
    draw.text((left, bottom + 4), f"{stage}, update", "#555555", font_size=11)
    draw.text((right, bottom + 4), f"{last:,}", "#555555", anchor="ra", font_size=11)
    x = left
    for colour, (name, line) in zip(COLOURS, lines.items(), strict=False):
        title = f"{name} {line[-1][1]:.3g}   "
        draw.text((x, 6), title, colour, font_size=13)
        x += draw.textlength(title, font_size=13)
        draw.line([place(*point) for point in line], colour, width=1)
    return sheet


def draw_curves(rows, columns=3):
    """All panels of a log as one picture; None where it has no numbers yet."""
    drawn = [draw_panel(stage, lines) for (stage, _), lines in panels_of(rows).items()]
    if not drawn:
        return None
    sheet = Image.new("RGB", (WIDE * columns, HIGH * math.ceil(len(drawn) / columns)), "white")
    for i, panel in enumerate(drawn):
        sheet.paste(panel, (WIDE * (i % columns), HIGH * (i // columns)))
    return sheet


def save_curves(run):
    """curves.png beside log.jsonl, as far as the run has got. Rank 0 alone draws."""
    if rank() == 0 and (picture := draw_curves(run.log.rows())):
        save_png(picture, run.out / "curves.png")
