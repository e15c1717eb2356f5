"""LADD, latent adversarial diffusion distillation: the method, its settings, the stages.

"Fast High-Resolution Image Synthesis with Latent Adversarial Diffusion Distillation",
arXiv 2403.12015.

A teacher that needs many steps becomes a student that needs one to four. One update, in six lines
whose numbers stand again at the functions:

    1  x_t   = (1 - t)·x_0 + t·ε            t from the student's few levels, x_0 made by the teacher
    2  x̂_0   = x_t - t·v_θ(x_t, t, c)       one evaluation of the student
    3  noise x̂_0 and x_0 to a level t̂       t̂ ~ logit-normal(m, σ), with the same noise for both
    4  f, r  = features of the frozen teacher on the noised x̂_0 and x_0
    5  L_D   = E[relu(1 - D(r))] + E[relu(1 + D(sg f))]    the heads learn
    6  L_G   = -E[D(f)]                                     the student learns, through the teacher
             + λ·E[(LN(f) - LN(r'))²]          r' = r at t < 1; ours, λ = 0 at the paper's sizes

sg means stop-gradient, LN layer normalisation of a token. At t < 1 ε is the noise that the teacher
made x_0 from, and the last term, the distillation loss, pulls the features of x̂_0 to those of x_0.
At t = 1 ε is new noise and says nothing of x_0: the nearest to every possible x_0 would be their
mean, which is a blur. So there r' is of another picture, and counts less: of what the student
itself makes of x̂_0 in one step more. The heads step first, and L_G is of the new heads, on the same
features f; docs/passes.md says what an update costs. The paper published neither code nor learning
rates, batch size, optimiser or EMA: those are ours (docs/log.md).

    python ladd.py --preset nano                  everything, on a laptop, with built-in data
    python ladd.py --preset tiny                  CIFAR-10 on one GPU
    torchrun … ladd.py --preset sd3-8b …          docs/full-size.md
"""

import dataclasses
import importlib
import math
import sys
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

import data
import sample
from data import Text, parse_size
from discriminator import Discriminator, hinge_d, hinge_g, r1
from lib.checks import check_together
from lib.health import commonest, diversity, separation
from lib.machine import moved
from lib.optim import learning_rate, make_optimizers, split, step_all, take, update_ema
from lib.parallel import fill, leave, my_share, rank, world
from lib.report import SIGNS
from lib.samples import read_samples, write_samples
from lib.settings import HowToRun, check_fields, setting
from lib.streams import normal, rng
from mmdit import MMDiT
from sample import add_noise, logit_normal, per_sample, predict_x0

# ---------------------------------------------------------------------------------------------
# The method: one function per quantity; b is a Batch, s the settings
# ---------------------------------------------------------------------------------------------


def teacher_loss(model, x0, text, t, noise):
    """Rectified flow: E‖v_θ(x_t, t, c) - (ε - x_0)‖². x0, noise (B, C, H, W), t (B,) -> scalar"""
    v, _ = model(add_noise(x0, noise, t), t, *text)
    return (v.float() - (noise - x0)).square().mean()


class Batch(NamedTuple):
    """What an update starts from: this process's share, or a part of it."""

    x0: torch.Tensor  # (B, C, H, W) what is real
    text: Text  # (B, M, D_c), (B, D_p)
    t: torch.Tensor  # (B,) the student's levels
    noise: torch.Tensor  # (B, C, H, W) ε of line 1
    paired: torch.Tensor  # (B,) whether x_t can tell x_0, which is then x̂_0's target
    t_hat: torch.Tensor  # (B,) t̂, the level of the re-noising
    noise_hat: torch.Tensor  # (B, C, H, W) the noise of line 3
    caption: torch.Tensor  # (B,) rows of `Samples.token_ids`: methods read it
    first: torch.Tensor  # (B,) whether t is the first level; on the host, where it can be counted


def student_predict(student, x0, text, t, noise):
    """Lines 1 and 2: noise x_0 to t and predict it back in one evaluation. -> x̂_0 (B, C, H, W)"""
    xt = add_noise(x0, noise, t)
    v, _ = student(xt, t, *text)
    return predict_x0(xt, v, t)


