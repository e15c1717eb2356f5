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
             + λ·smooth_l1(x̂_0, x_0)           ours, λ = 0 at the paper's sizes

sg means stop-gradient. The features f of the fakes serve both players, so an iteration costs six
forward units (a backward counts two, one through the frozen teacher): student 1 + 2, teacher on
fakes 1 + 1, teacher on reals 1. The paper published neither code nor learning rates, batch size,
optimiser or EMA: those are ours, chosen by the experiments in docs/log.md.

    python ladd.py --preset nano                  everything, on a laptop, with built-in data
    python ladd.py --preset tiny                  CIFAR-10 on one GPU
    python ladd.py --sweep t_hat_mean=-2,0 --seeds 0,1    students that differ, and their table
    python ladd.py --preset sd3-8b --dry-run      what the real size needs: no GPU, no weights
"""

import argparse
import contextlib
import copy
import ctypes
import dataclasses
import datetime
import functools
import hashlib
import itertools
import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
import traceback
import warnings
from itertools import groupby, pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_map
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import data
import sample
from discriminator import Discriminator, hinge_d, hinge_g, r1
from mmdit import MMDiT, open_sd3, write_sd3
from sample import add_noise, logit_normal, per_sample, predict_x0, read, save

# ---------------------------------------------------------------------------------------------
# Settings and presets
# ---------------------------------------------------------------------------------------------


def setting(default, help):
    return dataclasses.field(default=default, metadata={"help": help})


@dataclasses.dataclass(frozen=True)
class Settings:
    """Every setting, its default and its meaning; the command line is made from this."""

    preset: str = setting("nano", "the row of PRESETS to start from")
    data: str = setting("shapes", "shapes, cifar10, or a folder or zip of images, or of shards")
    seed: int = setting(0, "of all randomness")
    size: int = setting(16, "side of the images, pixels")
    aspects: tuple = setting(("1:1",), "width:height of the images; all have the area of size²")
    # the network: teacher and student
    channels: int = setting(3, "of x_0: 3 for pixels")
    downscale: int = setting(1, "pixels per position of x_0: 8 for SD3's latents")
    patch: int = setting(2, "side of a patch")
    width: int = setting(128, "D")
    depth: int = setting(4, "blocks")
    heads: int = setting(4, "attention heads")
    qk_norm: bool = setting(True, "RMSNorm of queries and keys, as in SD3.5")
    attn2_blocks: int = setting(0, "first blocks with a second attention, 13 in SD3.5-medium")
    pos_size: int = setting(32, "side of the position table, patches")
    text_dim: int = setting(64, "width of the text features")
    pooled_dim: int = setting(0, "width of the pooled ones; 0: the same")
    text_length: int = setting(8, "words of a caption that are read")
    # teacher (rectified flow, arXiv 2403.03206)
    teacher_iterations: int = setting(2400, "updates of the teacher")
    teacher_batch: int = setting(64, "images per update")
    teacher_lr: float = setting(2e-3, "AdamW, for what Muon does not train")
    muon_lr: float = setting(0.02, "Muon, for the blocks' matrices; 0: AdamW for all")
    t_mean: float = setting(-0.5, "logit-normal mean of t in training (SD3: 0)")
    t_std: float = setting(1.0, "its standard deviation (SD3: 1)")
    drop: float = setting(0.1, "share of captions dropped, for guidance")
    teacher_ema: float = setting(0.995, "decay per update of the teacher's average")
    teacher_steps: int = setting(32, "Euler steps of the teacher's samples")
    cfg: float = setting(4.0, "guidance scale w of the teacher's samples")
    shift: float = setting(1.0, "timestep shift α of Euler sampling")
    # synthesis
    synthetic: int = setting(4096, "samples the teacher makes for the student to learn from")
    synthetic_cfg: float = setting(4.0, "their constant guidance scale")
    synthetic_steps: int = setting(8, "their Euler steps")
    # distillation (LADD)
    iterations: int = setting(2200, "updates of the student and the heads")
    batch: int = setting(32, "images per update")
    method: str = setting("ladd", "or a baseline: regression, consistency, add, dmd")
    student_init: str = setting("teacher", "the student starts as the teacher, or from scratch")
    student_depth: int = setting(0, "blocks of the teacher that the student starts with; 0: all")
    shared_pass: bool = setting(True, "one pass of the fakes serves both players")
    levels: tuple = setting((), "noise levels t of the student (default: by size, see alpha)")
    level_p: tuple = setting(
        (), "their probabilities (reported: .7, .1, .1, .1; default: .4, and equal parts of .6)"
    )
    warmup_iterations: int = setting(0, "first updates, with other probabilities")
    warmup_p: tuple = setting((0.0, 0.0, 0.5, 0.5), "probabilities during those")
    t_hat_mean: float | None = setting(
        None, "m of t̂ ~ logit-normal(m, s) (default: by size, see alpha)"
    )
    t_hat_std: float = setting(1.0, "s of t̂")
    targets: str = setting("synthetic", "what is real to the heads: synthetic or real")
    distill_weight: float = setting(150.0, "weight of a distillation loss beside L_G; 0: pure LADD")
    heads_warmup: int = setting(
        100, "first updates, of the heads alone: their gradient is noise then"
    )
    taps: tuple = setting((1, 2), "blocks whose tokens the heads see; empty: all")
    head_width: int = setting(64, "channels of a head")
    conditional: bool = setting(True, "the heads are told t̂ and the pooled text")
    student_lr: float = setting(2e-4, "AdamW")
    heads_lr: float = setting(1e-3, "AdamW")
    beta1: float = setting(0.5, "AdamW's first decay, student and heads")
    adam_eps: float = setting(1e-8, "AdamW's ε (SD3: 1e-15)")
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
    checkpointing: bool = setting(False, "less memory: a backward computes the blocks again")
    accumulate: int = setting(1, "parts that a process's share of a batch is worked through in")
    units: float = setting(0.0, "instead of --iterations: forwards of the network, see UNITS")
    shard: bool = setting(False, "of many processes each holds a part of the networks (FSDP)")
    offload: bool = setting(False, "--shard: weights and moments of what learns wait on the CPU")
    replicas: int = setting(1, "--shard: parts are held so many times (hybrid: once per node)")
    explain: bool = setting(False, "follow one batch from images to losses, and stop")
    dry_run: bool = setting(False, "print what the run needs, and stop: no data, GPU or weights")
    gpus: int = setting(1, "--dry-run: number of GPUs")
    tflops: float = setting(989.0, "--dry-run: TFLOP/s of one GPU (H100 and H200: 989, dense bf16)")
    utilisation: float = setting(0.4, "--dry-run: the share of it that is reached")
    sweep: tuple = setting((), "NAME=A,B,…: a student for each value; may be repeated, see README")
    seeds: tuple = setting((0, 1, 2), "--sweep: seeds of the students; one teacher serves all")
    stage: str = setting("all", "run one stage: teacher, synthesis, distillation, report")
    teacher: str = setting(
        "", "a teacher to use instead of training one: our .pt, .safetensors, or a diffusers folder"
    )
    discriminator: str = setting("", "another run's heads.pt for the heads to start from")
    smoke: bool = setting(False, "two updates of every stage, to see that all of it runs")
    steps_scale: float = setting(1.0, "multiplies all updates, the synthetic set, the evaluation")
    deterministic: bool = setting(False, "only kernels that give the same bits every time")
    save_every: int = setting(500, "updates between states from which a cut run goes on")
    save_minutes: float = setting(10.0, "minutes after which a state is due anyway; 0: never")
    stop_after: float = setting(0.0, "minutes after which to save and exit with 75; 0: never")
    sample_every: int = setting(1000, "updates between sample grids")
    log_every: int = setting(20, "updates between lines of log.jsonl")
    tensorboard: bool = setting(False, "also write logs for tensorboard")

    @property
    def tapped(self):
        return self.taps or tuple(range(self.depth))

    @property
    def side(self):
        """Height and width of a square x_0."""
        return self.size // self.downscale

    @property
    def sizes(self):
        """(H, W) of x_0 for every aspect ratio."""
        return sample.latent_sizes(dataclasses.asdict(self))

    def logit_shift(self, size):
        """What SD3's shift α = √(n / n_square) for n = H·W positions adds to the logit of a t."""
        return 0.5 * math.log(size[0] * size[1] / self.side**2)

    @property
    def alpha(self):
        """SD3's shift α = √(n / n') from a 1024² image's latent to this x_0, n counted in values.

        The same t destroys more of a small image than of a large one, so the paper's levels and m
        belong to its latents of 16·128·128 values. Elsewhere (ours, by the experiments in
        docs/log.md) m, the mean of a logit, moves by ln α, as SD3 moves t, and the levels' logits
        by a third of it: -1.92 and {1, .53, .27, .11} for 16×16 pixels. Counting values instead of
        positions makes latents and pixels comparable."""
        return math.sqrt(self.channels * self.side**2 / (16 * 128**2))

    @property
    def m(self):
        """Mean of t̂'s logit."""
        return 1 + math.log(self.alpha) if self.t_hat_mean is None else self.t_hat_mean

    def default_levels(self):
        paper, alpha = (1.0, 0.75, 0.5, 0.25), self.alpha ** (1 / 3)
        return tuple(round(sample.shift_t(t, alpha), 4) for t in paper)

    def model(self):
        """MMDiT's arguments."""
        return dict(
            depth=self.depth,
            width=self.width,
            heads=self.heads,
            patch=self.patch,
            channels=self.channels,
            context_dim=self.text_dim,
            pooled_dim=self.pooled_dim or self.text_dim,
            pos_size=self.pos_size,
            qk_norm=self.qk_norm,
            attn2_blocks=self.attn2_blocks,
        )

    def head_sizes(self):
        """The Discriminator's arguments."""
        pooled, width = self.pooled_dim or self.text_dim, self.width
        sizes = dict(width=width, taps=self.tapped, pooled_dim=pooled, hidden=self.head_width)
        return sizes | dict(conditional=self.conditional)

    def scaled(self):
        """The settings with the size's levels, --smoke and --steps-scale worked in."""
        levels = self.levels or self.default_levels()
        others = (round(0.6 / (len(levels) - 1), 4),) * (len(levels) - 1) if levels[1:] else ()
        changes = dict(levels=levels, level_p=self.level_p or (0.4, *others))
        if self.units:
            more = 2 * (self.method == "ladd" and twice(self))
            changes["iterations"] = round(self.units / (UNITS[self.method] + more))
        if self.steps_scale != 1:
            for name in SCALED:
                value = changes.get(name, getattr(self, name))
                changes[name] = min(value, 1) and max(1, round(value * self.steps_scale))
        if self.smoke:
            changes |= dict(teacher_iterations=2, iterations=2, synthetic=32, evaluation=32)
            changes |= dict(heads_warmup=0)
            changes |= dict(judge_steps=20, teacher_batch=16, batch=16, log_every=1, sample_every=2)
            changes |= dict(teacher_steps=4, synthetic_steps=4)
        return dataclasses.replace(self, **changes)


# What an update costs in forwards of the whole network; a backward counts two, one through a frozen
# network one, LADD's heads nothing; ADD's, on larger maps, two at nano.
UNITS = dict(ladd=6, regression=3, consistency=6, add=5, dmd=9)

SCALED = ("teacher_iterations", "heads_warmup", "iterations", "synthetic", "evaluation")

# What SD3-medium and SD3.5-large have in common. [P] stands in arXiv 2403.03206 (SD3) or in the
# released files, [L] is reported of LADD (arXiv 2403.12015), all else is ours and not measured.
SD3 = dict(
    size=1024, channels=16, downscale=8, patch=2, pos_size=192,  # [P]
    text_dim=4096, pooled_dim=2048, text_length=154,  # [P] 77 tokens of CLIP, 77 of T5
    shift=3.0, adam_eps=1e-15,  # [P]
    levels=(1.0, 0.75, 0.5, 0.25), level_p=(0.7, 0.1, 0.1, 0.1),  # [L]
    warmup_iterations=500, warmup_p=(0.0, 0.0, 0.5, 0.5),  # [L] above 512²
    t_mean=0.0,  # [P]
    t_hat_mean=1.0, t_hat_std=1.0, taps=(), distill_weight=0.0,  # [L] m of -1, 0, 1, 2; all blocks
    iterations=10_000,  # [L] of its ablations
    aspects=("1:1", "5:4", "4:5", "3:2", "2:3", "16:9", "9:16"), batch=128, synthetic=500_000,
    student_lr=1e-5, heads_lr=1e-4, student_ema=0.999, head_width=128, save_every=500,
    muon_lr=0.0, shard=True,
)  # fmt: skip

PRESETS = {
    "nano": dict(),
    "tiny": dict(
        data="cifar10", size=32, width=384, depth=8, heads=6, text_length=16, t_mean=0.0,
        teacher_iterations=20_000, teacher_batch=256, teacher_lr=1e-3, teacher_ema=0.999, cfg=2.0,
        synthetic=50_000, synthetic_cfg=2.0, synthetic_steps=16, iterations=8_000, batch=256,
        taps=(), student_ema=0.999, evaluation=10_000, judge_steps=8_000, judge_width=64,
        log_every=50, save_every=2_000, sample_every=2_000,
    ),
    "small": dict(  # ours, not run yet; folders of photographs take --data PATH
        size=64, aspects=("1:1", "4:3", "3:4", "3:2", "2:3", "16:9", "9:16"), patch=4, width=512,
        depth=12, heads=8, text_length=16, teacher_iterations=40_000, teacher_batch=256, t_mean=0.0,
        teacher_lr=1e-3, teacher_ema=0.999, synthetic=50_000, iterations=10_000, batch=256,
        taps=(), student_ema=0.999, evaluation=10_000, judge_steps=8_000, judge_width=64,
        log_every=50, save_every=2_000, sample_every=2_000,
    ),
    # SD3-medium. SD3.5-medium is --qk-norm --attn2-blocks 13 --pos-size 384, as its weights say.
    "sd3-2b": SD3 | dict(
        depth=24, width=1536, heads=24, qk_norm=False,  # [P]
        teacher_steps=50, cfg=5.0, synthetic_steps=50, synthetic_cfg=5.0,  # [P] as released
    ),
    "sd3-8b": SD3 | dict(
        depth=38, width=2432, heads=38, qk_norm=True,  # [P]
        teacher_steps=40, cfg=4.5, synthetic_steps=40, synthetic_cfg=4.5,  # [P] as released
    ),
}  # fmt: skip

