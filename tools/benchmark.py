"""Speed and memory, as ratios measured in one run on one machine; the comparisons take turns.

    python -m tools.benchmark > docs/benchmark.md
    python -m tools.benchmark --gpu      tiny and SD3's real sizes with random weights, on one GPU

The network is compared with diffusers' SD3Transformer2DModel (pip install diffusers).
"""

import copy
import dataclasses
import itertools
import math
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch

import data
import ladd
import sample
from discriminator import Discriminator
from lib.errors import Parser, reason
from lib.machine import arithmetic, autocast, device_of, facts, keep_memory, made_on
from lib.optim import make_optimizers, step_all, update_ema
from lib.run import compile_blocks
from lib.samples import Joined
from mmdit import MMDiT
from tools.plan import in_bytes, plan, random_batch
from tools.train import given_settings

ROOT = Path(__file__).resolve().parent.parent


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
    return given_settings(["--preset", preset, "--data", "shapes", *flags])[0]


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
        out_channels=s.channels, num_layers=s.depth, num_attention_heads=s.attention_heads,
        attention_head_dim=s.width // s.attention_heads, caption_projection_dim=s.width,
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
        self.optimizers = make_optimizers(student, 1e-4, s.beta1)
        self.heads_optimizers = make_optimizers(heads, 1e-4, s.beta1)
        self.batch = random_batch(s, s.batch, device)
        for network in (student, self.teacher, heads) if s.compile == "yes" else ():
            compile_blocks(network)

    @torch.no_grad()
    def forward(self):
        """One forward of the whole network."""
        with autocast(self.device, self.s.precision):
            self.teacher(self.batch.x0, self.batch.t, *self.batch.text)

    def iteration(self):
        s, student, ema, heads = self.s, *self.networks.values()
        with autocast(self.device, s.precision):
            x0_hat, real, fake = ladd.features_of_both(student, self.teacher, self.batch, s)
            loss_d, *_ = ladd.heads_loss(heads, real, fake, self.batch, s)
        loss_d.backward()
        step_all((self.heads_optimizers, heads, math.inf, 1.0))
        with autocast(self.device, s.precision):
            targets, weights = ladd.held_to(ema, self.teacher, x0_hat, real, self.batch, s)
            loss_g, distill = ladd.student_losses(heads, targets, weights, fake, self.batch, s)
        (loss_g + s.distill_weight * distill).backward()
        step_all((self.optimizers, student, s.clip, 1.0))
        update_ema(ema, student, s.student_ema, step=10_000)


def training_step(preset, precision, device, n):
    """A teacher's step beside that of diffusers' network: a row."""
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
    seconds = rounds(dict(theirs=step(theirs(s), call_theirs), ours=ours), n)
    what = f"training step, {preset}, {precision}: diffusers' time over ours"
    ratio = seconds["theirs"] / seconds["ours"]
    yield what, f"{ratio:.2f}", "≥ 1.5" if device.type == "cpu" else "≥ 1.15"


def sampling(device, n):
    """64 images in 4 Euler steps without guidance: diffusers' time over ours."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    s = settings("nano")
    other = awake(theirs(s)).to(device).eval()
    generator = sample.Generator(awake(MMDiT(**s.model())).to(device).eval(), s, "teacher", device)
    captions = ["a large red circle on a striped blue background"] * 64
    text = generator.text_encoder(captions)

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

    ours = partial(generator.sample, captions, steps=4, cfg=1.0)
    seconds = rounds(dict(ours=ours, theirs=diffusers), n)
    return seconds["theirs"] / seconds["ours"]


def drawing(preset, n):
    """{stage: seconds} that the host needs for an update without the networks: to draw its batch.
    Images, noise and text features, which a GPU makes by itself, have a few numbers each here: as
    many calls, and hardly any computing."""
    s, step = settings(preset, "--size", "4", "--text-dim", "2"), itertools.count()
    images, caption = torch.zeros(8, 512, s.channels, *s.size), torch.arange(8 * 512)
    own = data.ImageSet("images", (images.flatten(0, 1).byte(), caption)).to("cpu")
    made = data.ImageSet("synthetic", (Joined(list(images.half())), caption), flip=False).to("cpu")
    text = data.HashedText(s.text_dim, s.text_length)
    token_ids = torch.zeros(len(caption), s.text_length, dtype=torch.int64)
    run = SimpleNamespace(settings=s, device=torch.device("cpu"), text_encoder=text, dataset=own)
    samples = ladd.Samples(made, token_ids, 0)
    calls = dict(teacher=lambda: ladd.draw_teacher_batch(run, next(step), token_ids))
    calls["distillation"] = lambda: ladd.draw_batch(run, samples, next(step))
    return rounds(calls, n)


def start_up(n):
    """Seconds to import each file and to print the help, over those of `import torch` alone."""
    run = partial(subprocess.run, cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
    lines = [f"import {m}" for m in ("torch", "mmdit", "discriminator", "sample", "data", "ladd")]
    calls = {line: partial(run, [sys.executable, "-c", line]) for line in lines}
    calls["ladd.py --help"] = partial(run, [sys.executable, "ladd.py", "--help"])
    seconds = rounds(calls, n)
    alone = seconds.pop("import torch")
    return {name: value / alone for name, value in seconds.items()}


def measure(n):
    device = device_of("auto")
    for preset, turns in (("nano", n), ("tiny", min(n, 3))):
        for precision in ("bf16", "fp32"):
            yield from training_step(preset, precision, device, turns)
    d = Distillation(settings("nano"), device)
    seconds = rounds(dict(forward=d.forward, iteration=d.iteration), n)
    forwards = seconds["iteration"] / seconds["forward"]
    yield "LADD iteration in forwards of the network", f"{forwards:.2f}", "≤ 6.6"
    yield "64 images in 4 steps: diffusers' time over ours", f"{sampling(device, n):.2f}", "≥ 1.3"
    for stage, seconds in drawing("tiny", n).items():
        yield f"{stage}, tiny: the host's time per update, ms", f"{1000 * seconds:.1f}", "≤ 3"
    for name, ratio in start_up(3).items():
        yield f"`{name}` over `import torch`", f"{ratio:.2f}", "< 1.5"


def matrix_rate(device):
    """The FLOPs a second of a large bf16 product: what a network can at most come near."""
    a, b = torch.randn(2, 8192, 8192, device=device, dtype=torch.bfloat16)
    return 2 * 8192**3 / rounds(dict(product=lambda: a @ b), 20)["product"]


def fitting(preset, most):
    """The preset with the largest batch, up to `most`, whose planned update fits on the GPU.
    -> its settings, the plan's FLOPs, FLOPs of one forward, bytes"""
    way = plan(settings(preset, "--batch", f"{most}"))["ways"][False]
    torch.cuda.empty_cache()  # what earlier rows took is free, too
    image, free = way["activations"] / most, torch.cuda.mem_get_info()[0]
    fixed = way["total"] - way["activations"]
    batch = min(most, int((0.9 * free - fixed) / image))
    if batch < 1:
        raise torch.OutOfMemoryError(f"an update takes {in_bytes(fixed + image)}")
    flops = way["flops"] * batch / most
    s = settings(preset, "--batch", f"{batch}")
    return s, flops, flops / way["forwards"], fixed + image * batch


