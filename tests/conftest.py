"""What several test files share: small runs in this process, and ways to look at what they leave.

Functions are imported (`from conftest import same`), fixtures are asked for by name.
"""

import io
import json
import os
import pickle
import signal
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from torch.utils.flop_counter import FlopCounterMode

import data
import ladd
import sample
from lib.loop import Loop
from lib.run import Run
from mmdit import MMDiT
from tools import report
from tools.train import given_settings

# These networks are so small that a second thread costs more than it brings, most of all beside
# other work; the programs that the tests start read the variable.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")

# nohup and "&" have signals ignored, in all programs that the tests start, too.
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

SMALL = "--size 12 --width 16 --depth 3 --attention-heads 2 --text-dim 10 --head-width 8 "
SMALL += "--judge-width 8 --precision fp32 --device cpu "
FEW = SMALL + "--teacher-iterations 6 --teacher-batch 5 --iterations 6 --batch 4 --synthetic 7 "
FEW += "--teacher-steps 2 --synthetic-steps 3 --log-every 1 --heads-warmup 1 "
FEW += "--evaluation 8 --judge-steps 2"
MAKING = ("teacher", "synthesis", "distillation")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=seeded(seed), dtype=dtype)


class Constant:
    """A stand-in for a network: always the same velocity, and a record of its input."""

    def __init__(self, v):
        self.v = v

    def __call__(self, x, t, *text):
        self.x, self.t = x, t
        return self.v, []


