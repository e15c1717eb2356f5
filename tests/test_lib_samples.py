"""lib/samples.py: the teacher's samples on disk."""

import numpy as np
import torch

from lib.files import read, save
from lib.samples import Joined


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
