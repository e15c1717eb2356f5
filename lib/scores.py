"""Scores: a judge reads the caption's attributes back from a picture, and compares distributions.

Alignment is the share of pictures of which every attribute is read right. Fréchet distance
(arXiv 1706.08500), precision and recall (arXiv 1904.06991) are taken in the judge's features.
"""

import copy
import hashlib
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from lib.checkpoints import not_finite
from lib.errors import CheckpointError, RunError, plural
from lib.files import read, save
from lib.machine import autocast

REAL = "real, held out"  # the name of a table's first row
UNKEPT = {}  # path -> weights of judges that could not be written there, for this process


class Judge(torch.nn.Module):
    """A small classifier: images to one answer per attribute, by way of 64 features."""

    def __init__(self, answers, width=32, size=(16, 16), channels=3, kernel=3):
        super().__init__()
        around = dict(kernel_size=kernel, padding=kernel // 2)
        layers, side, channels = [torch.nn.Conv2d(channels, width, **around)], min(size), width
        while side > 4:
            out = min(2 * channels, 8 * width)
            strides = (2, 1) if side <= 8 or width > 32 else (2,)
            for stride in strides:
                layers += [torch.nn.GroupNorm(4, channels), torch.nn.GELU()]
                layers += [torch.nn.Conv2d(channels, out, stride=stride, **around)]
                channels = out
            side = (side + 1) // 2
        layers += [torch.nn.GroupNorm(4, channels), torch.nn.GELU()]
        layers += [torch.nn.AdaptiveAvgPool2d(4), torch.nn.Flatten()]
        layers += [torch.nn.Linear(16 * channels, 64), torch.nn.GELU()]
        self.body = torch.nn.Sequential(*layers)
        self.heads = torch.nn.ModuleList(torch.nn.Linear(64, n) for n in answers)

    def forward(self, x):
        """x (B, C, H, W) in [-1, 1] -> features (B, 64), answers: list of logits (B, n)"""
        features = self.body(x)
        return features, [head(features) for head in self.heads]

    @torch.no_grad()
    def read(self, images, batch=500):
        """images (n, C, H, W) uint8 -> features (n, 64) float64, answers (n, A) int64, on CPU"""
        device = next(self.parameters()).device
        features, answers = [], []
        for part in images.split(batch):
            f, logits = self(part.to(device).float() / 127.5 - 1)
            features.append(f.cpu().double())  # not every device has float64
            read = [a.argmax(1) for a in logits]
            answers.append(torch.stack(read, 1).cpu() if read else torch.empty(len(f), 0).long())
        return torch.cat(features), torch.cat(answers)


def train_judge(judge, draw, steps, precision, batch=128):
    """Trains a judge on real images: draw(step, n) -> images (n, C, H, W) uint8, labels (n, A)"""
    device = next(judge.parameters()).device
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for step in tqdm(range(steps), "judge", leave=False, disable=None):
        images, labels = draw(step, batch)
        labels = labels.to(device)
        with autocast(device, precision):
            _, answers = judge(images.to(device).float() / 127.5 - 1)
        losses = [F.cross_entropy(a.float(), labels[:, k]) for k, a in enumerate(answers)]
        optimizer.zero_grad()
        sum(losses).backward()
        optimizer.step()
        schedule.step()


def get_judge(draw, dataset, s, device, data_dir, precision, seed=0, kernel=3):
    """The judge of a data set, trained once, always from the same seed, and kept in data_dir.

    draw: see `train_judge`; s: settings. One judge reads all sizes of images: it pools its features
    to 4 × 4. Where there is nothing to learn, its random features still tell images apart. seed,
    kernel: of its weights, and the side of its convolutions; a network that a student learns from
    must be another one than that which scores it."""
    images, labels = draw(0, 64)
    made_of = (dataset.name, dataset.attributes, s.size, s.judge_steps, s.judge_width, seed, kernel)
    key = hashlib.sha256(repr(made_of).encode())
    key.update(images.cpu().numpy().tobytes() + labels.numpy().tobytes())
    path = Path(data_dir) / f"judge-{key.hexdigest()[:16]}.pt"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        answers = [len(values) for values in dataset.attributes.values()]
        judge = Judge(answers, s.judge_width, s.size, dataset.channels, kernel).to(device)
    closed = None
    try:
        if path in UNKEPT or path.exists():
            judge.load_state_dict(UNKEPT.get(path) or read(path)["weights"])
            if not_finite(judge.state_dict()):
                raise ValueError("numbers that are not finite")
            return judge.eval()
    except PermissionError as error:  # another user's, which is not replaced
        closed = error
    except (ValueError, KeyError, TypeError, RuntimeError):  # also CheckpointError
        raise CheckpointError(
            f"{path}: damaged. Delete it and give the command again: it is made anew."
        ) from None
    if dataset.attributes:
        train_judge(judge, draw, s.judge_steps, precision)
    weights = {name: tensor.cpu() for name, tensor in judge.state_dict().items()}
    try:
        if closed:
            raise closed
        save(dict(weights=weights), path)
    except OSError as error:  # no permission, a full disk: no reason to end a run
        UNKEPT[path] = weights
        print(f"The judge can't be kept ({error}): each command trains it anew.", file=sys.stderr)
    return judge.eval()


def frechet_distance(a, b):
    """‖μ_a - μ_b‖² + tr(Σ_a + Σ_b - 2·(Σ_a Σ_b)^½) of two sets of features (n, d), in float64."""
    a, b = a.double(), b.double()
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T  # Σ_a^½
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    distance = (a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross
    return distance.item()


def precision_recall(real, fake, k=3):
    """Share of fakes in the reals' k-NN manifold, of reals in the fakes' (arXiv 1904.06991)."""

    def covered(points, manifold):
        radius = torch.cdist(manifold, manifold).kthvalue(k + 1, dim=1).values
        near = (torch.cdist(part, manifold) <= radius for part in points.split(1000))
        return torch.cat([part.any(dim=1) for part in near])

    return covered(fake, real).double().mean().item(), covered(real, fake).double().mean().item()


def score(images, labels, reference, judge):
    """One row of the table: alignment, Fréchet distance, precision, recall.

    images: a list of (n, 3, H, W) uint8; labels (N, A) of all of them; reference: features of
    held-out images (m, 64), the first N of them of the same shapes"""
    features, answers = (torch.cat(x) for x in zip(*map(judge.read, images), strict=True))
    precision, recall = precision_recall(reference[: len(features)], features)
    aligned = (answers == labels).all(dim=1).double().mean().item() if labels.shape[1] else None
    return dict(
        alignment=aligned,
        frechet=frechet_distance(reference, features),
        precision=precision,
        recall=recall,
    )


def compared(teacher, student, few=(8, 4, 2, 1)):
    """(name, generator, options) of all that a run compares, of those of both that are there.
    *Untrained* is the student before distillation: the teacher, sampled as the student is."""
    rows, levels = [], (teacher or student).settings.levels
    if teacher is not None:
        steps, cfg = teacher.settings.teacher_steps, teacher.settings.cfg
        name = f"teacher, {plural(steps, 'step')}, CFG {cfg:g}"
        rows.append((name, teacher, dict(steps=steps, cfg=cfg)))
    for name, generator in (("untrained", teacher), ("student", student)):
        for steps in few:
            if generator is not None and steps <= len(levels):
                options = dict(steps=steps, cfg=1.0, sampler="renoise")
                rows.append((f"{name}, {plural(steps, 'step')}", generator, options))
    return rows


def score_table(held, labels, judge, candidates, seed, to_uint8):
    """The table of a run: a list of dicts, the real images first.

    held: HeldOut of each size, each with its share; a row scores all of them together.
    labels: of all captions. candidates: see `compared`. seed: of their noise."""
    parts = [(part.captions, part.size) for part in held]
    labels = labels[torch.cat([part.caption for part in held])]
    read = [(judge.read(part.reference)[0], len(part.images)) for part in held]
    first, others = [f[:n] for f, n in read], [f[n:] for f, n in read]
    reference = torch.cat(first + others)  # first as many of each size as there are samples
    one = held[0]  # the only size, where images have a condition

    def scored(name, images, **more):
        row = dict(name=name) | score(images, labels, reference, judge) | more
        if one.region is not None and name != REAL:
            row |= distances(images[0], one.images, one.region)
        return row

    rows = [scored(REAL, [part.images for part in held])]
    total = len(candidates) * len(labels)
    with tqdm(total=total, desc="evaluation", leave=False, disable=None) as bar:
        for name, who, options in candidates:
            start = time.perf_counter()
            if one.condition is not None:
                who = copy.copy(who)
                who.condition = lambda index: one.condition[list(index)]
            made = who.sample_parts(parts, seed=seed, stream="evaluation", progress=bar, **options)
            if not all(x.isfinite().all() for x in made):
                raise RunError(f"{name}: its samples are not finite; try --precision fp32")
            seconds = (time.perf_counter() - start) / len(labels)
            evaluations = options["steps"] * (2 if options["cfg"] != 1 else 1)
            images = [to_uint8(x) for x in made]
            rows.append(scored(name, images, evaluations=evaluations, seconds=seconds))
    if one.region is not None:
        rows.append(scored("as given", [to_uint8(one.condition[:, : one.images.shape[1]])]))
    return rows


def distances(images, truth, region):
    """Mean absolute difference of pixels, 0…255, to those of the truth, in a region and outside.

    images, truth (n, C, H, W) uint8, region (n, 1, H, W) bool"""
    far = (images.float() - truth.float()).abs().mean(dim=1, keepdim=True)
    return dict(inside=far[region].mean().item(), outside=far[~region].mean().item())


def judge_accuracy(held, labels, attributes, judge):
    """Share of held-out images whose attributes the judge reads right, for each attribute."""
    right = [(judge.read(part.images)[1] == labels[part.caption]).double() for part in held]
    return dict(zip(attributes, torch.cat(right).mean(dim=0).tolist(), strict=True))


class HeldOut(NamedTuple):
    """Held-out images of one size, to be scored by."""

    images: torch.Tensor  # (n, C, H, W) uint8
    caption: torch.Tensor  # (n,) rows of the captions
    captions: list  # n texts
    size: tuple  # (H, W)
    reference: torch.Tensor  # (m, C, H, W) uint8, other images to compare with
    condition: torch.Tensor | None = None  # (n, C', H, W) what the network is told beside captions
    region: torch.Tensor | None = None  # (n, 1, H, W) bool, the pixels that it is to make


def held_out(shares):
    """Held-out images of a data set, [(set of one size, how many)] -> [HeldOut]"""
    found = []
    for bucket, n in shares:
        available = 6 * n if bucket.held_out_size is None else min(bucket.held_out_size, 6 * n)
        own = min(n, available // 2)  # the reference must not be the row "real" itself
        index = np.arange(n) % max(1, own)
        images, caption = bucket.batch(index, held_out=True)
        captions = [bucket.captions[i] for i in caption]
        reference, _ = bucket.batch(np.arange(own, available), held_out=True)
        more = (getattr(bucket, name, None) for name in ("condition", "region"))
        more = [function and function(index, held_out=True) for function in more]
        found.append(HeldOut(images, caption, captions, bucket.size, reference, *more))
    return found
