"""Any file, harmed at random: bytes of all kinds of files are flipped and cut, in a process of its
own that is held to its time and memory. Only errors that are made for people may come out.
"""

import contextlib
import gzip
import io
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from conftest import (
    CPU,
    NETWORK,
    PICTURE,
    TINY,
    checkpoint,
    cifar_tar,
    encode,
    encoded,
    folder,
    json_lines,
    plain,
    press,
    row_of,
    run_folder,
    saved,
    swapped,
    zipped,
)
from PIL import Image

import data
import sample
from discriminator import Discriminator
from lib import cifar10
from lib.errors import RunError, UserError
from lib.files import read_lines
from lib.log import Log
from lib.report import fingerprints, read_metrics
from lib.samples import read_samples
from lib.settings import bound, open_folder
from lib.streams import RULE
from mmdit import MMDiT
from sd3.weights import open_sd3
from tools import train
from tools.train import given_settings

ROUNDS = 700


class Hang(BaseException):
    """Raised by the alarm; not an Exception, so that no reader can take it for damage."""


def harm(content, rng):
    """Flips, cuts, repeats or blanks some bytes."""
    content = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8, 40))):
        at = rng.randrange(len(content) + 1)
        end = min(len(content), at + rng.choice((1, 2, 4, 60)))
        kind = rng.choice(("flip", "flip", "flip", "blank", "fill", "drop", "repeat", "cut"))
        if kind == "flip":
            content[at:end] = bytes(b ^ rng.randrange(256) for b in content[at:end])
        elif kind in ("blank", "fill"):
            content[at:end] = (b"\0" if kind == "blank" else b"\xff") * (end - at)
        elif kind == "cut" and rng.random() < 0.2:
            del content[at:]
        else:
            content[at:end] = b"" if kind == "drop" else content[at:end] * 3
    return bytes(content)


