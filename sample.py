"""Rectified flow: noise levels, samplers, command line of a finished run.

Rectified flow and its schedules: arXiv 2403.03206 (SD3). Few-step sampling: LADD, arXiv 2403.12015.

    x_t = (1 - t)·x_0 + t·ε        t in [0, 1]: 0 is data, 1 is noise
    v   = ε - x_0                  what the network predicts, the velocity dx_t/dt
    x̂_0 = x_t - t·v                what one prediction says about the data

    letter   meaning                              | symbol  variable  shape
    B        batch                                | x_0     x0        (B, C, H, W)
    C, H, W  channels, height, width              | ε       noise     (B, C, H, W), N(0, I)
    M        text tokens                          | t       t         (B,)
    n        number of positions of a latent, H·W | c, y    text      (B, M, D_c), (B, D_p)

    python sample.py runs/nano --prompt "a large red circle on a blue background" --out a.png
    python sample.py runs/nano --evaluate
    python sample.py runs/nano --export student.safetensors
    python sample.py RUN --decode SD3_DIR --prompt "a red fox" --size 832x1216 --out fox.png
"""

import copy
import hashlib
import io
import json
import math
import os
import pickle
import sys
import time
import zipfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, PngImagePlugin
from tqdm import tqdm

import data
from data import Parser
from mmdit import CheckpointError, MMDiT, write_sd3

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


def logit_normal(n, mean, std, generator=None):
    """n draws of t = sigmoid(u), u ~ N(mean, std²). -> (n,)"""
    return torch.sigmoid(torch.randn(n, generator=generator) * std + mean)


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


def renoise(model, x, levels, text, fresh_noise):
    """LADD's few-step sampler: predict x̂_0, noise it afresh to the next level, repeat.

    x = x_t at levels[0]; fresh_noise(i) gives the noise of step i. Without guidance."""
    for i, t in enumerate(levels):
        t = torch.as_tensor(t, dtype=torch.float32)
        if i > 0:
            x = add_noise(x0, fresh_noise(i), t.expand(len(x)).to(x.device))  # noqa: F821
        x0 = x - t * guided_velocity(model, x, t, text, None, 1.0)
        yield x0


def noise_of(seed, indices, shape, step=0):
    """Noise from (seed, index, step) alone: image i is the same in any batch. -> (B, …)"""
    out = torch.empty(len(indices), *shape)
    for row, index in zip(out, indices, strict=True):
        key = int(data.hash_uniform(seed + 7919 * step, [index], 1)[0, 0] * (1 << 53))
        row.normal_(generator=torch.Generator().manual_seed(key))
    return out


# ---------------------------------------------------------------------------------------------
# Checkpoints
# ---------------------------------------------------------------------------------------------


MARK = b"\nSHA-256 "  # then the digest of all before it, in hex: the end of every file of `save`


class Summed:
    """A file that torch.save writes to: adds up the SHA-256 of what is written. What is wrong with
    the disk, which torch.save hides, is kept in `error`."""

    def __init__(self, file):
        self.file, self.digest, self.error = file, hashlib.sha256(), None

    def write(self, content):
        self.digest.update(content)
        try:
            if self.error is None:
                self.file.write(content)
        except OSError as error:
            self.error = error
        return len(content)

    def flush(self):
        pass


def save(value, path):
    """Writes a file for `read` and torch.load, whole or not at all, that ends in its checksum.
    Tensor by tensor: no second copy of them in memory."""
    with data.replacing(path) as file:
        torch.save(value, summed := Summed(file))
        if summed.error is not None:
            raise summed.error
        file.write(MARK + summed.digest.hexdigest().encode())


def differs(path):
    """Whether a file of `save` is not what was written: read from end to end, and not kept. One
    without a checksum (torch.save's own) can't differ."""
    left, digest = max(0, os.path.getsize(path) - len(MARK) - 64), hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(min(left, 1 << 20)):
            digest.update(chunk)
            left -= len(chunk)
        end = file.read(len(MARK) + 64)
    return end.startswith(MARK) and end != MARK + digest.hexdigest().encode()


def refuse_packed(file):
    """ValueError where a file of torch.load's is compressed: torch.save packs nothing."""
    with zipfile.ZipFile(file) as parts:
        if any(part.compress_type for part in parts.infolist()):
            raise ValueError("it is compressed")


def mapped(path):
    """What `save` wrote, memory-mapped: a tensor is read where it is touched. Runs no code."""
    refuse_packed(path)
    try:
        str(path).encode()
    except UnicodeEncodeError:  # torch maps no file of such a name
        return torch.load(io.BytesIO(Path(path).read_bytes()), "cpu", weights_only=True)
    return torch.load(path, "cpu", weights_only=True, mmap=True)