# ---------------------------------------------------------------------------------------------
# What takes other processes long
# ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="session", autouse=True)
def beside(request, tmp_path_factory):
    """beside(make_NAME) -> the folder that make_NAME(folder) has filled.

    The tests use one core. On another, tests/beside.py makes from the first test on what they will
    ask for: where they ask for a fixture NAME, and their module has a function make_NAME."""
    folders, words, status = {}, [], {}
    for item in request.session.items:
        for name in item.fixturenames:
            make = getattr(item.module, f"make_{name}", None)
            if make and make not in folders:
                folders[make] = tmp_path_factory.mktemp(name)
                words += [make.__module__, make.__name__, str(folders[make])]
    if not words:
        yield None
        return
    here = Path(__file__).parent
    program = subprocess.Popen(
        [sys.executable, str(here / "beside.py"), *words],
        env=os.environ | dict(PYTHONPATH=os.pathsep.join([str(here), str(here.parent)])),
        stdout=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip

    def wait(make):
        folder = folders[make]
        while str(folder) not in status:
            line = program.stdout.readline()
            assert line, "tests/beside.py has ended too early"
            made, code = line.rsplit(maxsplit=1)
            status[made] = code
        assert status[str(folder)] == "0", (folder / "said.txt").read_text()
        return folder

    yield wait
    if program.poll() is None:  # the session ends early
        os.killpg(program.pid, signal.SIGKILL)
    program.communicate()


# ---------------------------------------------------------------------------------------------
# Runs
# ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """The --data-dir of all runs, so that a judge is trained once."""
    return tmp_path_factory.mktemp("data")


@pytest.fixture
def launch(cache, tmp_path, monkeypatch):
    """launch(name, flags) -> exit status of a run into the folder of that name; more arguments
    are ladd.main's."""
    monkeypatch.chdir(tmp_path)

    def launch(name, flags, **method):
        try:
            words = [*flags.split(), "--out", name, "--data-dir", str(cache)]
            return ladd.main(words, **method)
        except SystemExit as stop:
            return stop.code

    return launch


@pytest.fixture
def train_and_show(launch, tmp_path):
    """train_and_show(name, flags) -> folder of a run of a few updates, without its report."""

    def train(name, flags="", stages=MAKING, **method):
        for stage in stages:
            assert launch(name, f"{FEW} {flags} --stage {stage}", **method) == 0
        return tmp_path / name

    return train


@pytest.fixture
def train(train_and_show, monkeypatch):
    """The same without pictures and diversity, which are a third of the time of such a run."""
    monkeypatch.setattr(report, "show", lambda *_: None)
    monkeypatch.setattr(ladd, "diversity_probe", lambda *_: lambda student: torch.ones(()))
    return train_and_show


@pytest.fixture(scope="session")
def teacher(tmp_path_factory, cache):
    """The checkpoint of a teacher of the small runs, for those that are about the student."""
    out = tmp_path_factory.mktemp("teacher") / "run"
    words = ["--stage", "teacher", "--out", f"{out}", "--data-dir", f"{cache}"]
    assert ladd.main([*FEW.split(), *words]) == 0
    return out / "teacher.pt"


def train_whole(out, data_dir):
    """A run that nobody cut."""
    for stage in MAKING:
        where = ["--out", f"{out}", "--data-dir", f"{data_dir}"]
        assert ladd.main([*FEW.split(), "--stage", stage, *where]) == 0
    return out


@pytest.fixture(scope="session")
def whole(tmp_path_factory, cache):
    return train_whole(tmp_path_factory.mktemp("whole") / "run", cache)


def run_of(words):
    """The Run of a command line, whose folder may be that of a finished one."""
    s, _ = given_settings([*FEW.split(), *map(str, words)])
    dataset = data.load(s.data, s.sizes, data_dir=s.data_dir, seed=s.seed)
    return Run(s, dataset, data.text_features(dataset, s.text_dim, s.text_length), watch=None)


def cut_at(monkeypatch, stage, update):
    """Ctrl-C right after so many updates of a stage."""
    checkpoint = Loop.checkpoint

    def cut(self):
        checkpoint(self)
        if self.stage == stage and self.step + 1 == update:
            raise KeyboardInterrupt

    monkeypatch.setattr(Loop, "checkpoint", cut)


# ---------------------------------------------------------------------------------------------
# What a run leaves
# ---------------------------------------------------------------------------------------------


def weights(path):
    return torch.load(path, weights_only=True)["weights"]


def same(a, b):
    """Whether two checkpoints hold the same weights, bit for bit."""
    a, b = weights(a), weights(b)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def lines(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def updates(folder):
    """What the log tells of every update, its speed apart; the rows of scores left out."""
    rows = [row for row in lines(folder) if "step" in row and "frechet" not in row]
    return [{k: v for k, v in row.items() if k != "images_per_s"} for row in rows]


def snapshot(folder):
    """Every file under a folder, with its content and the time of its last change."""
    files = (p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): (p.read_bytes(), p.stat().st_mtime_ns) for p in files}


# ---------------------------------------------------------------------------------------------
# Samples that are alike
# ---------------------------------------------------------------------------------------------

COLLAPSES = {  # of 32 fakes, 8 captions four times each -> the diversity that is told
    "none": (lambda x: x, 0.85, 1.15),
    "all alike": (lambda x: x[:1].expand_as(x), 0, 0.01),
    "half of them alike": (lambda x: torch.cat([x[:1].expand_as(x)[:16], x[16:]]), 0.4, 0.7),
    "every caption alike": (lambda x: x[::4].repeat_interleave(4, 0), 0, 0.01),
    "every caption nearly alike": (
        lambda x: x[::4].repeat_interleave(4, 0) + 0.05 * x.roll(1, 0), 0.01, 0.2),
    "in pairs": (lambda x: x[::2].repeat_interleave(2, 0), 0, 0.01),
    "half the spread": (lambda x: x / 2, 0.4, 0.6),
}  # fmt: skip


def alike(seed, captions=8):
    """32 things: what those of a caption have in common, and what each has of its own."""
    common = torch.randn(captions, 3, 8, 8, generator=seeded(0))
    own = torch.randn(32, 3, 8, 8, generator=seeded(seed))
    return common.repeat_interleave(32 // captions, 0) + 0.5 * own


# ---------------------------------------------------------------------------------------------
# What an update costs
# ---------------------------------------------------------------------------------------------


def flops(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def update_cost(train, teacher, flags, **method):
    """FLOPs of the second of three updates, which draws and logs nothing, and of a forward of the
    network on as many images."""
    steps, cost = Loop.__iter__, []

    def counted(loop):
        for step in steps(loop):
            with FlopCounterMode(display=False) as counter:
                yield step
            cost.append(counter.get_total_flops())

    flags = f"--teacher {teacher} {flags} --iterations 3 --sample-every 100 --log-every 100"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loop, "__iter__", counted)
        train("run", flags, MAKING[1:], **method)
    model = sample.load_generator(teacher, teacher=True, device="cpu").model
    x, t = torch.randn(4, 3, 12, 12), torch.rand(4)
    forward = flops(lambda: model(x, t, torch.randn(4, 12, 10), torch.randn(4, 10)))
    return cost[1], forward


# ---------------------------------------------------------------------------------------------
# Files, pictures, zips
# ---------------------------------------------------------------------------------------------


def encode(image, kind="PNG", **options):
    """The bytes of an image file."""
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def plain(k, size=(3, 2), kind="PNG", **options):
    """A picture of one colour that belongs to the number k."""
    return encode(Image.new("RGB", size, (k, 255 - k, 7 * k % 256)), kind, **options)


PICTURE = plain(1)


def folder(path, files):
    """Writes files {name: content} into a folder."""
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def zipped(path, files, method=zipfile.ZIP_DEFLATED, mode=0):
    """A zip of files {name: content}; the last of them packed by `method`, and of Unix' `mode`."""
    with zipfile.ZipFile(path, "w") as out:
        for name, content in files.items():
            info, last = zipfile.ZipInfo(name), name == list(files)[-1]
            info.external_attr = mode << 16 if last else 0
            out.writestr(info, content, method if last else zipfile.ZIP_DEFLATED)
    return path


def chunk(kind, content):
    """A part of a PNG, right in its checksum."""
    check = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)


def png(width, height, rows=b"\0" * 100):
    """A PNG of grey pixels that claims a size, right in every checksum."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    end = chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + head + end


def swapped(whole=True):
    """sRGB's profile with red and blue changed about: blue pixels are red to who applies it."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for old, new in ((b"rXYZ", b"    "), (b"bXYZ", b"rXYZ"), (b"    ", b"bXYZ")):
        profile = profile.replace(old, new)
    return profile if whole else profile[: len(profile) // 2]


def press():
    """A printing press whose yellow is red, and whose other colours are no ink at all."""
    inks = np.indices((2, 2, 2, 2)).reshape(4, -1).T  # of C, M, Y, K: none or all
    lab = [(0, 128, 128) if k else (136, 208, 195) if y else (255, 128, 128) for *_, y, k in inks]
    ramp, same = bytes(range(256)), (np.eye(3, dtype=">i4") << 16).tobytes()
    lut = b"mft1\0\0\0\0\4\3\2\0" + same + 4 * ramp + np.uint8(lab).tobytes() + 3 * ramp
    head = (2 << 24, b"prtr", b"CMYK", b"Lab ", b"acsp", 63190, 65536, 54061, 1)
    body = struct.pack(">4xI4s4s4s12x4s28x3i48xI", *head)
    body += struct.pack(">4sII", b"A2B0", 144, len(lut)) + lut
    return struct.pack(">I", len(body) + 4) + body


def json_lines(*rows):
    """The content of a captions.jsonl."""
    return "\n".join(json.dumps(row) for row in rows).encode()


def row_of(file="0.png", caption="a cat", **more):
    """A row of a captions.jsonl."""
    return dict(file=file, caption=caption, **more)


def saved(value, **options):
    """The bytes of torch.save's file."""
    out = io.BytesIO()
    torch.save(value, out, **options)
    return out.getvalue()


class Bomb:
    """Unpickled without care, this writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


# ---------------------------------------------------------------------------------------------
# CIFAR-10, encoded shards
# ---------------------------------------------------------------------------------------------


def cifar_tar(change=lambda member: None, content=None):
    """A small archive in the form of the official one; `change` alters the third member."""
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for k, name in enumerate(names):
            batch = {b"data": np.full((2, 3072), k, np.uint8), b"labels": [k, 9]}
            raw = content if content is not None and k == 2 else pickle.dumps(batch, 2)
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(raw)
            if k == 2:
                change(member)
            tar.addfile(member, io.BytesIO(raw))
    return out.getvalue()


def shard_of(captions, dtype=torch.bfloat16, **more):
    """The content of a shard for text features 6 wide."""
    n = len(captions)
    tensors = dict(context=torch.ones(n, 4, 6), pooled=torch.ones(n, 6)) | more
    return saved({k: v.to(dtype) for k, v in tensors.items()} | dict(captions=captions))


def encoded(path, **changes):
    """A folder of encoded shards that is sound but for the changes; -> its files."""
    files = {"shards.json": json.dumps(dict(format="ladd-shards-2", shards=2)).encode()}
    files["000000.pt"] = shard_of([""])
    files["000001.pt"] = shard_of(["a", "b"], latents=torch.ones(2, 16, 4, 4))
    folder(path, files | {k.replace("_", "."): v for k, v in changes.items()})
    return files


# ---------------------------------------------------------------------------------------------
# Checkpoints, run folders, programs
# ---------------------------------------------------------------------------------------------

NETWORK = dict(depth=1, width=16, heads=1, patch=2, channels=3, context_dim=6, pooled_dim=6)
NETWORK |= dict(pos_size=4, qk_norm=False, attn2_blocks=0)
SETTINGS = dict(
    text_dim=6, text_length=4, levels=(1.0, 0.75, 0.5, 0.25), teacher_steps=2, cfg=2.0, shift=1.0,
    size=8, patch=2, pos_size=4, data="shapes", seed=0, evaluation=8, judge_steps=2, judge_width=8,
    eta=1.0,  # fresh noise: every step is another image, although the weights are random
)  # fmt: skip
CPU = ["--device", "cpu", "--precision", "fp32"]
TINY = "--smoke --size 8 --width 16 --depth 1 --attention-heads 1 --text-dim 6 --taps 0 "
TINY += "--head-width 8 --judge-width 8 --device cpu --precision fp32"


def checkpoint(kind="student", **changes):
    """A checkpoint that is sound but for the changes."""
    torch.manual_seed(0)
    weights = MMDiT(**NETWORK).state_dict()
    whole = dict(format="ladd-1", kind=kind, model=NETWORK, weights=weights, settings=SETTINGS)
    return whole | dict(step=1) | changes


def run_folder(path):
    """What `sample.py` needs of a run."""
    path.mkdir()
    for kind in ("teacher", "student"):
        torch.save(checkpoint(kind), path / f"{kind}.pt")
    return path


def run_on(path, *words):
    """The command line of a run on other data, which is refused before anything is trained."""
    return ["--smoke", "--data", path, "--out", "run", *CPU, *words]


def everything(path):
    """Every file under a folder with its content; where links lead."""
    return {
        p: os.readlink(p) if p.is_symlink() else p.read_bytes()
        for p in sorted(path.rglob("*"))
        if p.is_symlink() or p.is_file()
    }


@pytest.fixture
def refused(tmp_path, capsys, monkeypatch):
    """refused(program, words, status, *named): a command ends with this status and one line on
    stderr that has these words; no file under the test's folder has changed."""
    monkeypatch.chdir(tmp_path)

    def refused(program, words, status, *named):
        before = everything(tmp_path)
        capsys.readouterr()
        try:
            got = program.main([str(word) for word in words])
        except SystemExit as stop:
            got = stop.code
        said = capsys.readouterr().err
        assert got == status, said
        line = said.splitlines()[-1]
        assert line.startswith(f"{Path(program.__file__).name}: "), said
        assert "Traceback" not in said and line.isprintable()
        for word in named:
            assert str(word) in line
        assert everything(tmp_path) == before
        return said

    return refused
