"""Rectified flow: noise levels, samplers, and what samples from a finished network.

Rectified flow and its schedules: arXiv 2403.03206 (SD3). Few-step sampling: LADD, arXiv 2403.12015.

    x_t = (1 - t)·x_0 + t·ε        t in [0, 1]: 0 is data, 1 is noise
    v   = ε - x_0                  what the network predicts, the velocity dx_t/dt
    x̂_0 = x_t - t·v                what one prediction says about the data

    letter   meaning                              | symbol  variable  shape
    B        batch                                | x_0     x0        (B, C, H, W)
    C, H, W  channels, height, width              | ε       noise     (B, C, H, W), N(0, I)
    M        text tokens                          | t       t         (B,)
    n        number of samples                    | c, y    text      (B, M, D_c), (B, D_p)

    python sample.py runs/nano --prompt "a large red circle on a dotted blue background" --out a.png
    python sample.py runs/nano --evaluate        the table again
"""

import importlib
import math
import sys
from itertools import pairwise

import numpy as np
import torch

import data
from discriminator import Discriminator
from lib import checkpoints
from lib.conditions import paste
from lib.errors import UsageError
from lib.lora import added, build
from lib.machine import autocast, device_of
from lib.scores import compared, get_judge, held_out, score_table
from lib.streams import normal
from mmdit import MMDiT

# ---------------------------------------------------------------------------------------------
# Rectified flow
# ---------------------------------------------------------------------------------------------


def per_sample(t, x):
    """t (B,) shaped to multiply x (B, …)."""
    return t.view(-1, *[1] * (x.dim() - 1))


def add_noise(x0, noise, t):
    """x_t = (1 - t)·x_0 + t·ε. x0, noise (B, C, H, W), t (B,) -> (B, C, H, W)"""
    t = per_sample(t, x0)
    return (1 - t) * x0 + t * noise


def predict_x0(xt, v, t):
    """x̂_0 = x_t - t·v. xt, v (B, C, H, W), t (B,) -> (B, C, H, W)"""
    return xt - per_sample(t, xt) * v.float()


def logit_normal(n, mean, std, random):
    """n draws of t = sigmoid(u), u ~ N(mean, std²), from NumPy's generator `random`. -> (n,)"""
    u = torch.from_numpy(random.standard_normal(n, np.float32))
    return torch.sigmoid(u * std + mean)


def shift_t(t, alpha):
    """t' = α·t / (1 + (α - 1)·t): odds t/(1-t) times α; more noise for α > 1 (SD3)."""
    return alpha * t / (1 + (alpha - 1) * t)


def euler_times(steps, alpha=1.0):
    """The steps + 1 noise levels from 1 to 0 of an Euler sampler, shifted by α. -> (steps + 1,)"""
    return shift_t(torch.linspace(1, 0, steps + 1, dtype=torch.float64), alpha).float()