def read(path, device="cpu"):
    """What `save` wrote. Runs no code. CheckpointError where it is missing or damaged.

    A file without a checksum (torch.save's own) is taken as it is, if torch.load can read it."""
    if Path(path).exists() and not Path(path).is_file():
        raise CheckpointError(f"{path}: not a file.")  # a pipe or a device might never end
    try:
        content = Path(path).read_bytes()
        length = len(content) - len(MARK) - 64
        if content[length:].startswith(MARK):
            if hashlib.sha256(content[:length]).hexdigest().encode() != content[-64:]:
                raise ValueError("its content is not what was written: the checksum differs")
            content = content[:length]
        file = io.BytesIO(content)
        refuse_packed(file)
        file.seek(0)
        return torch.load(file, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file. Has the run got that far?") from None
    except pickle.UnpicklingError:
        raise CheckpointError(
            f"{path}: can't be read: damaged, or with code in it, which is never run."
        ) from None
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0][:100]
        raise CheckpointError(f"{path}: can't be read as a checkpoint ({reason}).") from None


def read_checkpoint(path, kinds=("teacher", "student")):
    """A checkpoint's dict: kind, model (arguments), weights, settings, step. Runs no code."""
    checkpoint = read(path)
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != "ladd-1":
        raise CheckpointError(f"{path}: not a checkpoint of this program.")
    if checkpoint.get("kind") not in kinds:
        raise CheckpointError(f"{path}: holds {checkpoint.get('kind')}, not {' or '.join(kinds)}.")
    try:
        if checkpoint["kind"] != "heads":
            check_parts(checkpoint, os.path.getsize(path))
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0][:100]
        raise CheckpointError(f"{path}: its parts don't fit together ({reason}).") from None
    return checkpoint


def check_parts(checkpoint, size):
    """Raises where a checkpoint's parts can't be used, or claim more than its `size` in bytes."""
    weights, settings = checkpoint["weights"], checkpoint["settings"]
    if any(type(w) is not torch.Tensor or w.is_meta or w.is_sparse for w in weights.values()):
        raise ValueError("weights that are no plain tensors")
    if sum(w.numel() * w.element_size() for w in weights.values()) > size:
        raise ValueError("it claims more weights than it holds")
    if checkpoint["model"]["depth"] > len(weights):
        raise ValueError("fewer weights than blocks")
    with torch.device("meta"):  # no memory for what the arguments claim
        model = MMDiT(**checkpoint["model"])
    model.load_state_dict(weights, assign=True)
    side = model.config["patch"] * model.config["pos_size"] * settings.get("downscale", 1)
    for name, most in dict(size=side, text_length=4096, teacher_steps=10_000).items():
        if not 1 <= settings[name] <= most or type(settings[name]) is not int:
            raise ValueError(f"{name} {settings[name]}")
    widths = settings["text_dim"], settings.get("pooled_dim") or settings["text_dim"]
    if widths != (model.config["context_dim"], model.config["pooled_dim"]):
        raise ValueError(f"text_dim {settings['text_dim']}")
    numbers = torch.tensor([settings["cfg"], settings["shift"], *settings["levels"]])
    if not numbers.isfinite().all() or numbers[1] <= 0 or not all(settings["levels"]):
        raise ValueError("cfg, shift or levels")


def build(checkpoint, device="cpu"):
    """The network of a checkpoint, weights included, ready for inference."""
    model = MMDiT(**checkpoint["model"])
    model.load_state_dict(checkpoint["weights"])
    return model.to(device).eval().requires_grad_(False)


def best_device():
    return "cuda" if torch.cuda.is_available() else "cpu"


def arithmetic(device, precision):
    """The dtype of products: `auto` is bf16 where the hardware has it, float32 elsewhere."""
    bf16 = has_bf16(torch.device(device)) if precision == "auto" else precision == "bf16"
    return torch.bfloat16 if bf16 else torch.float32


def autocast(device, precision):
    bf16 = arithmetic(device, precision) == torch.bfloat16
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=bf16)


def has_bf16(device):
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


