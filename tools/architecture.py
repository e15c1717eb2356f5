"""Draws docs/architecture.png: one batch of LADD, the network, its joint block, a head.

python docs/architecture.py            draws it, from nano's networks as they run
python docs/architecture.py --check    checks the picture's numbers against them; status 1 if not

Every shape and number in the picture is read off a forward and backward pass of `nano`. They are
also kept in the PNG as text, which is what --check compares: fonts may differ, numbers may not.
"""

import argparse
import json
import re
import sys
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import ladd  # noqa: E402
import mmdit  # noqa: E402
from discriminator import Discriminator  # noqa: E402

PICTURE = ROOT / "docs" / "architecture.png"

# ---------------------------------------------------------------------------------------------
# What the code says
# ---------------------------------------------------------------------------------------------


def shape_of(value):
    return "×".join(map(str, value.shape))


def watch(network, seen, prefix):
    """Hooks that note the shapes going into and out of every module of a network."""

    def note(name):
        def hook(_, inputs, output):
            for key, values in (("in", inputs), ("out", output)):
                values = values if isinstance(values, tuple) else (values,)
                shapes = [shape_of(v) for v in values if torch.is_tensor(v)]
                seen[f"{prefix}{name} {key}"] = shapes[0] if len(shapes) == 1 else shapes

        return hook

    for name, module in network.named_modules():
        module.register_forward_hook(note(name))


