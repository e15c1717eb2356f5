"""lib/errors.py: what a user is told when a program ends."""

import sys

import pytest
import torch
from tqdm import tqdm

import ladd
import sample
from lib.errors import Parser

OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has 79 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    MemoryError(),
]
PROGRAMS = {
    "train.train": "",
    "explain.explain": "--explain",
    "sweep.sweep": "--sweep batch=8,16",
    "draw.make_pictures": "sample",
    "draw.score": "sample --evaluate",
}


@pytest.fixture
def end(monkeypatch, tmp_path):
    """end(work, error) -> the status of the program whose work ends by the error."""
    monkeypatch.chdir(tmp_path)

    def end(work, error):
        def fail(*_):
            raise error

        monkeypatch.setattr(f"tools.{work}", fail)
        words = PROGRAMS[work].split()
        if words[:1] == ["sample"]:
            return sample.main(["runs/nano", *words[1:]])
        return ladd.main(["--device", "cpu", *words])

    return end


@pytest.mark.parametrize("work", PROGRAMS)
@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=range(len(OUT_OF_MEMORY)))
def test_where_memory_ends_one_line_says_what_needs_less(end, capsys, work, error):
    assert end(work, error) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "no memory is left" in line
    for flag in ("--batch", "--teacher-batch", "--accumulate", "--checkpointing", "--dry-run"):
        assert flag in line


def test_ctrl_c_is_one_line_in_every_program(monkeypatch, capsys):
    """What a program does not catch itself reaches the hook that its parser has left."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    Parser("tools/any.py", "Does nothing.")
    sys.excepthook(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert capsys.readouterr().err == "\ntools/any.py: interrupted\n"
    sys.excepthook(ValueError, ValueError("odd"), None)
    assert "ValueError: odd" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_closed_stream_ends_no_program(monkeypatch, name):
    """2>&- leaves no stream at all, and a bar of progress needs one."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(sys, name, None)
    Parser("tools/any.py", "Does nothing.")
    with getattr(sys, name) as stream:
        assert list(tqdm(range(2), file=stream, disable=None)) == [0, 1]


def test_an_error_that_was_not_foreseen_keeps_its_traceback(end, capsys):
    assert end("train.train", RuntimeError("the shapes don't match")) == 1
    told = capsys.readouterr().err
    assert "Traceback" in told and "don't match" in told
