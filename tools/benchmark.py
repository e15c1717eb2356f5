"""Speed and memory, as ratios measured in one run on one machine; the comparisons take turns.

    python tests/benchmark.py            prints the table
    python tests/benchmark.py --write    and keeps it in docs/benchmark.md
    python tests/benchmark.py --gpu      SD3's real sizes with random weights, on one GPU
    python tests/benchmark.py --leak     memory and open files after 200 and 5,000 updates

Every figure is a median over rounds in which all contestants run one after the other, so that a
machine whose speed drifts treats them alike. The network is compared with diffusers'
SD3Transformer2DModel (pip install diffusers) of the same sizes, precision and optimiser.
"""

import argparse
import copy
import math
import pickle
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
import ladd  # noqa: E402
import sample  # noqa: E402
from discriminator import Discriminator, hinge_d, hinge_g  # noqa: E402
from mmdit import MMDiT  # noqa: E402


def rounds(contestants, n):
    """{name: function} -> {name: median seconds of n calls}, in turns, after three to warm up: the
    second call still maps half as much memory as the first, the fourth hardly any."""
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


# ---------------------------------------------------------------------------------------------
# What is compared
# ---------------------------------------------------------------------------------------------


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
        sample_size=s.side // s.patch,
        patch_size=s.patch,
        in_channels=s.channels,
        out_channels=s.channels,
        num_layers=s.depth,
        num_attention_heads=s.heads,
        attention_head_dim=s.width // s.heads,
        caption_projection_dim=s.width,
        joint_attention_dim=s.text_dim,
        pooled_projection_dim=s.pooled_dim or s.text_dim,
        pos_embed_max_size=s.pos_size,
        qk_norm="rms_norm" if s.qk_norm else None,
    )


def call_theirs(model, x, t, context, pooled):
    return model(x, context, pooled, 1000 * t, return_dict=False)


def inputs(s, n, device):
    """x (n, C, H, W), t (n,), context (n, M, D_c), pooled (n, D_p), all random."""
    torch.manual_seed(0)
    x = torch.randn(n, s.channels, *s.sizes[0], device=device)
    context = torch.randn(n, s.text_length, s.text_dim, device=device)
    pooled = torch.randn(n, s.pooled_dim or s.text_dim, device=device)
    return x, torch.rand(n, device=device), context, pooled


class Products(TorchDispatchMode):
    """Remembers matrix products and attentions, to make them again on other numbers."""

    NAMES = ("mm", "addmm", "bmm", "_scaled_dot_product")

    def __init__(self):
        super().__init__()
        self.calls, self.tensors = [], {}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.overloadpacket.__name__.startswith(self.NAMES):
            self.calls.append((op, tree_map(self.stand_in, args), kwargs or {}))
        return op(*args, **(kwargs or {}))

    def stand_in(self, x):
        """Random numbers in the layout of a tensor, the same for all of its layout."""
        if not torch.is_tensor(x):
            return x
        key = x.shape, x.stride(), x.dtype
        if key not in self.tensors:
            last = sum((n - 1) * step for n, step in zip(*key[:2], strict=True))
            numbers = torch.randn(last + 1, device=x.device).to(x.dtype)
            self.tensors[key] = numbers.as_strided(*key[:2])
        return self.tensors[key]

    def again(self):
        for op, args, kwargs in self.calls:
            op(*args, **kwargs)


def training_step(preset, precision, device, n):
    """A teacher's step, same sizes, precision, optimiser: diffusers' time over ours, over that of
    our matrix products and attention alone (no form of the rest can be faster), and our seconds."""
    s = settings(preset)
    batch = inputs(s, 32, device)

    def step(model, forward):
        optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)

        def call():
            with sample.autocast(device, precision):
                v = forward(model, *batch)[0]
            loss = v.float().square().mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()

        return call

    ours, other = awake(MMDiT(**s.model())).to(device), awake(theirs(s)).to(device)
    mine, its = step(ours, lambda m, *b: m(*b)), step(other, call_theirs)
    with Products() as products:
        mine()
    seconds = rounds(dict(ours=mine, theirs=its, products=products.again), n)
    ratios = (seconds["theirs"] / seconds[name] for name in ("ours", "products"))
    return *ratios, seconds["ours"]


