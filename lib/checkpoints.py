"""KIND.pt of a run folder: a network's weights, and what is needed to rebuild and to use it.

A checkpoint may be a stranger's: it is refused where its parts can't be used, or where they ask for
more memory or time than they have content.
"""

import math
import re
from pathlib import Path
from types import SimpleNamespace

import torch

from lib.checks import ASPECT
from lib.errors import CheckpointError, UsageError, clean, reason
from lib.files import checksum, kind_of, read
from lib.lora import build, own_state
from lib.settings import differences

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def is_ours(path):
    """Whether weights that are given are a checkpoint of ours, or a run folder."""
    if path.is_dir():
        return (path / "log.jsonl").exists() or (path / "teacher.pt").exists()
    if not path.is_file():
        return True  # reading it says what is wrong
    content = read(path, check=False, mmap=True) if kind_of(path) == "torch" else None
    return isinstance(content, dict) and "format" in content


def read_checkpoint(path, kinds, network, check=True, alone=False):
    """What a file holds, or the file of the first kind in a run folder, as a dict: kind, one of
    `kinds`; model, the arguments of `network`; weights, memory-mapped; settings, read as
    attributes; step. CheckpointError says what is wrong. check: the checksums. alone: of a network
    with an adapter that alone is returned, as the file has it."""
    path = Path(path)
    if path.is_dir():
        path = path / f"{kinds[0]}.pt"
    checkpoint = read(path, check=check, mmap=True)
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != "ladd-1":
        raise CheckpointError(f"{path}: not a checkpoint of this program.")
    if checkpoint.get("kind") not in kinds:
        raise CheckpointError(f"{path}: holds {checkpoint.get('kind')}, not {' or '.join(kinds)}.")
    try:
        checkpoint["settings"] = settings_of(checkpoint)
        check_weights(checkpoint["weights"], path.stat().st_size)
        if checkpoint["model"].get("depth", 0) > len(checkpoint["weights"]):
            raise ValueError("fewer weights than blocks")
        with torch.device("meta"):  # no memory for what the arguments claim
            model = build(network, checkpoint)
        if odd := own_state(model).keys() ^ checkpoint["weights"].keys():
            raise ValueError(f"not the weights of its network: {clean(min(odd), 100)}")
        model.load_state_dict(checkpoint["weights"], strict=False, assign=True)
        if checkpoint["kind"] != "heads":
            check_settings(checkpoint["settings"], model.config)
        elif "optimizer" in checkpoint:
            check_moments(checkpoint["optimizer"]["state"], checkpoint["weights"])
    except Exception as error:
        why = reason(error, 300)
        raise CheckpointError(f"{path}: its parts don't fit together ({why}).") from None
    if checkpoint.get("lora") and not alone:
        checkpoint["weights"] = base_of(checkpoint, path, network, check) | checkpoint["weights"]
    return checkpoint


def base_of(checkpoint, path, network, check):
    """The weights that a checkpoint's adapter belongs to: of the teacher.pt beside it."""
    file = path.with_name("teacher.pt")
    if not file.exists():
        raise CheckpointError(f"{path}: an adapter alone; put its run's teacher.pt beside it.")
    base = read_checkpoint(file, ["teacher"], network, check, alone=True)
    same = base["model"] == checkpoint["model"] and checksum(file) == checkpoint.get("base")
    if not same or base.get("lora"):
        raise CheckpointError(f"{path}: an adapter of another network than {file}.")
    return base["weights"]


def settings_of(checkpoint):
    """A checkpoint's settings, read as attributes. An older version's size is one side."""
    older = dict(downscale=1, pooled_dim=0, aspects=(), eta=0.0, flip=True, precision="auto")
    s = SimpleNamespace(**older | checkpoint["settings"])
    if isinstance(s.size, int):
        s.size = (s.size, s.size)
    return s


def check_weights(weights, size):
    """Raises where weights are no plain tensors, or claim more than a file of `size` bytes has."""
    if any(type(w) is not torch.Tensor or w.is_meta or w.is_sparse for w in weights.values()):
        raise ValueError("weights that are no plain tensors")
    if odd := {w.dtype for w in weights.values()}.difference(FLOATS):
        raise ValueError(f"weights of {odd.pop()}, not of fp32, bf16 or fp16")
    if sum(w.numel() * w.element_size() for w in weights.values()) > size:
        raise ValueError("it claims more weights than it holds")


def check_moments(state, weights):
    """Raises where AdamW's moments are not those of the weights; its kernels would not notice."""
    for i, weight in enumerate(weights.values()):
        first, second = state[i]["exp_avg"], state[i]["exp_avg_sq"]
        if not first.shape == second.shape == weight.shape:
            raise ValueError("the optimiser's moments have other shapes than the weights")
        if not all(float(x.sum()) < math.inf for x in (first.abs(), second, state[i]["step"])):
            raise ValueError("the optimiser's moments are not finite")


def not_finite(weights):
    """The name of the first weights with a number that is not finite in float32, or None."""
    return next((name for name, w in weights.items() if not w.float().isfinite().all()), None)


def check_settings(s, config):
    """Raises where a network of this config can't be sampled with the settings."""
    side = config["patch"] * config["pos_size"] * s.downscale
    limits = [(s.size[0], side), (s.size[1], side)]
    limits += [(s.text_length, 4096), (s.teacher_steps, 10_000)]
    for value, most in limits:
        if type(value) is not int or not 1 <= value <= most:
            raise ValueError(f"size, text_length or teacher_steps {value}")
    if type(s.seed) is not int or type(s.data) is not str:
        raise ValueError(f"seed {s.seed} or data {s.data}")
    if s.text_dim != config["context_dim"] or (s.pooled_dim or s.text_dim) != config["pooled_dim"]:
        raise ValueError(f"text_dim {s.text_dim}")
    numbers = torch.tensor([s.cfg, s.shift, *s.levels])
    if not numbers.isfinite().all() or s.shift <= 0 or not 0 <= s.eta <= 1:
        raise ValueError("cfg, shift, levels or eta")
    if not all(0 < t <= 1 for t in s.levels):
        raise ValueError(f"levels {s.levels}")
    if not all(re.fullmatch(ASPECT, aspect) for aspect in s.aspects):
        raise ValueError(f"aspects {s.aspects}")


def same_network(flag, file, given, wanted):
    """Raises UsageError if the network of a file is not the one that is wanted: its arguments."""
    if different := differences(given, wanted, [*wanted, "condition_channels"]):
        raise UsageError(f"{flag} {file}: another network than the settings' ({different}).")
