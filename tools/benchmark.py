"""Speed and memory, as ratios measured in one run on one machine; the comparisons take turns.

    python -m tools.benchmark            prints the table
    python -m tools.benchmark --write    and keeps it in docs/benchmark.md
    python -m tools.benchmark --gpu      SD3's real sizes with random weights, on one GPU

The network is compared with diffusers' SD3Transformer2DModel (pip install diffusers).
"""

import copy
import itertools
import math
import pickle
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
from PIL import Image

import data
import ladd
import sample
from discriminator import Discriminator
from lib.cifar10 import NAMES
from lib.errors import Parser
from lib.files import write_text
from lib.machine import arithmetic, autocast, device_of, facts, keep_memory
from lib.memory import peak_bytes
from lib.optim import make_optimizers, step_all, update_ema
from lib.samples import Joined
from lib.states import Saver
from lib.streams import normal
from mmdit import MMDiT
from tools.plan import plan, random_batch

ROOT = Path(__file__).resolve().parent.parent


# ---------------------------------------------------------------------------------------------
# What is compared: our network and diffusers', and the parts of a run of LADD
# ---------------------------------------------------------------------------------------------


def rounds(contestants, n):
    """{name: function} -> {name: median seconds of n calls}. All run one after the other in every
    round, so that a machine whose speed drifts treats them alike; three rounds warm up."""
    times = {name: [] for name in contestants}
    for i in range(n + 3):
        for name, call in contestants.items():
            start = time.perf_counter()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if i >= 3:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def settings(preset, *flags):
    return ladd.parse(["--preset", preset, "--data", "shapes", *flags])[0]


def awake(model):
    """adaLN-Zero starts at zero, and so would every gradient: small random weights instead."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return model


def theirs(s):
    """diffusers' network of the same sizes."""
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=s.sizes[0][0], patch_size=s.patch, in_channels=s.channels,
        out_channels=s.channels, num_layers=s.depth, num_attention_heads=s.heads,
        attention_head_dim=s.width // s.heads, caption_projection_dim=s.width,
        joint_attention_dim=s.text_dim, pooled_projection_dim=s.pooled_dim or s.text_dim,
        pos_embed_max_size=s.pos_size, qk_norm="rms_norm" if s.qk_norm else None,
    )  # fmt: skip


def call_theirs(model, x, t, context, pooled):
    return model(x, context, pooled, 1000 * t, return_dict=False)


class Distillation:
    """Iterations of LADD on always the same batch, without data and logs."""

    def __init__(self, s, device):
        self.s, self.device = s, device
        with torch.device(device):
            student, heads = awake(MMDiT(**s.model())), Discriminator(**s.head_sizes())
        self.teacher = copy.deepcopy(student).to(arithmetic(device, s.precision))
        self.teacher.eval().requires_grad_(False)
        ema = copy.deepcopy(student).requires_grad_(False)
        self.networks = dict(student=student, ema=ema, heads=heads)
        self.optimizers = make_optimizers(student, 1e-4, 0.0, s.beta1)
        self.heads_optimizers = make_optimizers(heads, 1e-4, 0.0, s.beta1)
        self.batch = random_batch(s, s.batch, device)

    @torch.no_grad()
    def forward(self):
        """The unit: one forward of the whole network."""
        with autocast(self.device, self.s.precision):
            self.teacher(self.batch.x0, self.batch.t, *self.batch.text)

    def iteration(self):
        s, student, ema, heads = self.s, *self.networks.values()
        with autocast(self.device, s.precision):
            x0_hat, fake = ladd.make_fakes(student, self.teacher, self.batch, s)
            loss_d, *_ = ladd.heads_loss(self.teacher, heads, fake, self.batch, s)
        loss_d.backward()
        step_all((self.heads_optimizers, heads, math.inf, 1.0))
        with autocast(self.device, s.precision):
            loss_g, distill = ladd.student_losses(heads, x0_hat, fake, self.batch, s)
        (loss_g + s.distill_weight * distill).backward()
        step_all((self.optimizers, student, s.clip, 1.0))
        update_ema(ema, student, s.student_ema, step=10_000)

    def save(self, folder):
        """A state, as a run saves it every so many updates."""
        saver = Saver(Path(folder), "distillation", self.device, divided=False)
        saver.save(1, self.networks, self.optimizers + self.heads_optimizers, {}, wait=True)


