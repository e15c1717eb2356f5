"""LADD, latent adversarial diffusion distillation: presets, training, command line.

"Fast High-Resolution Image Synthesis with Latent Adversarial Diffusion Distillation",
arXiv 2403.12015.

A teacher that needs many steps becomes a student that needs one to four. One iteration:

    1  x_t   = (1 - t)·x_0 + t·ε            t from the student's few levels, x_0 made by the teacher
    2  x̂_0   = x_t - t·v_θ(x_t, t, c)       one evaluation of the student
    3  noise x̂_0 and x_0 to a level t̂       t̂ ~ logit-normal(m, s), the same for both
    4  f, r  = features of the frozen teacher on the noised x̂_0 and x_0
    5  L_D   = E[relu(1 - D(r))] + E[relu(1 + D(sg f))]    the heads learn
    6  L_G   = -E[D(f)]                                     the student learns, through the teacher

sg means stop-gradient. The features f of the fakes serve both players, so an iteration costs six
forward units (a backward counts two, one through the frozen teacher): student 1 + 2, teacher on
fakes 1 + 1, teacher on reals 1. The paper published neither code nor learning rates, batch size,
optimiser or EMA: those are ours, chosen by the experiments in docs/log.md.

    python ladd.py --preset nano                  everything, on a laptop, with built-in data
    python ladd.py --preset tiny                  CIFAR-10 on one GPU
"""

import argparse
import contextlib
import copy
import dataclasses
import json
import math
import platform
import shlex
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
import sample
from discriminator import Discriminator, hinge_d, hinge_g, r1
from mmdit import MMDiT
from sample import add_noise, logit_normal, predict_x0

# ---------------------------------------------------------------------------------------------
# Settings and presets
# ---------------------------------------------------------------------------------------------


def setting(default, help):
    return dataclasses.field(default=default, metadata={"help": help})


@dataclasses.dataclass(frozen=True)
class Settings:
    """Every setting, its default and its meaning; the command line is made from this."""

    preset: str = setting("nano", "the row of PRESETS to start from")
    data: str = setting("shapes", "shapes, cifar10, or a folder or zip of images")
    seed: int = setting(0, "of all randomness")
    size: int = setting(16, "side of the images, pixels")
    # the network: teacher and student
    channels: int = setting(3, "of x_0: 3 for pixels")
    patch: int = setting(2, "side of a patch")
    width: int = setting(128, "D")
    depth: int = setting(4, "blocks")
    heads: int = setting(4, "attention heads")
    qk_norm: bool = setting(True, "RMSNorm of queries and keys, as in SD3.5")
    pos_size: int = setting(32, "side of the position table, patches")
    text_dim: int = setting(64, "width of the text features")
    text_length: int = setting(8, "words of a caption that are read")
    # teacher (rectified flow, arXiv 2403.03206)
    teacher_iterations: int = setting(2400, "updates of the teacher")
    teacher_batch: int = setting(64, "images per update")
    teacher_lr: float = setting(2e-3, "AdamW, for what Muon does not train")
    muon_lr: float = setting(0.02, "Muon, for the blocks' matrices; 0: AdamW for all")
    t_mean: float = setting(0.0, "logit-normal mean of t in training (paper: 0)")
    t_std: float = setting(1.0, "its standard deviation (paper: 1)")
    drop: float = setting(0.1, "share of captions dropped, for guidance")
    teacher_ema: float = setting(0.995, "decay per update of the teacher's average")
    teacher_steps: int = setting(32, "Euler steps of the teacher's samples")
    cfg: float = setting(4.0, "guidance scale w of the teacher's samples")
    shift: float = setting(1.0, "timestep shift α of Euler sampling")
    # synthesis
    synthetic: int = setting(2048, "samples the teacher makes for the student to learn from")
    synthetic_cfg: float = setting(4.0, "their constant guidance scale")
    synthetic_steps: int = setting(16, "their Euler steps")
    # distillation (LADD)
    iterations: int = setting(1700, "updates of the student and the heads")
    batch: int = setting(32, "images per update")
    levels: tuple = setting((1.0, 0.75, 0.5, 0.25), "noise levels t of the student")
    level_p: tuple = setting((0.4, 0.2, 0.2, 0.2), "their probabilities (reported: .7, .1, .1, .1)")
    warmup_iterations: int = setting(0, "first updates, with other probabilities")
    warmup_p: tuple = setting((0.0, 0.0, 0.5, 0.5), "probabilities during those")
    t_hat_mean: float | None = setting(
        None, "m of t̂ ~ logit-normal(m, s) (default: by size, see m)"
    )
    t_hat_std: float = setting(1.0, "s of t̂")
    targets: str = setting("synthetic", "what is real to the heads: synthetic or real")
    distill_weight: float = setting(0.0, "weight of a distillation loss beside the adversarial one")
    heads_warmup: int = setting(
        150, "first updates, of the heads alone: their gradient is noise then"
    )
    taps: tuple = setting((1, 2), "blocks whose tokens the heads see; empty: all")
    head_width: int = setting(64, "channels of a head")
    student_lr: float = setting(2e-4, "AdamW")
    heads_lr: float = setting(1e-3, "AdamW")
    beta1: float = setting(0.5, "AdamW's first decay, student and heads")
    r1: float = setting(0.0, "weight γ of R1 on the heads' inputs")
    student_ema: float = setting(0.995, "decay per update of the student's average")
    clip: float = setting(1.0, "largest gradient norm, teacher and student")
    # report
    evaluation: int = setting(1000, "samples per row of the table")
    judge_steps: int = setting(700, "updates of the judge")
    judge_width: int = setting(32, "its channels")
    # how to run; these change no result on the same machine, or say so
    out: str = setting("", "run folder (default: runs/PRESET)")
    data_dir: str = setting("data", "where downloads and judges are kept")
    device: str = setting("auto", "cpu, cuda, …")
    precision: str = setting("auto", "bf16, fp32, or auto: bf16 where the hardware has it")
    compile: bool = setting(False, "torch.compile the networks")
    stage: str = setting("all", "run one stage: teacher, synthesis, distillation, report")
    teacher: str = setting("", "a teacher's checkpoint to use instead of training one")
    smoke: bool = setting(False, "two updates of every stage, to see that all of it runs")
    steps_scale: float = setting(1.0, "multiplies all updates, the synthetic set, the evaluation")
    save_every: int = setting(500, "updates between states from which a cut run goes on")
    sample_every: int = setting(1000, "updates between sample grids")
    log_every: int = setting(20, "updates between lines of log.jsonl")
    tensorboard: bool = setting(False, "also write logs for tensorboard")

    @property
    def tapped(self):
        return self.taps or tuple(range(self.depth))

    @property
    def m(self):
        """Mean of t̂'s logit: the paper's 1 at 1024², moved by SD3's rule for other resolutions.

        The same t destroys more of a small image than of a large one. SD3 makes up for it with a
        shift of t by α = √(n / n'), which moves a logit by ln α. LADD's m = 1 belongs to 1024²
        images, latents of 16·128·128 values; counting values instead of positions (ours) makes
        latents and pixels comparable: m = 1 + ½·ln(C·H·W / 262,144)."""
        if self.t_hat_mean is not None:
            return self.t_hat_mean
        return 1 + 0.5 * math.log(self.channels * self.size**2 / (16 * 128**2))

    def model(self):
        """MMDiT's arguments."""
        return dict(
            depth=self.depth,
            width=self.width,
            heads=self.heads,
            patch=self.patch,
            channels=self.channels,
            context_dim=self.text_dim,
            pooled_dim=self.text_dim,
            pos_size=self.pos_size,
            qk_norm=self.qk_norm,
        )

    def scaled(self):
        """The settings with --smoke and --steps-scale worked in."""
        changes = {}
        if self.steps_scale != 1:
            for name in SCALED:
                value = getattr(self, name)
                changes[name] = min(value, 1) and max(1, round(value * self.steps_scale))
        if self.smoke:
            changes = dict(teacher_iterations=2, iterations=2, synthetic=32, evaluation=32)
            changes |= dict(heads_warmup=0)
            changes |= dict(judge_steps=20, teacher_batch=16, batch=16, log_every=1, sample_every=2)
            changes |= dict(teacher_steps=4, synthetic_steps=4)
        return dataclasses.replace(self, **changes)


