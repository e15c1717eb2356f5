"""docs/architecture.png: one batch of LADD, the network, its joint block, a head.

Every shape and number is read off a pass of `nano`. tools/pictures.py draws it.
"""

from itertools import pairwise

import torch

import ladd
from tools.plan import meta_networks, random_batch
from tools.train import given_settings

# Fill and edge of a box; arrows have the colour of the edge.
BLUE, GREEN, YELLOW = ("#dbe9f8", "#2f6fb4"), ("#dcf0e1", "#2e8653"), ("#fcefcb", "#b5840f")
GREY, VIOLET, RED = ("#e9edf1", "#7c8896"), ("#ebe1f7", "#7a4fb5"), ("white", "#d1495b")
WHITE, PLAIN = ("white", "#1f2a37"), ("white", "white")


def shape_of(tensor):
    return "×".join(map(str, tensor.shape))


def read_code():
    """Follows a batch of nano through the code. -> {what: number, or words}"""
    s = given_settings(["--preset", "nano", "--device", "cpu"])[0]
    student, teacher, heads, _ = meta_networks(s)
    b = random_batch(s, s.batch, "meta")
    first, last = student.joint_blocks[0].x_block, student.joint_blocks[-1].context_block
    n = dict(x0=shape_of(b.x0), t=shape_of(b.t), c=shape_of(b.text.context))
    n |= dict(y=shape_of(b.text.pooled), depth=s.depth)
    n |= dict(taps=list(s.tapped), levels=len(s.levels), weight=s.distill_weight, qk_norm=s.qk_norm)
    n |= dict(vectors=first.chunks, last_vectors=last.chunks, attention_heads=first.attn.heads)
    n["kernel"] = "×".join(map(str, heads.heads[0].conv.kernel_size))
    names = {part: name or "logits" for m in (student, heads) for name, part in m.named_modules()}

    def note(module, given, made):
        if torch.is_tensor(made):
            n[names[module]] = shape_of(made)

    for module in names:
        module.register_forward_hook(note)
    _, real, fake = ladd.features_of_both(student, teacher, b, s)
    loss_d, *_ = ladd.heads_loss(heads, real, fake, b, s)
    loss_g, _ = ladd.student_losses(heads, real, b.paired, fake, b, s)
    networks = dict(student=student, teacher=teacher, heads=heads)
    n |= {name: sum(p.numel() for p in network.parameters()) for name, network in networks.items()}
    for loss, value in (("L_D", loss_d), ("L_G", loss_g)):
        value.backward(retain_graph=True)
        n[loss] = []  # who receives its gradient
        for name, network in networks.items():
            if any(p.grad is not None for p in network.parameters()):
                n[loss].append(name)
            network.zero_grad()
    return n


class Diagram:
    """A picture in units of a column and a row; rows go downwards."""

    def __init__(self, columns, rows):
        from matplotlib.figure import Figure  # optional

        self.figure = Figure(figsize=(2.3 * columns, 1.1 * rows), dpi=100)
        self.axes = self.figure.add_axes((0, 0, 1, 1), xlim=(0, columns), ylim=(rows, 0))
        self.axes.axis("off")

    def heading(self, x, y, text):
        self.axes.text(x, y, text, fontsize=20, va="center")

    def box(self, x, y, colour, text):
        """A box around (x, y) with centred text. -> what `join` takes"""
        shape = dict(boxstyle="round,pad=0.5", facecolor=colour[0], edgecolor=colour[1])
        style = dict(fontsize=13, ha="center", va="center", linespacing=1.5, bbox=shape)
        return self.axes.text(x, y, text, **style)

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


def draw_batch(d, n):
    """The path of one batch; the numbers are those of ladd.py's box."""
    d.heading(0.1, 0.4, "One batch of LADD")
    x0, features = n["x0"], f"{len(n['taps'])} × {n['x_embedder']}\nof blocks {n['taps']}"
    start = d.box(0.5, 3.8, BLUE, f"$x_0$\n{x0}\nteacher's samples")
    noised = d.box(0.5, 1.8, BLUE, f"1   $x_t$\n{x0}\nt of {n['levels']} levels")
    student = d.box(1.5, 1.8, BLUE, f"student $v_θ$\n{n['student'] / 1e6:.2f} M weights")
    guess = d.box(2.5, 1.8, BLUE, f"2   $\\hat x_0$\n{x0}\n$x_t - t\\,v$")
    fake = d.box(3.5, 1.8, BLUE, f"3   $\\hat x_0$ noised\n{x0}\nto $\\hat t$")
    real = d.box(3.5, 3.8, BLUE, f"3   $x_0$ noised\n{x0}\nto the same $\\hat t$")
    teacher = d.box(4.5, 2.8, GREY, "frozen teacher\nas the student\nwas at first")
    f = d.box(5.5, 1.8, BLUE, f"4   f\n{features}")
    r = d.box(5.5, 3.8, BLUE, f"4   r\n{features}")
    heads = d.box(6.5, 2.8, VIOLET, f"heads D\n{n['heads'] / 1e6:.2f} M weights")
    on_real = d.box(7.5, 3.8, VIOLET, f"5   D(r), D(sg f)\n{n['logits']}\n$L_D$: hinge")
    on_fake = d.box(7.5, 1.8, VIOLET, f"6   D(f)\n{n['logits']}\n$L_G$: −mean")
    beside = f"{n['weight']:g} · (LN f − LN r')²\nbeside $L_G$, ours; r' = r at t < 1"
    d.join(WHITE, start, noised, student, guess, fake, teacher, f, heads, on_fake)
    d.join(WHITE, start, real, teacher, r, heads, on_real)
    near = d.box(5.5, 2.8, WHITE, beside)
    d.join(WHITE, f, near)
    d.join(WHITE, r, near)
    d.join(RED, on_fake, student, bend="bar,fraction=0.06")
    d.join(RED, on_real, heads, bend="arc3,rad=-0.5")
    to = {loss: f"gradient of ${loss}$: to the {' and '.join(n[loss])}" for loss in ("L_D", "L_G")}
    d.box(4.5, 0.97, RED, f"{to['L_G']} alone, through heads and teacher")
    d.box(6.5, 4.65, RED, f"{to['L_D']} alone")