# ---------------------------------------------------------------------------------------------
# What is measured
# ---------------------------------------------------------------------------------------------


def training_step(preset, precision, device, n):
    """A teacher's step: seconds of diffusers' network, and of ours."""
    s = settings(preset)
    b = random_batch(s, 32, device)

    def step(model, forward):
        optimizer = torch.optim.AdamW(awake(model).to(device).parameters(), 1e-4, fused=True)

        def call():
            with autocast(device, precision):
                v = forward(model, b.x0, b.t, *b.text)[0]
            v.float().square().mean().backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

        return call

    ours = step(MMDiT(**s.model()), MMDiT.__call__)
    return rounds(dict(theirs=step(theirs(s), call_theirs), ours=ours), n).values()


def sampling(device, n):
    """64 images in 4 Euler steps without guidance: diffusers' time over ours."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    s = settings("nano")
    ours, other = awake(MMDiT(**s.model())), awake(theirs(s)).to(device).eval()
    generator = sample.Generator(ours.to(device).eval(), s, "teacher", device)
    captions = ["a large red circle on a striped blue background"] * 64
    text = generator.text(captions)

    def mine():
        generator.sample(captions, steps=4, cfg=1.0)

    @torch.no_grad()
    def diffusers():
        scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
        scheduler.set_timesteps(4)
        x = sample.noise_of(0, "sampling", range(64), (s.channels, *s.size), device=device)
        for t in scheduler.timesteps:
            with autocast(device, "auto"):
                v = call_theirs(other, x, t.to(device).expand(64) / 1000, *text)[0]
            x = scheduler.step(v.float(), t, x).prev_sample
        return x.cpu()

    seconds = rounds(dict(ours=mine, theirs=diffusers), n)
    return seconds["theirs"] / seconds["ours"]


def memory(s):
    """The most memory that two iterations of LADD take on the CPU, over the plan's."""

    def work():
        d = Distillation(s, torch.device("cpu"))
        d.iteration()
        d.iteration()

    return peak_bytes(work) / plan(s)["ways"][False]["total"]