SCALED = ("teacher_iterations", "heads_warmup", "iterations", "synthetic", "evaluation")

PRESETS = {
    "nano": dict(),
    "tiny": dict(
        data="cifar10", size=32, width=384, depth=8, heads=6, text_length=16,
        teacher_iterations=20_000, teacher_batch=256, teacher_lr=1e-3, teacher_ema=0.999, cfg=2.0,
        synthetic=50_000, synthetic_cfg=2.0, iterations=8_000, batch=256, taps=(),
        student_ema=0.999, evaluation=10_000, judge_steps=8_000, judge_width=64, log_every=50,
        save_every=2_000, sample_every=2_000,
    ),
}  # fmt: skip

# Settings that may differ between two commands of the same run.
FREE = {"out", "data_dir", "device", "stage", "save_every", "sample_every", "log_every"}
FREE |= {"tensorboard", "compile"}


class RunError(Exception):
    """The run can't go on; the message says why and what to do."""


# ---------------------------------------------------------------------------------------------
# The method: one function per quantity
# ---------------------------------------------------------------------------------------------


def teacher_loss(model, x0, text, t, noise):
    """Rectified flow: E‖v_θ(x_t, t, c) - (ε - x_0)‖². x0, noise (B, C, H, W), t (B,) -> scalar"""
    v, _ = model(add_noise(x0, noise, t), t, *text)
    return (v.float() - (noise - x0)).square().mean()


def student_predict(student, x0, text, t, noise):
    """Boxes 1 and 2: noise x_0 to t and predict it back in one evaluation. -> x̂_0 (B, C, H, W)"""
    xt = add_noise(x0, noise, t)
    v, _ = student(xt, t, *text)
    return predict_x0(xt, v, t)


def teacher_features(teacher, x0, text, t_hat, noise, taps):
    """Boxes 3 and 4: noise x_0 to t̂ and read the teacher's image tokens. -> [(B, N, D)]

    The teacher is frozen but must not be in no_grad for the fakes: the gradient to the student
    runs through it."""
    return teacher(add_noise(x0, noise, t_hat), t_hat, *text, taps=taps, features_only=True)[1]


def discriminator_loss(heads, real, fake, t_hat, pooled, grid, gamma):
    """Box 5. The heads alone receive gradient. -> L_D, logits of reals, logits of fakes"""
    real = [f.detach().requires_grad_(gamma > 0) for f in real]
    real_logits = heads(real, t_hat, pooled, *grid)
    fake_logits = heads([f.detach() for f in fake], t_hat, pooled, *grid)
    loss = hinge_d(real_logits, fake_logits)
    if gamma > 0:
        loss = loss + gamma * r1(real_logits, real)
    return loss, real_logits.detach().float(), fake_logits.detach().float()