def read_code():
    """{name: number, shape or list of them} of one batch of nano, followed through the code."""
    s = ladd.parse(["--preset", "nano", "--device", "cpu"])[0]
    torch.manual_seed(0)
    student, teacher = mmdit.MMDiT(**s.model()), mmdit.MMDiT(**s.model()).requires_grad_(False)
    heads, seen = Discriminator(**s.head_sizes()), {}
    for parameter in (*student.parameters(), *teacher.parameters()):
        torch.nn.init.normal_(parameter, std=0.02)  # adaLN-Zero has no gradient at the start
    networks = dict(student=student, teacher=teacher, heads=heads)
    watch(student, seen, "")
    watch(heads, seen, "heads.")
    attention = mmdit.attention

    def noted(q, k, v):
        seen["attention in"], seen["attention out"] = (
            shape_of(q),
            shape_of(out := attention(q, k, v)),
        )
        return out

    x0, t = torch.randn(s.batch, s.channels, s.size, s.size), torch.rand(s.batch)
    text = torch.randn(s.batch, s.text_length, s.text_dim), torch.randn(s.batch, s.text_dim)
    mmdit.attention = noted
    x0_hat = ladd.student_predict(student, x0, text, t, torch.randn_like(x0))
    mmdit.attention = attention
    fake = ladd.teacher_features(teacher, x0_hat, text, t, torch.randn_like(x0), s.tapped)
    with torch.no_grad():
        real = ladd.teacher_features(teacher, x0, text, t, torch.randn_like(x0), s.tapped)
    grid = (s.size // s.patch, s.size // s.patch)
    loss_d, logits, _ = ladd.discriminator_loss(heads, real, fake, t, text[1], grid, s.r1)
    losses = dict(L_D=loss_d, L_G=ladd.generator_loss(heads, fake, t, text[1], grid))
    for loss, value in losses.items():
        for network in networks.values():
            network.zero_grad(set_to_none=True)
        value.backward(retain_graph=True)
        with_grad = [
            k for k, n in networks.items() if any(p.grad is not None for p in n.parameters())
        ]
        seen[f"gradient of {loss}"] = with_grad
    block = student.joint_blocks[0]
    numbers = dict(x0=shape_of(x0), x0_hat=shape_of(x0_hat), t=shape_of(t), c=shape_of(text[0]))
    numbers |= dict(y=shape_of(text[1]), features=[shape_of(f) for f in fake])
    numbers |= dict(logits=shape_of(logits), taps=list(s.tapped), depth=len(student.joint_blocks))
    numbers |= {
        f"parameters, {k}": sum(p.numel() for p in n.parameters()) for k, n in networks.items()
    }
    numbers |= dict(qk_norm=block.x_block.attn.ln_q is not None, chunks=block.x_block.chunks)
    numbers |= dict(last_chunks=student.joint_blocks[-1].context_block.chunks)
    numbers |= dict(levels=list(s.levels), weight=s.distill_weight, patch=s.patch)
    for name, module in heads.heads[0].named_modules():
        if hasattr(module, "kernel_size"):
            numbers[f"kernel {name}"] = list(module.kernel_size)
    return json.loads(json.dumps(seen | numbers))


# ---------------------------------------------------------------------------------------------
# Drawing
# ---------------------------------------------------------------------------------------------

WIDTH, HEIGHT, FINE = 1840, 2150, 2  # drawn twice as large, for smooth lines
INK, QUIET = "#1f2a37", "#5d6b7a"
IMAGE, TEXT, CONDITION = ("#dbe9f8", "#2f6fb4"), ("#dcf0e1", "#2e8653"), ("#fcefcb", "#b5840f")
FROZEN, HEADS, PLAIN = ("#e9edf1", "#7c8896"), ("#ebe1f7", "#7a4fb5"), ("#ffffff", "#9aa5b1")
GRADIENT_G, GRADIENT_D = "#d1495b", "#7a4fb5"


def font(size, bold=False):
    try:
        return ImageFont.truetype(f"DejaVuSans{'-Bold' * bold}.ttf", size * FINE)
    except OSError:
        return ImageFont.load_default(size * FINE)  # without Greek letters: do for --check


class Sheet:
    """A picture in units of its final pixels."""

    def __init__(self):
        self.image = Image.new("RGB", (WIDTH * FINE, HEIGHT * FINE), "white")
        self.draw = ImageDraw.Draw(self.image)

    def parts(self, text, size, bold):
        """[(text, font, lowering, width)]; _{…} is a subscript."""
        for i, part in enumerate(re.split(r"_\{(.*?)\}", text)):
            own = font(size * 0.7 if i % 2 else size, bold)
            yield part, own, size * 0.22 * (i % 2), self.draw.textlength(part, own) / FINE

    def text(self, x, y, text, size=22, bold=False, colour=INK, anchor="m", most=WIDTH):
        """One line whose middle is at height y; it starts, is centred or ends at x."""
        parts = list(self.parts(text, size, bold))
        if (total := sum(width for *_, width in parts)) > most:
            size = size * most / total
            parts = list(self.parts(text, size, bold))
        x -= sum(width for *_, width in parts) * {"l": 0, "m": 0.5, "r": 1}[anchor]
        for part, own, low, width in parts:
            at = (x * FINE, (y + low + size * 0.36) * FINE)
            self.draw.text(at, part, colour, own, anchor="ls")
            x += width

    def box(self, x, y, w, h, lines=(), colour=PLAIN, radius=12):
        """A box with centred lines; the first is bold, the others are quiet."""
        fill, edge = colour
        corners = [v * FINE for v in (x, y, x + w, y + h)]
        self.draw.rounded_rectangle(corners, radius * FINE, fill, edge, 2 * FINE)
        step = 29
        for i, line in enumerate(lines):
            at = y + h / 2 + (i - (len(lines) - 1) / 2) * step
            size, colour = (23, INK) if i == 0 else (19, QUIET)
            self.text(x + w / 2, at, line, size, i == 0, colour, most=w - 14)

    def arrow(self, *points, colour=INK, width=3, head=True):
        """A line along the points, with a tip at the last."""
        scaled = [(x * FINE, y * FINE) for x, y in points]
        (x0, y0), (x1, y1) = points[-2:]
        length = max(1e-6, ((x1 - x0) ** 2 + (y1 - y0) ** 2) ** 0.5)
        dx, dy = (x1 - x0) / length, (y1 - y0) / length
        if head:
            scaled[-1] = ((x1 - 8 * dx) * FINE, (y1 - 8 * dy) * FINE)
        self.draw.line(scaled, colour, width * FINE, joint="curve")
        if head:
            tip = [(x1, y1), (x1 - 15 * dx - 7 * dy, y1 - 15 * dy + 7 * dx)]
            tip += [(x1 - 15 * dx + 7 * dy, y1 - 15 * dy - 7 * dx)]
            self.draw.polygon([(x * FINE, y * FINE) for x, y in tip], colour)

    def sign(self, x, y, text, colour=INK):
        """A small circle with a sign in it."""
        corners = [v * FINE for v in (x - 16, y - 16, x + 16, y + 16)]
        self.draw.ellipse(corners, "white", colour, 2 * FINE)
        self.text(x, y, text, 24, True, colour)

    def heading(self, x, y, text, more=""):
        self.text(x, y, text, 32, True, anchor="l")
        wide = self.draw.textlength(text, font(32, True)) / FINE
        self.text(x + wide + 18, y + 2, more, 21, colour=QUIET, anchor="l")


def millions(n):
    return f"{n / 1e6:.2f} M weights"


def draw_batch(s, n):
    """The path of one batch: boxes 1 to 6 of ladd.py."""
    x, w, h = [40 + 226 * i for i in range(8)], 180, 116
    top, low = 190, 470
    mid = (top + low + h) / 2
    assert n("gradient of L_G") == ["student"] and n("gradient of L_D") == ["heads"]
    s.heading(40, 50, "One batch of LADD", "student and heads learn, the teacher is frozen")
    taps = " and ".join(map(str, n("taps")))
    features = f"{len(n('features'))} × {n('features')[0]}"
    tall = low + h - top
    for column, y, height, lines, colour in (
        (0, top, h, ["x_{t}", n("x0"), f"t of {len(n('levels'))} levels"], IMAGE),
        (0, low, h, ["x_{0}", n("x0"), "teacher's sample"], IMAGE),
        (1, top, h, ["student v_{θ}", millions(n("parameters, student"))], IMAGE),
        (2, top, h, ["x̂_{0}", n("x0_hat"), "x_{t} − t·v"], IMAGE),
        (3, top, h, ["x̂_{t̂}", n("x0_hat"), "fresh noise"], IMAGE),
        (3, low, h, ["x_{t̂}", n("x0"), "fresh noise"], IMAGE),
        (
            4,
            top,
            tall,
            ["frozen teacher", "the student", "before training;", "sees c, y and t̂"],
            FROZEN,
        ),
        (5, top, h, ["f", features, f"of blocks {taps}"], IMAGE),
        (5, low, h, ["r", features, f"of blocks {taps}"], IMAGE),
        (6, top, tall, ["heads D", millions(n("parameters, heads")), "one per block"], HEADS),
        (7, top, h, ["D(f)", n("logits"), "L_{G} = −mean D(f)"], HEADS),
        (7, low, h, ["D(r)", n("logits"), "L_{D}, hinge"], HEADS),
    ):
        s.box(x[column], y, w, height, lines, colour)
    for a in range(7):
        s.arrow((x[a] + w, top + h / 2), (x[a + 1], top + h / 2))
    for a, b in ((0, 3), (3, 4), (4, 5), (5, 6), (6, 7)):
        s.arrow((x[a] + w, low + h / 2), (x[b], low + h / 2))
    s.arrow((x[0] + w / 2, low), (x[0] + w / 2, top + h))
    s.text(x[0] + w / 2 + 12, mid, "1  noise ε to t", 19, colour=QUIET, anchor="l")
    for a, number in ((1, "2"), (3, "3"), (4, "4"), (6, "5, 6")):
        s.text(x[a] - 23, top + h / 2 - 20, number, 19, colour=QUIET)
    between = (x[0] + w + x[3]) / 2
    s.text(between, low + h / 2 + 22, "3  the same t̂ ~ logit-normal(m, s)", 19, colour=QUIET)
    s.arrow((x[7] + w / 2, top + h), (x[7] + w / 2, low))
    s.text(x[7] + w / 2 - 12, mid, "sg f", 19, colour=QUIET, anchor="r")
    gap = top + h + 34
    s.box(x[2] - 30, gap, w + 60, 74, [f"+ {n('weight'):g} · smooth L1", "x̂_{0} to x_{0}; ours"])
    s.arrow((x[2] + w / 2, top + h), (x[2] + w / 2, gap))
    s.arrow((x[0] + w, low + 26), (x[2] + w / 2, low + 26), (x[2] + w / 2, gap + 74))
    up, down = top - 44, low + h + 44
    ends = (x[7] + w / 2, top), (x[7] + w / 2, up), (x[1] + w / 2, up), (x[1] + w / 2, top)
    s.arrow(*ends, colour=GRADIENT_G, width=4)
    told = "gradient of L_{G}: through heads and teacher, which keep none of it, to the student"
    s.text((x[1] + x[7] + w) / 2, up - 22, told, 21, colour=GRADIENT_G)
    ends = (x[7] + w / 2, low + h), (x[7] + w / 2, down), (x[6] + w / 2, down)
    s.arrow(*ends, (x[6] + w / 2, low + h), colour=GRADIENT_D, width=4)
    told = "gradient of L_{D}: to the heads alone"
    s.text(x[6] + w / 2 - 14, down, told, 21, colour=GRADIENT_D, anchor="r")


def draw_network(s, n):
    """MMDiT from its inputs to v, with the taps."""
    top, w, h, text, image, cond = 760, 168, 84, 270, 452, 634
    s.heading(40, 700, "The network: MMDiT")
    streams = (
        (text, TEXT, ["c", n("c")], ["Linear", n("context_embedder out")]),
        (image, IMAGE, ["x_{t}", n("x0")], ["patches + place", n("x_embedder out")]),
        (cond, CONDITION, ["t, y", f"{n('t')}, {n('y')}"], ["two MLPs, sum", n("t_embedder out")]),
    )
    for x, colour, given, embedded in streams:
        s.box(x - w / 2, top, w, h, given, colour)
        s.arrow((x, top + h), (x, top + 124))
        s.box(x - w / 2, top + 124, w, h, embedded, colour)
    first, step, deep = top + 268, 128, 80
    last = first + step * (n("depth") - 1)
    left, right = text - w / 2, image + w / 2
    bus = cond
    s.arrow((bus, top + 124 + h), (bus, last + 156), (right, last + 156), colour=CONDITION[1])
    for i in range(n("depth")):
        y = first + step * i
        for x, colour in ((text, TEXT), (image, IMAGE)):
            s.arrow((x, y - (step - deep if i else 60)), (x, y), colour=colour[1])
        s.box(left, y, right - left, deep, [f"joint block {i}"])
        s.arrow((bus, y + deep / 2), (right, y + deep / 2), colour=CONDITION[1])
        if i in n("taps"):
            s.arrow((image, y + deep + 24), (150, y + deep + 24), colour=HEADS[1])
            s.box(40, y + deep - 4, 110, 56, ["head"], HEADS)
    shapes = n("joint_blocks.0 out")
    s.text(text - 12, first + deep + 22, shapes[0], 17, colour=TEXT[1], anchor="r")
    s.text(image + 12, first + deep + 22, shapes[1], 17, colour=IMAGE[1], anchor="l")
    s.arrow((image, last + deep), (image, last + 116), colour=IMAGE[1])
    s.box(left, last + 116, right - left, h, ["modulate, Linear", n("final_layer out")], IMAGE)
    s.arrow((image, last + 200), (image, last + 236))
    s.box(image - w / 2, last + 236, w, h, ["v", n(" out")], IMAGE)
    s.text(text, last + 236 + h / 2, "unpatchify", 19, colour=QUIET)
    s.arrow(
        (text + 58, last + 236 + h / 2), (image - w / 2, last + 236 + h / 2), head=False, width=1
    )


def draw_block(s, n):
    """Both streams of a joint block, and where they meet."""
    top, w, text, image = 760, 290, 995, 1605
    mid = (text + image) / 2
    s.heading(800, 700, "A joint block", "two streams, one attention")
    block = "joint_blocks.0."
    shapes, chunks = n("joint_blocks.0 in"), n("chunks")
    s.box(mid - 120, top, 240, 72, ["t and y", shapes[2]], CONDITION)
    s.arrow((mid, top + 72), (mid, top + 110), colour=CONDITION[1])
    made = n(block + "x_block.adaLN_modulation out")
    vectors = [f"adaLN: {chunks} vectors", f"for each stream, {made}", "SiLU, Linear"]
    s.box(mid - 120, top + 110, 240, 112, vectors, CONDITION)
    rows = dict(norm=110, qkv=224, attention=344, proj=462, add=586, norm2=636, mlp=744, add2=868)
    y = {name: top + offset for name, offset in rows.items()}
    for x, name, colour, shape, side in (
        (text, "context_block.", TEXT, shapes[0], -1),
        (image, "x_block.", IMAGE, shapes[1], 1),
    ):
        own = f"{block}{name}"
        title = "text tokens" if side < 0 else "image tokens"
        s.box(x - w / 2, top, w, 72, [title, shape], colour)
        normed = ["LayerNorm", "· (1 + scale) + shift"]
        s.box(x - w / 2, y["norm"], w, 80, normed, colour)
        qkv = "RMSNorm of q and k" if n("qk_norm") else "Linear"
        s.box(x - w / 2, y["qkv"], w, 86, [f"q, k, v  {n(own + 'attn.qkv out')}", qkv], colour)
        s.box(x - w / 2, y["proj"], w, 80, ["Linear · gate", n(own + "attn.proj out")], colour)
        s.box(x - w / 2, y["norm2"], w, 74, normed, colour)
        inner = f"{n(own + 'mlp.fc1 out')} inside"
        s.box(x - w / 2, y["mlp"], w, 80, ["MLP · gate", inner], colour)
        for a, b in (
            (top + 72, y["norm"]),
            (y["norm"] + 80, y["qkv"]),
            (y["qkv"] + 86, y["attention"]),
            (y["attention"] + 84, y["proj"]),
            (y["proj"] + 80, y["add"] - 16),
            (y["add"] + 16, y["norm2"]),
            (y["norm2"] + 74, y["mlp"]),
            (y["mlp"] + 80, y["add2"] - 16),
            (y["add2"] + 16, y["add2"] + 56),
        ):
            s.arrow((x, a), (x, b), colour=colour[1])
        out = x + side * (w / 2 + 34)
        for a, b in ((top + 36, y["add"]), (y["add"], y["add2"])):
            start = x + side * (w / 2 if a == top + 36 else 16)
            s.arrow((start, a), (out, a), (out, b), (x + side * 16, b), colour=colour[1])
        for b in (y["add"], y["add2"]):
            s.sign(x, b, "+", colour[1])
        inside = x - side * w / 2
        bus = mid + side * 90
        s.arrow((mid - 120 if side < 0 else mid + 120, y["norm"] + 40), (inside, y["norm"] + 40),
                colour=CONDITION[1])  # fmt: skip
        for name in ("proj", "norm2", "mlp"):
            s.arrow((bus, y[name] + 40), (inside, y[name] + 40), colour=CONDITION[1])
        s.arrow(
            (bus, y["attention"] + 84 + 4), (bus, y["mlp"] + 40), colour=CONDITION[1], head=False
        )
        s.arrow((bus, y["norm"] + 112), (bus, y["attention"] - 4), colour=CONDITION[1], head=False)
    joint = [f"one attention over {shapes[0].split('×')[1]} + {shapes[1].split('×')[1]} tokens",
             f"q, k, v  {n('attention in')} each"]  # fmt: skip
    s.box(text - w / 2 - 10, y["attention"], image - text + w + 20, 84, joint)
    told = f"the last block's text gives q, k and v alone: {n('last_chunks')} vectors"
    s.text(mid, y["add2"] + 34, told, 19, colour=QUIET)


def draw_head(s, n):
    """One head, from a block's tokens to logits."""
    top, w, h = 1866, 224, 108
    x = [40 + 306 * i for i in range(6)]
    s.heading(
        40,
        1806,
        "A head",
        f"one for each of the {len(n('taps'))} tapped blocks of the frozen teacher",
    )
    own = "heads.heads.0."
    size = lambda name: "×".join(map(str, n(f"kernel {name}")))  # noqa: E731
    for i, (lines, colour) in enumerate((
        (["tokens", n("heads.heads.0 in")[0], "LayerNorm"], FROZEN),
        ([f"conv {size('reduce')}", n(own + "reduce out"), "norm, leaky ReLU"], HEADS),
        ([f"conv {size('conv')}", n(own + "conv out"), "norm, leaky ReLU"], HEADS),
        ([f"conv {size('features')}", n(own + "features out")], HEADS),
        (["inner product", "at every position"], HEADS),
        (["logits", n("heads.heads.0 out"), "> 0 real, < 0 fake"], HEADS),
    )):  # fmt: skip
        s.box(x[i], top, w, h, lines, colour)
        if i:
            s.arrow((x[i - 1] + w, top + h / 2), (x[i], top + h / 2))
    join = (x[2] + w + x[3]) / 2 - 2
    s.arrow(
        (x[1] + w + 12, top + h / 2),
        (x[1] + w + 12, top + h + 30),
        (join, top + h + 30),
        (join, top + h / 2 + 8),
        colour=HEADS[1],
        head=False,
    )
    s.sign(join, top + h / 2, "+", HEADS[1])
    low = top + h + 56
    lines = ["t̂, y", f"{n('heads.embed_t out')}, sum of two"]
    s.box(x[3], low, w, 84, lines, CONDITION)
    s.box(x[4], low, w, 84, ["Linear", n(own + "condition out")], CONDITION)
    s.arrow((x[3] + w, low + 42), (x[4], low + 42), colour=CONDITION[1])
    s.arrow((x[4] + w / 2, low), (x[4] + w / 2, top + h), colour=CONDITION[1])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare the numbers, draw nothing")
    args = parser.parse_args()
    sheet, numbers, told = Sheet(), read_code(), {}

    def n(name):
        """A number of the code, which is thereby one of the picture."""
        told[name] = numbers[name]
        return numbers[name]

    for part in (draw_batch, draw_network, draw_block, draw_head):
        part(sheet, n)
    if args.check:
        with Image.open(PICTURE) as old:
            same = json.loads(old.text.get("numbers", "{}")) == told
        if not same:
            print("docs/architecture.png is not of this code: run python docs/architecture.py")
        return 0 if same else 1
    image = sheet.image.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)
    info = PngImagePlugin.PngInfo()
    info.add_itxt("numbers", json.dumps(told))
    image.quantize(256, dither=Image.Dither.NONE).save(PICTURE, pnginfo=info, optimize=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
