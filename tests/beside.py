"""Makes what tests will ask for, one thing after the other, beside them: see conftest.beside.

    python tests/beside.py MODULE FUNCTION FOLDER [MODULE FUNCTION FOLDER …]

Each function is called with its folder, by a fork of this process, which has imported what takes
long; what it says is in said.txt. After each a line: FOLDER STATUS.
"""

import importlib
import multiprocessing
import os
import sys
from pathlib import Path

import torch._dynamo  # noqa: F401, which optimisers import


def work(make, folder):
    said = os.open(folder / "said.txt", os.O_CREAT | os.O_WRONLY)
    os.dup2(said, 1)
    os.dup2(said, 2)
    make(folder)


if __name__ == "__main__":
    words = sys.argv[1:]
    calls = list(zip(words[::3], words[1::3], words[2::3], strict=True))
    modules = {name: importlib.import_module(name) for name, _, _ in calls}
    for module, function, folder in calls:
        make = getattr(modules[module], function)
        fork = multiprocessing.get_context("fork")
        process = fork.Process(target=work, args=(make, Path(folder)))
        process.start()
        process.join()
        print(folder, process.exitcode, flush=True)