# Settings that may differ between two commands of the same run.
FREE = {"out", "data_dir", "device", "stage", "save_every", "sample_every", "log_every"}
FREE |= {"tensorboard", "compile", "checkpointing", "dry_run", "gpus", "tflops", "utilisation"}
FREE |= {"explain", "save_minutes", "stop_after", "shard", "replicas", "sweep", "seeds"}
FREE |= {"accumulate", "offload", "units"}


class RunError(Exception):
    """The run can't go on; the message says why and what to do."""


class Stop(BaseException):
    """The run was asked to end, and what it has is saved; holds the exit status. Like Ctrl-C's
    own exception it passes by `except Exception`."""


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


def distillation_loss(x0_hat, x0, known):
    """Beside L_G, ours: smooth L1 between x̂_0 and x_0 where x_0 can be `known` (B,) from x_t."""
    loss = F.smooth_l1_loss(x0_hat, x0, reduction="none").mean(dim=(1, 2, 3))
    return (loss * known).mean()


@torch.no_grad()
def diversity(fake, real):
    """Mean distance of a sample's features to the nearest other one's, of fakes over of reals.

    f, r (B, N, D), of the same captions with repetitions. 1 for the reals' own variety, 0 where all
    are alike or every caption has one image, about 1/2 where half of them are alike."""

    def spread(f):
        f = f.float().flatten(1)
        distances = torch.cdist(f, f, compute_mode="donot_use_mm_for_euclid_dist")
        return distances.fill_diagonal_(math.inf).amin(dim=1).mean()

    return (spread(fake) + 1e-6) / (spread(real) + 1e-6) if len(fake) > 1 else torch.tensor(1.0)


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
    optimizers = make_optimizers(model, s.teacher_lr, s.muon_lr, 0.9, s.adam_eps)
    ema = run.seeded(MMDiT, **s.model()).requires_grad_(False)
    model.checkpointing = s.checkpointing

    def losses(parts, values):
        for x0, text, t, noise in parts:
            with run.autocast():
                loss = teacher_loss(model, x0, text, t, noise)
            add(values, len(parts), loss=loss)
            yield loss / len(parts)

    words = run.text.ids(run.dataset.captions)
    loop = Loop(run, "teacher", s.teacher_iterations, s.teacher_batch)
    loop.resume(dict(model=model, ema=ema), optimizers)
    for step in loop:
        random = run.random("teacher", step)
        index = mine(np.arange(step * s.teacher_batch, (step + 1) * s.teacher_batch))
        images, caption = run.bucket("teacher", step).batch(index)
        kept = mine(torch.rand(s.teacher_batch, generator=random)) >= s.drop
        text = run.text.features((words[caption] * kept[:, None]).to(device))
        x0 = data.to_float(images.to(device))
        mean = s.t_mean + s.logit_shift(x0.shape[2:])
        t = mine(logit_normal(s.teacher_batch, mean, s.t_std, random)).to(device)
        noise = mine(torch.randn(s.teacher_batch, *x0.shape[1:], generator=random)).to(device)
        parts, values = cut((x0, text, t, noise), s.accumulate), {}
        rate = learning_rate(step, loop.total, 0.6)
        norm = update(optimizers, losses(parts, values), model, s.clip, rate)
        update_ema(ema, model, s.teacher_ema, step)
        loop.log(**values, grad_norm=norm)
        if loop.due(s.sample_every):
            run.show("teacher", step + 1, ema)
        loop.checkpoint()
    run.save("teacher", ema, s.teacher_iterations)
    loop.forget()


# ---------------------------------------------------------------------------------------------
# Stage 2: synthesis
# ---------------------------------------------------------------------------------------------

SHARD = 512  # samples of one file, all of one shape


def shard_buckets(run):
    """The bucket of every shard, each as often as its share of the images, and a shard's size."""
    s = run.settings
    size = min(SHARD, math.ceil(s.synthetic / len(data.buckets_of(run.dataset))))
    shares = data.shares(run.dataset, math.ceil(s.synthetic / size))
    return [bucket for bucket, n in shares for _ in range(n)], size


def synthesise(run):
    """The teacher's samples, in shards: what is real to the discriminator. A cut run goes on."""
    s, folder = run.settings, run.out / "synthetic"
    teacher = run.generator("teacher")
    options = dict(seed=s.seed + 2, steps=s.synthetic_steps, cfg=s.synthetic_cfg)
    buckets, size = shard_buckets(run)
    path = lambda shard: folder / f"{shard:05d}.pt"  # noqa: E731
    todo = shared([shard for shard in range(len(buckets)) if not path(shard).exists()])
    with progress("synthesis", len(buckets), len(buckets) - len(todo)) as bar:
        for turn in range(0, len(todo), world()):
            # Divided networks need all processes: those without a shard of their own join in.
            shard = todo[min(turn + rank(), len(todo) - 1)]
            bucket, end = buckets[shard], s.synthetic + size * run.divided
            index = np.arange(shard * size, min((shard + 1) * size, end))
            first = buckets.index(bucket) * size  # a bucket's own captions from the first on
            _, caption = bucket.batch(index - first + data.SYNTHETIC_INDEX)
            captions = [run.dataset.captions[i] for i in caption]
            x0 = teacher.sample(captions, index, size=bucket.size, **options)
            index = index[index < s.synthetic]
            x0, captions = x0[: len(index)], captions[: len(index)]
            if not x0.isfinite().all():
                raise RunError(
                    f"the teacher's samples {index[0]} to {index[-1]} are not finite. Train it "
                    "in another folder (--out) with a lower --teacher-lr or --precision fp32."
                )
            if turn + rank() < len(todo):
                made = dict(x0=x0.half(), captions=captions, index=index.tolist())
                save(made | dict(seed=options["seed"]), path(shard))
            bar.update(min(world(), len(todo) - turn))
            run.watch.check()


def read_shard(path, s, check=True):
    """A file of samples, memory-mapped: x0 (n, C, H, W) float16, n captions, the noise's seed."""
    try:
        if check and sample.differs(path):
            raise ValueError("its content is not what was written: the checksum differs")
        shard = sample.mapped(path)
        x0, captions = shard["x0"], [c + "" for c in shard["captions"]]
        n, channels, *size = x0.shape
        if (n, channels) != (len(captions), s.channels) or [v % s.patch for v in size] != [0, 0]:
            raise ValueError("samples and captions don't match")
        return dict(x0=x0, captions=captions, seed=int(shard.get("seed", s.seed + 2)))
    except Exception as error:  # a damaged file raises nearly anything
        reason = (str(error) or type(error).__name__).splitlines()[0][:100]
        raise RunError(
            f"{path} is damaged ({reason}). Delete it and give the command again."
        ) from None


def distillation_batches(run):
    """A function step -> x0, text, source: what the student learns from.

    source is the noise that the teacher made x0 from; None for real targets, or if not needed."""
    s, device = run.settings, run.device
    if s.targets == "real":
        words, dataset = run.text.ids(run.dataset.captions), run.dataset
    else:
        own = set(mine(run.shards()))  # the processes share the work of checking
        shards = [read_shard(path, s, path in own) for path in run.shards()]
        seed = shards[0]["seed"]  # of a sweep's students, that of the shared teacher
        words = run.text.ids([caption for shard in shards for caption in shard["captions"]])
        rows = torch.arange(len(words)).split([len(shard["x0"]) for shard in shards])
        parts = {}  # shape -> its samples and their rows in `words`, shard by shard
        for shard, row in zip(shards, rows, strict=True):
            parts.setdefault(shard["x0"].shape[1:], []).append((shard["x0"], row))
        columns = [zip(*part, strict=True) for part in parts.values()]
        columns = [(data.Joined(x0), torch.cat(row)) for x0, row in columns]
        dataset = data.Buckets(
            [data.ImageSet("synthetic", own, seed=s.seed, flip=False) for own in columns]
        )

    def draw(step):
        bucket = run.bucket("distillation", step, dataset)
        images, caption = bucket.batch(mine(np.arange(step * s.batch, (step + 1) * s.batch)))
        x0 = data.to_float(images)
        source = None
        held = s.distill_weight and s.method in ("ladd", "add")  # to its sample, from pure noise
        if s.targets == "synthetic" and (held or s.method == "regression"):
            source = sample.noise_of(seed, caption.tolist(), x0.shape[1:]).to(device)
        return x0.to(device), run.text.features(words[caption].to(device)), source

    return draw


def commonest(x0, pooled, most):
    """Rows of at most `most` samples: of the commonest captions first, four different ones each."""
    _, caption, count = pooled.unique(dim=0, return_inverse=True, return_counts=True)
    rows = []
    for common in count.argsort(descending=True, stable=True)[:most].tolist():
        own = []
        for row in (caption == common).nonzero()[:, 0].tolist():
            seen = any(torch.equal(x0[row], x0[other]) for other in own)  # in an earlier epoch
            own += [row] * (len(own) < 4 and not seen)
        rows += own
    return rows[:most]