def draw_network(d, n):
    """MMDiT from its inputs to v, with the taps."""
    d.heading(0.1, 5.3, "The network: MMDiT")
    c = d.box(0.9, 6.2, GREEN, f"c   {n['c']}\nLinear\n{n['context_embedder']}")
    x = d.box(1.85, 6.2, BLUE, f"$x_t$   {n['x0']}\npatches, place\n{n['x_embedder']}")
    ty = d.box(2.85, 6.2, YELLOW, f"t {n['t']}, y {n['y']}\ntwo MLPs, sum\n{n['t_embedder']}")
    texts = [f"joint block {i}\ntext and image tokens" for i in range(n["depth"])]
    texts += [f"image tokens alone\nmodulate, Linear\n{n['final_layer']}", f"v\n{n['x0']}"]
    column = d.boxes(1.4, 7.4, 0, 0.95, WHITE, *texts)
    d.join(WHITE, c, column[0])
    d.join(WHITE, x, column[0])
    for i, box in enumerate(column[:-1]):
        d.join(YELLOW, ty, box, bend="angle,angleA=90,angleB=0,rad=0")
        if i in n["taps"]:
            d.join(VIOLET, box, d.box(0.4, 7.4 + 0.95 * i, VIOLET, "head"))


def draw_block(d, n):
    """Both streams of a joint block, and where they meet."""
    d.heading(3.7, 5.3, "A joint block: two streams, one attention")
    block, modulated = "joint_blocks.0.", "LayerNorm\n· (1 + scale) + shift"
    adaln = f"adaLN of each stream\n{n['vectors']} vectors: {n[block + 'x_block.adaLN_modulation']}"
    _, adaln = d.boxes(5.75, 6.2, 0, 1.1, YELLOW, f"t and y\n{n['t_embedder']}", adaln)
    again = d.box(5.75, 11.5, YELLOW, "from the same adaLN")
    joint = d.box(5.75, 9.5, WHITE, f"one attention over both\n{n['attention_heads']} heads")
    norm = "RMSNorm of q and k" if n["qk_norm"] else "no norm"
    for x, colour, title, stream, embedder in (
        (4.3, GREEN, "text", f"{block}context_block.", "context_embedder"),
        (7.2, BLUE, "image", f"{block}x_block.", "x_embedder"),
    ):
        tokens = f"{title} tokens\n{n[embedder]}"
        qkv = f"q, k, v   {n[stream + 'attn.qkv']}\n{norm}"
        attended = f"tokens + gate · Linear\n{n[stream + 'attn.proj']}"
        mlp = f"tokens + gate · MLP\n{n[stream + 'mlp.fc1']} inside"
        above = d.boxes(x, 6.2, 0, 1.1, colour, tokens, modulated, qkv)
        below = d.boxes(x, 10.5, 0, 1, colour, attended, modulated, mlp)
        d.join(colour, above[2], joint, below[0])
        d.join(YELLOW, adaln, above[1])
        for box in below:
            d.join(YELLOW, again, box)
    told = f"the last block's text gives q, k, v alone: {n['last_vectors']} vectors"
    d.box(5.75, 13.1, PLAIN, told)


def draw_head(d, n):
    """One head, from a block's tokens to logits."""
    d.heading(0.1, 13.7, f"A head, one for each of the {len(n['taps'])} tapped blocks")
    row = d.boxes(
        0.7, 14.6, 1.32, 0, VIOLET, f"teacher's tokens\n{n['x_embedder']}\nLayerNorm",
        f"conv 1×1, norm\nleaky ReLU\n{n['heads.0.reduce']}",
        f"+ conv {n['kernel']}, norm\nleaky ReLU\n{n['heads.0.conv']}",
        f"conv 1×1\n{n['heads.0.project']}", "inner product\nat every position",
        f"{n['heads.0']} logits\n> 0 real, < 0 fake",
    )  # fmt: skip
    given = f"$\\hat t$ and y\n{n['embed_t']}, sum of two"
    _, linear = d.boxes(4.66, 15.6, 1.32, 0, YELLOW, given, f"Linear\n{n['heads.0.condition']}")
    d.join(YELLOW, linear, row[4])


def draw_architecture(n):
    """The whole picture. n: of `read_code`"""
    diagram = Diagram(8, 16.1)
    for draw in (draw_batch, draw_network, draw_block, draw_head):
        draw(diagram, n)
    return diagram.figure
