"""lib/samples.py: the teacher's samples on disk."""

import numpy as np
import pytest
import torch

from lib.errors import RunError
from lib.files import read, save
from lib.samples import Joined, read_samples
from lib.streams import RULE


def test_joined_tensors_are_read_as_one_and_not_before(tmp_path):
    """Rows in any order are those of the tensors end to end; of mapped files no more memory is
    taken than the rows asked for (anonymous memory: what is not the files' own)."""

    def anonymous():
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) << 10 for line in file if "RssAnon" in line)

    parts = [torch.randn(n, 3, 64, 64).half() for n in (300, 1, 500)]
    whole = torch.cat(parts)
    for i, part in enumerate(parts):
        save(dict(x0=part), tmp_path / f"{i}.pt")
    before = anonymous()
    joined = Joined([read(tmp_path / f"{i}.pt", mmap=True)["x0"] for i in range(3)])
    rows = np.array([800, 0, 299, 300, 301, 5, 800])
    assert torch.equal(joined[rows], whole[rows])
    assert len(joined) == 801 and joined.shape == whole.shape
    assert anonymous() - before < whole.nbytes / 4


def file(path, first, seed=0):
    """Two samples and their captions, from the number `first` on."""
    x0, captions = torch.full((2, 3, 4, 4), first).half(), [f"{first}", f"{first + 1}"]
    save(dict(x0=x0, captions=captions, index=[first, first + 1], seed=seed, noise=RULE), path)


def test_each_sample_keeps_its_number_whatever_else_is_in_the_folder(tmp_path):
    """The number of a sample gives its noise: a copy must not shift those that follow."""
    for name, first in {"00000": 0, "00000 (conflicted copy)": 0, "00001": 2}.items():
        file(tmp_path / f"{name}.pt", first)
    assert read_samples(tmp_path, 3, 2)[1] == ["0", "1", "2", "3"]
    file(tmp_path / "00001.pt", 0)
    with pytest.raises(RunError, match="its samples are not those from number 2 on"):
        read_samples(tmp_path, 3, 2)


def test_samples_of_two_seeds_are_refused(tmp_path):
    """The noise of all would be drawn by the seed of one."""
    file(tmp_path / "00000.pt", 0, seed=0)
    file(tmp_path / "00001.pt", 2, seed=1)
    with pytest.raises(RunError, match="of the seeds 0 and 1"):
        read_samples(tmp_path, 3, 2)