class Distillation:
    """A LADD iteration without files and logs, in one teacher pass and in two."""

    def __init__(self, preset, device, batch=None):
        self.s = s = settings(preset)
        self.device = device
        with torch.device(device):
            self.student = awake(MMDiT(**s.model()))
            self.heads = Discriminator(**s.head_sizes())
        dtype = sample.arithmetic(device, "auto")  # as in ladd.py
        self.teacher = copy.deepcopy(self.student).to(dtype).eval().requires_grad_(False)
        self.optimizer = ladd.make_optimizers(self.student, 1e-4, 0.0, s.beta1)
        self.heads_optimizer = ladd.make_optimizers(self.heads, 1e-4, 0.0, s.beta1)
        self.grid = tuple(side // s.patch for side in s.sizes[0])
        self.x0, self.t, *self.text = inputs(s, batch or s.batch, device)
        self.parts, self.last = None, 0.0  # {part: seconds}, while somebody wants to know
        for optimizer in self.optimizer + self.heads_optimizer:
            optimizer.register_step_pre_hook(lambda *_: self.done("backward"))

    def done(self, part):
        """The time since the call before was spent on this part."""
        if self.parts is not None:
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            now = time.perf_counter()
            self.parts[part] = self.parts.get(part, 0.0) + now - self.last
            self.last = now

    def forward(self):
        """The unit: one forward of the whole network."""
        with torch.no_grad(), sample.autocast(self.device, "auto"):
            self.teacher(self.x0, self.t, *self.text)

    def shared(self):
        """As in ladd.py: the features of the fakes serve both players."""
        s, (x0, t, text) = self.s, (self.x0, self.t, self.text)
        with sample.autocast(self.device, "auto"):
            x0_hat = ladd.student_predict(self.student, x0, text, t, torch.randn_like(x0))
            self.done("student forward")
            fake = self.features(x0_hat)
            self.done("teacher on fakes")
            with torch.no_grad():
                real = self.features(x0)
            self.done("teacher on reals")
            loss_d = ladd.discriminator_loss(self.heads, real, fake, t, text[1], self.grid, 0.0)[0]
        self.done("heads")
        ladd.update(self.heads_optimizer, loss_d, self.heads, math.inf, 1.0)
        self.done("optimisers")
        with sample.autocast(self.device, "auto"):
            loss_g = ladd.generator_loss(self.heads, fake, t, text[1], self.grid)
        self.done("heads")
        ladd.update(self.optimizer, loss_g, self.student, s.clip, 1.0)
        self.done("optimisers")

    def two_passes(self):
        """As usual in a GAN: one pass of student and teacher for each player."""
        s, (x0, t, text) = self.s, (self.x0, self.t, self.text)
        with sample.autocast(self.device, "auto"):
            with torch.no_grad():
                x0_hat = ladd.student_predict(self.student, x0, text, t, torch.randn_like(x0))
                fake, real = self.features(x0_hat), self.features(x0)
            logits = [self.heads(f, t, text[1], *self.grid) for f in (real, fake)]
            loss_d = hinge_d(*logits)
        ladd.update(self.heads_optimizer, loss_d, self.heads, math.inf, 1.0)
        self.heads.requires_grad_(False)
        with sample.autocast(self.device, "auto"):
            x0_hat = ladd.student_predict(self.student, x0, text, t, torch.randn_like(x0))
            loss_g = hinge_g(self.heads(self.features(x0_hat), t, text[1], *self.grid))
        self.heads.requires_grad_(True)
        ladd.update(self.optimizer, loss_g, self.student, s.clip, 1.0)

    def features(self, x0):
        noise = torch.randn_like(x0)
        return ladd.teacher_features(self.teacher, x0, self.text, self.t, noise, self.s.tapped)


def sampling(device, n):
    """Seconds of 64 images in 4 Euler steps without guidance, ours and diffusers'."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    s = settings("nano")
    ours, other = awake(MMDiT(**s.model())), awake(theirs(s)).to(device).eval()
    generator = sample.Generator(ours.to(device).eval(), vars(s), "teacher", device)
    captions = ["a large red circle on a blue background"] * 64
    text = generator.text(captions)

    def mine():
        generator.sample(captions, steps=4, cfg=1.0)

    @torch.no_grad()
    def diffusers():
        scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
        scheduler.set_timesteps(4)
        x = sample.noise_of(0, range(64), (s.channels, s.size, s.size)).to(device)
        for t in scheduler.timesteps:
            with sample.autocast(device, "auto"):
                v = call_theirs(other, x, t.to(device).expand(64) / 1000, *text)[0]
            x = scheduler.step(v.float(), t, x).prev_sample
        return x.cpu()

    seconds = rounds(dict(ours=mine, theirs=diffusers), n)
    return seconds["theirs"] / seconds["ours"]


def reading(folder, n, data_dir=None):
    """Seconds that a batch of 64 takes, per data set. CIFAR-10 is that of `data_dir`, or one of its
    size and format without pictures; it and a folder of images are made in `folder`."""
    shapes = data.load("shapes", 16, 16)
    images, caption = shapes.batch(np.arange(256))
    for i, (image, row) in enumerate(zip(images, caption.tolist(), strict=True)):
        path = Path(folder) / "images" / shapes.captions[row].split()[3] / f"{i}.png"
        path.parent.mkdir(exist_ok=True, parents=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    if not data_dir:
        data_dir, random = folder, np.random.default_rng(0)
        (batches := Path(folder) / "cifar-10-batches-py").mkdir()
        for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
            pixels = random.integers(0, 256, (10_000, 3072), np.uint8)
            labels = random.integers(0, 10, 10_000).tolist()
            (batches / name).write_bytes(pickle.dumps({b"data": pixels, b"labels": labels}))
    sets = {"shapes": shapes, "a folder of images": data.load(f"{folder}/images", 16, 16)}
    sets["CIFAR-10"] = data.load("cifar10", 16, 16, data_dir=data_dir)
    index = iter(range(1 << 30))

    def batch(dataset):
        first = 64 * next(index)
        dataset.batch(np.arange(first, first + 64))

    return rounds({k: lambda d=d: batch(d) for k, d in sets.items()}, n)


def start_up(n):
    """Seconds to import each file and to print the help, over those of `import torch` alone."""
    commands = {f"import {m}": ["-c", f"import {m}"] for m in ("torch", "numpy")}
    commands |= {
        f"import {m}": ["-c", f"import {m}"]
        for m in ("mmdit", "discriminator", "sample", "data", "ladd")
    }
    commands["ladd.py --help"] = ["ladd.py", "--help"]
    quiet = dict(cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
    calls = {
        name: lambda c=c: subprocess.run([sys.executable, *c], **quiet)
        for name, c in commands.items()
    }
    seconds = rounds(calls, n)
    alone = seconds.pop("import torch")
    seconds.pop("import numpy")
    return {name: value / alone for name, value in seconds.items()}


def peak(call):
    """The most bytes that PyTorch's allocator holds at a time in one call, beyond those before it.

    Resident memory tells less: the C library keeps what the call before gave back, as much of it
    as happened to lie together."""
    call()
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu], profile_memory=True) as record:
        call()
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    return int(np.cumsum([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]).max())


def saving(d, step):
    """Share of the time that goes into saved states at nano's interval; `step`: an update's."""
    with tempfile.TemporaryDirectory() as folder:
        run = ladd.Run(settings("nano", "--out", folder))
        loop = ladd.Loop(run, "distillation", d.s.iterations, d.s.batch)
        networks = dict(student=d.student, ema=copy.deepcopy(d.student), heads=d.heads)
        loop.resume(networks, d.optimizer + d.heads_optimizer)
        next(iter(loop))
        seconds = rounds(dict(save=loop.save), 5)["save"]
    return seconds / (step * d.s.save_every)


LEAK = """
import os, sys
sys.path.insert(0, {root!r})
import ladd

checkpoint = ladd.Loop.checkpoint

def watched(loop):
    checkpoint(loop)
    if loop.step + 1 in (200, 5000):
        pages = int(open("/proc/self/statm").read().split()[1])
        files = len(os.listdir("/proc/self/fd"))
        print("at", loop.stage, pages * os.sysconf("SC_PAGE_SIZE"), files, flush=True)

ladd.Loop.checkpoint = watched
flags = "--teacher-iterations 5001 --iterations 5001 --teacher-batch 4 --batch 4 --synthetic 64"
flags += " --evaluation 8 --judge-steps 20 --out {out} --data-dir {out}"
flags += " --save-every 60 --sample-every 190"  # the first of each take memory that is kept
sys.exit(ladd.main(flags.split()))
"""


def leak():
    """{stage: [(bytes, open files) at update 200, at 5,000]} of a process that trains nano, in
    batches of 4 to save time (Linux alone)."""
    with tempfile.TemporaryDirectory() as folder:
        code = LEAK.format(root=str(ROOT), out=f"{folder}/run")
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if out.returncode:
        raise RuntimeError(out.stderr[-2000:])
    found = {}
    for line in out.stdout.splitlines():
        if line.startswith("at "):
            _, stage, memory, files = line.split()
            found.setdefault(stage, []).append((int(memory), int(files)))
    return found


def full_size(preset, batch):
    """Yields (what, figure, goal) of a real size with random weights, on one GPU."""
    device, s = torch.device("cuda"), settings(preset)
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in "ab")
    rate = 2 * 8192**3 / rounds(dict(product=lambda: a @ b), 20)["product"]
    yield "bf16 matrix product of 8192³, TFLOP/s", f"{rate / 1e12:.0f}", "–"
    torch.cuda.reset_peak_memory_stats()
    d = Distillation(preset, device, batch)
    ema = copy.deepcopy(d.student).requires_grad_(False)
    kept, forward, flops = ladd.meta_iteration(s, batch, False)
    seconds = rounds(dict(forward=d.forward, iteration=d.shared), 5)
    figure = flops / seconds["iteration"]
    what = f"{preset}, LADD iteration of {batch} images at {s.size}²"
    yield f"{what}, TFLOP/s", f"{figure / 1e12:.0f}", "–"
    yield f"{what}, share of the matrix rate", f"{figure / rate:.2f}", "≥ 0.45"
    share = forward / seconds["forward"] / rate
    yield "the teacher's forward alone, share", f"{share:.2f}", "≥ 0.6"
    planned = sum(ladd.meta_state(s).values()) + kept
    memory = torch.cuda.max_memory_allocated() / planned
    yield "peak memory over the plan's", f"{memory:.2f}", "0.9 to 1.1"
    x, t, context, pooled = (v.bfloat16() for v in (d.x0, d.t, *d.text))
    del d, ema
    other = awake(theirs(s)).to(device, torch.bfloat16).eval()
    with torch.no_grad():
        call = rounds(dict(other=lambda: call_theirs(other, x, t, context, pooled)), 5)
    yield "diffusers' forward, share", f"{forward / call['other'] / rate:.2f}", "not above ours"


def large_sample(preset="sd3-8b"):
    """Yields (what, figure, goal) of one sample in 4 steps on one GPU."""
    s = settings(preset)
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        model = awake(MMDiT(**s.model())).eval()
        torch.set_default_dtype(torch.float32)
    x, _, *text = inputs(s, 1, torch.device("cuda"))
    torch.cuda.reset_peak_memory_stats()

    @torch.no_grad()
    def draw():
        with sample.autocast("cuda", "bf16"):
            return [*sample.renoise(model, x, s.levels, text, lambda i: torch.randn_like(x))]

    seconds = rounds(dict(draw=draw), 3)["draw"]
    memory = torch.cuda.max_memory_allocated() / 1e9
    yield f"{preset}, one sample in 4 steps at {s.size}², seconds", f"{seconds:.2f}", "–"
    yield "its memory, GB", f"{memory:.1f}", "one GPU's"


def by_part(d, n):
    """{part: share of the time} of n LADD iterations."""
    d.shared()
    d.parts, d.last = {}, time.perf_counter()
    for _ in range(n):
        d.shared()
    parts, d.parts = d.parts, None
    return {part: seconds / sum(parts.values()) for part, seconds in parts.items()}


def profile(call, most=8):
    """(operation, share of the time) of the operations that take most of three calls."""
    call()
    with torch.profiler.profile() as record:
        for _ in range(3):
            call()
    parts = sorted(record.key_averages(), key=lambda part: -part.self_cpu_time_total)
    total = sum(part.self_cpu_time_total for part in parts)
    return [(part.key, part.self_cpu_time_total / total) for part in parts[:most]]


# ---------------------------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------------------------


def measure(n, data_dir):
    """Yields (what, figure, goal) as they are measured."""
    device = torch.device(sample.best_device())
    step = None
    for preset in ("nano", "tiny"):
        for precision in ("bf16", "fp32"):
            turns = n if preset == "nano" else min(n, 3)
            ratio, bound, seconds = training_step(preset, precision, device, turns)
            step = seconds if step is None else step
            what = f"training step, {preset}, {precision}: diffusers' time over ours"
            yield what, f"{ratio:.2f}", "≥ 1.5" if device.type == "cpu" else "≥ 1.15"
            yield "the same over our matrix products and attention alone", f"{bound:.2f}", "–"
    d = Distillation("nano", device)
    seconds = rounds(dict(unit=d.forward, shared=d.shared, two=d.two_passes), n)
    units = seconds["shared"] / seconds["unit"]
    yield "LADD iteration in forwards of the network", f"{units:.2f}", "≤ 6.6"
    ratio = seconds["two"] / seconds["shared"]
    yield "LADD iteration: two passes' time over ours", f"{ratio:.2f}", "≥ 1.3"
    yield "saved states, share of the time", f"{saving(d, seconds['shared']):.2%}", "< 2 %"
    yield "64 images in 4 steps: diffusers' time over ours", f"{sampling(device, n):.2f}", "≥ 1.3"
    with tempfile.TemporaryDirectory() as folder:
        for name, seconds in reading(folder, n, data_dir).items():
            yield f"a batch of {name} over a training step", f"{seconds / step:.1%}", "≤ 5 %"
    for name, ratio in start_up(3).items():
        yield f"`{name}` over `import torch`", f"{ratio:.2f}", "< 1.5"
    if device.type == "cpu":
        memory = peak(d.shared) / peak(d.two_passes)
        yield "LADD iteration: our peak memory over two passes'", f"{memory:.2f}", "≤ 1.1"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="keep the output in docs/benchmark.md")
    parser.add_argument("--rounds", type=int, default=11, help="calls of which the median is taken")
    parser.add_argument("--data-dir", help="a folder with CIFAR-10 (default: noise of its size)")
    parser.add_argument("--gpu", action="store_true", help="measure the real sizes instead")
    parser.add_argument("--leak", action="store_true", help="look for leaks instead: minutes")
    args = parser.parse_args()
    if args.leak:
        for stage, ((early, opened), (late, still)) in leak().items():
            print(
                f"{stage}: {late / early:.4f} of the memory of update 200 at update 5,000 "
                f"({early:,} and {late:,} bytes), open files {opened} and {still}"
            )
        return
    if args.gpu and not torch.cuda.is_available():
        parser.error("--gpu: no GPU is here")
    ladd.keep_memory()  # as ladd.py does; it serves all contestants
    lines = ["| what | measured | goal |", "|---|---|---|"]
    print(*lines, sep="\n", flush=True)
    whole = (row for rows in (full_size("sd3-2b", 4), large_sample()) for row in rows)
    for row in whole if args.gpu else measure(args.rounds, args.data_dir):
        lines.append("| " + " | ".join(row) + " |")
        print(lines[-1], flush=True)
    printed = len(lines)
    d = Distillation("nano", torch.device(sample.best_device()))
    lines += ["", "Where the time of a LADD iteration of `nano` goes, by part:", ""]
    lines += ["| part | share |", "|---|---|"]
    lines += [f"| {part} | {share:.0%} |" for part, share in by_part(d, args.rounds).items()]
    lines += ["", "And by operation:", ""]
    lines += ["| operation | share |", "|---|---|"]
    lines += [f"| `{name}` | {share:.0%} |" for name, share in profile(d.shared)]
    where = ladd.machine()
    dirty = " with uncommitted changes" if where["dirty"] else ""
    lines += [
        "",
        f"`python tests/benchmark.py --rounds {args.rounds}`, commit {where['commit']}{dirty}, "
        f"torch {where['torch']}, {where['gpu'] or where['processor']}, "
        f"{where['threads']} threads.",
    ]
    print(*lines[printed:], sep="\n")
    if args.write:
        text = "# Benchmark\n\nRatios of one run on one machine.\n\n" + "\n".join(lines) + "\n"
        (ROOT / "docs" / "benchmark.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