def teacher_features(teacher, x0, text, t_hat, noise, taps):
    """Lines 3 and 4: noise x_0 to t̂ and read the teacher's image tokens. -> [(B, N, D)]

    The teacher is frozen but must not be in no_grad for the fakes: the gradient to the student
    runs through it."""
    return teacher(add_noise(x0, noise, t_hat), t_hat, *text, taps=taps, features_only=True)[1]


def features_of_both(student, teacher, b, s):
    """Lines 1 to 4. -> x̂_0, r and f; x̂_0 and f with the graph to the student"""
    x0_hat = student_predict(student, b.x0, b.text, b.t, b.noise)
    fake = teacher_features(teacher, x0_hat, b.text, b.t_hat, b.noise_hat, s.tapped)
    with torch.no_grad():
        real = teacher_features(teacher, b.x0, b.text, b.t_hat, b.noise_hat, s.tapped)
    return x0_hat, real, fake


def logits_of(heads, features, b, s):
    """D(f) or D(r). -> (B, K, h, w)"""
    h, w = (side // s.patch for side in b.x0.shape[2:])
    return heads(features, b.t_hat, b.text.pooled, h, w)


def heads_loss(heads, real, fake, b, s):
    """Line 5. The heads alone receive gradient. -> L_D, logits of reals, logits of fakes"""
    real = [r.detach().requires_grad_(s.r1 > 0) for r in real]
    on_real = logits_of(heads, real, b, s)
    on_fake = logits_of(heads, [f.detach() for f in fake], b, s)
    loss = hinge_d(on_real, on_fake)
    if s.r1 > 0:
        loss = loss + s.r1 * r1(on_real, real)
    return loss, on_real.detach().float(), on_fake.detach().float()


OWN = 0.3  # weight of the student's own next picture, beside a sample's 1 (docs/ablations.md)


@torch.no_grad()
def held_to(ema, teacher, x0_hat, real, b, s):
    """r' of line 6, what f is held to: r where x_t can tell x_0. At the first level it is features
    of the picture that the student's average makes of x̂_0 at the second level; ours, as in
    consistency models. -> [(B, N, D)]; (B,) how much each counts"""
    if s.distill_weight == 0 or len(s.levels) == 1:
        return real, b.paired
    first = b.first.nonzero()[:, 0]
    n = len(first)  # with none the passes are made, too: all processes need equally many
    rows = moved(first if n else torch.tensor([0]), b.t.device)
    x0, text, noise, t_hat, noise_hat = take((x0_hat, b.text, b.noise, b.t_hat, b.noise_hat), rows)
    t_next = torch.full_like(t_hat, s.levels[1])
    x0 = student_predict(ema, x0, text, t_next, noise)  # as `renoise`: its noise at t = 1 is ε
    own = teacher_features(teacher, x0, text, t_hat, noise_hat, s.tapped)
    targets = [r.index_copy(0, rows[:n], f[:n]) for r, f in zip(real, own, strict=True)]
    return targets, torch.ones_like(b.t_hat).index_fill(0, rows[:n], OWN)


def student_losses(heads, targets, weights, fake, b, s):
    """Line 6. Gradient goes through heads and teacher to the student, and stays in neither.
    -> L_G, the distillation loss before its weight λ"""
    heads.requires_grad_(False)  # frozen while the graph of these logits is made
    loss_g = hinge_g(logits_of(heads, fake, b, s))
    heads.requires_grad_(True)
    with torch.set_grad_enabled(s.distill_weight > 0):  # at 0 it is only logged
        distill = distillation_loss(targets, fake, weights)
    return loss_g, distill


def distillation_loss(targets, fake, weights):
    """Beside L_G, ours: how far f is from its target, E[(LN(f) - LN(r'))²].

    targets, fake: [(B, N, D)] with the same t̂ and noise; weights (B,), 0 where there is no target.
    -> scalar in [0, 4]: the mean over the whole batch"""
    loss = 0
    for r, f in zip(targets, fake, strict=True):
        r, f = (F.layer_norm(tokens, tokens.shape[-1:]) for tokens in (r, f))
        loss = loss + (f - r).square().mean(dim=(1, 2)) / len(fake)
    return (loss * weights).mean()


# ---------------------------------------------------------------------------------------------
# Settings and presets
# ---------------------------------------------------------------------------------------------

STAGES = ("teacher", "synthesis", "distillation", "report")


@dataclasses.dataclass(frozen=True)
class Settings(HowToRun):
    """What decides the result. The rest is HowToRun's (lib/settings.py); all become flags.

    A stage's result depends on the fields above and in its own section, and on none below. So a new
    field stands in the section of the first stage that it changes."""

    preset: str = setting("nano", "the row of PRESETS to start from")
    data: str = setting("shapes", "shapes, cifar10, or a folder or zip of images, or of shards")
    seed: int = setting(0, "of all randomness")
    size: tuple = setting((16, 16), "of the images, pixels: 16 or 24x40", parse=parse_size)
    aspects: tuple = setting((), "width:height of more sizes of the same area", kind=str)
    flip: bool = setting(True, "mirror half of the images at random (shapes: never)")
    # the network: teacher and student
    channels: int = setting(3, "of x_0: 3 for pixels", low=1, high=2**16)
    downscale: int = setting(1, "pixels per position of x_0: 8 for SD3's latents", low=1)
    patch: int = setting(2, "side of a patch", low=1)
    width: int = setting(128, "D", low=1, high=2**16)
    depth: int = setting(4, "blocks", low=1, high=1000)
    attention_heads: int = setting(4, "attention heads", low=1)
    qk_norm: bool = setting(True, "RMSNorm of queries and keys, as in SD3.5")
    attn2_blocks: int = setting(0, "first blocks with a second attention (SD3.5-medium)", low=0)
    pos_size: int = setting(32, "side of the position table, patches", low=1, high=2**12)
    text_dim: int = setting(64, "width of the text features", low=2, high=2**16)
    pooled_dim: int = setting(0, "width of the pooled ones; 0: the same", low=0, high=2**16)
    text_length: int = setting(12, "words of a caption that are read", low=1, high=4096)
    clip: float = setting(1.0, "largest gradient norm, teacher and student", above=0)
    adam_eps: float = setting(1e-8, "AdamW's ε (SD3: 1e-15)", low=1e-30)
    # teacher (rectified flow, arXiv 2403.03206)
    teacher: str = setting("", "use this one: a run folder, our .pt, or SD3's weights")
    teacher_iterations: int = setting(2400, "updates of the teacher", low=1, scales=True, smoke=2)
    teacher_batch: int = setting(64, "images per update", low=1, high=10**6, smoke=16)
    teacher_lr: float = setting(2e-3, "AdamW, for what Muon does not train", above=0)
    muon_lr: float = setting(0.02, "Muon, for the blocks' matrices; 0: AdamW for all", low=0)
    t_mean: float = setting(0.0, "mean of the logit of t in training")
    t_std: float = setting(1.0, "its standard deviation", above=0)
    drop: float = setting(0.1, "share of captions dropped, for guidance", low=0, below=1)
    teacher_ema: float = setting(0.995, "decay per update of its average", low=0, below=1)
    # synthesis
    synthetic: int = setting(4096, "samples that the teacher makes", low=1, scales=True, smoke=32)
    synthetic_cfg: float = setting(4.0, "their constant guidance scale w", low=-1e3, high=1e3)
    synthetic_steps: int = setting(16, "their Euler steps", low=1, high=10_000, smoke=4)
    shift: float = setting(1.0, "timestep shift α of Euler sampling", low=1e-6)
    # distillation (LADD)
    iterations: int = setting(2200, "updates of the student", low=1, scales=True, smoke=2)
    batch: int = setting(32, "images per update", low=1, high=10**6, smoke=16)
    targets: str = setting("synthetic", "what is real to the heads", choices=("synthetic", "real"))
    levels: tuple = setting((1.0, 0.75, 0.5, 0.25), "noise levels t of the student", above=0)
    level_p: tuple = setting((), "their probabilities; default: .4, and equal parts", low=0)
    level_warmup: int = setting(0, "how many first updates draw by level_warmup_p", low=0)
    level_warmup_p: tuple = setting((0.0, 0.0, 0.5, 0.5), "the probabilities in them", low=0)
    t_hat_mean: float = setting(1.0, "m of t̂, the mean of its logit")
    t_hat_std: float = setting(2.0, "σ of t̂; wider than the paper's 1", above=0)
    distill_weight: float = setting(10.0, "weight λ of the distillation loss", low=0)
    heads_warmup: int = setting(100, "first updates: heads alone", low=0, scales=True, smoke=0)
    taps: tuple = setting((1, 2), "blocks whose tokens the heads see; empty: all", kind=int)
    head_width: int = setting(64, "channels of a head", low=2, high=2**16)
    lora: int = setting(0, "rank of adapters that learn in the student's place; 0: none", low=0)
    student_lr: float = setting(2e-4, "AdamW", above=0)
    heads_lr: float = setting(1e-3, "AdamW", above=0)
    beta1: float = setting(0.5, "AdamW's first decay, student and heads", low=0, below=1)
    r1: float = setting(0.0, "weight γ of R1 on the heads' inputs", low=0)
    student_ema: float = setting(0.995, "decay per update of its average", low=0, below=1)
    discriminator: str = setting("", "another run's heads.pt for the heads to start from")
    # report
    evaluation: int = setting(1000, "samples a row", low=8, high=10**6, scales=True, smoke=32)
    teacher_steps: int = setting(32, "Euler steps of the teacher", low=1, high=10_000, smoke=4)
    cfg: float = setting(4.0, "guidance scale w of the teacher's samples", low=-1e3, high=1e3)
    eta: float = setting(0.0, "weight of fresh noise between the student's steps", low=0, high=1)
    judge_steps: int = setting(700, "updates of the judge", low=1, high=10**6, smoke=20)
    judge_width: int = setting(32, "its channels", low=4, high=1024)
    stage: str = setting("all", "run one of STAGES alone", choices=("all", *STAGES), free=True)
    source: str = setting("", "a run whose teacher and samples to use", flag="--from", free=True)

    def __post_init__(self):
        check_fields(self)
        check_together(self)

    @property
    def is_latent(self):
        """Whether x_0 is an encoder's latent; otherwise it is the picture itself."""
        return self.downscale > 1

    @property
    def positions(self):
        """H·W of an x_0 of --size."""
        return self.size[0] * self.size[1] // self.downscale**2

    @property
    def sizes(self):
        """(H, W) of x_0 for every aspect ratio."""
        return sample.latent_sizes(self)

    @property
    def tapped(self):
        return self.taps or tuple(range(self.depth))

    condition_channels = 0  # of what the network is told beside text, by a method's own settings

    def conditioned(self, dataset):
        """The data set that tells it, too."""
        return dataset

    def logit_shift(self, size):
        """What is added to the logit of t for an x_0 of another size (H, W) than that of --size:
        SD3's timestep shift by the square root of the ratio of their areas."""
        return 0.5 * math.log(size[0] * size[1] / self.positions)

    def model(self):
        """MMDiT's arguments."""
        same = "depth width patch channels pos_size qk_norm attn2_blocks"
        arguments = {name: getattr(self, name) for name in same.split()}
        arguments["heads"] = self.attention_heads
        arguments["context_dim"] = self.text_dim
        arguments["pooled_dim"] = self.pooled_dim or self.text_dim
        return arguments

    def head_sizes(self):
        """The Discriminator's arguments."""
        sizes = dict(width=self.width, taps=self.tapped, hidden=self.head_width)
        return sizes | dict(pooled_dim=self.model()["pooled_dim"])

    def scaled(self):
        """As HowToRun has it, and with `level_p` filled in."""
        others = len(self.levels) - 1
        level_p = self.level_p or (0.4, *[round(0.6 / max(1, others), 4)] * others)
        return dataclasses.replace(super().scaled(), level_p=level_p)


# What SD3-medium and SD3.5-large have in common. [P] stands in arXiv 2403.03206 (SD3) or in the
# released files, [L] is reported of LADD (arXiv 2403.12015), all else is ours and not measured.
SD3 = dict(
    size=(1024, 1024), channels=16, downscale=8, patch=2, pos_size=192,  # [P]
    text_dim=4096, pooled_dim=2048, text_length=154,  # [P] 77 tokens of CLIP, 77 of T5
    shift=3.0, adam_eps=1e-15,  # [P]
    level_p=(0.7, 0.1, 0.1, 0.1),  # [L], and the levels
    level_warmup=500, level_warmup_p=(0.0, 0.0, 0.5, 0.5),  # [L] above 512²
    taps=(), distill_weight=0.0, t_hat_mean=1.0, t_hat_std=1.0,  # [L] all; tried m -1 to 2
    iterations=10_000,  # [L] of its ablations
    aspects=("1:1", "5:4", "4:5", "3:2", "2:3", "16:9", "9:16"), batch=128, synthetic=500_000,
    student_lr=1e-5, heads_lr=1e-4, student_ema=0.999, head_width=128, save_every=500, log_every=10,
    muon_lr=0.0, shard=True,
)  # fmt: skip

PRESETS = {
    "nano": dict(),
    "tiny": dict(
        data="cifar10", size=(32, 32), width=384, depth=8, attention_heads=6, text_length=16,
        teacher_iterations=20_000, teacher_batch=256, teacher_lr=1e-3, teacher_ema=0.999, cfg=2.0,
        synthetic=50_000, synthetic_cfg=2.0, iterations=8_000, batch=256,
        t_hat_std=1.0, taps=(), student_ema=0.999, evaluation=10_000, judge_steps=8_000,
        judge_width=64, log_every=50, save_every=2_000, sample_every=2_000,
    ),
    "small": dict(  # ours, run in short only
        size=(64, 64), aspects=("1:1", "4:3", "3:4", "3:2", "2:3", "16:9", "9:16"), patch=4,
        width=512, depth=12, attention_heads=8, text_length=16,
        teacher_iterations=40_000, teacher_batch=256,
        teacher_lr=1e-3, teacher_ema=0.999, synthetic=50_000, iterations=10_000,
        batch=256, t_hat_std=1.0, taps=(), student_ema=0.999, evaluation=10_000, judge_steps=8_000,
        judge_width=64, log_every=50, save_every=2_000, sample_every=2_000,
    ),
    "sd3-2b": SD3 | dict(  # SD3-medium; SD3.5-medium: docs/full-size.md
        depth=24, width=1536, attention_heads=24, qk_norm=False,  # [P]
        teacher_steps=50, cfg=5.0, synthetic_steps=50, synthetic_cfg=5.0,  # [P] as released
    ),
    "sd3-8b": SD3 | dict(  # SD3.5-large
        depth=38, width=2432, attention_heads=38, qk_norm=True,  # [P]
        teacher_steps=40, cfg=4.5, synthetic_steps=40, synthetic_cfg=4.5,  # [P] as released
    ),
}  # fmt: skip


# ---------------------------------------------------------------------------------------------
# Stage 1: the teacher
# ---------------------------------------------------------------------------------------------

# tools/train.py calls the stages in order; the fourth, the report, is tools/report.py. `run`
# (lib/run.py) is what they share: settings, data set, text features, device, folder; run.make and
# run.load give networks on their device. `loop` (lib/loop.py) yields the steps, from where a cut
# run goes on: loop.add(name=value) notes a number of a part of the batch, loop.log(name=value) ends
# the update, and a row of log.jsonl has the means of what was noted since the row before. `signs`
# are tests for bad rows. `split` cuts a batch into --accumulate parts, and `my_share` keeps this
# process's rows. `step_all` takes (optimisers, network, largest gradient norm, factor of the
# learning rate), and clips, steps and clears gradients.


def draw_teacher_batch(run, step, token_ids):
    """A batch of the teacher, drawn from (seed, step) alone; this process's share of it.

    token_ids: the captions' ids. -> x0, text, t, noise"""
    s, random = run.settings, rng(run.settings.seed, "teacher", step)
    bucket = data.draw_bucket(run.dataset, s.seed, "teacher", step)
    index = my_share(np.arange(step * s.teacher_batch, (step + 1) * s.teacher_batch))
    images, caption = bucket.batch(index)
    kept = torch.from_numpy(my_share(random.random(s.teacher_batch)) >= s.drop)
    ids = token_ids[caption] * kept[:, None]  # id 0 is no word: a dropped caption is the empty one
    text = bucket.told(run.text_encoder.features(ids), index)
    x0 = data.to_float(moved(images, run.device))
    mean = s.t_mean + s.logit_shift(x0.shape[2:])
    t = moved(my_share(logit_normal(s.teacher_batch, mean, s.t_std, random)), run.device)
    noise = normal(s.seed, "teacher, noise", index, x0.shape[1:], run.device)
    return x0, text, t, noise


def train_teacher(run):
    s = run.settings
    model = run.make(MMDiT, **s.model())
    ema = run.make(MMDiT, **s.model()).requires_grad_(False)
    teach(run, "teacher", model, ema, s.teacher_iterations, s.teacher_lr, s.muon_lr)


def teach(run, stage, model, ema, total, lr, muon_lr):
    """The updates of a teacher; also of one that is tuned (methods/inpaint.py)."""
    s = run.settings
    optimizers = make_optimizers(model, lr, 0.9, s.adam_eps, muon_lr)
    token_ids = run.text_encoder.ids(run.dataset.captions)
    networks = dict(model=model, ema=ema)
    loop = run.loop(stage, total, s.teacher_batch, networks, optimizers, signs=SIGNS.get(stage, ()))
    run.compile(model)
    for step in loop:
        for part in split(draw_teacher_batch(run, step, token_ids), s.accumulate):
            with run.autocast():
                loss = teacher_loss(model, *part)
            (loss / s.accumulate).backward()
            loop.add(loss=loss)
        rate = learning_rate(step, total, decay=0.6)
        (norm,) = step_all((optimizers, model, s.clip, rate))
        update_ema(ema, model, s.teacher_ema, step)
        loop.log(grad_norm=norm)
        if loop.due(s.sample_every):
            run.show(stage, step + 1, ema)
    run.save("teacher", ema, total)


# ---------------------------------------------------------------------------------------------
# Stage 2: synthesis
# ---------------------------------------------------------------------------------------------

FILE = 512  # samples of one file, all of one size
SYNTHESIS = "synthesis"  # the random stream of their noise; the student meets it again


def planned_samples(run):
    """Which samples stand in which file. -> their numbers, the bucket of every file"""
    s = run.settings
    size = min(FILE, math.ceil(s.synthetic / len(run.dataset.sets)))
    numbers = [np.arange(a, min(a + size, s.synthetic)) for a in range(0, s.synthetic, size)]
    shares = data.shares(run.dataset, len(numbers))
    return numbers, [bucket for bucket, n in shares for _ in range(n)]


def synthesise(run):
    """The teacher's samples: what is real to the discriminator."""
    s = run.settings
    teacher = generator(run, "teacher")
    numbers, buckets = planned_samples(run)

    def make(file, index):
        n, bucket = len(index), buckets[file]
        if run.divided:  # a short last file is padded: all processes need equally many passes
            index = index[0] + np.arange(len(numbers[0]))
        first = numbers[buckets.index(bucket)][0]  # the bucket's first sample: its caption 0
        _, caption = bucket.batch(index - first + data.SYNTHETIC_INDEX)
        captions = [run.dataset.captions[i] for i in caption]
        options = dict(seed=s.seed, stream=SYNTHESIS)
        options |= dict(steps=s.synthetic_steps, cfg=s.synthetic_cfg)
        x0 = teacher.sample(captions, index, size=bucket.size, **options)
        return x0[:n], captions[:n]

    write_samples(run, numbers, make, s.seed)


# ---------------------------------------------------------------------------------------------
# Stage 3: LADD
# ---------------------------------------------------------------------------------------------


class Samples(NamedTuple):
    """What the student learns from."""

    dataset: data.Buckets
    token_ids: torch.Tensor  # ids of its captions
    seed: int | None  # of the noise that the samples were made from; None: real images


def distillation_samples(run):
    s = run.settings
    if s.targets == "real":
        return Samples(run.dataset, run.text_encoder.ids(run.dataset.captions), None)
    parts, captions, seed = read_samples(run.out / "synthetic", s.channels, s.patch)
    sets = [data.ImageSet("synthetic", part, seed=s.seed, flip=False) for part in parts]
    return Samples(data.Buckets(sets).to(run.device), run.text_encoder.ids(captions), seed)


def draw_levels(settings, n, step, random):
    """n levels of the student, by their probabilities. -> (n,)"""
    warm = step < settings.level_warmup
    p = np.array(settings.level_warmup_p if warm else settings.level_p)
    return torch.from_numpy(random.choice(np.float32(settings.levels), n, p=p / p.sum()))


def draw_batch(run, samples, step, heads_warmup=0, own_noise="low"):
    """All that an update starts from, drawn from (seed, step) alone; this process's share of it.

    samples: of `distillation_samples`. own_noise: the levels at which ε is the noise that this very
    sample was made from: "low", all but the first (LADD); "all"; "none". Real images have none."""
    s, device, random = run.settings, run.device, rng(run.settings.seed, "distillation", step)
    dataset, token_ids, seed = samples
    bucket = data.draw_bucket(dataset, s.seed, "distillation", step)
    index = my_share(np.arange(step * s.batch, (step + 1) * s.batch))
    images, caption = bucket.batch(index)
    x0 = data.to_float(moved(images, device))
    text = bucket.told(run.text_encoder.features(token_ids[caption]), index)
    since = max(0, step - heads_warmup)  # how many updates the student has had
    t = my_share(draw_levels(s, s.batch, since, random))
    first, t = t == s.levels[0], moved(t, device)
    m = s.t_hat_mean + s.logit_shift(x0.shape[2:])
    t_hat = moved(my_share(logit_normal(s.batch, m, s.t_hat_std, random)), device)
    noise, noise_hat = (
        normal(s.seed, f"distillation, noise of {level}", index, x0.shape[1:], device)
        for level in ("t", "t̂")
    )
    paired = (t < s.levels[0]) | (own_noise == "all")  # the first level is pure noise
    if own_noise != "none" and seed is not None:
        # every synthetic sample has a caption of its own, so the caption's row is its number
        source = sample.noise_of(seed, SYNTHESIS, caption, x0.shape[1:], device=device)
        noise = torch.where(per_sample(paired, x0), source, noise)
    return Batch(x0, text, t, noise, paired, t_hat, noise_hat, caption, first)


def start_as_teacher(run, teacher=None):
    """A trainable copy of the teacher. With --lora an adapter alone is trainable, on the weights of
    `teacher`, which stay in its memory."""
    if run.settings.lora:
        return run.adapted(teacher or load(run, "teacher", frozen=True))
    return load(run, "teacher").requires_grad_(True)


def start_student(run, teacher=None):
    """The student before its first update, its average, and its optimisers."""
    s = run.settings
    student = start_as_teacher(run, teacher)
    ema = start_as_teacher(run, teacher or student).requires_grad_(False)
    return student, ema, make_optimizers(student, s.student_lr, s.beta1, s.adam_eps)


def start_heads(run):
    """The discriminator's heads and their optimisers, afresh or from --discriminator."""
    s = run.settings
    heads = run.alone().make(Discriminator, **s.head_sizes())  # small: every process holds them
    optimizers = make_optimizers(heads, s.heads_lr, s.beta1, s.adam_eps)
    if s.discriminator:
        start = sample.read_checkpoint(s.discriminator, ["heads"])
        fill(heads, start["weights"])
        if "optimizer" in start:  # pretrained/ has none; the learning rate is the settings'
            moments = dict(state=start["optimizer"]["state"])
            optimizers[0].load_state_dict(optimizers[0].state_dict() | moments)
    return heads, optimizers


def student_rate(s, step, heads_warmup=0):
    """The student's learning rate, as a factor: it rises over 40 updates, and falls over the last
    30 % of them."""
    return learning_rate(step - heads_warmup, s.iterations - heads_warmup, decay=0.3)


def distil(run):
    """The updates: the six lines are `features_of_both`, `heads_loss` and `student_losses`. Around
    them stand the parts of --accumulate, the heads' own first updates, and what is logged."""
    s = run.settings
    teacher = load(run, "teacher", frozen=True)
    student, ema, student_optimizers = start_student(run, teacher)
    heads, heads_optimizers = start_heads(run)
    samples = distillation_samples(run)
    probe = diversity_probe(run, teacher, samples)
    networks = dict(student=student, ema=ema, heads=heads)
    loop = run.loop("distillation", s.iterations, s.batch, networks,
                    student_optimizers + heads_optimizers, signs=SIGNS["distillation"],
                    shown=("loss_d", "loss_g", "d_real", "d_fake"))  # fmt: skip
    for network in (teacher, student, heads):
        run.compile(network)
    for step in loop:
        learning, one_pass = step >= s.heads_warmup, s.accumulate == 1
        batch = draw_batch(run, samples, step, s.heads_warmup)
        parts = split(batch, s.accumulate)
        for b in parts:  # the heads learn
            shared = learning and one_pass  # the student learns from these features, too
            with run.autocast(), torch.set_grad_enabled(shared):
                x0_hat, real, fake = features_of_both(student, teacher, b, s)
            with run.autocast():
                loss_d, on_real, on_fake = heads_loss(heads, real, fake, b, s)
            (loss_d / s.accumulate).backward()
            loop.add(loss_d=loss_d, **separation(on_real, on_fake))
        heads_rate = min(1.0, (step + 1) / 40)  # rises over 40 updates
        (norm_d,) = step_all((heads_optimizers, heads, math.inf, heads_rate))
        for b in parts if learning else ():  # the student learns, from the new heads
            with run.autocast():
                if not one_pass:  # of several parts no graph was kept: computed once more
                    x0_hat, real, fake = features_of_both(student, teacher, b, s)
                targets, weights = held_to(ema, teacher, x0_hat, real, b, s)
                loss_g, distill = student_losses(heads, targets, weights, fake, b, s)
            ((loss_g + s.distill_weight * distill) / s.accumulate).backward()
            loop.add(loss_g=loss_g, loss_distill=distill)
        if learning:
            rate = student_rate(s, step, s.heads_warmup)
            # no step where the heads' gradient was not finite
            (norm_g,) = step_all((student_optimizers, student, s.clip, rate), after=[norm_d])
            update_ema(ema, student, s.student_ema, step - s.heads_warmup)
            loop.add(grad_norm=norm_g)
        if loop.due(s.log_every):
            loop.add(diversity=probe(student))
        loop.log(grad_norm_heads=norm_d)
        if loop.due(s.sample_every):
            run.show("student", step + 1, ema)
    run.save("heads", heads, s.iterations, optimizer=heads_optimizers[0])
    run.save("student", ema, s.iterations)


@torch.no_grad()
def diversity_probe(run, teacher, samples):
    """A function student -> diversity of what it makes of pure noise, at always the same captions.

    The distance of a sample's features to the nearest other one's, over that of real samples. All
    get the same noise for the teacher, so that only their images differ."""
    s = run.settings
    steps = min(64, math.ceil(2048 * world() / s.batch))
    most = max(1, min(32, s.batch // world()) // s.accumulate)
    b = commonest([draw_batch(run, samples, step) for step in range(steps)], most)
    t = torch.full_like(b.t, s.levels[0])
    t_hat = torch.full_like(t, s.t_hat_mean + s.logit_shift(b.x0.shape[2:])).sigmoid()  # median
    alike = b.noise_hat[:1].expand_as(b.x0)

    @torch.no_grad()
    def features(student=None):
        with run.autocast():
            x0 = student_predict(student, b.x0, b.text, t, b.noise) if student else b.x0
            return teacher_features(teacher, x0, b.text, t_hat, alike, s.tapped)[-1]

    real = features()
    return lambda student: diversity(real, features(student))


# ---------------------------------------------------------------------------------------------
# One run
# ---------------------------------------------------------------------------------------------


def load(run, kind, frozen=False):
    """The finished teacher or student, without gradient."""
    checkpoint = sample.read_checkpoint(run.path(kind), check=rank() == 0)
    return run.load(checkpoint, MMDiT, frozen)


def generator(run, kind, model=None):
    """What samples from the finished teacher or student, or from a network in training."""
    model = load(run, kind, frozen=run.divided) if model is None else model
    s, condition = run.settings, getattr(run.dataset, "condition", None)
    condition = condition and partial(condition, held_out=True)
    return sample.Generator(model, s, kind, run.device, s.precision, run.text_encoder, condition)


def main(argv=None, distil=distil, method="ladd", kind=Settings):
    """The program, which is tools/train.py; a method of methods/ brings its own stage `distil`,
    and with `kind` settings of its own, a dataclass that adds to Settings."""
    argv = sys.argv[1:] if argv is None else argv
    return importlib.import_module("tools.train").main(argv, distil, method, kind)


if __name__ == "__main__":
    import ladd  # the module that tools and methods know

    leave(ladd.main())
