"""Draws docs/architecture.png: one batch of LADD, the network, its joint block, a head.

python -m tools.architecture            draws it, from nano's networks as they run (matplotlib)
python -m tools.architecture --check    checks the picture's numbers against them; status 1 if not

Every shape and number is read off a forward and backward pass of `nano`. All words of the picture
are also kept in the PNG as text, which is what --check compares.
"""

import json
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from PIL import Image

import ladd
import mmdit
from discriminator import Discriminator
from lib.errors import Parser, UsageError, exit_status

PICTURE = Path(__file__).resolve().parent.parent / "docs" / "architecture.png"
SIZE = 1840, 2000  # pixels
IMAGE, TEXT, CONDITION = ("#dbe9f8", "#2f6fb4"), ("#dcf0e1", "#2e8653"), ("#fcefcb", "#b5840f")
FROZEN, HEADS, PLAIN = ("#e9edf1", "#7c8896"), ("#ebe1f7", "#7a4fb5"), ("white", "#1f2a37")
RED = "#d1495b"


def shape_of(tensor):
    return "×".join(map(str, tensor.shape))


def read_code():
    """Shapes and numbers of one batch of nano, followed through the code; `out` has the shapes
    that leave the modules, by name."""
    s = ladd.parse(["--preset", "nano", "--device", "cpu"])[0]
    torch.manual_seed(0)
    student, teacher = mmdit.MMDiT(**s.model()), mmdit.MMDiT(**s.model()).requires_grad_(False)
    networks = dict(student=student, teacher=teacher, heads=Discriminator(**s.head_sizes()))
    for parameter in (*student.parameters(), *teacher.parameters()):
        torch.nn.init.normal_(parameter, std=0.02)  # adaLN-Zero has no gradient at the start
    n = SimpleNamespace(s=s, student=student, heads=networks["heads"], out={}, gradient={})
    for module in (student, n.heads):
        for name, part in module.named_modules():

            def note(_, inputs, output, name=name):
                if torch.is_tensor(output):
                    n.out[name] = shape_of(output)

            part.register_forward_hook(note)
    x0, t = torch.randn(s.batch, s.channels, *s.size), torch.rand(s.batch)
    text = torch.randn(s.batch, s.text_length, s.text_dim), torch.randn(s.batch, s.text_dim)
    n.x0, n.t, n.c, n.y = map(shape_of, (x0, t, *text))
    grid = [side // s.patch for side in s.size]
    with mock.patch.object(mmdit, "attention", wraps=mmdit.attention) as attention:
        x0_hat = ladd.student_predict(student, x0, text, t, x0)
    n.qkv, n.x0_hat = shape_of(attention.call_args.args[0]), shape_of(x0_hat)
    fake = ladd.teacher_features(teacher, x0_hat, text, t, x0, s.tapped)
    real = ladd.teacher_features(teacher, x0, text, t, x0, s.tapped)
    loss_d, logits, _ = ladd.discriminator_loss(n.heads, real, fake, t, text[1], grid, s.r1)
    loss_g = ladd.generator_loss(n.heads, fake, t, text[1], grid)
    n.features, n.logits = f"{len(fake)} × {shape_of(fake[0])}", shape_of(logits)
    for loss, value in dict(D=loss_d, G=loss_g).items():
        value.backward(retain_graph=True)
        learn = [k for k, m in networks.items() if any(p.grad is not None for p in m.parameters())]
        n.gradient[loss] = " and ".join(learn)
        n.heads.zero_grad()
    return n


class Sheet:
    """Boxes, arrows and words before they are drawn; x and y in pixels, y downwards."""

    def __init__(self):
        self.boxes, self.arrows, self.words = [], [], []

    def write(self, x, y, text, size=18, colour="#4a5766", align="center"):
        self.words.append((x, y, text, size, colour, align))

    def box(self, x, y, w, h, colour, *lines):
        """A box around (x, y), with a title and lines below it. -> what `join` takes"""
        self.boxes.append((x - w / 2, y - h / 2, w, h, colour))
        for i, line in enumerate(lines):
            style = (18,) if i else (23, PLAIN[1])
            self.write(x, y + 28 * (i - (len(lines) - 1) / 2), line, *style)
        return x, y, w, h

    def arrow(self, colour, *points, tip="-|>"):
        self.arrows.append((colour, points, tip))

    def join(self, colour, *boxes):
        """Arrows from box to box, each of which is beside, above or below the next."""
        for (ax, ay, aw, ah), (bx, by, bw, bh) in pairwise(boxes):
            if abs(ax - bx) > (aw + bw) / 2:  # at the height of the smaller one
                y, side = (by if bh < ah else ay), (1 if bx > ax else -1)
                self.arrow(colour, (ax + side * aw / 2, y), (bx - side * bw / 2, y))
            else:
                x, side = (bx if bw < aw else ax), (1 if by > ay else -1)
                self.arrow(colour, (x, ay + side * ah / 2), (x, by - side * bh / 2))


def draw_batch(sheet, n):
    """The path of one batch: numbers 1 to 6 are those of ladd.py."""
    sheet.write(40, 50, "One batch of LADD: student and heads learn, the teacher is frozen", 30, PLAIN[1], "left")
    x, top, low, made = [130 + 226 * i for i in range(8)], 250, 530, {}
    of_blocks = f"of blocks {' and '.join(map(str, n.s.tapped))}"
    student = sum(p.numel() for p in n.student.parameters()) / 1e6
    heads = sum(p.numel() for p in n.heads.parameters()) / 1e6
    for name, column, y, colour, *lines in (
        ("x_0", 0, low, IMAGE, "$x_0$", n.x0, "teacher's sample"),
        ("x_t", 0, top, IMAGE, "1   $x_t$", n.x0, f"t of {len(n.s.levels)} levels"),
        ("student", 1, top, IMAGE, r"student $v_\theta$", f"{student:.2f} M weights"),
        ("predicted", 2, top, IMAGE, r"2   $\hat{x}_0$", n.x0_hat, r"$x_t - t \cdot v$"),
        ("fake", 3, top, IMAGE, r"3   noised $\hat{x}_0$", n.x0_hat, r"to $\hat{t}$"),
        ("real", 3, low, IMAGE, "3   noised $x_0$", n.x0, r"to the same $\hat{t}$"),
        ("teacher", 4, 390, FROZEN, "frozen teacher", "the student", "before training", r"given c, y, $\hat{t}$"),
        ("f", 5, top, IMAGE, "4   f", n.features, of_blocks),
        ("r", 5, low, IMAGE, "4   r", n.features, of_blocks),
        ("heads", 6, 390, HEADS, "heads D", f"{heads:.2f} M weights", "one per block"),
        ("D(f)", 7, top, HEADS, "6   D(f)", n.logits, "$L_G$: −mean D(f)"),
        ("D(r)", 7, low, HEADS, "5   D(r), D(f)", n.logits, "$L_D$: hinge"),
    ):  # fmt: skip
        made[name] = sheet.box(x[column], y, 184, 396 if y == 390 else 116, colour, *lines)
    for chain in (
        "x_0 x_t student predicted fake teacher f heads D(f)",
        "x_0 real teacher r heads D(r)",
        "D(f) D(r)",
    ):
        sheet.join(PLAIN[1], *(made[name] for name in chain.split()))
    weight = f"{n.s.distill_weight:g} · smooth L1"
    extra = sheet.box(x[2], 390, 224, 76, PLAIN, weight, r"of $\hat{x}_0$ and $x_0$; ours")
    sheet.join(PLAIN[1], made["predicted"], extra)
    sheet.arrow(PLAIN[1], (x[0] + 92, 500), (x[2], 500), (x[2], 428))
    sheet.write(x[7] - 10, 390, "without gradient", align="right")
    sheet.arrow(RED, (x[7], 192), (x[7], 145), (x[1], 145), (x[1], 192))
    way = f"gradient of $L_G$: through heads and teacher, which keep none of it, to the {n.gradient['G']}"
    sheet.write((x[1] + x[7]) / 2, 120, way, 20, RED)
    sheet.arrow(HEADS[1], (x[7], 588), (x[7], 635), (x[6], 635), (x[6], 588))
    sheet.write(x[6] - 14, 635, f"gradient of $L_D$: to the {n.gradient['D']} alone", 20, HEADS[1], "right")


def draw_network(sheet, n):
    """MMDiT from its inputs to v, with the taps."""
    sheet.write(40, 720, "The network: MMDiT", 30, PLAIN[1], "left")
    text, image, cond, depth = 270, 452, 634, n.s.depth
    final = sheet.box(361, 1090 + 115 * depth, 350, 80, IMAGE, "modulate, Linear", n.out["final_layer"])
    blocks = [sheet.box(361, 1050 + 115 * i, 350, 76, PLAIN, f"joint block {i}") for i in range(depth)]
    for x, colour, given, *embedded in (
        (text, TEXT, ("c", n.c), "Linear", n.out["context_embedder"]),
        (image, IMAGE, ("$x_t$", n.x0), "patches + place", n.out["x_embedder"]),
        (cond, CONDITION, ("t, y", f"{n.t}, {n.y}"), "two MLPs, sum", n.out["t_embedder"]),
    ):
        sheet.join(colour[1], sheet.box(x, 800, 168, 80, colour, *given), sheet.box(x, 920, 168, 80, colour, *embedded))
    for colour, x, end in ((TEXT[1], text, depth), (IMAGE[1], image, depth + 1)):
        edges = [(920, 40), *((y, h / 2) for _, y, _, h in blocks), (final[1], 40)]
        for (a, ha), (b, hb) in pairwise(edges[: end + 1]):
            sheet.arrow(colour, (x, a + ha), (x, b - hb))
    sheet.arrow(CONDITION[1], (cond, 960), (cond, final[1]), (536, final[1]))
    for i, (_, y, *_) in enumerate(blocks):
        sheet.arrow(CONDITION[1], (cond, y), (536, y))
        if i in n.s.tapped:
            sheet.box(95, y + 57, 110, 50, HEADS, "head")
            sheet.arrow(HEADS[1], (image, y + 57), (150, y + 57))
    sheet.join(IMAGE[1], final, sheet.box(image, final[1] + 120, 168, 80, IMAGE, "v", n.x0_hat))


def draw_block(sheet, n):
    """Both streams of a joint block, and where they meet."""
    sheet.write(800, 720, "A joint block: two streams, one attention", 30, PLAIN[1], "left")
    mid, text, image = 1300, 995, 1605
    block, first = n.student.joint_blocks[0], "joint_blocks.0."
    count = block.x_block.chunks
    vectors = f"{n.out[first + 'x_block.adaLN_modulation']} for each stream"
    adaln = sheet.box(mid, 925, 250, 104, CONDITION, f"adaLN: {count} vectors", vectors, "SiLU, Linear")
    sheet.join(CONDITION[1], sheet.box(mid, 800, 250, 76, CONDITION, "t and y", n.out["t_embedder"]), adaln)
    sheet.arrow(CONDITION[1], (mid, 977), (mid, 1540), tip="-")
    for y in (915, 1265, 1430, 1540):
        sheet.arrow(CONDITION[1], (mid, y), (text + 145, y))
        sheet.arrow(CONDITION[1], (mid, y), (image - 145, y))
    for x, side, colour, title, embedder, own in (
        (text, -1, TEXT, "text tokens", "context_embedder", first + "context_block."),
        (image, 1, IMAGE, "image tokens", "x_embedder", first + "x_block."),
    ):
        norm = "RMSNorm of q and k" if n.s.qk_norm else "Linear"
        modulated = "LayerNorm", "· (1 + scale) + shift"
        column = [
            sheet.box(x, 800, 290, 76, colour, title, n.out[embedder]),
            sheet.box(x, 915, 290, 76, colour, *modulated),
            sheet.box(x, 1030, 290, 76, colour, f"q, k, v  {n.out[own + 'attn.qkv']}", norm),
            (x, 1150, 290, 80),
            sheet.box(x, 1265, 290, 76, colour, "Linear · gate", n.out[own + "attn.proj"]),
            sheet.box(x, 1345, 34, 34, colour, "+"),
            sheet.box(x, 1430, 290, 76, colour, *modulated),
            sheet.box(x, 1540, 290, 76, colour, "MLP · gate", f"{n.out[own + 'mlp.fc1']} inside"),
            sheet.box(x, 1625, 34, 34, colour, "+"),
            (x, 1690, 0, 20),
        ]
        sheet.join(colour[1], *column)
        out, plus = x + 175 * side, x + 17 * side
        sheet.arrow(colour[1], (x + 145 * side, 800), (out, 800), (out, 1345), (plus, 1345))
        sheet.arrow(colour[1], (x, 1376), (out, 1376), (out, 1625), (plus, 1625))
    tokens = [n.out[name].split("×")[1] for name in ("context_embedder", "x_embedder")]
    joint = f"one attention over {' + '.join(tokens)} tokens"
    sheet.box(mid, 1150, 920, 80, PLAIN, joint, f"q, k, v  {n.qkv} each")
    last = n.student.joint_blocks[-1].context_block.chunks
    sheet.write(mid, 1660, f"the last block's text gives q, k, v alone: {last} vectors")


def draw_head(sheet, n):
    """One head, from a block's tokens to logits."""
    sheet.write(40, 1770, f"A head, one for each of the {len(n.s.tapped)} tapped blocks of the frozen teacher", 30, PLAIN[1], "left")
    conv = {name: f"conv {'×'.join(map(str, part.kernel_size))}" for name, part in n.heads.heads[0].named_modules() if hasattr(part, "kernel_size")}
    y, w, h, act = 1860, 224, 104, "norm, leaky ReLU"
    tokens = sheet.box(152, y, w, h, FROZEN, "tokens", n.out["x_embedder"], "LayerNorm")
    reduce = sheet.box(458, y, w, h, HEADS, conv["reduce"], n.out["heads.0.reduce"], act)
    middle = sheet.box(764, y, w, h, HEADS, conv["conv"], n.out["heads.0.conv"], act)
    plus = sheet.box(922, y, 34, 34, HEADS, "+")
    features = sheet.box(1080, y, w, h, HEADS, conv["features"], n.out["heads.0.features"])
    product = sheet.box(1386, y, w, h, HEADS, "inner product", "at every position")
    logits = sheet.box(1692, y, w, h, HEADS, "logits", n.out["heads.0"], "> 0 real, < 0 fake")
    sheet.join(HEADS[1], tokens, reduce, middle, plus, features, product, logits)
    sheet.arrow(HEADS[1], (458, y + 52), (458, y + 82), (922, y + 82), (922, y + 17))
    given = sheet.box(1080, y + 130, w, 84, CONDITION, r"$\hat{t}$, y", f"{n.out['embed_t']}, sum of two")
    linear = sheet.box(1386, y + 130, w, 84, CONDITION, "Linear", n.out["heads.0.condition"])
    sheet.join(CONDITION[1], given, linear, product)


def save(sheet, words):
    try:
        from matplotlib.figure import Figure
        from matplotlib.patches import FancyBboxPatch
    except ImportError:
        raise UsageError("matplotlib is missing: pip install matplotlib") from None
    width, height = SIZE
    figure = Figure(figsize=(width / 100, height / 100), dpi=100)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    for colour, points, tip in sheet.arrows:
        axes.plot(*zip(*points, strict=True), color=colour, linewidth=2, solid_capstyle="butt")
        style = dict(arrowstyle=tip, color=colour, linewidth=2, mutation_scale=18, shrinkA=0, shrinkB=0)
        axes.annotate("", points[-1], points[-2], arrowprops=style)
    for x, y, w, h, (fill, edge) in sheet.boxes:
        style = dict(boxstyle="round,pad=0,rounding_size=12", fc=fill, ec=edge, lw=2, zorder=3)
        axes.add_patch(FancyBboxPatch((x, y), w, h, **style))
    for x, y, text, size, colour, align in sheet.words:
        axes.text(x, y, text, fontsize=0.72 * size, color=colour, ha=align, va="center", zorder=4)
    figure.savefig(PICTURE, metadata=dict(words=words))


def main(argv=None):
    parser = Parser("tools/architecture.py", "Draws docs/architecture.png from the code.")
    parser.add_argument("--check", action="store_true", help="compare the words, draw nothing")
    args = parser.parse_args(argv)
    sheet, n = Sheet(), read_code()
    for part in (draw_batch, draw_network, draw_block, draw_head):
        part(sheet, n)
    words = json.dumps([text for _, _, text, *_ in sheet.words])
    if args.check:
        with Image.open(PICTURE) as old:
            same = old.text.get("words") == words
        if not same:
            print("docs/architecture.png is not of this code: python -m tools.architecture")
        return 0 if same else 1
    try:
        save(sheet, words)
    except UsageError as error:
        return exit_status("tools/architecture.py", error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