def readers(path):
    """{kind of file: (its name, sound content, what reads it)}"""
    made = run_folder(path / "made")
    words = [*TINY.split(), "--out", f"{path}/run", "--discriminator", f"{path}/heads.pt"]
    settings = given_settings(words)[0]
    for name in ("pictures", "list", "beside"):
        folder(path / name, {"a/0.png": PICTURE})

    def load(name):
        return lambda: data.load(f"{path / name}", [(8, 8)])

    def draw(*words):
        return lambda: sample.main([f"{made}", "--out", f"{path}/a.png", *CPU, *words])

    def judge():
        shapes = data.load("shapes", [(8, 8)])
        s = SimpleNamespace(size=(8, 8), judge_steps=2, judge_width=8)
        return sample.judge_of(shapes, s, "cpu", path / "judges", "auto")

    def samples():
        for x0, rows in read_samples(path / "samples", 3, 2)[0]:
            assert len(x0[torch.arange(len(rows))]) == len(rows)

    def read_shards():
        dataset = data.load(f"{path}/shards", [(4, 4)])
        wanted = SimpleNamespace(
            data="",
            text_dim=6,
            pooled_dim=6,
            channels=16,
            patch=2,
            pos_size=8,
            positions=16,
            downscale=8,
        )
        dataset.check(wanted, 1, False)
        for bucket in dataset.sets:
            latents, caption = bucket.batch([0, 1])
            dataset([dataset.captions[i] for i in caption])

    few = [plain(k) for k in range(3)]
    captions = json_lines(*(row_of(f"{k}.png") for k in range(3)))
    files = {f"{k}.png": p for k, p in enumerate(few)} | {"captions.jsonl": captions}
    whole = zipped(io.BytesIO(), files).getvalue()
    shard = dict(x0=torch.zeros(2, 3, 8, 8).half(), captions=["a", "b"], index=[0, 1])
    shard |= dict(seed=2, noise=RULE)
    (path / "run").mkdir()
    sign = bound(settings)
    open_folder(path / "run", sign, sign)
    config = (path / "run/config.json").read_bytes()
    log = json_lines(dict(stage="teacher", step=1, loss=0.5), dict(stage="teacher", seconds=1.0))
    folder(made, {"student.pt": saved(checkpoint())})
    metrics = json.dumps(dict(rows=[], checkpoints=fingerprints(made))).encode()
    heads = Discriminator(**settings.head_sizes())
    heads = checkpoint("heads", model=heads.config, weights=heads.state_dict())
    judge()
    (judged,) = (path / "judges").iterdir()
    shards = encoded(path / "shards")
    kinds = {
        "shards.json": ("shards/shards.json", shards["shards.json"], read_shards),
        "a shard": ("shards/000001.pt", shards["000001.pt"], read_shards),
        "zip": ("set.zip", whole, load("set.zip")),
        "captions.jsonl": ("list/captions.jsonl", json_lines(row_of("a/0.png")), load("list")),
        "text": ("beside/a/0.txt", "a café".encode(), load("beside")),
        "CIFAR-10": (
            "cifar/cifar-10-python.tar.gz", gzip.decompress(cifar_tar()),
            lambda: data.load("cifar10", [(8, 8)], data_dir=path / "cifar"),
        ),
        "checkpoint": ("made/student.pt", saved(checkpoint()), draw("--prompt", "x")),
        "prompts": ("p.txt", "a cat\na café\n".encode(), draw("--prompts", f"{path}/p.txt")),
        "prompts to encode": ("q.txt", b"a cat\n", lambda: read_lines(path / "q.txt", "")),
        "an image to start from": ("i.png", PICTURE, draw("--prompt", "x", "--init-image",
            f"{path}/i.png")),
        "samples": ("samples/0.pt", saved(shard), samples),
        "heads": ("heads.pt", saved(heads), lambda: train.given_heads(settings)),
        "judge": (f"judges/{judged.name}", judged.read_bytes(), judge),
        "config.json": ("run/config.json", config, lambda: open_folder(path / "run", sign, sign)),
        "log.jsonl": ("log.jsonl", log, lambda: list(Log(path).rows())),
        "metrics.json": ("made/metrics.json", metrics, lambda: read_metrics(made)),
    }  # fmt: skip
    random = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    profiles = dict(JPEG=swapped(), PNG=swapped(), WEBP=swapped(), CMYK=press())
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "CMYK"):
        picture = Image.fromarray(random).convert("CMYK" if kind == "CMYK" else "RGB")
        options = dict(exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0", icc_profile=profiles.get(kind))
        form = "JPEG" if kind == "CMYK" else kind
        content = encode(picture, form, **(options if kind in profiles else {}))
        kinds[kind] = ("pictures/a/0.png", content, load("pictures"))
    with contextlib.suppress(ImportError):
        kinds |= of_safetensors(path)
    return kinds


def of_safetensors(path):
    """More of the same: weights from elsewhere."""
    from safetensors.torch import save

    official = {k: torch.zeros(v.shape) for k, v in MMDiT(**NETWORK).state_dict().items()}
    weights = save(official, metadata=dict(heads="1"))
    name = "diffusion_pytorch_model.safetensors"
    own = {"config.json": b'{"num_attention_heads": 1}', name: weights}
    folder(path / "transformer", own)

    def read_weights(name):
        return lambda: [w.sum() for w in open_sd3(path / name)[1].values()]

    return {
        "weights": ("w.safetensors", weights, read_weights("w.safetensors")),
        "diffusers' config": (
            "transformer/config.json",
            own["config.json"],
            read_weights("transformer"),
        ),
        "diffusers' weights": (f"transformer/{name}", weights, read_weights("transformer")),
    }


def storm(path, seed):
    """Reads files harmed at random. Only the errors that are made for people may come out."""
    path, rng = Path(path), random.Random(seed)
    cifar10.sha256 = lambda path: cifar10.SHA256  # as if each were the official archive
    kinds = readers(path)
    for name, content, read in kinds.values():
        folder(path, {name: content})
        assert read() != 2  # before harm each can be read

    def hang(*_):
        raise Hang

    signal.signal(signal.SIGALRM, hang)
    for turn in range(ROUNDS):
        kind = list(kinds)[turn % len(kinds)]
        name, content, read = kinds[kind]
        folder(path, {name: harm(content, rng)})
        said = io.StringIO()
        signal.alarm(10)
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            try:
                assert read() != 1 or "not finite" in said.getvalue()
            except (UserError, RunError) as error:
                print(error)
            except SystemExit as stop:
                assert stop.code == 2
        signal.alarm(0)
        for word in ("Traceback", "MemoryError", "can't allocate"):
            assert word not in said.getvalue(), (kind, said.getvalue())
        folder(path, {name: content})
    print(peak_memory())


def peak_memory():
    """kB that this process has had at most; ru_maxrss would count the parent before the fork."""
    status = Path("/proc/self/status").read_text()
    return next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))


def test_no_harmed_file_ends_in_a_traceback_a_hang_or_a_gigabyte(tmp_path):
    """A process of its own reads 700 files of 26 kinds, each with some bytes changed."""
    here = Path(__file__).parent
    code = f"import test_storm; test_storm.storm({str(tmp_path)!r}, 0)"
    environment = os.environ | {"PYTHONPATH": f"{here}{os.pathsep}{here.parent}"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout.split()[-1]) < 1 << 20  # kB
