"""The machine: memory that an update frees is kept for the next."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest

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