class Generator:
    """A network with all that it takes to sample from it: text features, sizes, levels, guidance.

    steps, sampler and cfg default to how the network was made: a student predicts and re-noises on
    its levels without guidance, a teacher takes 32 Euler steps with guidance."""

    def __init__(self, model, settings, kind, device="cpu", precision="auto"):
        self.model, self.settings, self.kind = model, settings, kind
        self.device, self.precision = torch.device(device), precision
        self.side = settings["size"] // settings.get("downscale", 1)  # of its square samples
        self.text = data.HashedText(settings["text_dim"], settings["text_length"]).to(self.device)

    def steps_or_default(self, steps, cfg, sampler=None):
        """The steps and the guidance that sampling will use. Re-noising has no guidance."""
        student = self.kind == "student" or sampler == "renoise"
        steps = steps or (
            len(self.settings["levels"]) if student else self.settings["teacher_steps"]
        )
        return steps, (1.0 if student else self.settings["cfg"]) if cfg is None else cfg

    def network(self, *arguments):
        with autocast(self.device, self.precision):
            return self.model(*arguments)

    @torch.no_grad()
    def trajectory(
        self,
        captions,
        indices,
        *,
        seed=0,
        steps=None,
        cfg=None,
        sampler=None,
        size=None,
        start=None,
    ):
        """Yields x̂_0 (B, C, H, W) on the CPU after every step, for one batch of captions.

        size: (H, W) of the latents, by default the square that the model was made for. The shift of
        an Euler sampler follows the number n of positions: α·√(n / n_square), SD3's rule.

        indices: the number of every image, which with the seed decides its noise.
        start: (x0, strength), to begin at an image noised to that level, not at pure noise."""
        steps, cfg = self.steps_or_default(steps, cfg, sampler)
        sampler = sampler or ("renoise" if self.kind == "student" else "euler")
        shape = (self.model.config["channels"], *(size or (self.side, self.side)))
        fresh = lambda step: noise_of(seed, indices, shape, step).to(self.device)  # noqa: E731
        x, level = fresh(0), 1.0
        if start is not None:
            level = start[1]
            x = add_noise(start[0].to(self.device), x, torch.full((len(x),), level).to(self.device))
        text = self.text(captions)
        if sampler == "euler":
            alpha = self.settings["shift"] * math.sqrt(shape[1] * shape[2]) / self.side
            times = euler_times(steps, alpha) * level
            path = euler(self.network, x, times, text, self.text([""]), cfg)
        else:
            levels = [t * level for t in student_levels(self.settings["levels"], steps)]
            path = renoise(self.network, x, levels, text, fresh)
        for x0 in path:
            yield x0.float().cpu()

    def sample(self, captions, indices=None, *, batch=256, progress=None, start=None, **options):
        """captions -> samples (n, C, H, W) in [-1, 1]; see `trajectory` for the options."""
        indices = range(len(captions)) if indices is None else indices
        out = []
        for a in range(0, len(captions), batch):
            part = slice(a, a + batch)
            own = start and (start[0][part] if len(start[0]) > 1 else start[0], start[1])
            for x0 in self.trajectory(captions[part], indices[part], start=own, **options):
                last = x0
            out.append(last)
            if progress is not None:
                progress.update(len(last))
        return torch.cat(out)


def checkpoint_of(run, teacher=False):
    """The file of the student (or teacher) of a run folder; a file stands for itself."""
    path, kind = Path(run), "teacher" if teacher else "student"
    return path / f"{kind}.pt" if path.is_dir() else path