def generator_loss(heads, fake, t_hat, pooled, grid):
    """Box 6. Gradient goes through heads and teacher to the student, and stays in neither."""
    heads.requires_grad_(False)
    logits = heads(fake, t_hat, pooled, *grid)
    heads.requires_grad_(True)
    return hinge_g(logits)


def distillation_loss(x0_hat, x0):
    """Optional, ours: smooth L1 between x̂_0 and the teacher's sample from the same noise."""
    return F.smooth_l1_loss(x0_hat, x0)


def draw_levels(settings, n, step, generator):
    """n noise levels of the student, by their probabilities. -> (n,)"""
    warm = step < settings.warmup_iterations
    p = torch.tensor(settings.warmup_p if warm else settings.level_p)
    index = torch.multinomial(p, n, replacement=True, generator=generator)
    return torch.tensor(settings.levels)[index]


# ---------------------------------------------------------------------------------------------
# Stage 1: the teacher
# ---------------------------------------------------------------------------------------------


def train_teacher(run):
    s, device = run.settings, run.device
    model = run.seeded(MMDiT, **s.model())
    optimizers = make_optimizers(model, s.teacher_lr, s.muon_lr, 0.9)
    ema = copy.deepcopy(model).requires_grad_(False)
    words = run.text.ids(run.dataset.captions)
    loop = Loop(run, "teacher", s.teacher_iterations, s.teacher_batch)
    loop.resume(dict(model=model, ema=ema), optimizers)
    for step in loop:
        random = run.random("teacher", step)
        index = np.arange(step * s.teacher_batch, (step + 1) * s.teacher_batch)
        images, caption = run.dataset.batch(index)
        kept = torch.rand(len(caption), generator=random) >= s.drop
        text = run.text.features((words[caption] * kept[:, None]).to(device))
        x0 = data.to_float(images.to(device))
        t = logit_normal(len(x0), s.t_mean, s.t_std, random).to(device)
        noise = torch.randn(x0.shape, generator=random).to(device)
        with run.autocast():
            loss = teacher_loss(model, x0, text, t, noise)
        norm = update(optimizers, loss, model, s.clip, learning_rate(step, loop.total, 0.6))
        update_ema(ema, model, s.teacher_ema, step)
        loop.log(loss=loss, grad_norm=norm)
        loop.checkpoint()
        if loop.due(s.sample_every):
            run.show("teacher", step + 1, ema)
    run.save("teacher", ema, s.teacher_iterations)
    loop.forget()


# ---------------------------------------------------------------------------------------------
# Stage 2: synthesis
# ---------------------------------------------------------------------------------------------

SHARD = 512  # samples of one file


def synthesise(run):
    """The teacher's samples, in shards: what is real to the discriminator. A cut run goes on."""
    s, folder = run.settings, run.out / "synthetic"
    teacher = run.generator("teacher")
    with progress("synthesis", s.synthetic) as bar:
        for start in range(0, s.synthetic, SHARD):
            index = np.arange(start, min(start + SHARD, s.synthetic))
            path = folder / f"{start // SHARD:05d}.pt"
            if not path.exists():
                _, caption = run.dataset.batch(index + data.SYNTHETIC_INDEX)
                captions = [run.dataset.captions[i] for i in caption]
                x0 = teacher.sample(
                    captions, index, seed=s.seed + 2, steps=s.synthetic_steps, cfg=s.synthetic_cfg
                )
                if not x0.isfinite().all():
                    raise RunError(
                        f"the teacher's samples {index[0]} to {index[-1]} are not finite."
                    )
                save(dict(x0=x0.half(), captions=captions, index=index.tolist()), path)
            bar.update(len(index))


