"""The machine: its memory, its devices, its terminal."""

import dataclasses
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ladd
from lib.errors import UsageError
from lib.machine import check_compiler, device_of
from tools import train

ROOT = Path(__file__).resolve().parent.parent

UPDATES = """
import resource, torch, ladd, tools.train
tools.train.train = lambda *arguments: None
assert ladd.main(["--device", "cpu"]) == 0  # as if it had trained

def update():  # 128 MB in parts
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    activations = [torch.ones(1 << 20) for _ in range(32)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(*(update() for _ in range(4)))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator alone is told to")
def test_an_update_takes_the_memory_of_the_last_one_instead_of_asking_the_system_again():
    out = subprocess.run([sys.executable, "-c", UPDATES], capture_output=True, text=True, cwd=ROOT)
    first, *_, last = map(int, out.stdout.split())
    assert first > 32  # pages, or huge pages of 2 MB
    assert last < first / 10, out.stdout


@pytest.mark.parametrize(
    ("there", "chosen"), [(("cuda", "mps"), "cuda"), (("mps",), "mps"), ((), "cpu")]
)
def test_auto_is_nvidias_gpu_then_apples_then_the_cpu(monkeypatch, there, chosen):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: "cuda" in there)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: "mps" in there)
    number = torch.zeros(1)
    monkeypatch.setattr(torch, "zeros", lambda *_, device: number)  # none of them is here
    assert device_of("auto").type == chosen


@pytest.mark.parametrize("name", ["gpu", "", "cpu:x", "meta", "hpu"])
def test_a_device_that_computes_nothing_is_refused(name):
    """PyTorch's "meta" has shapes and no numbers."""
    with pytest.raises(UsageError, match=f"--device {name}: .*; --device auto takes"):
        device_of(name)


@pytest.mark.parametrize(("program", "encoding"), [("ladd.py", "ascii"), ("sample.py", "cp1252")])
def test_a_terminal_that_cant_show_a_character_ends_no_program(program, encoding):
    """--help has Greek letters, which such a terminal shows as "?"; -OO takes docstrings away."""
    words = [sys.executable, "-OO", program, "--help"]
    environment = os.environ | dict(PYTHONIOENCODING=encoding)
    out = subprocess.run(words, capture_output=True, cwd=ROOT, env=environment)
    assert out.returncode == 0, out.stderr
    assert b"?" in out.stdout and b"Traceback" not in out.stderr


def test_compiling_without_a_compiler_is_refused_in_one_line(monkeypatch):
    """At the start, not by a traceback of the first update."""

    def broken(*_, **options):
        raise RuntimeError("No working C++ compiler found\nand so on")

    monkeypatch.setattr(torch, "compile", broken)
    check_compiler.cache_clear()
    with pytest.raises(UsageError, match=r"--compile yes: .*No working C\+\+") as why:
        check_compiler(torch.device("cpu"))
    assert "and so on" not in str(why.value)


GPU = dict(device="cuda", compile="auto", iterations=5_000)


@pytest.mark.parametrize(
    "changes, answer",
    [
        ({}, "yes"),
        (dict(iterations=2200), "no"),  # compiling would take longer than it saves
        (dict(device="cpu"), "no"),
        (dict(deterministic=True), "no"),
        (dict(r1=1.0), "no"),
        (dict(compile="no"), "no"),
        (dict(iterations=10, compile="yes"), "yes"),
    ],
)
@pytest.mark.parametrize("compiler", [True, False])
def test_long_runs_on_a_gpu_are_compiled_where_a_compiler_is(
    monkeypatch, changes, answer, compiler
):
    def check(device):
        if not compiler:
            raise UsageError("no compiler")

    monkeypatch.setattr(train, "device_of", torch.device)
    monkeypatch.setattr(train, "check_compiler", check)
    s = dataclasses.replace(ladd.Settings(), **GPU | changes)
    if compiler or answer == "no":
        assert train.compiling(s) == answer
    elif s.compile == "yes":
        with pytest.raises(UsageError):
            train.compiling(s)
    else:
        assert train.compiling(s) == "no"