def latent_sizes(settings):
    """The (H, W) of the latents of every aspect ratio in a run's settings: multiples of the patch,
    or where an encoder made the latents, of 64 pixels."""
    scale, patch = settings.get("downscale", 1), settings["patch"]
    unit = patch if scale == 1 else max(patch, 64 // scale)
    return data.bucket_sizes(settings["size"] // scale, unit, settings.get("aspects", ["1:1"]))


def sample_buckets(generator, parts, **options):
    """Samples of several shapes: parts = [(captions, (H, W)), …] -> [(n, C, H, W), …].

    Image i of all together has noise i."""
    out, first = [], 0
    for captions, size in parts:
        index = range(first, first + len(captions))
        out.append(generator.sample(captions, index, size=size, **options))
        first += len(captions)
    return out


def held_out_captions(dataset, count):
    """`count` captions of held-out images with their shapes -> [(captions, (H, W)), …]"""
    parts = []
    for bucket, n in data.shares(dataset, count):
        _, caption = bucket.batch(np.arange(n), held_out=True)
        parts.append(([bucket.captions[i] for i in caption], bucket.size))
    return parts


def load_generator(run, teacher=False, device=None, precision="auto"):
    """The student (or teacher) of a run folder, or of a checkpoint file."""
    checkpoint = read_checkpoint(checkpoint_of(run, teacher))
    device = device or best_device()
    return Generator(
        build(checkpoint, device), checkpoint["settings"], checkpoint["kind"], device, precision
    )


# ---------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------


def grid(images, columns, scale=None):
    """Images (3, H, W) uint8 -> one picture, small images enlarged without smoothing.

    Smaller ones stand in the middle of a place that has room for the largest."""
    H, W = (max(image.shape[k] for image in images) for k in (1, 2))
    rows, scale = math.ceil(len(images) / columns), scale or max(1, 64 // max(H, W))
    sheet = np.full((rows, H + 2, columns, W + 2, 3), 255, np.uint8)
    for i, image in enumerate(images):
        _, h, w = image.shape
        top, left = 1 + (H - h) // 2, 1 + (W - w) // 2
        place = sheet[i // columns, top : top + h, i % columns, left : left + w]
        place[:] = image.permute(1, 2, 0).numpy()
    picture = Image.fromarray(sheet.reshape(rows * (H + 2), columns * (W + 2), 3))
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def panels(titled, columns):
    """[(title, images)] -> the grids side by side under their titles."""
    grids = [(title, grid(images, columns)) for title, images in titled]
    width = sum(g.width for _, g in grids) + 16 * (len(grids) - 1)
    sheet = Image.new("RGB", (width, grids[0][1].height + 24), "white")
    draw, x = ImageDraw.Draw(sheet), 0
    for title, picture in grids:
        draw.text((x + 4, 4), title, fill="black", font_size=14)
        sheet.paste(picture, (x, 24))
        x += picture.width + 16
    return sheet


def stack(pictures):
    """Pictures one below the other, on white."""
    size = max(p.width for p in pictures), sum(p.height for p in pictures)
    sheet = Image.new("RGB", size, "white")
    top = 0
    for picture in pictures:
        sheet.paste(picture, (0, top))
        top += picture.height
    return sheet


def refuse_strangers(path):
    """Raises FileExistsError where a file is that this program did not make."""
    try:
        with Image.open(path, formats=("PNG", "GIF")) as old:
            ours = old.info.get("Software") == "LADD" or old.info.get("comment") == b"LADD"
    except FileNotFoundError:
        return
    except Exception:  # Pillow raises nearly anything on damaged files
        ours = False
    if not ours:
        raise FileExistsError(f"{path} exists and was not made by this program; choose another")


def save_png(picture, path, **notes):
    """Writes a PNG that carries the notes; an existing picture is replaced only if this made it."""
    path = Path(path)
    refuse_strangers(path)
    info = PngImagePlugin.PngInfo()
    for key, value in {"Software": "LADD", **notes}.items():
        info.add_itxt(key, data.clean(value))
    with data.replacing(path) as file:
        picture.save(file, "PNG", pnginfo=info)


# ---------------------------------------------------------------------------------------------
# Evaluation: a judge reads the caption's attributes back
# ---------------------------------------------------------------------------------------------


class Judge(torch.nn.Module):
    """A small classifier: images to one answer per attribute, by way of 64 features."""

    def __init__(self, answers, width=32, size=(16, 16)):
        super().__init__()
        self.config = dict(answers=list(answers), width=width, size=list(size))
        layers, side, channels = [torch.nn.Conv2d(3, width, 3, padding=1)], min(size), width
        while side > 4:
            out = min(2 * channels, 8 * width)
            for stride in (2, 1) if side <= 8 or width > 32 else (2,):
                layers += [torch.nn.GroupNorm(4, channels), torch.nn.GELU()]
                layers += [torch.nn.Conv2d(channels, out, 3, padding=1, stride=stride)]
                channels = out
            side = (side + 1) // 2
        layers += [torch.nn.GroupNorm(4, channels), torch.nn.GELU()]
        layers += [torch.nn.AdaptiveAvgPool2d(4), torch.nn.Flatten()]
        layers += [torch.nn.Linear(16 * channels, 64), torch.nn.GELU()]
        self.body = torch.nn.Sequential(*layers)
        self.heads = torch.nn.ModuleList(torch.nn.Linear(64, n) for n in answers)

    def forward(self, x):
        """x (B, 3, H, W) in [-1, 1] -> features (B, 64), answers: list of logits (B, n)"""
        features = self.body(x)
        return features, [head(features) for head in self.heads]

    @torch.no_grad()
    def read(self, images, batch=500):
        """images (n, 3, H, W) uint8 -> features (n, 64) float64, answers (n, A) int64, on CPU"""
        device = next(self.parameters()).device
        features, answers = [], []
        for part in images.split(batch):
            f, logits = self(data.to_float(part.to(device)))
            features.append(f.double().cpu())
            read = [a.argmax(1) for a in logits]
            answers.append(torch.stack(read, 1).cpu() if read else torch.empty(len(f), 0).long())
        return torch.cat(features), torch.cat(answers)


def train_judge(dataset, size, device, *, steps, width, precision="auto", batch=128):
    """Trains a judge on the real images, always from the same seed.

    One judge reads all shapes: it learns from batches of each, and pools its features to 4 × 4."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        judge = Judge([len(v) for v in dataset.attributes.values()], width, size).to(device)
    if not dataset.attributes:  # nothing to learn: its random features still tell images apart
        return judge.eval()
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for step in tqdm(range(steps), "judge", leave=False, disable=not sys.stderr.isatty()):
        index = np.arange(step * batch, (step + 1) * batch) + data.JUDGE_INDEX
        images, caption = data.draw_bucket(dataset, 0, 0, step).batch(index)
        labels = dataset.labels[caption].to(device)
        with autocast(device, precision):
            _, answers = judge(data.to_float(images.to(device)))
        loss = sum(
            torch.nn.functional.cross_entropy(a.float(), labels[:, k])
            for k, a in enumerate(answers)
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return judge.eval()


def get_judge(dataset, size, device, *, data_dir="data", steps=1000, width=32, precision="auto"):
    """The judge of a data set, trained once and kept in data_dir."""
    buckets = [copy.copy(bucket) for bucket in data.buckets_of(dataset)]
    key = hashlib.sha256(repr((dataset.captions[:1000], size, steps, width)).encode())
    for bucket in buckets:
        bucket.seed, bucket.orders = 0, {}  # the same judge for all seeds
        key.update(bucket.batch(np.arange(64))[0].numpy().tobytes())
    dataset = data.Buckets(buckets)
    path = Path(data_dir) / f"judge-{key.hexdigest()[:16]}.pt"
    if path.exists():
        judge = Judge([len(v) for v in dataset.attributes.values()], width, size).to(device)
        try:
            judge.load_state_dict(read(path, device)["weights"])
        except (CheckpointError, KeyError, TypeError, RuntimeError):
            raise CheckpointError(
                f"{path}: damaged. Delete it and give the command again: it is made anew."
            ) from None
        return judge.eval()
    judge = train_judge(dataset, size, device, steps=steps, width=width, precision=precision)
    save({"config": judge.config, "weights": judge.state_dict()}, path)
    return judge


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
        return torch.cat(
            [(torch.cdist(part, manifold) <= radius).any(dim=1) for part in points.split(1000)]
        )

    return covered(fake, real).double().mean().item(), covered(real, fake).double().mean().item()


def score(images, labels, reference, judge):
    """One row of the table: alignment, Fréchet distance, precision, recall.

    images (n, 3, H, W) uint8, or a list of such; labels (n, A); reference: features of held-out
    images (m, 64), the first n of them of the same shapes"""
    parts = [images] if torch.is_tensor(images) else images
    features, answers = (torch.cat(x) for x in zip(*map(judge.read, parts), strict=True))
    precision, recall = precision_recall(reference[: len(features)], features)
    aligned = (answers == labels).all(dim=1).double().mean().item() if labels.shape[1] else None
    return dict(
        alignment=aligned,
        frechet=frechet_distance(reference, features),
        precision=precision,
        recall=recall,
    )


def evaluation_rows(teacher, student):
    """(name, generator, options) of every generated row, of those of both that are there. The
    teacher at 4, 2 and 1 steps, sampled as the student is, is the student before distillation: the
    number to beat."""
    few = [n for n in (4, 2, 1) if n <= len((teacher or student).settings["levels"])]
    named = lambda who, n: f"{who}, {n} step{'s'[: n > 1]}"  # noqa: E731
    rows = []
    if teacher is not None:
        steps, cfg = teacher.settings["teacher_steps"], teacher.settings["cfg"]
        guided, untrained = dict(steps=steps, cfg=cfg), dict(cfg=1.0, sampler="renoise")
        rows += [(f"teacher, {steps} steps, CFG {cfg:g}", teacher, guided)]
        rows += [(named("untrained", n), teacher, dict(steps=n, **untrained)) for n in few]
    if student is not None:
        rows += [(named("student", n), student, dict(steps=n)) for n in few]
    return rows


def held_out_split(dataset, count):
    """Held-out images of one shape: -> `count` of them, their captions, others to compare with."""
    index = np.arange(count)
    real, caption = dataset.batch(index, held_out=True)
    held_out = getattr(dataset, "held_out_images", None)
    available = 6 * count if held_out is None else len(held_out)
    if available < 2 * count:  # few images: the reference must not be the row "real" itself
        available, real, caption = 2 * count, *dataset.batch(index % max(1, available // 2), True)
        reference, _ = dataset.batch(np.arange(len(held_out) // 2, len(held_out)), held_out=True)
    else:
        reference, _ = dataset.batch(np.arange(count, min(available, 6 * count)), held_out=True)
    return real, caption, reference


def evaluate(dataset, judge, teacher, student, count, seed=0):
    """The table of a run: a list of dicts, the real images first.

    Of several shapes each has its share of the samples, and a row scores all of them together."""
    split = [(bucket, n, *held_out_split(bucket, n)) for bucket, n in data.shares(dataset, count)]
    real, captions = [part[2] for part in split], torch.cat([part[3] for part in split])
    parts = [([b.captions[i] for i in caption], b.size) for b, _, _, caption, _ in split]
    labels, read = dataset.labels[captions], [(n, judge.read(r)[0]) for _, n, _, _, r in split]
    reference = torch.cat([r[:n] for n, r in read] + [r[n:] for n, r in read])
    rows = [dict(name="real, held out", **score(real, labels, reference, judge))]
    planned = evaluation_rows(teacher, student)
    noise = seed + 1_000_000  # a sweep's students have learned from that of nearby seeds
    total = len(planned) * count
    with tqdm(total=total, desc="evaluation", leave=False, disable=not sys.stderr.isatty()) as bar:
        for name, generator, options in planned:
            start = time.perf_counter()
            images = sample_buckets(generator, parts, seed=noise, progress=bar, **options)
            seconds = (time.perf_counter() - start) / count
            evaluations = options["steps"] * (2 if options.get("cfg", 1) != 1 else 1)
            row = score([data.to_uint8(x) for x in images], labels, reference, judge)
            rows.append(dict(name=name, **row, evaluations=evaluations, seconds=seconds))
    return rows


def judge_accuracy(dataset, judge, count=2000):
    """Share of held-out images whose attributes the judge reads right, for each attribute."""
    right = []
    for bucket, n in data.shares(dataset, count):
        real, caption = bucket.batch(np.arange(n), held_out=True)
        right.append((judge.read(real)[1] == dataset.labels[caption]).double())
    right = torch.cat(right).mean(dim=0)
    return dict(zip(dataset.attributes, right.tolist(), strict=True))


def accuracy_line(accuracy):
    return ", ".join(f"{name} {value:.3f}" for name, value in accuracy.items())


def markdown_table(rows):
    lines = ["| samples | alignment | Fréchet | precision | recall | evaluations | s / image |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for row in rows:
        cells = [row["name"]]
        for key, form in (
            ("alignment", ".3f"),
            ("frechet", ".2f"),
            ("precision", ".2f"),
            ("recall", ".2f"),
            ("evaluations", "d"),
            ("seconds", ".4f"),
        ):
            cells.append("–" if row.get(key) is None else format(row[key], form))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------


EXPORTS = dict(fp32="F32", bf16="BF16", fp16="F16")  # as safetensors names them


def parse(argv):
    parser = Parser(
        "sample.py", description="Samples from a finished run, or scores it.", allow_abbrev=False
    )
    add = parser.add_argument
    add("run", help="a run folder, or a checkpoint")
    add("--prompt", action="append", default=[], metavar="TEXT", help="may be repeated")
    add("--prompts", metavar="FILE", help="a file of one prompt a line, or @captions of the data")
    add("--num", type=int, help="images (default: one per prompt; @captions: 16)")
    add(
        "--steps",
        type=int,
        help="network steps (default: as the model was made for; --evaluate: the teacher's)",
    )
    add("--teacher", action="store_true", help="sample from the teacher instead of the student")
    add("--cfg", type=float, help="guidance scale w (default: the teacher's own; students: 1)")
    add("--sampler", choices=("renoise", "euler"), help="default: renoise, for a teacher euler")
    add("--seed", type=int, help="of the noise (default: 0; --evaluate: the run's own)")
    add("--size", metavar="HxW", help="another size than the model was trained at")
    add("--out", default="samples.png", help="a grid as .png, or a folder for one PNG per image")
    add("--trajectory", metavar="FILE.gif", help="x̂_0 along the steps, as an animation")
    add("--init-image", metavar="FILE", help="start from this image instead of noise …")
    add("--strength", type=float, default=0.6, help="… noised to this level (0 to 1)")
    add("--decode", metavar="SD3_DIR", help="for latents: SD3's text encoders and VAE, diffusers'")
    add("--evaluate", action="store_true", help="the table of scores instead of samples")
    add("--export", metavar="FILE", help="write the weights as .safetensors, SD3's names")
    add("--dtype", choices=EXPORTS, default="fp32", help="of the exported weights")
    add("--data", help="score against other data than the run's own")
    add("--data-dir", default="data", help="where downloads and judges are kept")
    add("--device", default=None)
    add("--precision", choices=("auto", "bf16", "fp32"), default="auto")
    add("--batch", type=int, default=256, help="images at a time")
    args = parser.parse_args(argv)
    if not 0 < args.strength <= 1:
        parser.error(f"--strength {args.strength:g}: must be above 0 and at most 1")
    if args.evaluate:
        if args.decode:
            parser.error("--evaluate scores models of pixels, --decode is for models of latents")
        if args.num is not None and args.num < 8:
            parser.error("--num: scores need at least 8 samples")
        for name in ("prompt", "prompts", "teacher", "sampler", "size", "trajectory", "init_image"):
            if getattr(args, name):
                flag = "--" + name.replace("_", "-")
                parser.error(
                    f"{flag}: has no place beside --evaluate, which scores the report's rows"
                )
    for name in ("num", "steps", "batch"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name}: must be at least 1")
    return args, parser.error


def read_prompts(args, generator, error):
    """The prompt of every image."""
    prompts = list(args.prompt)
    if args.prompts == "@captions":
        dataset = dataset_of(args, generator)
        for captions, _ in held_out_captions(dataset, args.num or 16):
            prompts += captions
    elif args.prompts:
        try:
            with open(args.prompts, "rb") as file:
                text = file.read(1 << 24).decode("utf-8-sig")
            if len(text) == 1 << 24:
                raise ValueError("more than 16 MB")
        except (OSError, ValueError) as reason:
            error(f"--prompts {args.prompts}: can't be read ({reason})")
        prompts += filter(None, map(data.clean, text.split("\n")))
    if not prompts:
        error("no prompt: give --prompt TEXT, --prompts FILE, or --prompts @captions")
    length = math.inf if args.decode else generator.settings["text_length"]
    for prompt in dict.fromkeys(prompts):
        if len(data.split_words(prompt)) > length:
            print(f"only the first {length} words are read of: {prompt[:200]}", file=sys.stderr)
    return [prompts[i % len(prompts)] for i in range(args.num or len(prompts))]


def dataset_of(args, generator):
    """The data set that a model was trained on, or the one that was asked for."""
    s = generator.settings
    most = dict(evaluation=10**6, judge_steps=10**6, judge_width=1024, seed=1 << 64)
    wrong = [k for k, n in most.items() if type(s.get(k)) is not int or abs(s[k]) > n]
    if wrong or not isinstance(s.get("data"), str):
        raise CheckpointError(f"{args.run}: its settings can't be used: {wrong or 'data'}.")
    options = dict(data_dir=args.data_dir, seed=s["seed"], sizes=latent_sizes(s))
    return data.load(args.data or s["data"], s["size"], s["size"], **options)


def sd3_encoders(folder, generator):
    """SD3's encoders, in place of the text features that the model is otherwise sampled with."""
    encoders, config = data.Encoders(folder, generator.device, vae=True), generator.model.config
    context, pooled = encoders([""])
    mine = context.shape[2], pooled.shape[1], encoders.part("vae").config.latent_channels
    wanted = config["context_dim"], config["pooled_dim"], config["channels"]
    if mine != wanted:
        names = "widths of text and pooled text, and channels of latents"
        raise ValueError(f"--decode {folder}: {names} are {mine}, but the model has {wanted}")
    generator.text = encoders
    return encoders


def parse_size(text, generator, error, unit=1):
    """--size, which is in pixels, in the model's own positions of `unit` pixels a side."""
    if text is None:
        return None
    try:
        height, width = (int(part) for part in text.lower().split("x"))
    except ValueError:
        error(f"--size {text}: must look like 24x16, height x width")
    patch, most = generator.settings["patch"], generator.settings["pos_size"]
    side = patch * unit  # of a patch, pixels
    if height < 1 or width < 1 or height % side or width % side:
        error(f"--size {text}: both must be multiples of the patch, {side}")
    if max(height, width) > side * most:
        error(f"--size {text}: the model's positions end at {side * most} pixels")
    return height // unit, width // unit


def draw(args, error):
    """Samples as asked for, and writes them."""
    generator = load_generator(args.run, args.teacher, args.device, args.precision)
    prompts = read_prompts(args, generator, error)
    to_images, unit = data.to_uint8, 1
    if args.decode:
        encoders = sd3_encoders(args.decode, generator)
        to_images, unit = encoders.pixels, encoders.unit()
        encoders.learn([*prompts, ""])  # all at once: every encoder moves to the device one time
    elif (channels := generator.model.config["channels"]) != 3:
        error(f"{args.run} makes latents of {channels} channels: add --decode SD3_DIR")
    seed = args.seed or 0
    options = dict(seed=seed, steps=args.steps, cfg=args.cfg, sampler=args.sampler)
    options["size"] = size = parse_size(args.size, generator, error, unit)
    steps, cfg = generator.steps_or_default(args.steps, args.cfg, args.sampler)
    few = "renoise" if generator.kind == "student" else "euler"
    if cfg != 1 and (args.sampler or few) == "renoise":
        error(f"--cfg {cfg:g}: predicting and re-noising has no guidance; add --sampler euler")
    if args.trajectory:
        refuse_strangers(args.trajectory)
    if args.init_image:
        height, width = size or (generator.side, generator.side)
        try:
            with open(args.init_image, "rb") as file:
                pixels = data.decode(file.read(data.MOST_BYTES), height * unit, width * unit)
        except Exception as reason:  # Pillow raises nearly anything on damaged files
            error(f"--init-image {args.init_image}: can't be read ({data.clean(reason, 200)})")
        pixels = torch.from_numpy(pixels.copy())[None]
        x0 = encoders.latents(pixels) if args.decode else data.to_float(pixels)
        options["start"] = (x0, args.strength)

    notes = dict(seed=seed, steps=steps, cfg=cfg, model=f"{generator.kind} of {args.run}")
    with tqdm(total=len(prompts), desc="sampling", disable=not sys.stderr.isatty()) as bar:
        images = generator.sample(prompts, batch=args.batch, progress=bar, **options)
    images, out = to_images(images), Path(args.out)
    if out.suffix.lower() == ".png":
        columns = math.ceil(math.sqrt(len(images)))
        text = "; ".join(dict.fromkeys(prompts))
        save_png(grid(images, columns), out, prompt=text, **notes)
    else:
        for i, image in enumerate(images):
            picture = Image.fromarray(image.permute(1, 2, 0).numpy())
            save_png(picture, out / f"{i:05d}.png", prompt=prompts[i], index=i, **notes)
    print(f"{len(images)} images, {steps} steps: {out}")
    if args.trajectory:
        frames = generator.trajectory(prompts[:64], range(min(64, len(prompts))), **options)
        pictures = [grid(to_images(x), math.ceil(len(x) ** 0.5)) for x in frames]
        pause = [150] * (len(pictures) - 1) + [1500]
        moving = dict(save_all=True, append_images=pictures[1:], duration=pause, loop=0)
        with data.replacing(args.trajectory) as file:
            pictures[0].save(file, "GIF", comment=b"LADD", **moving)
        print(f"{len(pictures)} frames: {args.trajectory}")


def fingerprints(folder):
    """The SHA-256 of a run's checkpoints, which say what a metrics.json was made from."""
    return {kind: data.sha256(Path(folder) / f"{kind}.pt") for kind in ("teacher", "student")}


def read_metrics(folder):
    """A run's metrics.json, {} if there is none. CheckpointError: not of its checkpoints."""
    path = Path(folder) / "metrics.json"
    metrics = data.read_object(path) if path.exists() else {}
    if metrics and metrics.get("checkpoints") != fingerprints(folder):
        raise CheckpointError(
            f"{path}: not made from the teacher.pt and student.pt beside it (or by an older "
            "version). Delete it and report.md to have both made again."
        )
    return metrics


def score_run(args, error):
    """Prints the table of a run; what is scored as in its report goes to its metrics.json."""
    folder = Path(args.run)
    if not folder.is_dir():
        error(f"--evaluate needs a run folder, and {args.run} is none")
    teacher = load_generator(folder, True, args.device, args.precision)
    student = load_generator(folder, False, args.device, args.precision)
    metrics = read_metrics(folder)
    s = student.settings
    dataset = dataset_of(args, student)
    judge = get_judge(
        dataset, (s["size"], s["size"]), teacher.device, data_dir=args.data_dir,
        steps=s["judge_steps"], width=s["judge_width"], precision=args.precision,
    )  # fmt: skip
    accuracy = judge_accuracy(dataset, judge)
    own = {name: s[name] for name in ("evaluation", "seed", "data", "teacher_steps", "cfg")}
    asked = dict(evaluation=args.num, seed=args.seed, data=args.data)
    asked |= dict(teacher_steps=args.steps, cfg=args.cfg)
    scored = own | {name: value for name, value in asked.items() if value is not None}
    teacher.settings = teacher.settings | scored
    rows = evaluate(dataset, judge, teacher, student, scored["evaluation"], scored["seed"])
    print(markdown_table(rows))
    print("\nThe judge reads held-out images right: " + accuracy_line(accuracy))
    if scored != own:
        print(f"Not kept: the run's own metrics.json has {own['evaluation']} samples a row, seed "
              f"{own['seed']}, of {own['data']}, its teacher in {own['teacher_steps']} steps "
              f"at CFG {own['cfg']:g}.")  # fmt: skip
        return
    metrics |= dict(rows=rows, judge_accuracy=accuracy, samples=own["evaluation"])
    metrics["checkpoints"] = fingerprints(folder)
    with data.replacing(folder / "metrics.json") as file:
        file.write((json.dumps(metrics, indent=1) + "\n").encode())


def export(args, error):
    """Writes the network's weights for other programs, under the names of the released files."""
    out = Path(args.export)
    if out.exists():
        error(f"--export {out}: exists; choose another name")
    checkpoint = read_checkpoint(checkpoint_of(args.run, args.teacher))
    with data.replacing(out) as file:
        write_sd3(file, checkpoint["weights"], checkpoint["model"]["heads"], EXPORTS[args.dtype])
    print(f"{checkpoint['kind']}, {args.dtype}: {out}")


def main(argv=None):
    args, error = parse(argv)
    try:
        (export if args.export else score_run if args.evaluate else draw)(args, error)
    except (CheckpointError, data.DataError, FileExistsError, ValueError) as reason:
        print(f"sample.py: {data.clean(reason, 4000)}", file=sys.stderr)
        return 2
    except OSError as reason:
        print(f"sample.py: {data.clean(reason, 4000)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