def read_shard(path, s):
    """A file of samples: x0 (n, C, H, W) float16, n captions."""
    try:
        shard = sample.read(path)
        x0, captions = shard["x0"].contiguous(), [c + "" for c in shard["captions"]]
        if x0.shape != (len(captions), s.channels, s.size, s.size):
            raise ValueError("samples and captions don't match")
    except (sample.CheckpointError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise RunError(
            f"{path} is damaged ({error}). Delete it and give the command again."
        ) from None
    return dict(x0=x0, captions=captions)


def distillation_batches(run):
    """A function (step, generator) -> x0, text, noise: what the student learns from.

    With a distillation loss a sample comes with the noise that the teacher made it from."""
    s, device = run.settings, run.device
    if s.targets == "real":
        words, dataset = run.text.ids(run.dataset.captions), run.dataset
    else:
        shards = [read_shard(p, s) for p in run.shards()]
        x0_all = torch.cat([shard["x0"].float() for shard in shards])
        words = run.text.ids([caption for shard in shards for caption in shard["captions"]])
        shape = x0_all.shape[1:]
        paired = sample.noise_of(s.seed + 2, range(len(words)), shape) if s.distill_weight else None
        dataset = data.ImageSet(
            "synthetic", (x0_all, torch.arange(len(words))), seed=s.seed, flip=False
        )

    def draw(step, generator):
        images, caption = dataset.batch(np.arange(step * s.batch, (step + 1) * s.batch))
        x0 = data.to_float(images) if s.targets == "real" else images
        noise = torch.randn(x0.shape, generator=generator)
        if s.targets == "synthetic" and paired is not None:
            noise = paired[caption]
        text = run.text.features(words[caption].to(device))
        return x0.to(device), text, noise.to(device)

    return draw


# ---------------------------------------------------------------------------------------------
# Stage 3: LADD
# ---------------------------------------------------------------------------------------------


def distil(run):
    s, device = run.settings, run.device
    teacher = run.load("teacher")  # frozen
    student = copy.deepcopy(teacher).requires_grad_(True)
    ema = copy.deepcopy(teacher)
    heads = run.seeded(
        Discriminator, width=s.width, taps=s.tapped, pooled_dim=s.text_dim, hidden=s.head_width
    )
    student_optimizer = make_optimizers(student, s.student_lr, 0.0, s.beta1)
    heads_optimizer = make_optimizers(heads, s.heads_lr, 0.0, s.beta1)
    batch = distillation_batches(run)
    grid = (s.size // s.patch,) * 2
    loop = Loop(run, "distillation", s.iterations, s.batch)
    loop.resume(dict(student=student, ema=ema, heads=heads), student_optimizer + heads_optimizer)
    for step in loop:
        random = run.random("distillation", step)
        x0, text, noise = batch(step, random)
        t = draw_levels(s, s.batch, step - s.heads_warmup, random).to(device)
        t_hat = logit_normal(s.batch, s.m, s.t_hat_std, random).to(device)
        noise_fake, noise_real = (torch.randn(x0.shape, generator=random).to(device) for _ in "12")
        pooled = text[1]

        learning = step >= s.heads_warmup
        with run.autocast(), torch.set_grad_enabled(learning):
            x0_hat = student_predict(student, x0, text, t, noise)
            fake = teacher_features(teacher, x0_hat, text, t_hat, noise_fake, s.tapped)
            with torch.no_grad():
                real = teacher_features(teacher, x0, text, t_hat, noise_real, s.tapped)
        with run.autocast():
            loss_d, real_logits, fake_logits = discriminator_loss(
                heads, real, fake, t_hat, pooled, grid, s.r1
            )
        norm_d = update(heads_optimizer, loss_d, heads, math.inf, min(1.0, (step + 1) / 40))
        ranked = (real_logits.mean((1, 2, 3)) > fake_logits.mean((1, 2, 3))).float().mean()
        values = dict(loss_d=loss_d, d_real=real_logits.mean(), d_fake=fake_logits.mean())
        values |= dict(ranked=ranked, grad_norm_heads=norm_d)

        if learning:
            with run.autocast():
                loss_g = generator_loss(heads, fake, t_hat, pooled, grid)
                if s.distill_weight:
                    loss_g = loss_g + s.distill_weight * distillation_loss(x0_hat, x0)
            rate = learning_rate(step - s.heads_warmup, loop.total - s.heads_warmup, 0.3)
            norm_g = update(student_optimizer, loss_g, student, s.clip, rate)
            update_ema(ema, student, s.student_ema, step - s.heads_warmup)
            values |= dict(loss_g=loss_g, grad_norm=norm_g)
        loop.log(**values)
        loop.checkpoint()
        if loop.due(s.sample_every):
            run.show("student", step + 1, ema)
    run.save("student", ema, s.iterations)
    loop.forget()


# ---------------------------------------------------------------------------------------------
# Stage 4: report
# ---------------------------------------------------------------------------------------------


def report(run):
    """Scores everything; writes samples.png (same noise for all), metrics.json and report.md."""
    s, start = run.settings, time.perf_counter()
    judge = run.judge()
    teacher, student = run.generator("teacher"), run.generator("student")
    accuracy = sample.judge_accuracy(run.dataset, judge)
    rows = sample.evaluate(run.dataset, judge, teacher, student, s.evaluation, s.seed)

    _, caption = run.dataset.batch(np.arange(24), held_out=True)
    captions = [run.dataset.captions[i] for i in caption]
    made = [(f"teacher, {s.teacher_steps} steps", teacher, dict(steps=s.teacher_steps))]
    few = [n for n in (4, 2, 1) if n <= len(s.levels)]
    made += [(f"student, {n} step{'s'[: n > 1]}", student, dict(steps=n)) for n in few]
    made += [("untrained, 1 step", teacher, dict(steps=1, cfg=1.0, sampler="renoise"))]
    titled = [
        (title, data.to_uint8(generator.sample(captions, seed=s.seed + 3, **options)))
        for title, generator, options in made
    ]
    sample.save_png(sample.panels(titled, 4), run.out / "samples.png", captions="; ".join(captions))

    run.write_report(rows, accuracy, time.perf_counter() - start)
    print(sample.markdown_table(rows), flush=True)
    print(f"The judge reads held-out images right: {sample.accuracy_line(accuracy)}", flush=True)


# ---------------------------------------------------------------------------------------------
# Plumbing: optimisers, averages
# ---------------------------------------------------------------------------------------------


def make_optimizers(model, lr, muon_lr, beta1):
    """[AdamW], or with muon_lr [AdamW, Muon], where Muon has the matrices of the blocks."""
    matrices, rest = [], []
    for name, parameter in model.named_parameters():
        inner = muon_lr and parameter.ndim == 2 and name.startswith("joint_blocks")
        (matrices if inner else rest).append(parameter)
    optimizers = [torch.optim.AdamW(rest, lr, betas=(beta1, 0.99), weight_decay=0.0)]
    if matrices:
        optimizers.append(
            torch.optim.Muon(
                matrices, muon_lr, momentum=0.95, weight_decay=0.0, adjust_lr_fn="original"
            )
        )
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["base_lr"] = group["lr"]
    return optimizers


def learning_rate(step, total, decay, warmup=40):
    """A factor: linear warm-up, constant, linear to zero over the last `decay` of the updates."""
    return min(1.0, (step + 1) / warmup, (total - step) / (decay * total))


def update(optimizers, loss, model, clip, rate):
    """Backward and one step of all optimisers at `rate` times their lr. -> gradient norm"""
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * rate
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    for optimizer in optimizers:
        optimizer.step()
    return norm


@torch.no_grad()
def update_ema(ema, model, decay, step):
    """ema ← decay·ema + (1 - decay)·model; the decay starts small, to forget the start."""
    decay = min(decay, (step + 1) / (step + 10))
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


# ---------------------------------------------------------------------------------------------
# Plumbing: the run folder
# ---------------------------------------------------------------------------------------------


def save(value, path):
    with data.replacing(path) as file:
        torch.save(value, file)


def write(text, path):
    with data.replacing(path) as file:
        file.write(text.encode("utf-8", "replace"))  # a path need not be text


def progress(name, total, initial=0):
    return tqdm(
        total=total, initial=initial, desc=name, disable=not sys.stderr.isatty(), dynamic_ncols=True
    )


class Run:
    """One run: its settings, device, data, and the files in its folder."""

    def __init__(self, settings):
        self.settings = settings
        self.out = Path(settings.out)
        self.device = torch.device(
            sample.best_device() if settings.device == "auto" else settings.device
        )
        self.text = data.HashedText(settings.text_dim, settings.text_length).to(self.device)
        self.dataset = data.load(
            settings.data,
            settings.size,
            settings.size,
            data_dir=settings.data_dir,
            seed=settings.seed,
        )
        self.notes = []  # lines the report must repeat
        self.board = None

    # networks -------------------------------------------------------------------------------

    def seeded(self, module, **arguments):
        """A fresh network, its weights drawn from the seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.settings.seed)
            return module(**arguments).to(self.device)

    def path(self, kind):
        return self.out / f"{kind}.pt"

    def save(self, kind, model, step):
        weights = {k: v.detach().cpu() for k, v in model.state_dict().items()}
        checkpoint = dict(format="ladd-1", kind=kind, model=model.config, weights=weights)
        settings = dataclasses.asdict(self.settings)
        save(checkpoint | dict(settings=settings, step=step), self.path(kind))

    def load(self, kind):
        """The finished teacher or student, frozen."""
        return sample.build(sample.read_checkpoint(self.path(kind)), self.device)

    def generator(self, kind, model=None):
        """What samples from the finished teacher or student, or from a network in training."""
        model = self.load(kind) if model is None else model
        settings = dataclasses.asdict(self.settings)
        return sample.Generator(model, settings, kind, self.device, self.settings.precision)

    def judge(self):
        s = self.settings
        return sample.get_judge(
            self.dataset, (s.size, s.size), self.device, data_dir=s.data_dir,
            steps=s.judge_steps, width=s.judge_width, precision=s.precision,
        )  # fmt: skip

    # randomness and arithmetic --------------------------------------------------------------

    def random(self, stage, step):
        """The generator of one update, from seed, stage and step: a resumed run draws alike."""
        key = data.hash_uniform(self.settings.seed, [step], 1 + STAGES.index(stage))[0, -1]
        return torch.Generator().manual_seed(int(key * (1 << 53)))

    def autocast(self):
        return sample.autocast(self.device, self.settings.precision)

    # files ----------------------------------------------------------------------------------

    def shards(self):
        return sorted((self.out / "synthetic").glob("*.pt"))

    def show(self, kind, step, model):
        """A grid from fixed noise and captions into samples/."""
        _, caption = self.dataset.batch(np.arange(32), held_out=True)
        captions = [self.dataset.captions[i] for i in caption]
        images = data.to_uint8(
            self.generator(kind, model).sample(captions, seed=self.settings.seed)
        )
        path = self.out / "samples" / f"{kind}-{step:06d}.png"
        sample.save_png(sample.grid(images, 8), path, step=step, captions="; ".join(captions))

    def log(self, **row):
        with open(self.out / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def rows(self):
        """The rows of log.jsonl; what a cut or damage left of others is passed over."""
        path = self.out / "log.jsonl"
        for line in path.read_bytes().splitlines() if path.exists() else []:
            with contextlib.suppress(ValueError, RecursionError):
                row = json.loads(line)
                if isinstance(row, dict) and isinstance(row.get("step", 0), int):
                    yield row

    def forget_log(self, stage, step):
        """Drops the log's lines after a saved state: the updates they tell of are done again."""
        kept = [r for r in self.rows() if r.get("stage") != stage or r.get("step", 0) <= step]
        write("".join(json.dumps(row) + "\n" for row in kept), self.out / "log.jsonl")

    def write_board(self, stage, step, values):
        """tensorboard, if asked for."""
        if not self.settings.tensorboard:
            return
        if self.board is None:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise RunError("--tensorboard needs: pip install tensorboard") from None
            self.board = SummaryWriter(str(self.out / "tensorboard"))
        for name, value in values.items():
            self.board.add_scalar(f"{stage}/{name}", value, step)

    def command(self):
        """The command line that gives these settings."""
        row = dataclasses.asdict(Settings()) | PRESETS[self.settings.preset]
        words = [f"python ladd.py --preset {self.settings.preset}"]
        for name, value in dataclasses.asdict(self.settings).items():
            if value != row[name] and name not in FREE | {"preset", "seed", "steps_scale"}:
                flag = "--" + name.replace("_", "-")
                text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
                if isinstance(value, bool):
                    words.append(flag if value else "--no-" + flag[2:])
                else:
                    words.append(f"{flag} {shlex.quote(text)}")
        return " ".join(words)

    def write_report(self, rows, accuracy, report_seconds):
        """metrics.json and report.md."""
        s, where = self.settings, machine()
        seconds = {}
        for row in self.rows():
            if row.get("stage") in STAGES and isinstance(row.get("seconds"), float):
                seconds[row["stage"]] = row["seconds"]
        seconds["report"] = report_seconds
        metrics = dict(
            rows=rows, judge_accuracy=accuracy, seconds=seconds, seed=s.seed, data=s.data
        )
        metrics |= dict(preset=s.preset, notes=self.notes, command=self.command(), **where)
        write(json.dumps(metrics, indent=1) + "\n", self.out / "metrics.json")
        judged = sample.accuracy_line(accuracy)
        dirty = " with uncommitted changes" if where["dirty"] else ""
        took = ", ".join(f"{stage} {value:.0f} s" for stage, value in seconds.items())
        lines = [
            f"# {s.preset} on {s.data}, seed {s.seed}",
            *self.notes,
            "",
            "![samples](samples.png)",
        ]
        lines += ["", sample.markdown_table(rows), ""]
        lines += [
            f"{s.evaluation} samples per row, captions of held-out images. Fréchet distance, "
            "precision and recall in the judge's features. *untrained* is the student before "
            "distillation: the teacher, sampled as the student is.",
            "",
            f"The judge reads held-out images right: {judged}.",
            "",
            f"Time: {took}. Commit {where['commit']}{dirty}, torch {where['torch']}, "
            f"{where['gpu'] or where['processor']}, {where['threads']} threads.",
        ]
        write("\n".join(lines) + "\n", self.out / "report.md")


class Loop:
    """The steps of a stage, and around them: resuming, logging, progress, saved states."""

    def __init__(self, run, stage, total, batch):
        self.run, self.stage, self.total, self.batch = run, stage, total, batch
        self.step, self.sums, self.path = 0, {}, run.out / f"{stage}-state.pt"

    def resume(self, networks, optimizers):
        """Remembers what a state consists of, and takes it from the last saved one, if any."""
        self.networks, self.optimizers = networks, optimizers
        if self.path.exists():
            state = torch.load(self.path, map_location=self.run.device, weights_only=True)
            for name, network in networks.items():
                network.load_state_dict(state["networks"][name])
            for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            self.step, self.sums = state["step"], state["sums"]
            print(f"{self.stage}: going on from update {self.step} of {self.total}", flush=True)
        self.run.forget_log(self.stage, self.step)
        if self.run.settings.compile:
            for network in networks.values():
                network.compile()

    def __iter__(self):
        self.start, self.first = time.perf_counter(), self.step
        self.last_line = self.start
        with progress(self.stage, self.total, self.step) as self.bar:
            while self.step < self.total:
                yield self.step
                self.step += 1
                self.bar.update()

    def forget(self):
        """The stage's result is safe: its state is not needed any more."""
        self.path.unlink(missing_ok=True)

    def due(self, every):
        """Whether something done every so many updates, and at the end, is due after this one."""
        return (self.step + 1) % every == 0 or self.step + 1 == self.total

    def log(self, **values):
        """Adds up the values; at every log line writes their means. Non-finite ones end the run."""
        for name, value in values.items():
            total, n = self.sums.get(name, (0, 0))
            self.sums[name] = (total + value.detach().float(), n + 1)
        if self.step - self.first == 4:  # the first updates are slower
            self.warm = time.perf_counter()
        if self.step - self.first == 14:
            self.warn_if_hours()
        if self.due(self.run.settings.log_every):
            means = {name: (total / n).item() for name, (total, n) in self.sums.items()}
            self.sums = {}
            if not all(map(math.isfinite, means.values())):
                raise RunError(
                    f"{self.stage}: a loss or gradient is not finite at update {self.step + 1} "
                    f"({means}). Try a lower learning rate or --precision fp32; the last saved "
                    f"state is {self.path}."
                )
            self.tell(means)

    def warn_if_hours(self):
        """After the first updates: on a CPU a preset made for a GPU takes days."""
        left = (self.total - self.step - 1) * (time.perf_counter() - self.warm) / 10
        if self.run.device.type == "cpu" and left > 3600:
            print(
                f"The {self.stage} alone needs about {left / 3600:.0f} hours on this CPU. "
                "`--preset nano` is made for a CPU: minutes in all.",
                file=sys.stderr,
                flush=True,
            )

    def tell(self, means):
        now = time.perf_counter()
        speed = (self.step + 1 - self.first) / (now - self.start)  # updates per second
        means["images_per_s"] = speed * self.batch
        self.run.log(stage=self.stage, step=self.step + 1, **means)
        self.run.write_board(self.stage, self.step + 1, means)
        shown = {k: f"{means[k]:.3f}" for k in SHOWN if k in means}
        self.bar.set_postfix(shown | {"img/s": f"{means['images_per_s']:.0f}"})
        left = (self.total - self.step - 1) / speed
        if self.bar.disable and (now - self.last_line > 15 or self.due(self.total)):
            self.last_line = now
            line = ", ".join(f"{k} {v}" for k, v in shown.items())
            print(
                f"{self.stage} {self.step + 1}/{self.total}: {line}, "
                f"{means['images_per_s']:.0f} images/s, {left / 60:.1f} min left",
                flush=True,
            )

    def checkpoint(self):
        """Saves a state from which a cut run goes on, every `save_every` updates."""
        if (self.step + 1) % self.run.settings.save_every or self.step + 1 == self.total:
            return
        state = dict(step=self.step + 1, sums=self.sums)
        state["networks"] = {name: network.state_dict() for name, network in self.networks.items()}
        state["optimizers"] = [optimizer.state_dict() for optimizer in self.optimizers]
        save(state, self.path)


SHOWN = ("loss", "loss_d", "loss_g", "d_real", "d_fake")


# ---------------------------------------------------------------------------------------------
# Plumbing: command line
# ---------------------------------------------------------------------------------------------

STAGES = ("teacher", "synthesis", "distillation", "report")


def parse(argv):
    """The command line -> Settings: the preset's row, with every given flag replacing a field."""
    parser = sample.Parser(
        "ladd.py",
        description="Trains a teacher, lets it make samples, distils a few-step student, reports.",
        allow_abbrev=False,
    )
    for field in dataclasses.fields(Settings):
        flag, help = "--" + field.name.replace("_", "-"), field.metadata["help"]
        options = dict(default=argparse.SUPPRESS, help=help)
        if field.name == "preset":
            parser.add_argument(flag, **options, choices=list(PRESETS))
        elif isinstance(field.default, bool):
            parser.add_argument(flag, **options, action=argparse.BooleanOptionalAction)
        elif isinstance(field.default, tuple):
            kind = int if field.name == "taps" else float
            parser.add_argument(
                flag, **options, metavar="A,B,…", type=lambda text, kind=kind: numbers(text, kind)
            )
        else:
            kind = float if field.default is None else type(field.default)
            parser.add_argument(flag, **options, type=kind, metavar="X")
    given = vars(parser.parse_args(argv))
    settings = Settings(**{**PRESETS[given.get("preset", "nano")], **given})
    if not settings.out:
        name = settings.preset
        if settings.data != PRESETS[name].get("data", "shapes"):
            name += "-" + Path(settings.data).stem
        settings = dataclasses.replace(settings, out=f"runs/{name}")
    check(settings, parser.error)
    check(settings.scaled(), parser.error)
    return settings.scaled(), "data" in given


def numbers(text, kind):
    return tuple(kind(part) for part in text.split(",") if part)


AT_LEAST_ONE = "size patch width depth heads text_length teacher_iterations teacher_batch"
AT_LEAST_ONE += " teacher_steps synthetic synthetic_steps iterations batch head_width"
AT_LEAST_ONE += " judge_steps judge_width save_every sample_every log_every pos_size"
ABOVE_ZERO = "steps_scale teacher_lr student_lr heads_lr clip t_std t_hat_std shift"
SHARES = "drop teacher_ema student_ema beta1"


def check(s, error):
    """Refuses settings that can't work, with one clear line."""

    def demand(right, name, why):
        if not right:
            error(f"--{name.replace('_', '-')} {getattr(s, name)}: {why}")

    for name in AT_LEAST_ONE.split():
        demand(getattr(s, name) >= 1, name, "must be at least 1")
    for name in ABOVE_ZERO.split():
        demand(getattr(s, name) > 0, name, "must be above 0")
    for name in SHARES.split():
        demand(0 <= getattr(s, name) < 1, name, "must be from 0 to below 1")
    demand(s.channels == 3, "channels", "images have 3; other latents need an encoder")
    demand(s.size % s.patch == 0, "size", f"patches of {s.patch} pixels don't divide it")
    demand(s.size <= s.patch * s.pos_size, "size", f"more than {s.pos_size} patches a side")
    demand(
        s.width % s.heads == 0 and s.width % 4 == 0,
        "width",
        f"not a multiple of 4 and of --heads {s.heads}",
    )
    demand(s.text_dim >= 2 and s.text_dim % 2 == 0, "text_dim", "must be even")
    groups = max(1, s.head_width // 16)
    demand(s.head_width % groups == 0, "head_width", "must be a multiple of 16, or less than 32")
    same = len(s.levels) == len(s.level_p) == len(s.warmup_p)
    demand(same, "level_p", "--levels, --level-p and --warmup-p need the same number of values")
    falling = all(a > b for a, b in pairwise((*s.levels, 0)))
    demand(
        s.levels and s.levels[0] <= 1 and falling, "levels", "must fall, from at most 1 to above 0"
    )
    demand(min(s.level_p) >= 0 and sum(s.level_p) > 0, "level_p", "must be probabilities")
    warm = min(s.warmup_p) >= 0 and sum(s.warmup_p) > 0
    demand(warm or not s.warmup_iterations, "warmup_p", "must be probabilities")
    demand(s.heads_warmup < s.iterations, "heads_warmup", f"leaves none of {s.iterations} updates")
    demand(s.evaluation >= 8, "evaluation", "scores need at least 8 samples")
    demand(s.targets in ("synthetic", "real"), "targets", "must be synthetic or real")
    demand(s.stage in ("all", *STAGES), "stage", f"must be all, {', '.join(STAGES)}")
    demand(s.precision in ("auto", "bf16", "fp32"), "precision", "must be auto, bf16 or fp32")
    ascending = list(s.taps) == sorted(set(s.taps)) and all(0 <= i < s.depth for i in s.taps)
    demand(ascending, "taps", f"must be ascending block numbers from 0 to {s.depth - 1}")
    try:
        torch.empty(0, device=sample.best_device() if s.device == "auto" else s.device)
    except (RuntimeError, AssertionError) as reason:
        error(f"--device {s.device}: {str(reason).splitlines()[0]}")


def open_folder(settings):
    """Makes the run folder, or finds it made with the same settings."""
    out, mine = Path(settings.out), dataclasses.asdict(settings)
    mine = json.loads(json.dumps({k: v for k, v in mine.items() if k not in FREE}))
    path = out / "config.json"
    if path.exists():
        theirs = data.read_object(path)
        names = [k for k in {**theirs, **mine} if theirs.get(k) != mine.get(k)]
        if names:
            different = ", ".join(f"{k} {theirs.get(k)} → {mine.get(k)}" for k in names)
            raise UsageError(
                f"{out} was made with other settings ({different}). "
                f"Choose another folder with --out, or give the same settings to go on."
            )
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} is not empty and not a run folder: choose another with --out.")
    else:
        out.mkdir(parents=True, exist_ok=True)
        write(json.dumps(mine, indent=1) + "\n", path)


class UsageError(Exception):
    """What the user asked for can't be done; exit status 2."""


def machine():
    """What the first row of a log says about where it was made."""

    def git(*words):
        try:
            answer = subprocess.run(
                ["git", *words],
                cwd=Path(__file__).parent,
                capture_output=True,
                text=True,
                timeout=10,
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return answer.stdout.strip() if answer.returncode == 0 else None

    changed = git("status", "--porcelain", "--untracked-files=no")
    return dict(
        commit=git("rev-parse", "HEAD"),
        dirty=None if changed is None else bool(changed),
        python=platform.python_version(),
        torch=torch.__version__,
        numpy=np.__version__,
        machine=platform.machine(),
        processor=processor(),
        threads=torch.get_num_threads(),
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    )


def processor():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor()


def load_data(settings, given):
    """The data set; where a preset's own default can't be had, shapes in its place, said loudly."""
    try:
        run = Run(settings)
        held_out = getattr(run.dataset, "held_out_images", None)
        if held_out is not None and len(held_out) < 8:
            raise data.DataError(
                f"--data {settings.data}: {len(held_out) + run.dataset.train_size} images are too "
                "few: a tenth is held out to score by, and that takes at least 80."
            )
        return settings, None, run
    except data.DataError as error:
        if given or settings.data == "shapes":
            raise
        note = f"{settings.data} can't be had, so this run uses the built-in shapes. {error}"
        settings = dataclasses.replace(settings, data="shapes")
        return settings, note, Run(settings)


def main(argv=None):
    settings, given = parse(argv)
    try:
        if settings.teacher:
            given_teacher(settings)
        settings, note, run = load_data(settings, given)
        open_folder(settings)
        if note:
            run.notes.append(note)
            print(f"\n!!! {note}\n", file=sys.stderr, flush=True)
        run.log(settings=dataclasses.asdict(settings), note=note, **machine())
        execute(run)
        if note:
            print(f"\n!!! {note}\n", file=sys.stderr, flush=True)
    except (UsageError, data.DataError, sample.CheckpointError) as error:
        print(f"ladd.py: {data.clean(error, 4000)}", file=sys.stderr)
        return 2
    except (RunError, OSError) as error:
        print(f"ladd.py: {data.clean(error, 4000)}", file=sys.stderr)
        return 1
    return 0


def given_teacher(s):
    """The checkpoint of --teacher, if its network is that of the settings."""
    checkpoint = sample.read_checkpoint(s.teacher)
    with torch.device("meta"):
        wanted = MMDiT(**s.model()).config
    different = [k for k in wanted if checkpoint["model"].get(k) != wanted[k]]
    if different:
        names = ", ".join(f"{k} {checkpoint['model'].get(k)} → {wanted[k]}" for k in different)
        raise UsageError(f"--teacher {s.teacher}: another network than the settings' ({names}).")
    return checkpoint


def execute(run):
    """The stages in order; one that is finished is skipped."""
    s, wanted = run.settings, STAGES if run.settings.stage == "all" else (run.settings.stage,)
    if s.teacher and not run.path("teacher").exists():
        save(given_teacher(s) | dict(kind="teacher"), run.path("teacher"))
    done = dict(
        teacher=run.path("teacher").exists(),
        synthesis=s.targets == "real" or len(run.shards()) == math.ceil(s.synthetic / SHARD),
        distillation=run.path("student").exists(),
        report=(run.out / "report.md").exists(),
    )
    work = dict(teacher=train_teacher, synthesis=synthesise, distillation=distil, report=report)
    for i, stage in enumerate(STAGES):
        if stage not in wanted:
            continue
        missing = [before for before in STAGES[:i] if not done[before]]
        if missing:
            raise UsageError(f"--stage {stage} needs the stage {missing[0]} first.")
        if done[stage]:
            print(f"{stage}: done before", flush=True)
            continue
        start = time.perf_counter()
        work[stage](run)
        seconds = time.perf_counter() - start
        run.log(stage=stage, finished=True, seconds=seconds)
        print(f"{stage}: {seconds:.0f} s", flush=True)
        done[stage] = True


if __name__ == "__main__":
    sys.exit(main())