def real_size(preset, most, device, rate):
    """The rows of a preset at its real size; rate: FLOPs a second of a large matrix product."""
    s, flops, forward, in_plan = fitting(preset, most)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    d = Distillation(s, device)
    seconds = rounds(dict(forward=d.forward, iteration=d.iteration), 5)
    used = (torch.cuda.max_memory_allocated() - before) / in_plan
    speed, alone = flops / seconds["iteration"], forward / seconds["forward"]
    what = f"{preset}, LADD iteration of {s.batch} images at {s.size[0]}²"
    yield f"{what}, forwards", f"{seconds['iteration'] / seconds['forward']:.2f}", "≤ 6.6"
    yield f"{what}, TFLOP/s", f"{speed / 1e12:.0f}", "–"
    yield f"{what}, share of the matrix rate", f"{speed / rate:.2f}", "≥ 0.45"
    yield f"{preset}, the teacher's forward alone, share", f"{alone / rate:.2f}", "≥ 0.6"
    long = s.positions // s.patch**2 > 512  # up to there the plan counts attention as on a CPU
    goal = "0.9 to 1.1" if long else "≤ 1.1"
    yield f"{preset}, peak memory over the plan's", f"{used:.2f}", goal
    del d  # the next one needs its memory
    d = Distillation(dataclasses.replace(s, compile="yes"), device)
    gain = seconds["iteration"] / rounds(dict(iteration=d.iteration), 5)["iteration"]
    yield f"{what}: its time over that with --compile", f"{gain:.2f}", "–"


def measure_gpu(device):
    """On one GPU, with random weights."""
    rate = matrix_rate(device)
    yield "bf16 matrix product of 8192³, TFLOP/s", f"{rate / 1e12:.0f}", "–"
    yield from tried("a training step", training_step("tiny", "bf16", device, 5))
    for preset, most in (("tiny", 256), ("sd3-2b", 4)):
        yield from tried(preset, real_size(preset, most, device, rate))


def tried(what, rows):
    """The rows; one that says why, where memory or diffusers is missing."""
    try:
        yield from rows
    except (torch.OutOfMemoryError, ImportError) as error:
        yield what, f"not measured: {reason(error)}", "–"


def main(argv=None):
    parser = Parser("tools/benchmark.py", "Speed and memory, beside diffusers'.")
    parser.add_argument("--rounds", type=int, default=11, help="calls of which the median is taken")
    parser.add_argument("--gpu", action="store_true", help="measure the real sizes instead")
    args = parser.parse_args(argv)
    if args.gpu and not torch.cuda.is_available():
        parser.error("--gpu: no GPU is here")
    if args.rounds < 1:
        parser.error(f"--rounds {args.rounds}: must be at least 1")
    keep_memory()  # as ladd.py does; it serves all contestants
    print("# Benchmark\n\nRatios of one run on one machine.")
    print(f"`python -m tools.benchmark --rounds {args.rounds}`, commit {made_on(facts())}.\n")
    print("| what | measured | goal |\n|---|---|---|")
    for row in measure_gpu(torch.device("cuda")) if args.gpu else measure(args.rounds):
        print("| " + " | ".join(row) + " |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
