"""The machine: which device, which arithmetic, and what a log says about where it was made."""

import contextlib
import ctypes
import functools
import os
import platform
import re
import subprocess
from pathlib import Path

import numpy as np
import torch

from lib.errors import UsageError, reason
from lib.parallel import world


def device_of(name):
    """--device as torch.device; `auto` is a GPU where there is one, NVIDIA's before Apple's.

    Of many processes each has its own GPU. UsageError where there is no such device."""
    if name == "auto":
        there = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available())
        name = next((device for device in there if there[device]), "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # the device "meta" has no numbers
    except (RuntimeError, AssertionError, ImportError) as error:
        why = f"can't be used ({reason(error)}); --device auto takes the best that is here"
        raise UsageError(f"--device {name}: {why}") from None
    if device.type == "cuda" and world() > 1:
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return device


def moved(tensor, device):
    """The tensor on the device, without waiting for what the device has still to do."""
    if torch.device(device).type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()  # a copy from other memory would wait
    return tensor.to(device, non_blocking=True)


def arithmetic(device, precision):
    """The dtype of products: `auto` is bf16 where the hardware has it, float32 elsewhere."""
    bf16, there = precision == "bf16", torch.device(device).type
    if precision == "auto" and there == "cuda":
        bf16 = torch.cuda.is_bf16_supported()
    elif precision == "auto" and there == "cpu":
        bf16 = torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if bf16 else torch.float32


def autocast(device, precision):
    bf16 = arithmetic(device, precision) == torch.bfloat16
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=bf16)


@functools.cache
def check_compiler(device):
    """Raises UsageError where torch.compile does not work: it needs a C++ compiler, or Triton."""
    try:
        options = dict(fx_graph_cache=False)  # where an answer may be left of better days
        torch.compile(lambda x: x.sin() + x, options=options)(torch.zeros(8, device=device))
    except Exception as error:
        why = reason(error, 200)
        raise UsageError(f"--compile yes: doesn't work on this machine ({why})") from None


def deterministic(wanted):
    """Whether only deterministic kernels are used; torch warns where none exists."""
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
    if wanted != torch.are_deterministic_algorithms_enabled():  # to say so takes torch a second
        torch.use_deterministic_algorithms(wanted, warn_only=True)


def keep_memory():
    """Has the C library (glibc alone) keep the memory that an update frees: the next takes as much
    again, and on a CPU having it mapped anew was a twentieth of nano's time, a tenth of tiny's."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # on other systems
        mallopt = ctypes.CDLL(None).mallopt
        trim_threshold, mmap_threshold = -1, -3  # malloc.h
        mallopt(mmap_threshold, 32 << 20)  # the most that it takes
        mallopt(trim_threshold, 2**31 - 1)


def facts():
    """Commit, versions and machine, as a log's first row and metrics.json have them."""
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


def made_on(facts):
    """Commit, torch, processor and threads of `facts`, in words."""
    dirty = " with uncommitted changes" if facts["dirty"] else ""
    machine = f"{facts['gpu'] or facts['processor']}, {facts['threads']} threads"
    return f"{facts['commit']}{dirty}, torch {facts['torch']}, {machine}"


def git(*words):
    """What git says of this checkout; None where it is none."""
    options = dict(cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    try:
        return subprocess.run(["git", *words], timeout=10, **options).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def processor():
    cpuinfo = Path("/proc/cpuinfo")
    found = cpuinfo.exists() and re.search(r"model name\s*: (.*)", cpuinfo.read_text())
    return found[1].strip() if found else platform.processor()
