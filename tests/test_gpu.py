"""What only a GPU can show: it computes what the CPU does, and fits the plan. Skipped elsewhere."""

import math
import os

import pytest
import torch
from conftest import FEW, MAKING, cut_at, same, updates

from tools import benchmark
from tools.plan import plan

DEVICE = "cuda"
there = getattr(torch, DEVICE).is_available()
pytestmark = pytest.mark.skipif(not there, reason="no GPU is here")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it once, for the cut run


def losses(folder):
    """What was logged of every update's losses: [(stage, step, name, value)]."""
    rows = updates(folder)
    names = ("loss", "loss_d", "loss_g", "loss_distill")
    return [(r["stage"], r["step"], k, r[k]) for r in rows for k in names if k in r]


def far(first, second):
    """The largest difference between two runs' losses, in parts of 1 or of the loss."""
    pairs = list(zip(losses(first), losses(second), strict=True))
    assert pairs and all(a[:3] == b[:3] for a, b in pairs)
    return max(abs(a[3] - b[3]) / max(1, abs(a[3])) for a, b in pairs)


def test_every_stage_has_the_losses_of_the_cpu(launch, tmp_path):
    """To a thousandth: weights that differ by 1e-4 of themselves change them by 2e-5."""
    for device in ("cpu", DEVICE):
        for stage in MAKING:
            words = f"--preset nano --smoke --precision fp32 --device {device} --stage {stage}"
            assert launch(device, words) == 0
    assert far(tmp_path / "cpu", tmp_path / DEVICE) < 1e-3


def test_updates_in_bf16_are_finite(train):
    out = train("run", f"--device {DEVICE} --precision bf16")
    assert not any("skipped" in row for row in updates(out))
    assert all(math.isfinite(value) for *_, value in losses(out))


def test_a_cut_run_goes_on_bit_for_bit_with_deterministic_kernels(launch, train, monkeypatch):
    flags = f"--device {DEVICE} --deterministic --save-every 3"
    want = train("want", flags)
    for stage in MAKING:
        if stage != "synthesis":
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                cut_at(patch, stage, 4)
                launch("cut", f"{FEW} {flags} --stage {stage}")
        assert launch("cut", f"{FEW} {flags} --stage {stage}") == 0
    cut = want.parent / "cut"
    assert all(same(want / name, cut / name) for name in ("teacher.pt", "student.pt", "heads.pt"))
    assert updates(cut) == updates(want)


def test_compiled_blocks_have_the_losses_of_plain_ones(train):
    plain, compiled = (train(flag, f"--device {DEVICE} --compile {flag}") for flag in ("no", "yes"))
    assert far(plain, compiled) < 1e-3


def test_the_planned_memory_is_what_an_update_takes():
    """Within 10 %, for more tokens than those whose attention is counted as on a CPU."""
    s = benchmark.settings("nano", "--size", "64", "--batch", "64", "--precision", "bf16")
    cuda = torch.cuda
    before = cuda.memory_allocated()
    d = benchmark.Distillation(s, torch.device(DEVICE))
    cuda.reset_peak_memory_stats()
    d.iteration()
    d.iteration()
    used = cuda.max_memory_allocated() - before
    assert used / plan(s)["ways"][False]["total"] == pytest.approx(1, abs=0.1)
