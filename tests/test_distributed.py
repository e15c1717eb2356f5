"""Many processes: whatever runs on one runs on N, divided or not, with the same results."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import ladd

NET = "--size 8 --width 16 --depth 2 --heads 2 --text-dim 8 --text-length 4 --pos-size 6 --taps 0,1"
RUN = f"{NET} --head-width 8 --teacher-batch 8 --batch 8 --teacher-iterations 20 --iterations 20"
RUN += " --heads-warmup 3 --synthetic 22 --synthetic-steps 2 --teacher-steps 2 --save-every 8"
RUN += " --precision fp32 --device cpu --log-every 1 --r1 0.1 --aspects 1:1,2:1 --muon-lr 0"


def launch(n, *commands, limit=120):
    """Runs ladd.py's main with each of the commands in n processes. -> [(status, errors), …]"""
    script = "import json, sys, ladd\nstatus = 0\n"
    script += "for words in json.loads(sys.argv[1]): status = status or ladd.main(words.split())\n"
    script += "sys.exit(status)"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = os.environ | dict(WORLD_SIZE=f"{n}", MASTER_ADDR="127.0.0.1", MASTER_PORT=f"{port}")
    env |= dict(OMP_NUM_THREADS="1", PYTHONPATH=str(Path(ladd.__file__).parent))
    words = [sys.executable, "-c", script, json.dumps(commands)]
    workers = [
        subprocess.Popen(
            words, env=env | dict(RANK=f"{rank}"), stderr=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(n)
    ]  # fmt: skip
    return [(w.communicate(timeout=limit), w.returncode) for w in workers]
