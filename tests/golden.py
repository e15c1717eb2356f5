"""Golden hashes: final weights of small runs in float32, to prove that a change moved no number.

    python tests/golden.py record hashes.json [--repo OTHER_CHECKOUT]
    python tests/golden.py check hashes.json [NAME ...]

Not a test of the suite: hashes hold on one machine, with one version of PyTorch. Record them before
a refactoring, check them after every step of it.
"""

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

SMOKE = """--preset nano --smoke --precision fp32 --device cpu --judge-steps 2"""
FEW = """
    --preset nano --precision fp32 --device cpu --size 8 --width 32 --attention-heads 2
    --head-width 16 --teacher-iterations 12 --teacher-batch 16 --iterations 12 --batch 16
    --heads-warmup 3 --synthetic 48 --evaluation 16 --judge-steps 2 --log-every 1 --sample-every 6
"""
LATENTS = """
    --preset nano --smoke --precision fp32 --device cpu --size 64 --channels 4 --downscale 8
    --text-dim 24 --pooled-dim 16 --text-length 6
"""
METHODS = ("regression", "consistency", "add", "dmd")

SHARDS = """
import hashlib, sys, torch
from types import SimpleNamespace
sys.path.insert(0, sys.argv[1])
from sd3.encode import encode

class Encoders:
    t5, folder, parts = True, "made up", ()

    def identity(self):
        return "made up"

    def text(self, captions):
        rows = []
        for caption in captions:
            seed = int(hashlib.sha256(caption.encode()).hexdigest()[:8], 16)
            rows.append(torch.randn(6 * 24 + 16, generator=torch.Generator().manual_seed(seed)))
        rows = torch.stack(rows)
        return rows[:, :144].reshape(-1, 6, 24), rows[:, 144:]

    def encode(self, images):
        small = torch.nn.functional.avg_pool2d(images.float() / 127.5 - 1, 8)
        return torch.cat([small, small[:, :1]], dim=1)

    def tell_cut(self):
        pass

args = SimpleNamespace(images=sys.argv[2], out=sys.argv[3], shard=8, rank=0, world=1)
encode(Encoders(), args, [(64, 64)])
"""


def call(repo, folder, *words, processes=1):
    env = os.environ | dict(PYTHONPATH=str(repo), OMP_NUM_THREADS="1")
    launch = [sys.executable]
    if processes > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    words = [*launch, *words]
    done = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(map(str, words))}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")


def pictures(folder):
    import numpy as np
    from PIL import Image

    random = np.random.default_rng(0)
    for i in range(40):
        path = folder / ("fox" if i % 2 else "owl") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 255, (64, 64, 3), np.uint8)).save(path)


def digest(path):
    """Of a checkpoint's weights alone, whatever else stands in the file."""
    sums = hashlib.sha256()
    for name, tensor in sorted(torch.load(path, weights_only=True)["weights"].items()):
        sums.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return sums.hexdigest()[:16]


def result(run):
    return {kind: digest(run / f"{kind}.pt") for kind in ("teacher", "student")}


def main_file(repo, method):
    """How a method is run: since the refactoring it is a file of its own."""
    if (repo / "methods" / f"{method}.py").exists():
        return ["-m", f"methods.{method}"]
    return [repo / "ladd.py", *(["--method", method] if method != "ladd" else [])]


def cases(repo, folder):
    """{name: a function that makes a run and returns its folder}"""
    ladd = repo / "ladd.py"

    def plain(name, *words, processes=1, program=(ladd,)):
        call(repo, folder, *program, *words, "--out", folder / name, processes=processes)
        return folder / name

    def latents():
        pictures(folder / "pictures")
        call(repo, folder, "-c", SHARDS, repo, folder / "pictures", folder / "shards")
        return plain("latents", *LATENTS.split(), "--data", folder / "shards")

    def resumed():
        """Cut by a signal once in each stage, then gone on with."""
        words = [
            sys.executable,
            ladd,
            *FEW.split(),
            "--save-every",
            "1",
            "--out",
            folder / "resumed",
        ]
        env = os.environ | dict(PYTHONPATH=str(repo), OMP_NUM_THREADS="1")
        for stage in ("teacher", "distillation"):
            process = subprocess.Popen(words, cwd=folder, env=env, stderr=subprocess.PIPE)
            while process.poll() is None:
                if list((folder / "resumed").glob(f"{stage}-state-*")):
                    process.send_signal(signal.SIGTERM)
                    break
                time.sleep(0.01)
            process.communicate()
        return plain("resumed", *FEW.split(), "--save-every", "1")

    made = {
        "nano": lambda: plain("nano", *SMOKE.split()),
        "aspects": lambda: plain("aspects", *SMOKE.split(), "--aspects", "1:1,3:2,2:3"),
        "few": lambda: plain("few", *FEW.split()),
        "pure": lambda: plain("pure", *FEW.split(), "--distill-weight", "0", "--r1", "0.1"),
        "latents": latents,
        "two": lambda: plain("two", *FEW.split(), "--muon-lr", "0", processes=2),
        "shard": lambda: plain("shard", *FEW.split(), "--muon-lr", "0", "--shard", processes=2),
        "resumed": resumed,
    }
    for method in METHODS:
        program = main_file(repo, method)
        made[method] = lambda m=method, p=program: plain(m, *FEW.split(), program=p)
    return made


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=("record", "check"))
    parser.add_argument("file")
    parser.add_argument("names", nargs="*")
    parser.add_argument("--repo", default=Path(__file__).resolve().parent.parent)
    args = parser.parse_args()
    found, repo = {}, Path(args.repo).resolve()
    wanted = json.loads(Path(args.file).read_text()) if args.command == "check" else {}
    with tempfile.TemporaryDirectory() as folder:
        for name, run in cases(repo, Path(folder)).items():
            if args.names and name not in args.names:
                continue
            found[name] = result(run())
            same = "" if name not in wanted else " as before" * (found[name] == wanted[name])
            print(f"{name}: {found[name]}{same or (' CHANGED' if wanted else '')}", flush=True)
    if args.command == "record":
        Path(args.file).write_text(json.dumps(found, indent=1) + "\n")
    return int(any(found[name] != wanted.get(name) for name in found)) if wanted else 0


if __name__ == "__main__":
    sys.exit(main())