@torch.no_grad()
def diversity_probe(run, teacher, batch):
    """A function student -> diversity of what it makes of pure noise, at always the same captions:
    of some 2,000 samples the commonest, 32 in all (or as many as are worked on at once).

    All are noised alike for the teacher, so that only their images differ. A log line costs a
    third of an update."""
    s, size = run.settings, len(batch(0)[0])
    drawn = [batch(step) for step in range(min(64, math.ceil(2048 / size)))]
    drawn = [(x0, *text, source) for x0, text, source in drawn if x0.shape == drawn[0][0].shape]
    *columns, sources = zip(*drawn, strict=True)
    x0, context, pooled = map(torch.cat, columns)
    rows = commonest(x0, pooled, min(32, size // s.accumulate))
    x0, text = x0[rows], (context[rows], pooled[rows])
    alike = sample.noise_of(s.seed + 4, [0], x0.shape[1:]).to(x0).expand_as(x0)
    noise = sample.noise_of(s.seed + 5, range(len(x0)), x0.shape[1:]).to(x0)
    if sources[0] is not None:
        noise = torch.cat(sources)[rows]
    t, m = torch.full_like(x0[:, 0, 0, 0], s.levels[0]), s.m + s.logit_shift(x0.shape[2:])
    t_hat = torch.full_like(t, m).sigmoid()

    @torch.no_grad()
    def features(x):
        with run.autocast():
            return teacher_features(teacher, x, text, t_hat, alike, s.tapped)[-1]

    @torch.no_grad()
    def measure(student):
        with run.autocast():
            x0_hat = student_predict(student, x0, text, t, noise)
        return diversity(features(x0_hat), real)

    real = features(x0)
    return measure


# ---------------------------------------------------------------------------------------------
# Stage 3: LADD
# ---------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """What an update starts from: this process's share, or a part of it."""

    x0: torch.Tensor  # (B, C, H, W) what is real
    text: tuple  # (B, M, D_c), (B, D_p)
    t: torch.Tensor  # (B,) the student's levels
    noise: torch.Tensor  # (B, C, H, W) ε of box 1
    known: torch.Tensor  # (B,) whether x_t can tell x_0
    t_hat: torch.Tensor  # (B,) t̂, the level of the re-noising
    noise_fake: torch.Tensor  # (B, C, H, W) ε of box 3, of x̂_0
    noise_real: torch.Tensor  # and of x_0

    @property
    def condition(self):
        """What the heads are told: t̂, the pooled text."""
        return self.t_hat, self.text[1]


def draw_batch(run, draw, step, turn=0):
    """All that is random in an update, drawn from (seed, step, turn) alone."""
    s, device = run.settings, run.device
    random = run.random("distillation", step + (turn << 40))
    x0, text, source = draw(step)
    since = max(0, step - warmup(s))  # the heads, alone, see the student's first levels
    t = mine(draw_levels(s, s.batch, since, random)).to(device)
    m = s.m + s.logit_shift(x0.shape[2:])
    t_hat = mine(logit_normal(s.batch, m, s.t_hat_std, random)).to(device)
    noises = torch.randn(3, s.batch, *x0.shape[1:], generator=random)
    noise, noise_fake, noise_real = (mine(noise).to(device) for noise in noises)
    known = t < s.levels[0]
    if source is not None:  # from pure noise only the teacher's own noise tells its sample
        noise = torch.where(per_sample(known, x0), noise, source)
        known = torch.ones_like(known)
    return Batch(x0, text, t, noise, known, t_hat, noise_fake, noise_real)


def start_student(run):
    """The student before its first update and its average: copies of the teacher, or of
    --student-depth of its blocks; or random weights. -> student, average, [optimiser]"""
    s = run.settings
    scratch = s.student_init == "scratch"
    student, ema = (
        run.seeded(MMDiT, **s.model()) if scratch else run.load("teacher") for _ in range(2)
    )
    for network in (student, ema):
        n, depth = s.student_depth or s.depth, s.depth
        blocks = network.joint_blocks
        if n < depth:  # equally far apart, the last one among them
            network.joint_blocks = torch.nn.ModuleList(
                blocks[(i + 1) * depth // n - 1] for i in range(n)
            )
            network.config["depth"] = n
    student.checkpointing = s.checkpointing
    student.requires_grad_(True)
    optimizer = make_optimizers(student, s.student_lr, 0.0, s.beta1, s.adam_eps)
    return student, ema.requires_grad_(False), optimizer


def warmup(s):
    """The first updates, of the heads alone; a method without heads has none."""
    return s.heads_warmup if s.method in ("ladd", "add") else 0


def student_rate(s, step):
    """The student's learning rate, as a factor: it falls over the last 30 % of the updates."""
    return learning_rate(step - warmup(s), s.iterations - warmup(s), 0.3)


def distil(run):
    s = run.settings
    student, ema, student_optimizer = start_student(run)
    teacher = run.load("teacher", frozen=True)
    run.compile(teacher)
    teacher.checkpointing = s.checkpointing
    heads = run.seeded(Discriminator, **s.head_sizes())
    heads_optimizer = make_optimizers(heads, s.heads_lr, 0.0, s.beta1, s.adam_eps)
    if s.discriminator:
        start_heads(s, heads, heads_optimizer[0])

    def fakes(b):  # boxes 1 to 4
        x0_hat = student_predict(student, b.x0, b.text, b.t, b.noise)
        return x0_hat, teacher_features(teacher, x0_hat, b.text, b.t_hat, b.noise_fake, s.tapped)

    def heads_losses(parts, values, kept):  # box 5, part by part; the fakes' graph goes to `kept`
        for b in parts:
            with run.autocast(), torch.set_grad_enabled(kept is not None):
                x0_hat, fake = fakes(b)
            with run.autocast(), torch.no_grad():
                real = teacher_features(teacher, b.x0, b.text, b.t_hat, b.noise_real, s.tapped)
            with run.autocast():
                loss, *logits = discriminator_loss(heads, real, fake, *b.condition, grid(b), s.r1)
            if kept is not None:
                kept.append((x0_hat, fake))
            add(values, len(parts), loss_d=loss, **told_apart(*logits))
            yield loss / len(parts)

    def student_losses(parts, values, kept):  # box 6
        for i, b in enumerate(parts):
            with run.autocast():
                x0_hat, fake = kept[i] if kept else fakes(b)
                loss = generator_loss(heads, fake, *b.condition, grid(b))
                if s.distill_weight:
                    loss = loss + s.distill_weight * distillation_loss(x0_hat, b.x0, b.known)
            add(values, len(parts), loss_g=loss)
            yield loss / len(parts)

    def grid(b):
        return b.x0.shape[2] // s.patch, b.x0.shape[3] // s.patch

    draw = distillation_batches(run)
    probe = diversity_probe(run, teacher, draw)
    loop = Loop(run, "distillation", s.iterations, s.batch)
    loop.resume(dict(student=student, ema=ema, heads=heads), student_optimizer + heads_optimizer)
    for step in loop:
        # Generators: `update` asks for a part's loss (which fills `values` and `kept`), goes back
        # through it, asks for the next, and steps once. L_D's way back ends at the detached f.
        parts = cut(draw_batch(run, draw, step), s.accumulate)
        learning, values = step >= s.heads_warmup, {}
        # One pass of the fakes serves both players, unless their graphs would not fit in memory.
        kept = None if twice(s) or not learning else []
        losses = heads_losses(parts, values, kept)
        norm_d = update(heads_optimizer, losses, heads, math.inf, min(1.0, (step + 1) / 40))
        values |= dict(grad_norm_heads=norm_d)
        if loop.due(s.log_every):
            values["diversity"] = probe(student)
        if learning and norm_d is not None:
            if not s.shared_pass:
                parts = cut(draw_batch(run, draw, step, turn=1), s.accumulate)
            losses = student_losses(parts, values, kept)
            norm_g = update(student_optimizer, losses, student, s.clip, student_rate(s, step))
            update_ema(ema, student, s.student_ema, step - s.heads_warmup)
            values |= dict(grad_norm=norm_g)
        loop.log(**values)
        if loop.due(s.sample_every):
            run.show("student", step + 1, ema)
        loop.checkpoint()
    run.save("heads", heads, s.iterations, optimizer=heads_optimizer[0].state_dict())
    finish(run, loop, ema)


def start_heads(s, heads, optimizer):
    """Takes heads and their optimiser's state from --discriminator."""
    start = given_heads(s)
    fill(heads, start["weights"])
    moments = dict(state=start["optimizer"]["state"])  # the learning rate is the settings'
    fill_optimizer(optimizer, optimizer.state_dict() | moments)


def told_apart(real, fake):
    """How well the heads tell samples apart: real and fake logits (B, …) -> what is logged."""
    ranked = (real.flatten(1).mean(1) > fake.flatten(1).mean(1)).float().mean()
    return dict(d_real=real.mean(), d_fake=fake.mean(), ranked=ranked)


def finish(run, loop, ema):
    """The student is its average."""
    s = run.settings
    run.save("student", ema, s.iterations)
    if s.downscale > 1 and rank() == 0:  # of latents: SD3's names, for other programs
        weights = sample.read_checkpoint(run.path("student"))["weights"]
        with data.replacing(run.out / "student.safetensors") as file:
            write_sd3(file, weights, s.heads, "BF16")
    loop.forget()


# ---------------------------------------------------------------------------------------------
# Stage 3 by other methods: what LADD is compared with, from the same teacher, samples and batches
# ---------------------------------------------------------------------------------------------


def regress(run):
    """Regression to the teacher's samples from the noise that they were made of (3 units)."""
    s = run.settings
    student, ema, optimizer = start_student(run)
    draw = distillation_batches(run)
    loop = Loop(run, "distillation", s.iterations, s.batch)
    loop.resume(dict(student=student, ema=ema), optimizer)
    for step in loop:
        b = draw_batch(run, draw, step)
        with run.autocast():
            x0_hat = student_predict(student, b.x0, b.text, b.t, b.noise)
            loss = distillation_loss(x0_hat, b.x0, b.known)
        norm = update(optimizer, loss, student, s.clip, student_rate(s, step))
        update_ema(ema, student, s.student_ema, step)
        loop.log(loss=loss, grad_norm=norm)
        loop.checkpoint()
    finish(run, loop, ema)


def consistency_loss(student, ema, velocity, b, t, t_next):
    """The student's x̂_0 from x_t is held to its average's from x_t', where one step of `velocity`,
    the guided teacher's, leads. Pseudo-Huber. velocity(x_t, t) -> v; t' < t (B,) -> scalar"""
    xt = add_noise(b.x0, b.noise, t)
    with torch.no_grad():
        x_next = xt + per_sample(t_next - t, xt) * velocity(xt, t)
        target = predict_x0(x_next, ema(x_next, t_next, *b.text)[0], t_next)
    x0_hat = predict_x0(xt, student(xt, t, *b.text)[0], t)
    return (((x0_hat - target).square() + 1e-6).sqrt() - 1e-3).mean()


def distil_consistency(run):
    """Latent consistency distillation (LCM, arXiv 2310.04378), on 32 levels (6 units).

    Ours: the average that is the target is the result, too."""
    s, times = run.settings, sample.euler_times(32, run.settings.shift).to(run.device)
    student, ema, optimizer = start_student(run)
    teacher, uncond = run.load("teacher", frozen=True), run.text([""])
    draw = distillation_batches(run)
    loop = Loop(run, "distillation", s.iterations, s.batch)
    loop.resume(dict(student=student, ema=ema), optimizer)
    for step in loop:
        b = draw_batch(run, draw, step)
        u = mine(torch.rand(s.batch, generator=run.random("distillation", step + (1 << 41))))
        i = (u * 32).long().to(run.device)
        with run.autocast():
            guided = functools.partial(
                sample.guided_velocity, teacher, text=b.text, uncond=uncond, cfg=s.synthetic_cfg
            )
            loss = consistency_loss(student, ema, guided, b, times[i], times[i + 1])
        norm = update(optimizer, loss, student, s.clip, student_rate(s, step))
        update_ema(ema, student, s.student_ema, step)
        loop.log(loss=loss, grad_norm=norm)
        loop.checkpoint()
    finish(run, loop, ema)


def judge_features(judge, x0):
    """The maps after the judge's convolutions: [(tokens (B, h·w, C), (h, w))]"""
    found, x = [], x0
    for layer in judge.body:
        x = layer(x)
        if isinstance(layer, torch.nn.Conv2d):
            found.append((x.flatten(2).transpose(1, 2), tuple(x.shape[2:])))
    return found


def distil_add(run):
    """Adversarial diffusion distillation (ADD, arXiv 2311.17042): the same heads, on the features
    of a frozen network of clean pixels, here the judge; the teacher has no part (3 units, and at
    nano 2 of the heads)."""
    s, judge = run.settings, run.judge().requires_grad_(False)
    student, ema, student_optimizer = start_student(run)
    widths = [layer.out_channels for layer in judge.body if isinstance(layer, torch.nn.Conv2d)]
    made = [run.seeded(Discriminator, **s.head_sizes() | dict(width=w, taps=(0,))) for w in widths]
    heads = torch.nn.ModuleList(made)
    heads_optimizer = make_optimizers(heads, s.heads_lr, 0.0, s.beta1, s.adam_eps)

    def logits(features, b):  # of every map, (B, 1, h, w)
        clean = torch.zeros_like(b.t)
        both = zip(heads, features, strict=True)
        return [h([f], clean, b.text[1], *g) for h, (f, g) in both]

    draw = distillation_batches(run)
    loop = Loop(run, "distillation", s.iterations, s.batch)
    loop.resume(dict(student=student, ema=ema, heads=heads), student_optimizer + heads_optimizer)
    for step in loop:
        b, learning = draw_batch(run, draw, step), step >= s.heads_warmup
        with run.autocast(), torch.set_grad_enabled(learning):
            x0_hat = student_predict(student, b.x0, b.text, b.t, b.noise)
            fake = judge_features(judge, x0_hat)
            real = judge_features(judge, b.x0)
        with run.autocast():
            on = logits(real, b), logits([(f.detach(), g) for f, g in fake], b)
            loss_d = sum(map(hinge_d, *on)) / len(heads)  # every map counts alike
        norm_d = update(heads_optimizer, loss_d, heads, math.inf, min(1.0, (step + 1) / 40))
        means = ([x.detach().float().flatten(1).mean(1) for x in own] for own in on)
        apart = told_apart(*(torch.stack(own, dim=1) for own in means))
        values = dict(loss_d=loss_d, grad_norm_heads=norm_d, **apart)
        if learning and norm_d is not None:
            heads.requires_grad_(False)
            with run.autocast():
                loss = sum(map(hinge_g, logits(fake, b))) / len(heads)
                if s.distill_weight:
                    loss = loss + s.distill_weight * distillation_loss(x0_hat, b.x0, b.known)
            heads.requires_grad_(True)
            norm = update(student_optimizer, loss, student, s.clip, student_rate(s, step))
            update_ema(ema, student, s.student_ema, step - s.heads_warmup)
            values |= dict(loss_g=loss, grad_norm=norm)
        loop.log(**values)
        loop.checkpoint()
    finish(run, loop, ema)


@torch.no_grad()
def matching_gradient(x0_hat, noise, t, velocity, score):
    """DMD's gradient with respect to x̂_0: what the fakes' own score network predicts from its
    noised form, less what the guided teacher does, over how far off x̂_0 is. -> (B, C, H, W)

    velocity(x_t, t), the guided teacher's, and score(x_t, t) -> v (B, C, H, W)"""
    xt = add_noise(x0_hat, noise, t)
    real, fake = (predict_x0(xt, v(xt, t), t) for v in (velocity, score))
    far = (x0_hat - real).abs().mean((1, 2, 3), keepdim=True)
    return (fake - real) / far.clamp(min=1e-3)


def matching_loss(x0_hat, gradient):
    """The scalar whose gradient with respect to x̂_0 is the given one, over its number of values."""
    return 0.5 * (x0_hat - (x0_hat - gradient).detach()).square().mean()


def match_distributions(run):
    """Distribution matching (DMD, arXiv 2311.18828), without its regression; nor is it DMD2, which
    updates the score five times for each of the student's and has a GAN loss, too. The student
    follows the difference of two scores, of the guided teacher and of a network that learns the
    student's own samples (9 units)."""
    s = run.settings
    student, ema, optimizer = start_student(run)
    teacher, uncond = run.load("teacher", frozen=True), run.text([""])
    score = run.load("teacher").requires_grad_(True)  # of the fakes
    score_optimizer = make_optimizers(score, s.student_lr, 0.0, s.beta1, s.adam_eps)
    draw = distillation_batches(run)
    loop = Loop(run, "distillation", s.iterations, s.batch)
    networks = dict(student=student, ema=ema, score=score)
    loop.resume(networks, optimizer + score_optimizer)
    for step in loop:
        b, random = draw_batch(run, draw, step), run.random("distillation", step + (1 << 41))
        t, t_score = (0.02 + 0.96 * mine(torch.rand(2, s.batch, generator=random).T).T).to(b.t)
        with run.autocast():
            x0_hat = student_predict(student, b.x0, b.text, b.t, b.noise)
            guided = functools.partial(
                sample.guided_velocity, teacher, text=b.text, uncond=uncond, cfg=s.synthetic_cfg
            )
            fakes = lambda xt, t, text=b.text: score(xt, t, *text)[0]  # noqa: E731
            gradient = matching_gradient(x0_hat, b.noise_fake, t, guided, fakes)
        loss = matching_loss(x0_hat, gradient)
        norm = update(optimizer, loss, student, s.clip, student_rate(s, step))
        update_ema(ema, student, s.student_ema, step)
        with run.autocast():
            loss_score = teacher_loss(score, x0_hat.detach(), b.text, t_score, b.noise_real)
        norm_score = update(score_optimizer, loss_score, score, s.clip, 1.0)
        values = dict(loss=loss, grad_norm=norm, loss_score=loss_score)
        loop.log(**values, grad_norm_score=norm_score)
        loop.checkpoint()
    finish(run, loop, ema)


# ---------------------------------------------------------------------------------------------
# Stage 4: report
# ---------------------------------------------------------------------------------------------


def report(run):
    """Scores everything; writes samples.png (same noise for all), metrics.json and report.md."""
    s, start = run.settings, time.perf_counter()
    run.divided = False  # this is the first process's alone
    if s.channels != 3:
        command = f"`python sample.py {run.out} --decode SD3_DIR --prompt TEXT`"
        return write(f"Latents are not scored. {command} makes pictures.\n", run.out / "report.md")
    judge = run.judge()
    teacher, student = run.generator("teacher"), run.generator("student")
    accuracy = sample.judge_accuracy(run.dataset, judge)
    rows = sample.evaluate(run.dataset, judge, teacher, student, s.evaluation, s.seed)

    parts = sample.held_out_captions(run.dataset, 24)
    captions = [caption for own, _ in parts for caption in own]
    made = [(f"teacher, {s.teacher_steps} steps", teacher, dict(steps=s.teacher_steps))]
    few = [n for n in (4, 2, 1) if n <= len(s.levels)]
    made += [(f"student, {n} step{'s'[: n > 1]}", student, dict(steps=n)) for n in few]
    made += [("untrained, 1 step", teacher, dict(steps=1, cfg=1.0, sampler="renoise"))]
    titled = []
    for title, generator, options in made:
        images = sample.sample_buckets(generator, parts, seed=s.seed + 3, **options)
        titled.append((title, [image for part in images for image in data.to_uint8(part)]))
    sample.save_png(sample.panels(titled, 4), run.out / "samples.png", captions="; ".join(captions))

    run.write_report(rows, accuracy, time.perf_counter() - start)
    print(sample.markdown_table(rows), flush=True)
    print(f"The judge reads held-out images right: {sample.accuracy_line(accuracy)}", flush=True)


# ---------------------------------------------------------------------------------------------
# Explanation: one batch, followed through the functions above
# ---------------------------------------------------------------------------------------------


def explain(run):
    """Prints every quantity of an iteration: its shape, range, mean, and who receives gradient.

    Of the run's finished teacher, if there is one; the student is before its first update. x_0 are
    real images here, not yet the teacher's samples; always of LADD, whatever --method says."""
    s = run.settings
    taught = run.path("teacher").exists()
    teacher = run.load("teacher") if taught else run.seeded(MMDiT, **s.model())
    student = copy.deepcopy(teacher).requires_grad_(True)
    networks = dict(student=student, teacher=teacher.requires_grad_(False))
    networks["heads"] = heads = run.seeded(Discriminator, **s.head_sizes())
    lines = [f"{'quantity':12}{'shape':18}{'from':>8}{'to':>8}{'mean':>8}  what it is"]

    def show(symbol, value, what):
        value = value.detach().float()
        shape = "×".join(map(str, value.shape)) or "scalar"
        low, high, mean = (f"{v:8.2f}" for v in (value.min(), value.max(), value.mean()))
        symbol += " " * (12 - len(symbol.replace("\u0302", "")))  # a hat takes no room
        lines.append(f"{symbol}{shape:18}{low}{high}{mean}  {what}")

    def gradients(loss, symbol):
        for network in networks.values():
            network.zero_grad(set_to_none=True)
        loss.backward()
        for name, network in networks.items():
            grads = [p.grad for p in network.parameters() if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(grads) if grads else None
            told = "none" if norm is None else f"norm {norm:.3g}"
            lines.append(f"    gradient of {symbol} to the {name}: {told}")

    images, caption = run.bucket("distillation", 0).batch(np.arange(s.batch))
    captions = [run.dataset.captions[i] for i in caption]
    drawn = data.to_float(images).to(run.device), run.text(captions), None
    b = draw_batch(run, lambda step: drawn, warmup(s) + s.warmup_iterations)
    x0, text, t, noise, _, t_hat, noise_fake, noise_real = b
    grid = tuple(side // s.patch for side in x0.shape[2:])
    show("x_0", x0, f'images, the first: "{captions[0]}"')
    show("c", text[0], "the captions' features, one row a token")
    show("y", text[1], "the captions' pooled features")
    show("t", t, f"the student's noise levels, of {s.levels}")
    show("x_t", add_noise(x0, noise, t), "1  what the student sees: (1 - t)·x_0 + t·ε")
    with run.autocast():
        x0_hat = student_predict(student, x0, text, t, noise)
        show("x̂_0", x0_hat, "2  what it makes of it: x_t - t·v")
        show("t̂", t_hat, f"3  the level of the re-noising, logit-normal({s.m:.2f}, {s.t_hat_std})")
        show("x̂_t̂", add_noise(x0_hat, noise_fake, t_hat), "   what the frozen teacher sees of it")
        fake = teacher_features(teacher, x0_hat, text, t_hat, noise_fake, s.tapped)
        with torch.no_grad():
            real = teacher_features(teacher, x0, text, t_hat, noise_real, s.tapped)
        for block, f, r in zip(s.tapped, fake, real, strict=True):
            show(f"f, block {block}", f, "4  image tokens of the fakes after this block")
            show(f"r, block {block}", r, "   and of the real ones")
        loss, *logits = discriminator_loss(heads, real, fake, t_hat, text[1], grid, s.r1)
    show("D(r)", logits[0], "5  logits: one a head and position")
    show("D(sg f)", logits[1], "   and those of the fakes")
    show("L_D", loss, "   hinge loss of the heads; 2 is chance")
    gradients(loss, "L_D")
    with run.autocast():
        loss = generator_loss(heads, fake, t_hat, text[1], grid)
        more = f"; training adds {s.distill_weight:g}·smooth_l1(x̂_0, x_0)" * bool(s.distill_weight)
        show("L_G", loss, f"6  -mean logit: the student's loss{more}")
        gradients(loss, "L_G")
    if not taught:
        lines.append(f"The networks are untrained: {run.path('teacher')} is not there yet.")
    print("\n".join(lines))


# ---------------------------------------------------------------------------------------------
# Sweeps: students that differ in a setting, from one teacher
# ---------------------------------------------------------------------------------------------

# In a sweep's folder lie `shared`, the teachers and their samples, each made once; `members`, a run
# folder for every student, named by its settings, so that sweeps in one folder share what they
# have in common; and for each sweep a folder with its table, picture and sweep.json.


def parse_sweep(settings, argv, error):
    """All combinations of the swept values: [({setting: value as text}, {seed: Settings})]"""
    known, axes = {f.name: f.default for f in dataclasses.fields(Settings)}, []
    for text in settings.sweep:
        name, _, values = text.partition("=")
        name = name.strip().lstrip("-").replace("-", "_")
        values = values.split("/" if isinstance(known.get(name), tuple) else ",")
        if name not in known or name in FREE - {"units"} | {"preset", "seed"} or not all(values):
            why = "a setting that changes results, and its values"
            error(f"--sweep {text}: must be {why}: t_hat_mean=-1,0,1 or taps=0,1/1,2")
        axes.append([(name, value) for value in values])
    swept = {name for axis in axes for name, _ in axis}
    if "iterations" in swept and (settings.units or "units" in swept):
        error("--sweep iterations: --units decides them")
    if not settings.seeds or len(set(settings.seeds)) < len(settings.seeds):
        error("--sweep takes at least one of --seeds, and none twice")
    if settings.channels != 3 or world() > 1 or settings.explain:
        error("--sweep scores images, takes one process, and no --explain")
    members = []
    for values in itertools.product(*axes):
        words = [
            f"--{'no-' * (value == 'false')}{name.replace('_', '-')}"
            if isinstance(known[name], bool) and value in ("true", "false")
            else f"--{name.replace('_', '-')}={value}"
            for name, value in values
        ]
        own = {seed: parse([*argv, *words, f"--seed={seed}"])[0] for seed in settings.seeds}
        members.append((dict(values), own))
    return members


def sweep(settings, members, watch):
    """Every student, seed by seed, then the table. What is finished is skipped."""
    out, total = Path(settings.out), len(members) * len(settings.seeds)
    results = [dict(values=values, runs=[]) for values, _ in members]
    with locked(out):
        for i, seed in enumerate(settings.seeds):
            for j, (values, own) in enumerate(members):
                name = ", ".join(f"{k}={v}" for k, v in values.items())
                print(f"student {i * len(members) + j + 1} of {total}: {name}, seed {seed}")
                results[j]["runs"].append(member(own[seed], settings.seed, out, watch))
        run = Run(settings)
        words = [run.command(), *[f"--seed {settings.seed}"] * bool(settings.seed)]
        words += [f"--units {settings.units:g}"] * bool(settings.units)
        words += [f"--sweep {shlex.quote(axis)}" for axis in settings.sweep]
        words += [f"--seeds {','.join(map(str, settings.seeds))}"]
        result = dict(command=" ".join(words))
        folder = sweep_folder(out, members[0][0], result["command"])
        first = dataclasses.replace(next(iter(members[0][1].values())), seed=settings.seed)
        result |= dict(seeds=settings.seeds, reference=reference(Run(first), out, watch))
        result |= dict(members=results, **machine())
        write(json.dumps(result, indent=1) + "\n", folder / "sweep.json")
        write(sweep_table(result) + "\n", folder / "sweep.md")
        watch.check()
        shown = [(values, own[settings.seeds[0]]) for values, own in members]
        sweep_picture(run, shown, out, folder / "sweep.png")
    print(f"{sweep_table(result)}\n\n{folder}", flush=True)


def sweep_folder(out, names, command):
    """Named by what is swept, and where that is another command's table by a digest, too."""
    folder = out / "+".join(names)
    made = folder / "sweep.json"
    if made.exists() and data.read_object(made).get("command") != command:
        folder = out / f"{folder.name}.{hashlib.sha256(command.encode()).hexdigest()[:8]}"
    return folder


def member(s, teacher_seed, out, watch):
    """One student with its scores: made in its run folder, if it is not there yet."""
    folder = member_folder(s, teacher_seed, out)
    if not sample.read_metrics(folder):
        source = samples_for(s, teacher_seed, out, watch)
        s = dataclasses.replace(s, stage="distillation", out=str(folder), sweep=())
        run = train(s, True, watch, source)
        watch.patient = False  # scoring saves nothing on its way
        watch.check()
        rows = sample.evaluate(
            run.dataset, run.judge(), None, run.generator("student"), s.evaluation, s.seed
        )
        took = [row["seconds"] for row in run.rows() if row.get("finished")]
        took = took[-1] if took else None  # None: cut between the student and its row
        run.write_metrics(rows, dict(distillation=took))
    return sample.read_metrics(folder)


def member_folder(s, teacher_seed, out):
    return out / "members" / f"{member_name(s)}-of-{teacher_seed}" / f"seed-{s.seed}"


def member_name(s):
    """What differs from the preset, and a digest of all settings but the seed."""
    row, own = (
        {k: v for k, v in dataclasses.asdict(x).items() if k not in FREE | {"seed"}}
        for x in (Settings(**PRESETS[s.preset]).scaled(), s)
    )
    files = [data.sha256(path) for path in (s.teacher, s.discriminator) if Path(path).is_file()]
    digest = hashlib.sha256(json.dumps([own, *files] if files else own).encode()).hexdigest()[:8]
    differs = ",".join(f"{k}={v}" for k, v in own.items() if v != row[k])
    name = re.sub(r"[^\w=.,-]+", "", differs.replace(", ", "-"))
    return f"{name[:120] or s.preset}.{digest}"


def samples_for(s, seed, out, watch):
    """The run folder with the teacher and the samples that a student learns from: those stages are
    run where no other student has needed them yet, with this seed for all."""
    names, source = [field.name for field in dataclasses.fields(Settings)], None
    row = dataclasses.asdict(Settings(**PRESETS[s.preset]).scaled())
    for stage, after in (("teacher", "teacher_steps"), ("synthesis", "iterations")):
        later = names[names.index(after) : names.index("out")]  # what the stage does not depend on
        later += ["cfg", "teacher_steps", "discriminator"]
        unread = {k: row[k] for k in later if k not in ("clip", "adam_eps")}
        own = dataclasses.replace(s, **unread, seed=seed, steps_scale=1.0)
        folder = out / "shared" / f"{stage}-{member_name(own)}-seed-{seed}"
        if stage == "teacher" or s.targets == "synthetic":
            train(dataclasses.replace(own, stage=stage, out=str(folder)), True, watch, source)
            source = folder
    return source


def reference(run, out, watch):
    """The rows of teacher and untrained student, with the settings of the first value."""
    s = run.settings
    path = out / "shared" / f"reference-{member_name(s)}-seed-{s.seed}.json"
    if not path.exists():
        source = samples_for(s, s.seed, out, watch)
        teacher = sample.load_generator(source, True, run.device, s.precision)
        teacher.settings = dataclasses.asdict(s)
        rows = sample.evaluate(run.dataset, run.judge(), teacher, None, s.evaluation, s.seed)
        write(json.dumps(dict(rows=rows)) + "\n", path)
    return data.read_object(path)["rows"]


STEPS, SCORES = (1, 2, 4), (("alignment", 2), ("frechet", 1), ("recall", 2))


def sweep_table(result):
    """A sweep.json's content as a table: mean ± standard deviation over its seeds."""
    names = list(result["members"][0]["values"])
    told = {"alignment": "alignment", "frechet": "Fréchet", "recall": "recall"}
    head = [*names, *(f"{told[key]}, {n}" for key, _ in SCORES for n in STEPS), "s"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]

    def line(first, who, runs, seconds):
        cells = list(first)
        for key, digits in SCORES:
            for n in STEPS:
                name = f"{who}, {n} step{'s'[: n > 1]}"
                found = [r[key] for rows in runs for r in rows if r["name"] == name]
                cells.append(mean_and_deviation(found, digits))
        lines.append("| " + " | ".join([*cells, seconds]) + " |")

    line(["*untrained*", *[""] * (len(names) - 1)], "untrained", [result["reference"]], "")
    for own in result["members"]:
        runs = own["runs"]
        seconds = mean_and_deviation([run["seconds"]["distillation"] for run in runs], 0)
        line(own["values"].values(), "student", [run["rows"] for run in runs], seconds)
    return "\n".join(lines)


def mean_and_deviation(values, digits):
    """Of the values that are known: not None."""
    values = [value for value in values if value is not None]
    if not values:
        return "–"
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if values[1:] else ""
    return f"{statistics.fmean(values):.{digits}f}{deviation}"


def sweep_picture(run, members, out, path):
    """sweep.png: a row of samples for every value, from the same captions and noise."""
    rows, captions = [], []
    for values, s in members:
        parts = sample.held_out_captions(Run(s).dataset, 8)
        captions += [caption for own, _ in parts for caption in own]
        folder, titled = member_folder(s, run.settings.seed, out), []
        student = sample.load_generator(folder, False, run.device, s.precision)
        for n in (n for n in STEPS if n <= len(s.levels)):
            made = sample.sample_buckets(student, parts, seed=s.seed + 3, steps=n)
            name = ", ".join(f"{k}={v}" for k, v in values.items())
            images = [image for part in made for image in data.to_uint8(part)]
            titled.append((f"{name}: {n} step{'s'[: n > 1]}", images))
        rows.append(sample.panels(titled, 8))
    sample.save_png(sample.stack(rows), path, captions="; ".join(captions))


# ---------------------------------------------------------------------------------------------
# The plan: what a run needs, from the same networks and steps without data (the meta device)
# ---------------------------------------------------------------------------------------------

NETWORK = 50e9  # bytes a second that one GPU exchanges with the others: 400 Gbit/s


def storages(tensors):
    """The memory under the tensors, every piece once. -> {identity: storage}"""
    return {t.untyped_storage()._cdata: t.untyped_storage() for t in tensors}


def bytes_of(pieces):
    return sum(storage.nbytes() for storage in pieces.values())


def meta_networks(s):
    """Student, frozen teacher and heads without data, and the precision that they compute in."""
    dtype = torch.float32 if s.precision == "fp32" else torch.bfloat16
    with torch.device("meta"):
        student = MMDiT(**s.model() | dict(depth=s.student_depth or s.depth))
        heads = Discriminator(**s.head_sizes())
        return student, MMDiT(**s.model()).requires_grad_(False), heads, dtype


def meta_state(s):
    """Bytes of all weights, gradients, optimisers, and of the position tables, undivided."""
    student, teacher, heads, dtype = meta_networks(s)
    networks, optimizers = (student, copy.deepcopy(student), teacher.to(dtype), heads), []
    for network, lr in ((student, s.student_lr), (heads, s.heads_lr)):
        for parameter in network.parameters():
            parameter.grad = torch.empty_like(parameter)
        optimizers += make_optimizers(network, lr, 0.0, s.beta1, s.adam_eps)
    for optimizer in optimizers:
        optimizer.step()
    weights = [p for network in networks for p in network.parameters()]
    moments = [v for o in optimizers for state in o.state.values() for v in state.values()]
    return dict(
        weights=bytes_of(storages(weights)),
        gradients=bytes_of(storages(p.grad for p in weights if p.grad is not None)),
        optimiser=bytes_of(storages(moments)),
        tables=bytes_of(storages(b for network in networks for b in network.buffers())),
    )


def twice(s):
    """Whether an update sends the fakes through student and teacher for each player."""
    return s.accumulate > 1 or not s.shared_pass


def meta_iteration(s, batch, checkpointing):
    """One update of `distil` without data -> the most bytes kept for a backward, FLOPs of one
    forward, and of all. Up to 512 tokens (float32: 128) attention is counted as on a CPU."""
    student, teacher, heads, dtype = meta_networks(s)
    cast = lambda x: x.to(dtype) if torch.is_tensor(x) else x  # noqa: E731
    for network in (student, teacher, heads):
        network.to(dtype).register_forward_pre_hook(lambda _, inputs: tree_map(cast, inputs))
    student.checkpointing = teacher.checkpointing = checkpointing
    (height, width), pooled_dim = s.sizes[0], student.config["pooled_dim"]
    grid = (height // s.patch, width // s.patch)
    with torch.device("meta"):
        x0, t = torch.empty(batch, s.channels, height, width), torch.empty(batch)
        text = torch.empty(batch, s.text_length, s.text_dim), torch.empty(batch, pooled_dim)
        tokens = [torch.empty(batch, n, s.width) for n in (s.text_length, math.prod(grid))]
    own = storages(v for n in (student, teacher, heads) for v in (*n.parameters(), *n.buffers()))
    kept, block = {}, 0

    def pack(tensor):
        kept.update({k: v for k, v in storages([tensor]).items() if k not in own})
        return tensor

    if checkpointing:  # the way back holds one block that it has computed again
        with saved_tensors_hooks(pack, lambda x: x):
            student.joint_blocks[0](*map(cast, tokens), cast(tokens[0][:, 0]))
        block, kept = bytes_of(kept), {}
    with FlopCounterMode(display=False) as flops, saved_tensors_hooks(pack, lambda x: x):
        with torch.set_grad_enabled(not twice(s)):
            x0_hat = student_predict(student, x0, text, t, x0)
            forward = flops.get_total_flops()
            fake = teacher_features(teacher, x0_hat, text, t, x0, s.tapped)
        with torch.no_grad():
            real = teacher_features(teacher, x0, text, t, x0, s.tapped)
        kept |= storages(fake)
        before = {} if twice(s) else dict(kept)
        kept |= storages(real)
        loss = discriminator_loss(heads, real, fake, t, text[1], grid, s.r1)[0]
        most, kept = bytes_of(kept), before
        loss.backward()
        if twice(s):
            x0_hat = student_predict(student, x0, text, t, x0)
            fake = teacher_features(teacher, x0_hat, text, t, x0, s.tapped)
            kept |= storages(fake)
        loss = generator_loss(heads, fake, t, text[1], grid)
        most = max(most, bytes_of(kept) + block)
        loss.backward()
    return most, forward, flops.get_total_flops()


def plan(s):
    """What `s.gpus` GPUs need for LADD: bytes of one GPU, FLOPs of all, seconds of an update.

    The student stands in float32 with its average, gradients (all the time, as when they are
    accumulated) and AdamW's moments, the teacher in the precision of the arithmetic; FSDP divides
    all of it and gathers block by block. Buffers of communication are not counted."""
    student, _, heads, dtype = meta_networks(s)
    sizes = dict(student=student, teacher=student, heads=heads)
    sizes = {k: sum(p.numel() for p in network.parameters()) for k, network in sizes.items()}
    block = max(sum(p.numel() for p in b.parameters()) for b in student.joint_blocks)
    state, images, width = meta_state(s), math.ceil(s.batch / s.gpus), dtype.itemsize
    part = math.ceil(images / s.accumulate)
    tables = state.pop("tables")
    parts = max(1, s.gpus // s.replicas) if s.shard else 1  # that the state is divided into
    share = {k: v / parts for k, v in state.items()} | dict(tables=tables)
    gather = block * (2 * width + 4)  # two blocks, and the gradients of one in float32
    share["gathered"] = gather if parts > 1 else 0
    # The student is gathered twice and its gradients reduced in float32, the teacher is gathered
    # for fakes, for reals and for the way back, each once more where the fakes pass twice; all of
    # it for every part. Traffic and arithmetic overlap.
    traffic = sizes["student"] * (5 * width + 4 + 2 * width * twice(s)) * (1 - 1 / parts)
    traffic *= s.accumulate
    rows = s.gpus // parts  # that hold the same, and have gradients to exchange
    traffic += 8 * sizes["student"] / parts * (1 - 1 / rows)
    ways = {}
    for again in (False, True):
        kept, forward, flops = meta_iteration(s, part, again)
        forward, flops = forward * s.accumulate, flops * s.accumulate
        seconds = max(flops / (s.tflops * 1e12 * s.utilisation), traffic / NETWORK)
        total = sum(share.values()) + kept
        ways[again] = dict(activations=kept, total=total, flops=flops * s.gpus, seconds=seconds)
    one_image = tables + gather + ways[True]["activations"] / part
    room = {gb: 0.9e9 * gb - one_image for gb in (80, 141)}  # a tenth for what is not counted
    smallest = {gb: math.ceil(sum(state.values()) / r) for gb, r in room.items() if r > 0}
    text = s.text_length * s.text_dim + student.config["pooled_dim"] if s.downscale > 1 else 0
    disk = s.synthetic * 2 * (s.channels * s.side**2 + text)
    result = dict(parameters=sizes, images=images, share=share, ways=ways, smallest=smallest)
    return result | dict(forward=forward * s.gpus, traffic=traffic, disk=disk)


def plan_table(s):
    p, (height, width) = plan(s), s.sizes[0]
    both = lambda key, form: " | ".join(form(way[key]) for way in p["ways"].values())  # noqa: E731
    forwards = lambda flops: f"{flops:.3e} ({flops / p['forward']:.2f} forwards)"  # noqa: E731
    fits = (f"{n} of {gb} GB" for gb, n in p["smallest"].items())
    rows = {f"{s.preset}, {s.gpus} GPUs": f"{p['images']} × {s.channels}×{height}×{width} each"}
    rows |= {f"parameters, {name}": f"{n:,}" for name, n in p["parameters"].items()}
    rows |= {f"a GPU's {name}": in_bytes(n) for name, n in p["share"].items()}
    rows |= {"(a | b: b is with --checkpointing)": ""}
    rows |= {"a GPU's activations": both("activations", in_bytes)}
    rows |= {"a GPU's sum": both("total", in_bytes), "FLOPs of an update": both("flops", forwards)}
    rows |= {"a GPU's traffic, an update": in_bytes(p["traffic"])}
    rows |= {f"seconds, {s.tflops:g} TFLOP/s × {s.utilisation:g}": both("seconds", "{:.3g}".format)}
    hours = lambda seconds: f"{seconds * s.iterations / 3600:.3g}"  # noqa: E731
    rows |= {f"hours, {s.iterations:,} updates": both("seconds", hours)}
    rows |= {"fewest GPUs, with --checkpointing": ", ".join(fits) or "none of 80 or 141 GB"}
    rows |= {f"{s.synthetic:,} samples on disk": in_bytes(p["disk"])}
    return "\n".join(f"{name:36}{value}".rstrip() for name, value in rows.items())


def in_bytes(n):
    power = min(3, max(0, int(math.log10(max(n, 1)) / 3)))
    return f"{n / 1000**power:,.3g} {('B', 'kB', 'MB', 'GB')[power]}"


# ---------------------------------------------------------------------------------------------
# Plumbing: many processes, as torchrun starts them; on one all of this disappears
# ---------------------------------------------------------------------------------------------

# Every process draws a batch's randomness as one process would and takes its part of it, so the
# results do not depend on their number. Small networks are copied to all, and their gradients
# averaged; --shard divides them by FSDP. The first process alone writes and speaks. What it takes
# of PyTorch is imported where it is used: importing it takes longer than all the rest.


def rank():
    return int(os.environ.get("RANK", 0))


def world():
    return int(os.environ.get("WORLD_SIZE", 1))


def mine(batch):
    """This process's part of a batch that all have drawn alike."""
    return batch[rank() :: world()]


def device_of(s):
    device = torch.device(sample.best_device() if s.device == "auto" else s.device)
    if device.type == "cuda" and world() > 1:
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return device


@contextlib.contextmanager
def together(s):
    """Joins the processes, and has all but the first be quiet. The first to fail tells why."""
    if world() == 1:
        yield
        return
    out, err = sys.stdout, sys.stderr
    if rank() > 0:
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    cuda = device_of(s).type == "cuda"
    if cuda:
        torch.cuda.set_device(device_of(s))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # without it, old addresses
    store = dist.PrefixStore(f"attempt {attempt}", next(dist.rendezvous("env://"))[0])
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo", store=store, rank=rank(), world_size=world(),
        timeout=datetime.timedelta(minutes=10),
    )  # fmt: skip
    try:
        yield
        part()
    except Stop:
        part()
        raise
    except Exception as error:
        sys.stdout, sys.stderr = out, err
        status, first = 1, False
        with contextlib.suppress(RuntimeError), quiet():  # where the store's own process is gone
            first = store.add("failed", 1) == 1
        if first:
            status = told(error)
        sys.stderr.flush()
        os._exit(status)  # without waiting for the others
    finally:
        sys.stdout, sys.stderr = out, err


@contextlib.contextmanager
def quiet():
    """Drops what C++ writes to standard error."""
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)


def part():
    """The processes end their work together; after this each is alone."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def shared(value):
    """The first process's value, in all of them. (With None: they wait for each other.)"""
    if dist.is_initialized():
        dist.broadcast_object_list(box := [value])
        dist.barrier()
        return box[0]
    return value


def highest(value):
    """The highest of all processes' numbers."""
    if dist.is_initialized():
        dist.all_reduce(value := torch.tensor(float(value)), dist.ReduceOp.MAX)
    return int(value)


def average(tensors):
    """Makes every tensor its mean over the processes. FSDP has done it for those it divides."""
    tensors = [t for t in tensors if not is_divided(t)]
    if dist.is_initialized() and tensors:
        flat = torch.cat([t.flatten() for t in tensors])
        dist.all_reduce(flat)
        flat /= world()
        for tensor, mean in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(mean.view_as(tensor))


def is_divided(tensor):
    return hasattr(tensor, "full_tensor")


def whole(tensor):
    """A divided tensor put together, in all processes."""
    return tensor.full_tensor() if is_divided(tensor) else tensor


def on_first(value):
    """A whole tensor in the first process's CPU memory; in the others, which help, nothing."""
    if not torch.is_tensor(value):
        return value
    value = whole(value.detach())
    return value.cpu() if rank() == 0 else None


def divided_as(tensor, other):
    """This process's part of a whole tensor that stands for `other`, which is divided."""
    if not is_divided(other) or is_divided(tensor) or tensor.ndim == 0:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    tensor = tensor.to(other.device)
    return distribute_tensor(tensor, other.device_mesh, other.placements, src_data_rank=None)


def fill(network, weights):
    """Loads a state dict of whole tensors, or of divided ones, into a network."""
    own = network.state_dict()
    network.load_state_dict({k: divided_as(v, own.get(k)) for k, v in weights.items()})


def fill_optimizer(optimizer, saved):
    """The same for an optimiser."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = {
        i: {k: divided_as(v, parameters[i]) for k, v in moments.items()}
        for i, moments in saved["state"].items()
    }
    optimizer.load_state_dict(saved | dict(state=state))


# ---------------------------------------------------------------------------------------------
# Plumbing: optimisers, averages
# ---------------------------------------------------------------------------------------------


def make_optimizers(model, lr, muon_lr, beta1, eps=1e-8):
    """[AdamW], or with muon_lr [AdamW, Muon], where Muon has the matrices of the blocks."""
    matrices, rest = [], []
    for name, parameter in model.named_parameters():
        inner = muon_lr and parameter.ndim == 2 and name.startswith("joint_blocks")
        (matrices if inner else rest).append(parameter)
    fused = rest[0].device.type in ("cpu", "cuda")  # and not on the meta device of the plan
    adamw = dict(betas=(beta1, 0.99), eps=eps, weight_decay=0.0, fused=fused)
    optimizers = [torch.optim.AdamW(rest, lr, **adamw)]
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


def update(optimizers, losses, model, clip, rate):
    """Backward and one step of all optimisers at `rate` times their lr. -> gradient norm

    losses: the loss, or parts of it one by one, whose sum it is. None, and no step at all, where
    the loss or the gradient is not finite. (To know costs a wait for the backward pass; the queue
    of the device fills again at once.)"""
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * rate
    total = 0.0
    for loss in [losses] if torch.is_tensor(losses) else losses:
        loss.backward()
        total = total + loss.detach()
    average([total, *(p.grad for p in model.parameters() if p.grad is not None)])
    norm = whole(torch.nn.utils.clip_grad_norm_(model.parameters(), clip)).to(total.device)
    if not (norm + total).isfinite():
        return None
    for optimizer in optimizers:
        optimizer.step()
    return norm


def cut(batch, n):
    """n equal parts of a batch: of every tensor in it."""
    return [tree_map(lambda x, i=i: x.chunk(n)[i], batch) for i in range(n)]


def add(values, n, **more):
    """Adds a part's values to the means over all n parts."""
    for name, value in more.items():
        values[name] = values.get(name, 0.0) + value.detach() / n


@torch.no_grad()
def update_ema(ema, model, decay, step):
    """ema ← decay·ema + (1 - decay)·model; the decay starts small, to forget the start."""
    decay = min(decay, (step + 1) / (step + 10))
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


# ---------------------------------------------------------------------------------------------
# Plumbing: the run folder
# ---------------------------------------------------------------------------------------------


def write(text, path):
    if rank() > 0:
        return
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
        self.device = device_of(settings)
        self.divided = settings.shard and world() > 1
        self.dataset = data.load(
            settings.data,
            settings.size,
            settings.size,
            data_dir=settings.data_dir,
            seed=settings.seed,
            sizes=settings.sizes,
        )
        encoded = isinstance(self.dataset, data.Shards)
        if encoded:
            wanted = settings.model()
            names = ("context_dim", "pooled_dim", "channels", "patch")
            self.dataset.expect(*(wanted[name] for name in names))
        elif settings.channels != 3:
            raise data.DataError(
                f"--preset {settings.preset} learns from latents of {settings.channels} channels, "
                f"and --data {settings.data} has images of 3: it needs a folder of encoded shards."
            )
        words = data.HashedText(settings.text_dim, settings.text_length)
        self.text = (self.dataset if encoded else words).to(self.device)
        self.notes = []  # lines the report must repeat
        self.board, self.watch, self.state = None, Watch(settings.stop_after), None
        self.earlier = 0.0  # seconds that earlier processes worked at the stage

    # networks -------------------------------------------------------------------------------

    def seeded(self, module, **arguments):
        """A fresh network, its weights drawn from the seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.settings.seed)
            return self.divide(module(**arguments))

    @functools.cached_property
    def mesh(self):
        """The processes, in rows that hold all of a network each."""
        from torch.distributed.device_mesh import init_device_mesh

        rows = self.settings.replicas
        shape = (rows, world() // rows) if rows > 1 else (world(),)
        names = ("replicate", "shard")[-len(shape) :]
        return init_device_mesh(self.device.type, shape, mesh_dim_names=names)

    def divide(self, network, learns=True):
        """The network on its device; with --shard by FSDP: a process holds a part of every tensor,
        and gathers block by block. In bf16 it gathers bf16 and adds gradients up in float32; what
        it holds is float32. With --offload the parts of what learns wait in CPU memory."""
        twice = self.settings.r1 and isinstance(network, Discriminator)
        if not self.divided or twice:  # R1's gradient of a gradient is not for FSDP
            return network.to(self.device)
        from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

        bf16 = sample.arithmetic(self.device, self.settings.precision) == torch.bfloat16
        types = dict(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if bf16 else {}
        options = dict(mesh=self.mesh, reshard_after_forward=True)
        options["mp_policy"] = MixedPrecisionPolicy(**types, cast_forward_inputs=False)
        place = self.device
        if self.settings.offload and learns:
            place = torch.device("cpu")
            options["offload_policy"] = CPUOffloadPolicy(pin_memory=self.device.type == "cuda")
        for module in (*getattr(network, "joint_blocks", ()), network):
            fully_shard(module, **options)
        if next(network.parameters()).is_meta:
            network.to_empty(device=place)
        for name, buffer in network.named_buffers():  # all of them are the network's own
            setattr(network, name, buffer.to(self.device))
        return network.to(place) if place == self.device else network

    def compile(self, network):
        """With --compile: block by block, as most are alike, once for every shape."""
        if self.settings.compile:
            torch._dynamo.config.recompile_limit = 64
            for module in getattr(network, "joint_blocks", [network]):
                module.compile()

    def path(self, kind):
        return self.out / f"{kind}.pt"

    def save(self, kind, model, step, **more):
        weights = {k: on_first(v) for k, v in model.state_dict().items()}
        more = tree_map(on_first, more)
        checkpoint = dict(format="ladd-1", kind=kind, model=model.config, weights=weights)
        settings = dataclasses.asdict(self.settings)
        if rank() == 0:
            save(checkpoint | dict(settings=settings, step=step, **more), self.path(kind))

    def load(self, kind, frozen=False):
        """The finished teacher or student, without gradient. One that stays `frozen` is kept in the
        precision of the arithmetic: autocast would cast its weights in every pass."""
        dtype = sample.arithmetic(self.device, self.settings.precision) if frozen else torch.float32
        if not self.divided:
            network = sample.build(sample.read_checkpoint(self.path(kind)), self.device)
            return network.to(dtype)
        if rank() == 0 and sample.differs(self.path(kind)):
            raise sample.CheckpointError(f"{self.path(kind)}: damaged, its checksum differs.")
        checkpoint = sample.mapped(self.path(kind))
        with torch.device("meta"):
            network = MMDiT(**checkpoint["model"]).to(dtype)
        network = self.divide(network, learns=not frozen)
        fill(network, checkpoint["weights"])  # tensor by tensor from the mapped file
        return network.eval().requires_grad_(False)

    def generator(self, kind, model=None):
        """What samples from the finished teacher or student, or from a network in training."""
        model = self.load(kind, frozen=self.divided) if model is None else model
        settings = dataclasses.asdict(self.settings)
        made = sample.Generator(model, settings, kind, self.device, self.settings.precision)
        made.text = self.text
        return made

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

    def bucket(self, stage, step, dataset=None):
        """The data set of one shape that an update's batch comes from."""
        dataset = self.dataset if dataset is None else dataset
        return data.draw_bucket(dataset, self.settings.seed, STAGES.index(stage), step)

    def autocast(self):
        return sample.autocast(self.device, self.settings.precision)

    # files ----------------------------------------------------------------------------------

    def shards(self):
        return sorted((self.out / "synthetic").glob("*.pt"))

    def show(self, kind, step, model):
        """A grid from fixed noise and captions into samples/; of pixels, not of latents."""
        if self.settings.channels != 3:
            return
        parts = sample.held_out_captions(self.dataset, 32)
        captions = [caption for own, _ in parts for caption in own]
        made = sample.sample_buckets(self.generator(kind, model), parts, seed=self.settings.seed)
        images = [image for part in made for image in data.to_uint8(part)]
        path = self.out / "samples" / f"{kind}-{step:06d}.png"
        if rank() == 0:
            sample.save_png(sample.grid(images, 8), path, step=step, captions="; ".join(captions))

    def states(self, stage):
        """The files of a stage's states, the newest last."""
        return sorted(self.out.glob(f"{stage}-state-*.pt"))

    def forget_state(self, path):
        if rank() == 0:
            path.unlink()
            shutil.rmtree(path.with_suffix(""), ignore_errors=True)

    def forget_unfinished(self):
        """What a cut left of files, and of divided states whose own file was not there yet."""
        if rank() == 0:
            for file in self.out.rglob(".*.tmp"):
                file.unlink()
            for folder in self.out.glob("*-state-*/"):
                if not folder.with_suffix(".pt").exists():
                    shutil.rmtree(folder, ignore_errors=True)

    def newest_state(self):
        """The state that a cut run goes on from, None if there is none; writes nothing."""
        for stage, kind in (("teacher", "teacher"), ("distillation", "student")):
            paths = [] if self.path(kind).exists() else self.states(stage)
            for path in reversed(paths):
                try:
                    state = read(path, self.device)
                    check_parts(path.with_suffix(""), state.get("parts", {}))
                    return state
                except sample.CheckpointError as error:
                    print(f"ladd.py: {error} Trying the state before it.", file=sys.stderr)
            if paths:
                raise RunError(
                    f"no state of the {stage} can be read. To begin this stage afresh, delete "
                    + ", ".join(map(str, paths))
                )

    def log(self, **row):
        if rank() > 0:
            return
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

    def forget_log(self, stage=None, step=0):
        """Drops what a cut left of a row, and a stage's rows after its saved state: the updates
        that they tell of are done again."""
        kept = [r for r in self.rows() if r.get("stage") != stage or r.get("step", 0) <= step]
        write("".join(json.dumps(row) + "\n" for row in kept), self.out / "log.jsonl")

    def write_board(self, stage, step, values):
        """tensorboard, if asked for."""
        if not self.settings.tensorboard or rank() > 0:
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
        row = dataclasses.asdict(Settings(**PRESETS[self.settings.preset]).scaled())
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

    def write_metrics(self, rows, seconds, **more):
        """metrics.json: the scores, and what they are of. -> its content"""
        s = self.settings
        metrics = dict(rows=rows, seconds=seconds, seed=s.seed, data=s.data, samples=s.evaluation)
        metrics |= dict(checkpoints=sample.fingerprints(self.out), **more)
        metrics |= dict(preset=s.preset, notes=self.notes, command=self.command(), **machine())
        write(json.dumps(metrics, indent=1) + "\n", self.out / "metrics.json")
        return metrics

    def write_report(self, rows, accuracy, report_seconds):
        """metrics.json and report.md."""
        s, log = self.settings, list(self.rows())
        timed = [r for r in log if r.get("stage") in STAGES and isinstance(r.get("seconds"), float)]
        seconds = {row["stage"]: row["seconds"] for row in timed}
        seconds["report"] = report_seconds
        verdicts = judge_stages(s, log, rows)
        where = self.write_metrics(rows, seconds, judge_accuracy=accuracy, verdicts=verdicts)
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
            *(f"- {stage}: {verdict}" for stage, verdict in verdicts.items()),
            "",
            f"Time: {took}. Commit {where['commit']}{dirty}, torch {where['torch']}, "
            f"{where['gpu'] or where['processor']}, {where['threads']} threads.",
        ]
        write("\n".join(lines) + "\n", self.out / "report.md")


class Watch:
    """Whether a run should end: SIGINT or SIGTERM came, or --stop-after is over."""

    def __init__(self, minutes):
        self.end = time.perf_counter() + 60 * minutes if minutes else math.inf
        self.status, self.patient, self.before = 0, False, {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():  # others can't hear signals
            for number in (signal.SIGINT, signal.SIGTERM):
                self.before[number] = signal.signal(number, self.hear)
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def hear(self, number, frame):
        """The first signal waits for what can be saved, where a stage is `patient` for it; the
        second ends the process at once."""
        for each in self.before:
            signal.signal(each, signal.SIG_DFL)
        self.status = 128 + number
        if not self.patient:
            raise Stop(self.status)
        os.write(2, b"\nladd.py: one moment, saving; a second signal ends at once\n")

    def due(self):
        """The exit status to end with, or 0 to go on."""
        return self.status or (75 if time.perf_counter() > self.end else 0)

    def check(self):
        if end := highest(self.due()):
            raise Stop(end)


class Loop:
    """The steps of a stage, and around them: resuming, logging, progress, saved states."""

    def __init__(self, run, stage, total, batch):
        self.run, self.stage, self.total, self.batch = run, stage, total, batch
        self.step, self.sums, self.kept = 0, {}, run.states(stage)[-1:]
        self.skipped = self.in_a_row = 0  # updates that were not applied
        self.pending = self.group = None  # a save that is not complete; the processes that write it

    def resume(self, networks, optimizers):
        """Remembers what a state consists of, and takes it from the last saved one, if any."""
        self.networks, self.optimizers = networks, optimizers
        state, self.run.state = self.run.state, None
        if state is not None and state["stage"] == self.stage:
            if "parts" in state:
                self.read_parts(state)
            for name, network in networks.items():
                fill(network, state["networks"][name])
            for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
                fill_optimizer(optimizer, saved)
            self.step, self.run.earlier = state["step"], state["seconds"]
            self.sums = own_sums(state["sums"])
            self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]
            self.kept = [self.path(self.step)]
            print(f"{self.stage}: going on from update {self.step} of {self.total}", flush=True)
        self.run.forget_log(self.stage, self.step)
        self.rows = [row for row in self.run.rows() if row.get("stage") == self.stage]
        self.warned = {why for _, why, _ in self.signs()}
        for network in networks.values():
            self.run.compile(network)

    def __iter__(self):
        self.start, self.first = time.perf_counter(), self.step
        self.last_line = self.saved = self.start
        with progress(self.stage, self.total, self.step) as self.bar:
            while self.step < self.total:
                yield self.step
                self.step += 1
                self.bar.update()

    def forget(self):
        """The stage's result is safe: its states are not needed any more."""
        self.complete()
        for path in self.run.states(self.stage):
            self.run.forget_state(path)
        self.run.forget_unfinished()

    def due(self, every):
        """Whether something done every so many updates, and at the end, is due after this one."""
        return (self.step + 1) % every == 0 or self.step + 1 == self.total

    def log(self, **values):
        """Adds up the values; at every log line writes their means.

        None among them: an update that was not applied, which is counted and told instead."""
        if None in values.values():
            self.skip(values)
        else:
            self.in_a_row = 0
            for name, value in values.items():
                total, n = self.sums.get(name, (0, 0))
                value = value.detach().float()
                self.sums[name] = (value + torch.as_tensor(total).to(value), n + 1)
        if self.step - self.first == 4:  # the first updates are slower
            self.warm = time.perf_counter()
        if self.step - self.first == 14:
            self.warn_if_hours()
        if self.due(self.run.settings.log_every) and self.sums:
            self.average()
            means = {name: (total / n).item() for name, (total, n) in self.sums.items()}
            self.sums = {}
            self.tell(means)

    def average(self):
        """The sums become the processes' mean ones. (`diversity` is among a process's own.)"""
        average([total for total, _ in self.sums.values()])

    def skip(self, values):
        """Tells of an update that was not applied; five in a row end the run."""
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        names = [name for name, v in values.items() if v is None or not v.isfinite()]
        row = dict(stage=self.stage, step=self.step + 1, skipped=self.skipped, not_finite=names)
        self.run.log(**row)
        self.rows.append(row)
        if self.in_a_row == 5:
            self.in_a_row = 0
            self.save()
            raise RunError(
                f"{self.stage}: the loss or the gradient was not finite at update {self.step + 1} "
                f"and the 4 before it ({', '.join(names)}). None of them was applied; the weights "
                "are saved as they were before. The same command tries the next batches; if that "
                "does not help, train in another folder (--out) with --precision fp32 or a lower "
                f"{'--teacher-lr' if self.stage == 'teacher' else '--student-lr'}."
            )

    def signs(self):
        return health(self.stage, self.rows, self.total // self.run.settings.log_every)

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
        self.rows.append(dict(stage=self.stage, step=self.step + 1, **means))
        self.run.log(**self.rows[-1])
        for _, why, figure in self.signs():
            if why not in self.warned:
                self.warned.add(why)
                print(
                    f"\n{self.stage}: {why} ({figure}). README: If a run is cut or goes wrong",
                    file=sys.stderr,
                    flush=True,
                )
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
        """Saves a state every so many updates or minutes, and when the run is asked to end."""
        if self.step + 1 == self.total:  # the result itself is saved next
            return
        s, end = self.run.settings, highest(self.run.watch.due())
        late = s.save_minutes and time.perf_counter() - self.saved > 60 * s.save_minutes
        if (self.step + 1) % s.save_every == 0 or highest(late) or end:
            self.save(wait=bool(end))
        if end:
            raise Stop(end)

    def path(self, step):
        return self.run.out / f"{self.stage}-state-{step:08d}.pt"

    def save(self, wait=True):
        """A state: all that the rest of the stage depends on. The last two are kept.

        Without `wait` the parts of divided networks may be written while the training goes on; the
        state counts once they are, at the next save or at the end."""
        self.complete()
        self.saved = time.perf_counter()
        sums = gathered(self.sums)
        state = dict(stage=self.stage, step=self.step + 1, sums=sums, skipped=self.skipped)
        state |= dict(in_a_row=self.in_a_row, seconds=self.run.earlier + self.saved - self.start)
        state["networks"] = {name: network.state_dict() for name, network in self.networks.items()}
        state["optimizers"] = [optimizer.state_dict() for optimizer in self.optimizers]
        path, written = self.path(self.step + 1), None
        if self.run.divided:
            state, written = self.write_parts(state, path.with_suffix(""))
        self.pending = state, path, written
        if wait or not self.asynchronous:
            self.complete()

    @property
    def asynchronous(self):
        """On a CPU the copy would cost as much as the writing."""
        return self.run.divided and self.run.device.type == "cuda"

    def complete(self):
        """Ends a save: the state is there once its own file is, after its parts."""
        if self.pending is None:
            return
        (state, path, written), self.pending = self.pending, None
        if written is not None:
            state["parts"] = self.sums_of_parts(path.with_suffix(""), written)
        self.kept = [*(p for p in self.kept if p != path), path][-2:]
        if rank() > 0:
            return
        with open(self.run.out / "log.jsonl", "ab") as file:
            os.fsync(file.fileno())  # a state's rows must not be lost where the state is not
        save(state, path)
        for old in set(self.run.states(self.stage)) - set(self.kept):
            self.run.forget_state(old)

    def write_parts(self, state, folder):
        """Every process writes what it holds of a state's divided tensors into `folder`.

        -> the state with None in their place, and a function that waits for the files"""
        from torch.distributed import checkpoint as dcp

        divided = {k: v for k, v in named_parts(state).items() if is_divided(v)}
        if self.asynchronous:
            self.group = self.group or dist.new_group(backend="gloo")  # beside the training's own
            wait = dcp.async_save(divided, checkpoint_id=folder, process_group=self.group).result
        else:
            wait = functools.partial(dcp.save, divided, checkpoint_id=folder)
        rest = lambda x: x.clone() if torch.is_tensor(x) else x  # noqa: E731
        hide = lambda x: None if is_divided(x) else rest(x)  # noqa: E731
        return {k: tree_map(hide, v) for k, v in state.items()}, wait

    def sums_of_parts(self, folder, written):
        """Waits until the parts are `written` -> {name: SHA-256}, by which the state knows them."""
        from torch.distributed import checkpoint as dcp

        try:
            written()
        except dcp.api.CheckpointException as error:
            reason = next(iter(error.failures.values()))[0]
            raise RunError(f"{folder}: the state can't be written ({reason}).") from None
        names = [f"__{rank()}_*", *[".metadata"] * (rank() == 0)]
        dist.all_gather_object(
            digests := [None] * world(),
            {p.name: data.sha256(p) for name in names for p in folder.glob(name)},
        )
        return {name: digest for own in digests for name, digest in own.items()}

    def read_parts(self, state):
        """The way back, for any number of processes, divided or not."""
        from torch.distributed import checkpoint as dcp

        names = [name for name, v in named_parts(state).items() if v is None]
        for name, network in self.networks.items():
            own, saved = network.state_dict(), state["networks"][name]
            saved.update({k: own[k] for k, v in saved.items() if v is None})
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            parameters = [p.detach() for group in optimizer.param_groups for p in group["params"]]
            for i, own in saved["state"].items():
                empty = {k: torch.zeros_like(parameters[i]) for k, v in own.items() if v is None}
                own.update(empty)
        wanted, folder = named_parts(state), self.path(state["step"]).with_suffix("")
        wanted = {name: wanted[name] for name in names}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it tells that one process is one
            dcp.load(wanted, checkpoint_id=folder, no_dist=not dist.is_initialized())


def gathered(sums):
    """The sums of the log of every process: [{name: (total, number)}]"""
    own = {name: (total.cpu(), n) for name, (total, n) in sums.items()}
    everyone = [own] * world()
    if dist.is_initialized():
        dist.all_gather_object(everyone, own)
    return everyone


def own_sums(everyone):
    """This process's own, or where there are now more or fewer, the mean ones."""
    if len(everyone) == world():
        return everyone[rank()]
    total = lambda name: sum(own[name][0] for own in everyone) / len(everyone)  # noqa: E731
    return {name: (total(name), n) for name, (_, n) in everyone[0].items()}


def check_parts(folder, parts):
    """Raises CheckpointError in all processes where one finds a damaged file of a divided state.
    parts: {name: SHA-256}, of which each process reads its share."""
    names, own = sorted(parts), mine(range(len(parts)))
    path = lambda i: folder / names[i]  # noqa: E731
    sound = lambda i: path(i).is_file() and data.sha256(path(i)) == parts[names[i]]  # noqa: E731
    if bad := highest(max((i + 1 for i in own if not sound(i)), default=0)):
        raise sample.CheckpointError(f"{path(bad - 1)}: missing or damaged, its checksum differs.")


def named_parts(state):
    """Everything in a state's networks and optimisers by its name."""
    moments = [optimizer["state"] for optimizer in state["optimizers"]]
    leaves, _ = tree_flatten_with_path([state["networks"], moments])
    return {keystr(path): leaf for path, leaf in leaves}


SHOWN = ("loss", "loss_d", "loss_g", "d_real", "d_fake")


# ---------------------------------------------------------------------------------------------
# Plumbing: health
# ---------------------------------------------------------------------------------------------

# What is a bad sign in a row of log.jsonl, beside the first row: number, test, meaning.
SIGNS = {
    "teacher": (("loss", lambda r, first: r["loss"] > 0.9 * first["loss"], "no progress"),),
    "distillation": (
        ("loss_d", lambda r, _: r["loss_d"] > 1.95 and r["ranked"] < 0.53, "the heads see nothing"),
        ("loss_d", lambda r, _: r["loss_d"] < 0.3, "the heads have won outright"),
        (
            "grad_norm",
            lambda r, first: r["grad_norm"] < 0.01 * first["grad_norm"],
            "the student's gradient has vanished",
        ),
        ("diversity", lambda r, _: r["diversity"] < 0.7, "the student's samples are alike"),
    ),
}


def health(stage, rows, expected=None):
    """What is wrong with a stage by its rows of log.jsonl: [(verdict, what, figure)].

    A sign is suspicious when it stands for a tenth of the stage's rows without a break (of those
    `expected` at its end) and for ten, and a failure when it stands for half of them."""
    told = [r for r in rows if "loss" in r or "loss_g" in r]  # not while the heads learn alone
    expected, found = expected or len(told), []
    for number, test, what in SIGNS[stage]:
        groups = groupby([r for r in told if number in r], lambda r, f=test: f(r, told[0]))
        longest = max((list(group) for bad, group in groups if bad), key=len, default=[])
        if len(longest) >= max(10, expected / 10):
            verdict = "failed" if len(longest) >= expected / 2 else "suspicious"
            mean = sum(row[number] for row in longest) / len(longest)
            span = f"updates {longest[0]['step']} to {longest[-1]['step']}"
            found.append((verdict, what, f"{number} {mean:.3g}, {span}"))
    skipped = [r["step"] for r in rows if "skipped" in r]
    if skipped:
        verdict = "failed" if 10 * len(skipped) > rows[-1]["step"] else "suspicious"
        figure = f"{len(skipped)} of {rows[-1]['step']}, the first was {skipped[0]}"
        found.append((verdict, "updates were not finite, so not applied", figure))
    return found


def judge_stages(s, log, table):
    """{stage: healthy, suspicious or failed, and why}, from the log and the table of scores."""
    verdicts, real = {}, table[0]["alignment"]
    frechet = {row["name"]: row["frechet"] for row in table}
    after, before = frechet["student, 1 step"], frechet["untrained, 1 step"]
    for stage in STAGES:
        rows = [r for r in log if r.get("stage") == stage and "step" in r]
        found = health(stage, rows) if stage in SIGNS else []
        if stage == "distillation" and after >= before:
            figure = f"Fréchet {after:.3g} in 1 step, {before:.3g} before"
            found.append(("suspicious", "the student is no better than untrained", figure))
        if stage == "report" and real is not None and real < 0.5:
            found.append(("suspicious", "the judge misreads real images", f"{real:.2f} right"))
        if found:
            worst = min(verdict for verdict, _, _ in found)  # failed comes before suspicious
            verdicts[stage] = f"{worst}: " + "; ".join(f"{w} ({f})" for _, w, f in found)
        elif stage == "teacher" and s.teacher:
            verdicts[stage] = "not trained here but given"
        elif stage == "synthesis" and s.targets == "real":
            verdicts[stage] = "not needed"
        elif stage in SIGNS and len(rows) < 10:
            verdicts[stage] = f"not judged: {len(rows)} rows of log.jsonl are too few"
        else:
            verdicts[stage] = "healthy"
    return verdicts


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
        elif field.name == "sweep":
            parser.add_argument(flag, **options, action="append", metavar="NAME=A,B,…")
        elif isinstance(field.default, tuple):
            kind = dict(taps=int, seeds=int, aspects=str).get(field.name, float)
            parser.add_argument(
                flag, **options, metavar="A,B,…", type=lambda text, kind=kind: numbers(text, kind)
            )
        else:
            kind = float if field.default is None else type(field.default)
            parser.add_argument(flag, **options, type=kind, metavar="X")
    if rank() > 0:  # the first process says it
        parser.error = lambda _: sys.exit(2)
    given = vars(parser.parse_args(argv))
    given |= dict(sweep=tuple(given.get("sweep", ())))
    settings = Settings(**{**PRESETS[given.get("preset", "nano")], **given})
    if not settings.out:
        name = settings.preset
        if settings.data != PRESETS[name].get("data", "shapes"):
            name += "-" + Path(settings.data).stem
        name += "-sweep" * bool(settings.sweep)
        settings = dataclasses.replace(settings, out=f"runs/{name}")
    check(settings, parser.error)
    check(settings.scaled(), parser.error)
    return settings.scaled(), "data" in given


def numbers(text, kind):
    return tuple(kind(part) for part in text.split(",") if part)


AT_LEAST_ONE = "size patch width depth heads text_length teacher_iterations teacher_batch"
AT_LEAST_ONE += " teacher_steps synthetic synthetic_steps iterations batch head_width"
AT_LEAST_ONE += " judge_steps judge_width save_every sample_every log_every pos_size"
AT_LEAST_ONE += " downscale gpus replicas accumulate"
ABOVE_ZERO = "steps_scale teacher_lr student_lr heads_lr clip t_std t_hat_std shift adam_eps"
ABOVE_ZERO += " tflops utilisation"
SHARES = "drop teacher_ema student_ema beta1"


def check(s, error):
    """Refuses settings that can't work, with one clear line."""

    def demand(right, name, why):
        if not right:
            error(f"--{name.replace('_', '-')} {getattr(s, name)}: {why}")

    for name in AT_LEAST_ONE.split():
        demand(getattr(s, name) >= 1, name, "must be at least 1")
    for name in ("save_minutes", "stop_after"):
        demand(getattr(s, name) >= 0, name, "must not be negative")
    for name in ABOVE_ZERO.split():
        demand(getattr(s, name) > 0, name, "must be above 0")
    for name in SHARES.split():
        demand(0 <= getattr(s, name) < 1, name, "must be from 0 to below 1")
    latent = s.downscale > 1
    demand(s.channels == 3 or latent, "channels", "images have 3; other latents need an encoder")
    patch = s.patch * s.downscale
    demand(s.size % patch == 0, "size", f"patches of {patch} pixels don't divide it")
    demand(s.size <= patch * s.pos_size, "size", f"more than {s.pos_size} patches a side")
    ratio = re.compile("[1-9][0-9]*:[1-9][0-9]*")
    right = s.aspects and all(ratio.fullmatch(aspect) for aspect in s.aspects)
    demand(right, "aspects", "must be WIDTH:HEIGHT,… such as 1:1,3:2,2:3")
    for height, width in s.sizes:
        fits = max(height, width) <= s.patch * s.pos_size
        demand(fits, "aspects", f"{height}×{width} has more than {s.pos_size} patches a side")
    demand(
        s.width % s.heads == 0 and s.width % 4 == 0,
        "width",
        f"not a multiple of 4 and of --heads {s.heads}",
    )
    demand(s.text_dim >= 2 and s.text_dim % 2 == 0, "text_dim", "must be even")
    groups = max(1, s.head_width // 16)
    demand(s.head_width % groups == 0, "head_width", "must be a multiple of 16, or less than 32")
    levels = s.levels or s.default_levels()
    same = {
        len(levels),
        len(s.level_p or levels),
        len(s.warmup_p if s.warmup_iterations else levels),
    }
    why = "--levels, --level-p and --warmup-p need the same number of values"
    demand(len(same) == 1, "level_p", why)
    falling = all(a > b for a, b in pairwise((*levels, 0)))
    falling &= 0.99 <= levels[0] <= 1
    demand(falling, "levels", "must fall, from 1 (or .99: samples start from noise) to above 0")
    right = not s.level_p or (min(s.level_p) >= 0 and sum(s.level_p) > 0)
    demand(right, "level_p", "must be probabilities")
    warm = min(s.warmup_p) >= 0 and sum(s.warmup_p) > 0
    demand(warm or not s.warmup_iterations, "warmup_p", "must be probabilities")
    some = s.heads_warmup < s.iterations or s.method not in ("ladd", "add")
    demand(some, "heads_warmup", f"leaves none of {s.iterations} updates")
    demand(s.channels == 3 or s.method != "add", "method", "its judge reads images of 3 channels")
    demand(s.method == "ladd" or not s.r1, "r1", "is for LADD alone")
    demand(s.method == "ladd" or not s.discriminator, "discriminator", "is for LADD alone")
    demand(s.evaluation >= 8, "evaluation", "scores need at least 8 samples")
    demand(s.targets in ("synthetic", "real"), "targets", "must be synthetic or real")
    demand(s.stage in ("all", *STAGES), "stage", f"must be all, {', '.join(STAGES)}")
    demand(s.precision in ("auto", "bf16", "fp32"), "precision", "must be auto, bf16 or fp32")
    demand(s.method in UNITS, "method", f"must be {', '.join(UNITS)}")
    demand(s.student_init in ("teacher", "scratch"), "student_init", "must be teacher or scratch")
    demand(0 <= s.student_depth <= s.depth, "student_depth", f"must be from 0 to {s.depth}")
    one = not s.shard or (s.method == "ladd" and not s.student_depth)
    demand(one, "shard", "only for LADD with a student of the teacher's depth")
    demand(not s.student_depth or not s.attn2_blocks, "student_depth", "not with --attn2-blocks")
    demand(s.targets == "synthetic" or s.method != "regression", "targets", "have no paired noise")
    demand(0 <= s.units < math.inf, "units", "must be finite and not negative")
    demand(s.steps_scale < math.inf, "steps_scale", "must be finite")
    n = world() * s.accumulate
    parts = f" in {s.accumulate} parts" if s.accumulate > 1 else ""
    share = f"its images can't be divided equally among {world()} processes{parts}"
    demand(s.batch % n == 0, "batch", share)
    demand(s.teacher or s.teacher_batch % n == 0, "teacher_batch", share)
    demand(s.accumulate == 1 or s.method == "ladd", "accumulate", "is for LADD alone")
    n = world()
    demand(s.synthetic >= n, "synthetic", f"fewer than the {n} processes")
    demand(n == 1 or n % s.replicas == 0, "replicas", f"must divide the {n} processes")
    muon = s.shard and n > 1 and s.muon_lr and not s.teacher
    demand(not muon, "muon_lr", "Muon needs whole matrices: --shard takes --muon-lr 0")
    demand(not s.compile or not s.r1, "compile", "not with --r1, a gradient of a gradient")
    demand(not s.offload or s.shard, "offload", "is a part of --shard")
    ascending = list(s.taps) == sorted(set(s.taps)) and all(0 <= i < s.depth for i in s.taps)
    demand(ascending, "taps", f"must be ascending block numbers from 0 to {s.depth - 1}")
    try:
        torch.empty(0, device=sample.best_device() if s.device == "auto" else s.device)
    except (RuntimeError, AssertionError) as reason:
        error(f"--device {s.device}: {str(reason).splitlines()[0]}")


@contextlib.contextmanager
def locked(out):
    """Makes the run folder and holds it for this process alone, until it ends, however it ends."""
    if rank() > 0:  # the first process does it for all
        yield
        return
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file: choose another folder with --out.")
    out.mkdir(parents=True, exist_ok=True)
    handle = None
    try:
        import fcntl

        handle = os.open(out, os.O_RDONLY)
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise UsageError(f"{out}: another process is at work in this run folder.") from None
    except (ImportError, OSError):
        print(f"{out} can't be locked here: take care that one process uses it", file=sys.stderr)
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)


@contextlib.contextmanager
def deterministic(wanted):
    """Has torch take kernels that give the same bits every time; it names those that don't."""
    before = torch.are_deterministic_algorithms_enabled()
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
        torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def open_folder(settings):
    """Finds the run folder made with the same settings, or empty, and writes them into it."""
    if rank() > 0:
        return
    out, mine = Path(settings.out), dataclasses.asdict(settings)
    mine = json.loads(json.dumps({k: v for k, v in mine.items() if k not in FREE}))
    path = out / "config.json"
    if path.exists():
        theirs = data.read_object(path)
        known = dataclasses.asdict(Settings()) | PRESETS.get(str(theirs.get("preset")), {})
        known = {k: v for k, v in known.items() if k not in FREE}
        theirs = json.loads(json.dumps(known)) | theirs  # made before a setting was: its default
        names = [k for k in {**theirs, **mine} if theirs.get(k) != mine.get(k)]
        if names:
            different = ", ".join(f"{k} {theirs.get(k)} → {mine.get(k)}" for k in names)
            raise UsageError(
                f"{out} was made with other settings ({different}). "
                f"Choose another folder with --out, or give the same settings to go on."
            )
    elif any(not p.name.startswith(".config.json.") for p in out.iterdir()):
        raise UsageError(f"{out} is not empty and not a run folder: choose another with --out.")
    else:
        write(json.dumps(mine, indent=1) + "\n", path)


class UsageError(Exception):
    """What the user asked for can't be done; exit status 2."""


def refuse(why):
    """Ends as the parser of the command line does."""
    print(f"ladd.py: {why}", file=sys.stderr)
    sys.exit(2)


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


def keep_memory():
    """Has the C library (glibc alone) keep the memory that an update frees: the next takes as much
    again, and on a CPU having it mapped anew was a twentieth of nano's time, a tenth of tiny's."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # on other systems
        mallopt = ctypes.CDLL(None).mallopt
        trim_threshold, mmap_threshold = -1, -3  # malloc.h
        mallopt(mmap_threshold, 32 << 20)  # the most that it takes
        mallopt(trim_threshold, 2**31 - 1)


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
        if isinstance(run.dataset, data.Shards):
            prompts = sum(bucket.train_size for bucket in run.dataset.sets)
            if prompts < world():
                raise data.DataError(
                    f"--data {settings.data}: {prompts} prompts are fewer than the {world()} "
                    "processes."
                )
            taught = settings.teacher or run.path("teacher").exists()
            if not run.dataset.channels and (settings.targets == "real" or not taught):
                raise data.DataError(
                    f"--data {settings.data}: has no images, prompts alone: that takes --teacher, "
                    "and --targets synthetic."
                )
            return settings, None, run
        finite = [bucket for bucket in data.buckets_of(run.dataset) if bucket.train_size]
        held_out = sum(len(bucket.held_out_images) for bucket in finite)
        if finite and held_out < 8:
            images = held_out + sum(bucket.train_size for bucket in finite)
            raise data.DataError(
                f"--data {settings.data}: {images} images are too "
                "few: a tenth is held out to score by, and that takes at least 80."
            )
        return settings, None, run
    except data.DataError as error:
        if given or settings.data == "shapes" or settings.channels != 3:
            raise
        note = f"{settings.data} can't be had, so this run uses the built-in shapes. {error}"
        settings = dataclasses.replace(settings, data="shapes")
        return settings, note, Run(settings)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    settings, given = parse(argv)
    members = parse_sweep(settings, argv, refuse) if settings.sweep else None
    if settings.dry_run:
        print(plan_table(settings))
        return 0
    keep_memory()
    try:
        with Watch(settings.stop_after) as watch, together(settings):
            if members:
                sweep(settings, members, watch)
            else:
                train(settings, given, watch)
    except Stop as stop:
        again = shlex.join(["python", "ladd.py", *argv])
        if rank() == 0:
            print(
                f"ladd.py: stopped, and saved what is done. To go on:\n    {again}", file=sys.stderr
            )
        return stop.args[0]
    except (UsageError, data.DataError, sample.CheckpointError, RunError, OSError) as error:
        return told(error)
    return 0


def train(settings, given, watch, source=None):
    """One run: checks what it is given, opens its folder, goes through its stages. -> the run

    source: another run's folder, whose teacher and samples this one takes over."""
    if settings.teacher and (others := given_teacher(settings).get("ignored")):
        which = f"{others} tensors of other networks are ignored"
        print(f"--teacher {settings.teacher}: {which}")
    if settings.discriminator:
        given_heads(settings)
    if rank() > 0:  # the first process downloads
        shared(None)
    settings, note, run = load_data(settings, given)
    if rank() == 0:
        shared(None)
    run.watch = watch
    if settings.explain:
        explain(run)
        return run
    with locked(run.out), deterministic(settings.deterministic):
        open_folder(settings)
        for file in [*source.glob("teacher.pt"), *source.glob("synthetic/*.pt")] if source else ():
            link(file, run.out / file.relative_to(source))
        shared(None)
        run.state = run.newest_state()
        run.forget_unfinished()
        run.forget_log()
        if note:
            run.notes.append(note)
            print(f"\n!!! {note}\n", file=sys.stderr, flush=True)
        where = machine() if rank() == 0 else {}
        run.log(settings=dataclasses.asdict(settings), note=note, **where)
        execute(run)
        if note:
            print(f"\n!!! {note}\n", file=sys.stderr, flush=True)
    return run


def link(file, path):
    """Gives a file a second name, or where that can't be, a copy."""
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        try:
            os.link(file, path)
        except OSError:
            with open(file, "rb") as old, data.replacing(path) as new:
                shutil.copyfileobj(old, new)


def told(error):
    """Says why a run has ended, in one line if that was foreseen. -> exit status"""
    lost = isinstance(error, RuntimeError) and "gloo" in str(error).lower()
    if lost or isinstance(error, dist.DistError):
        reason = str(error).splitlines()[0]
        error = RunError(f"process {rank()} of {world()} has lost another ({reason}).")
    if isinstance(error, (UsageError, data.DataError, sample.CheckpointError)):
        status = 2
    else:
        status = 1
    if status == 2 or isinstance(error, (RunError, OSError)):
        print(f"ladd.py: {data.clean(error, 4000)}", file=sys.stderr)
    else:
        traceback.print_exception(error)
    return status


def given_teacher(s):
    """The checkpoint of --teacher, ours or released, if its network is that of the settings."""
    if Path(s.teacher).is_dir() or s.teacher.endswith(".safetensors"):
        model, weights = open_sd3(s.teacher)
        checkpoint = dict(format="ladd-1", model=model.config, weights=weights, step=0)
        checkpoint |= dict(settings=dataclasses.asdict(s), ignored=weights.ignored)
    else:
        checkpoint = sample.read_checkpoint(s.teacher)
    with torch.device("meta"):
        same_network("teacher", s.teacher, checkpoint["model"], MMDiT(**s.model()).config)
    return checkpoint


def given_heads(s):
    """The checkpoint of --discriminator, if its heads are those of the settings."""
    checkpoint = sample.read_checkpoint(s.discriminator, ["heads"])
    same_network("discriminator", s.discriminator, checkpoint["model"], s.head_sizes())
    return checkpoint


def same_network(flag, file, given, wanted):
    """Raises UsageError if the network of a file is not the one that is wanted."""
    names = [f"{k} {given.get(k)} → {wanted[k]}" for k in wanted if given.get(k) != wanted[k]]
    if names:
        different = ", ".join(names)
        raise UsageError(f"--{flag} {file}: another network than the settings' ({different}).")


def execute(run):
    """The stages in order; one that is finished is skipped."""
    s, wanted = run.settings, STAGES if run.settings.stage == "all" else (run.settings.stage,)
    if s.teacher and not run.path("teacher").exists() and rank() == 0:
        given = given_teacher(s)  # its tensors are views of the file until here
        given |= dict(kind="teacher", weights=dict(given["weights"]))
        save(given, run.path("teacher"))
    done = dict(
        teacher=run.path("teacher").exists(),
        synthesis=s.targets == "real" or len(run.shards()) == len(shard_buckets(run)[0]),
        distillation=run.path("student").exists(),
        report=(run.out / "report.md").exists(),
    )
    done = shared(done)
    methods = dict(ladd=distil, regression=regress, add=distil_add, dmd=match_distributions)
    methods |= dict(consistency=distil_consistency)
    work = dict(teacher=train_teacher, synthesis=synthesise, report=report)
    work |= dict(distillation=methods[s.method])
    for i, stage in enumerate(STAGES):
        if stage not in wanted:
            continue
        missing = [before for before in STAGES[:i] if not done[before]]
        if missing:
            raise UsageError(f"--stage {stage} needs the stage {missing[0]} first.")
        if done[stage]:
            for path in run.states(stage):  # the process ended between the result and this
                run.forget_state(path)
            if stage == "report":
                sample.read_metrics(run.out)
            print(f"{stage}: done before", flush=True)
            continue
        run.watch.patient = stage != "report"  # which saves nothing on its way
        run.watch.check()
        if stage == "report":
            part()
            if rank() > 0:
                return
        start, run.earlier = time.perf_counter(), 0.0
        work[stage](run)
        shared(None)
        seconds = run.earlier + time.perf_counter() - start
        run.log(stage=stage, finished=True, seconds=seconds)
        print(f"{stage}: {seconds:.0f} s", flush=True)
        done[stage] = True


def leave(status):
    """Ends the process; one of many without its destructors, in which gloo's threads may abort.

    Under torchrun what --stop-after ended is no failure: with 75 it would start it again."""
    if status == 75 and "TORCHELASTIC_RUN_ID" in os.environ:
        status = 0
    if world() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    leave(main())