def student_levels(levels, steps):
    """The trained levels that a sampler visits: 2 steps of {1, .75, .5, .25} are {1, .5}."""
    if not 1 <= steps <= len(levels):
        raise ValueError(
            f"the student was trained for 1 to {len(levels)} steps, not {steps}; "
            "--sampler euler takes any number"
        )
    return [levels[i * len(levels) // steps] for i in range(steps)]


# ---------------------------------------------------------------------------------------------
# Samplers: each yields x̂_0 after every step; the last one is the sample
# ---------------------------------------------------------------------------------------------

SAMPLERS = ("renoise", "euler")  # those that `Generator.way` and `.trajectory` know


def guided_velocity(model, x, t, text, uncond, cfg):
    """v = v_uncond + w·(v_cond - v_uncond), both halves in one forward; no second half at w = 1."""
    t = t.expand(len(x)).to(x.device)
    if cfg == 1:
        return model(x, t, *text)[0].float()
    both = [torch.cat([c, u.expand_as(c)]) for c, u in zip(text, uncond, strict=True)]
    v_cond, v_uncond = model(x.repeat(2, 1, 1, 1), t.repeat(2), *both)[0].float().chunk(2)
    return v_uncond + cfg * (v_cond - v_uncond)


def euler(model, x, times, text, uncond=None, cfg=1.0):
    """Euler steps along dx/dt = v from times[0] to times[-1] = 0. x = x_t at times[0]."""
    for t, t_next in pairwise(times):
        v = guided_velocity(model, x, t, text, uncond, cfg)
        yield x - t * v
        x = x + (t_next - t) * v


def renoise(model, x, levels, text, fresh_noise, eta=0.0):
    """The student's few-step sampler: predict x̂_0, noise it to the next level, repeat.

    x = x_t at levels[0]; fresh_noise(i) gives the noise of step i. Without guidance. The noise for
    the next level is √(1 - η²)·ε̂ + η·(fresh noise), where ε̂ = x̂_0 + v is what the student has just
    predicted. η = 0 makes this an Euler sampler on the student's levels. (LADD's paper does not say
    which; consistency models draw fresh noise, the released turbo models keep ε̂.)"""
    for i, t in enumerate(levels):
        t = torch.as_tensor(t, dtype=torch.float32)
        v = guided_velocity(model, x, t, text, None, 1.0)
        x0 = x - t * v
        yield x0
        if i + 1 < len(levels):
            noise = math.sqrt(1 - eta**2) * (x0 + v) + (eta * fresh_noise(i + 1) if eta else 0)
            x = add_noise(x0, noise, torch.full((len(x),), levels[i + 1], device=x.device))


# ---------------------------------------------------------------------------------------------
# A finished network: reading it, sampling from it
# ---------------------------------------------------------------------------------------------


def read_checkpoint(path, kinds=("teacher", "student"), check=True):
    """A checkpoint's dict: kind, model (arguments), weights (memory-mapped), settings (read as
    attributes), step. Runs no code. check: whether its checksums are."""
    network = Discriminator if "heads" in kinds else MMDiT
    return checkpoints.read_checkpoint(path, kinds, network, check)


def latent_sizes(s):
    """The (H, W) of x_0 for the size and aspect ratios of a run's settings: multiples of the patch,
    or where an encoder made the latents, of 64 pixels."""
    size = tuple(side // s.downscale for side in s.size)
    unit = s.patch if s.downscale == 1 else max(s.patch, 64 // s.downscale)
    return data.bucket_sizes(size, unit, s.aspects) if s.aspects else [size]


def noise_of(seed, stream, indices, shape, step=0, device="cpu"):
    """The noise of sampling, ε at a step. The noise of image i depends on these and `step` alone,
    wherever and whenever it is drawn. -> (B, *shape)"""
    return normal(seed, f"{stream}, step {step}", indices, shape, device)


class Generator:
    """A network with all that it takes to sample from it: text features, sizes, levels, guidance.

    steps, sampler and cfg default to how the network was made: a student predicts and re-noises on
    its levels without guidance, a teacher takes Euler steps with guidance.

    condition: for a network with condition channels, a function of images' numbers that gives them,
    (B, C', H, W)."""

    def __init__(
        self, model, settings, kind, device="cpu", precision="auto", text_encoder=None,
        condition=None,
    ):  # fmt: skip
        self.model, self.settings, self.kind = model, settings, kind
        self.condition = condition
        self.device, self.precision = torch.device(device), precision
        self.size = latent_sizes(settings)[0]
        if text_encoder is None:
            text_encoder = data.HashedText(settings.text_dim, settings.text_length)
        self.text_encoder = text_encoder.to(self.device)

    def way(self, steps=None, cfg=None, sampler=None):
        """How it samples: what is not given is as the network was made for.
        -> steps, guidance scale, sampler. Re-noising has no guidance: ValueError."""
        sampler = sampler or ("renoise" if self.kind == "student" else "euler")
        few = self.kind == "student" or sampler == "renoise"
        steps = steps or (len(self.settings.levels) if few else self.settings.teacher_steps)
        if cfg is None:
            cfg = 1.0 if few else self.settings.cfg
        if cfg != 1 and sampler == "renoise":
            raise ValueError(f"cfg {cfg:g}: re-noising has no guidance; add --sampler euler")
        return steps, cfg, sampler

    def network(self, *arguments):
        with autocast(self.device, self.precision):
            return self.model(*arguments)

    @torch.no_grad()
    def trajectory(
        self, captions, indices, *, seed=0, stream="sampling", steps=None, cfg=None, sampler=None,
        eta=None, size=None, start=None,
    ):  # fmt: skip
        """Yields x̂_0 (B, C, H, W) on the CPU after every step, for one batch of captions.

        size: (H, W) of x_0, by default the first that the model was made for. The shift of an Euler
        sampler follows the number of positions, SD3's rule: α·√(H·W / that of the training).

        indices: the number of every image, which with seed and stream decides its noise.
        start: (x0 of one image, strength), to begin at it noised to that level, not at noise. All
        levels are then times the strength, so a student meets some that it has not learned at."""
        s = self.settings
        steps, cfg, sampler = self.way(steps, cfg, sampler)
        shape = (self.model.config["channels"], *(size or self.size))

        def fresh(step):
            return noise_of(seed, stream, indices, shape, step, self.device)

        x, level = fresh(0), 1.0
        if start is not None:
            level = start[1]
            x = add_noise(start[0].to(self.device), x, torch.full((len(x),), level).to(self.device))
        text, uncond, known = self.text_encoder(captions), self.text_encoder([""]), None
        if self.condition is not None:
            given = self.condition(indices).to(self.device)
            text, uncond = (*text, given), (*uncond, given)
            known = given if given.shape[1] == shape[0] + 1 else None  # inpainting: with its mask
        elif "condition_channels" in self.model.config:
            raise UsageError("this network fills or edits a picture: sample.py's --init-image")
        if sampler == "euler":
            positions = s.size[0] * s.size[1] // s.downscale**2  # that it was trained at
            alpha = s.shift * math.sqrt(shape[1] * shape[2]) / math.sqrt(positions)
            times = euler_times(steps, alpha) * level
            path = euler(self.network, x, times, text, uncond, cfg)
        elif sampler == "renoise":
            levels = [t * level for t in student_levels(s.levels, steps)]
            path = renoise(self.network, x, levels, text, fresh, s.eta if eta is None else eta)
        else:
            raise ValueError(f"sampler {sampler!r}: must be one of {', '.join(SAMPLERS)}")
        for x0 in path:
            yield (x0 if known is None else paste(x0, known)).float().cpu()

    def batches(self, captions, indices=None, *, batch=256, progress=None, **options):
        """captions -> samples (B, C, H, W), unclipped, batch by batch; options: of `trajectory`."""
        indices = range(len(captions)) if indices is None else indices
        for a in range(0, len(captions), batch):
            part = slice(a, a + batch)
            for x0 in self.trajectory(captions[part], indices[part], **options):
                last = x0
            if progress is not None:
                progress.update(len(last))
            yield last

    def sample(self, captions, indices=None, **options):
        """captions -> samples (n, C, H, W), all of them together."""
        return torch.cat(list(self.batches(captions, indices, **options)))

    def sample_parts(self, parts, **options):
        """Samples of several sizes: parts = [(captions, (H, W)), …] -> [(n, C, H, W), …].

        Image i of all together has noise i."""
        out, first = [], 0
        for captions, size in parts:
            index = range(first, first + len(captions))
            out.append(self.sample(captions, index, size=size, **options))
            first += len(captions)
        return out


def read_network(run, teacher=False, adapter=None, scale=1.0):
    """The checkpoint of a run's student (or teacher), with another run's adapter added to it."""
    checkpoint = read_checkpoint(run, ("teacher",) if teacher else ("student", "teacher"))
    if adapter:
        kinds = ("student", "teacher", "adapter")
        other = checkpoints.read_checkpoint(adapter, kinds, MMDiT, alone=True)
        checkpoints.same_network("--adapter", adapter, other["model"], checkpoint["model"])
        if not other.get("lora"):
            raise UsageError(f"--adapter {adapter}: a whole network, not the adapter of --lora")
        checkpoint["weights"] = added(checkpoint["weights"], other["weights"], scale)
    return checkpoint


def load_generator(run, teacher=False, device="auto", precision="auto", **adapter):
    """The student (or teacher) of a run folder, or of a checkpoint file; adapter: of the above."""
    checkpoint = read_network(run, teacher, **adapter)
    model = build(MMDiT, checkpoint)
    model.load_state_dict(checkpoint["weights"])
    model = model.to(device_of(device)).eval().requires_grad_(False)
    kind = checkpoint["kind"]
    return Generator(model, checkpoint["settings"], kind, device_of(device), precision)


def judge_of(dataset, s, device, data_dir, precision, **other):
    """The judge that a run's samples are scored by; with another seed and kernel, another one."""
    draw = data.judge_batches(dataset)
    return get_judge(draw, dataset, s, device, data_dir, precision, **other)


def evaluate(dataset, judge, teacher, student, count, seed=0, samples=None):
    """The table of a run, of those of both that are there: dicts, the real images first.

    samples: {(H, W): images (n, C, H, W) uint8} to be compared with in place of real ones"""
    held, rows = held_out(data.shares(dataset, count)), compared(teacher, student)
    if samples is not None:
        held = [p._replace(reference=samples[p.size]) for p in held if p.size in samples]
        if not held:
            raise UsageError(f"no samples of the data's sizes: they are of {list(samples)}")
    return score_table(held, dataset.labels, judge, rows, seed, data.to_uint8)


def main(argv=None):
    """The command line, which is tools/draw.py."""
    argv = sys.argv[1:] if argv is None else argv
    return importlib.import_module("tools.draw").main(argv)


if __name__ == "__main__":
    sys.exit(main())