def reading(folder, n):
    """Seconds that a batch of 64 takes, per data set; what must be files is made in `folder`."""
    sizes = [(16, 16)]
    shapes = data.load("shapes", sizes)
    images, caption = shapes.batch(np.arange(256))
    for i, (image, row) in enumerate(zip(images, caption.tolist(), strict=True)):
        path = folder / "images" / shapes.captions[row].split()[3] / f"{i}.png"
        path.parent.mkdir(exist_ok=True, parents=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    random, batches = np.random.default_rng(0), folder / "cifar-10-batches-py"
    batches.mkdir()
    for name in NAMES:  # noise in files of CIFAR-10's size and format
        pixels = random.integers(0, 256, (10_000, 3072), np.uint8)
        labels = random.integers(0, 10, 10_000).tolist()
        (batches / name).write_bytes(pickle.dumps({b"data": pixels, b"labels": labels}))
    sets = {"shapes": shapes, "a folder of images": data.load(str(folder / "images"), sizes)}
    sets["CIFAR-10"] = data.load("cifar10", sizes, data_dir=folder)
    index = itertools.count()

    def batch(dataset):
        first = 64 * next(index)
        dataset.batch(np.arange(first, first + 64))

    return rounds({name: lambda d=d: batch(d) for name, d in sets.items()}, n)


def drawing(preset, n):
    """{stage: seconds} that the host needs for an update without the networks: to draw its batch,
    of images and samples in memory. Noise, which a GPU makes by itself, is of two numbers an image
    here: so it takes as many calls, and no computing."""

    def asked_for(seed, stream, rows, shape, device):
        return normal(seed, stream, rows, (2,), device).mean(1).view(-1, 1, 1, 1).expand(-1, *shape)

    s, step = settings(preset), itertools.count()
    images, caption = torch.zeros(8, 512, s.channels, *s.size), torch.arange(8 * 512)
    own = data.ImageSet("images", (images.flatten(0, 1).byte(), caption))
    made = data.ImageSet("synthetic", (Joined(list(images.half())), caption), flip=False)
    text = data.HashedText(s.text_dim, s.text_length)
    words = torch.zeros(len(caption), s.text_length, dtype=torch.int64)
    run = SimpleNamespace(settings=s, device=torch.device("cpu"), text=text, dataset=own)
    samples = ladd.Samples(made, words, 0)
    calls = dict(teacher=lambda: ladd.draw_teacher_batch(run, next(step), words))
    calls["distillation"] = lambda: ladd.draw_batch(run, samples, next(step))
    with mock.patch("ladd.normal", asked_for), mock.patch("sample.normal", asked_for):
        return rounds(calls, n)


def start_up(n):
    """Seconds to import each file and to print the help, over those of `import torch` alone."""
    modules = ("torch", "mmdit", "discriminator", "sample", "data", "ladd")
    commands = {f"import {m}": ["-c", f"import {m}"] for m in modules}
    commands["ladd.py --help"] = ["ladd.py", "--help"]

    def call(words):
        quiet = dict(cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
        subprocess.run([sys.executable, *words], **quiet)

    seconds = rounds({name: lambda w=words: call(w) for name, words in commands.items()}, n)
    alone = seconds.pop("import torch")
    return {name: value / alone for name, value in seconds.items()}


# ---------------------------------------------------------------------------------------------
# The table: what is measured, the figure, the goal
# ---------------------------------------------------------------------------------------------


def measure(n):
    device, step = device_of("auto"), None
    for preset, turns in (("nano", n), ("tiny", min(n, 3))):
        for precision in ("bf16", "fp32"):
            other, ours = training_step(preset, precision, device, turns)
            step = step or ours  # of nano in bf16
            what = f"training step, {preset}, {precision}: diffusers' time over ours"
            yield what, f"{other / ours:.2f}", "≥ 1.5" if device.type == "cpu" else "≥ 1.15"
    d = Distillation(settings("nano"), device)
    with tempfile.TemporaryDirectory() as folder:
        calls = dict(unit=d.forward, iteration=d.iteration, save=lambda: d.save(folder))
        seconds = rounds(calls, n)
    units = seconds["iteration"] / seconds["unit"]
    yield "LADD iteration in forwards of the network", f"{units:.2f}", "≤ 6.6"
    used = memory(settings("nano", "--precision", "fp32"))
    yield "its peak memory over the plan's, float32 on a CPU", f"{used:.2f}", "0.9 to 1.1"
    share = seconds["save"] / (seconds["iteration"] * d.s.save_every)
    yield "saved states, share of the time", f"{share:.2%}", "< 2 %"
    yield "64 images in 4 steps: diffusers' time over ours", f"{sampling(device, n):.2f}", "≥ 1.3"
    with tempfile.TemporaryDirectory() as folder:
        for name, seconds in reading(Path(folder), n).items():
            yield f"a batch of {name} over a training step", f"{seconds / step:.1%}", "≤ 5 %"
    for stage, seconds in drawing("tiny", n).items():
        yield f"{stage}, tiny: the host's time per update, ms", f"{1000 * seconds:.1f}", "≤ 3"
    for name, ratio in start_up(3).items():
        yield f"`{name}` over `import torch`", f"{ratio:.2f}", "< 1.5"


def measure_iteration(preset, batch):
    """On one GPU, with random weights."""
    device, s = torch.device("cuda"), settings(preset, "--batch", f"{batch}")
    a, b = torch.randn(2, 8192, 8192, device=device, dtype=torch.bfloat16)
    rate = 2 * 8192**3 / rounds(dict(product=lambda: a @ b), 20)["product"]
    yield "bf16 matrix product of 8192³, TFLOP/s", f"{rate / 1e12:.0f}", "–"
    torch.cuda.reset_peak_memory_stats()
    d, way = Distillation(s, device), plan(s)["ways"][False]
    forward = way["flops"] / way["forwards"]
    seconds = rounds(dict(forward=d.forward, iteration=d.iteration), 5)
    used = torch.cuda.max_memory_allocated() / way["total"]
    speed = way["flops"] / seconds["iteration"]
    what = f"{preset}, LADD iteration of {batch} images at {s.size[0]}²"
    yield f"{what}, TFLOP/s", f"{speed / 1e12:.0f}", "–"
    yield f"{what}, share of the matrix rate", f"{speed / rate:.2f}", "≥ 0.45"
    share = forward / seconds["forward"] / rate
    yield "the teacher's forward alone, share", f"{share:.2f}", "≥ 0.6"
    yield "peak memory over the plan's", f"{used:.2f}", "0.9 to 1.1"
    x, t, *text = (v.bfloat16() for v in (d.batch.x0, d.batch.t, *d.batch.text))
    del d
    other = awake(theirs(s)).to(device, torch.bfloat16).eval()
    with torch.no_grad():
        seconds = rounds(dict(other=lambda: call_theirs(other, x, t, *text)), 5)
    share = forward / seconds["other"] / rate
    yield "diffusers' forward, share", f"{share:.2f}", "not above ours"


def measure_sample(preset):
    """On one GPU, with random weights."""
    device, s = torch.device("cuda"), settings(preset)
    with device:
        model = awake(MMDiT(**s.model()).bfloat16()).eval()
    b = random_batch(s, 1, device)
    torch.cuda.reset_peak_memory_stats()

    @torch.no_grad()
    def draw():
        with autocast(device, "bf16"):
            list(sample.renoise(model, b.x0, s.levels, b.text, lambda step: b.noise))

    seconds = rounds(dict(draw=draw), 3)["draw"]
    used = torch.cuda.max_memory_allocated() / 1e9
    yield f"{preset}, one sample in 4 steps at {s.size[0]}², seconds", f"{seconds:.2f}", "–"
    yield "its memory, GB", f"{used:.1f}", "one GPU's"


def main(argv=None):
    parser = Parser("tools/benchmark.py", "Speed and memory, beside diffusers'.")
    parser.add_argument("--write", action="store_true", help="keep the output in docs/benchmark.md")
    parser.add_argument("--rounds", type=int, default=11, help="calls of which the median is taken")
    parser.add_argument("--gpu", action="store_true", help="measure the real sizes instead")
    args = parser.parse_args(argv)
    if args.gpu and not torch.cuda.is_available():
        parser.error("--gpu: no GPU is here")
    keep_memory()  # as ladd.py does; it serves all contestants
    lines = ["| what | measured | goal |", "|---|---|---|"]
    print(*lines, sep="\n", flush=True)
    rows = measure(args.rounds)
    if args.gpu:
        rows = itertools.chain(measure_iteration("sd3-2b", 4), measure_sample("sd3-8b"))
    for row in rows:
        lines.append("| " + " | ".join(row) + " |")
        print(lines[-1], flush=True)
    where = facts()
    dirty = " with uncommitted changes" if where["dirty"] else ""
    told = f"\n`python -m tools.benchmark --rounds {args.rounds}`, commit {where['commit']}{dirty}"
    told += f", torch {where['torch']}, {where['gpu'] or where['processor']}, "
    told += f"{where['threads']} threads."
    print(told)
    if args.write:
        text = ["# Benchmark\n", "Ratios of one run on one machine.\n", *lines, f"{told}\n"]
        write_text("\n".join(text), ROOT / "docs" / "benchmark.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
