"""The exercises' answers: every patch applies, is as short as promised, and trains."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "docs" / "exercises.md").read_text("utf-8")
PATCHES = sorted((ROOT / "docs" / "exercises").glob("*.patch"))
FILES = ("mmdit.py", "discriminator.py", "sample.py", "data.py", "ladd.py")

# Each answer is run by a fork of one process that has imported what takes long, two at a time.
FORK = """
import json, os, sys
import numpy, PIL.Image, torch, tqdm, torch._dynamo
torch.set_num_threads(1)
children, ended = {}, {}

def wait():
    child, end = os.wait()
    ended[children.pop(child)] = os.waitstatus_to_exitcode(end)

for folder in json.loads(sys.argv[1]):
    if len(children) == 2:
        wait()
    if child := os.fork():
        children[child] = folder
    else:
        os.chdir(folder)
        sys.path.insert(0, folder)
        out = os.open("out.txt", os.O_CREAT | os.O_WRONLY)
        os.dup2(out, 1), os.dup2(out, 2)
        code = 1
        try:
            import ladd
            assert ladd.__file__.startswith(folder)
            flags = "--preset nano --smoke --size 8 --width 16 --attention-heads 2 --head-width 16"
            flags += " --judge-width 4 --precision fp32 --out run"
            code = ladd.main(flags.split())
        except BaseException:
            import traceback
            traceback.print_exc()
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)
while children:
    wait()
print(json.dumps(ended))
"""


def make_answers(root):
    """A folder for every patch with the answer applied and run; status.json: {name: exit status}"""
    folders = {}
    for patch in PATCHES:
        folders[patch.stem] = folder = root / patch.stem
        folder.mkdir()
        for name in FILES:
            shutil.copy(ROOT / name, folder / name)
        for name in ("lib", "tools", "sd3"):  # which no exercise touches
            (folder / name).symlink_to(ROOT / name)
        words = ["git", "apply", "--unsafe-paths", f"--directory={folder}", str(patch)]
        done = subprocess.run(words, cwd=root, capture_output=True, text=True)
        assert done.returncode == 0, f"{patch.name}: {done.stderr}"
        touched = re.findall(r"^\+\+\+ b/(\S+)", patch.read_text("utf-8"), re.M)
        for name in touched:
            assert (folder / name).read_bytes() != (ROOT / name).read_bytes()
    words = [sys.executable, "-c", FORK, json.dumps([f"{f}" for f in folders.values()])]
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(words, capture_output=True, text=True, env=env, cwd=root, timeout=3600)
    status = json.loads(done.stdout.splitlines()[-1])
    named = {name: status[f"{folder}"] for name, folder in folders.items()}
    (root / "status.json").write_text(json.dumps(named))


@pytest.fixture(scope="module")
def answers(beside):
    return beside(make_answers)


def test_there_are_thirteen_exercises_each_with_its_answer():
    assert len(PATCHES) == 13 == len(re.findall(r"^## \d+\. ", TEXT, re.M))


@pytest.mark.parametrize("patch", PATCHES, ids=lambda p: p.stem)
def test_the_answer_in_the_text_is_the_patch(patch):
    assert f"```diff\n{patch.read_text('utf-8')}```" in TEXT


@pytest.mark.parametrize("patch", PATCHES[:9], ids=lambda p: p.stem)
def test_the_first_nine_change_at_most_twenty_lines(patch):
    changed = [x for x in patch.read_text("utf-8").splitlines() if re.match(r"[+-](?![+-]{2})", x)]
    assert 0 < len(changed) <= 20


@pytest.mark.parametrize("patch", PATCHES, ids=lambda p: p.stem)
def test_an_exercise_touches_the_five_files_alone(patch):
    touched = re.findall(r"^\+\+\+ b/(\S+)", patch.read_text("utf-8"), re.M)
    assert touched and set(touched) <= set(FILES)


@pytest.mark.parametrize("patch", PATCHES, ids=lambda p: p.stem)
def test_the_text_names_files_and_functions_that_the_answer_touches(patch):
    """`Where: file.py: name, name; …` names what is there, and every file of the patch."""
    where = re.search(rf"^## {int(patch.stem)}\. .*?^Where: (.*?)\n\n", TEXT, re.M | re.S)[1]
    touched = set(re.findall(r"^\+\+\+ b/(\S+)", patch.read_text("utf-8"), re.M))
    named = {}
    for part in where.replace("\n", " ").split(";"):
        file, _, names = part.strip().partition(": ")
        named[file.strip("`")] = re.findall(r"`([\w.]+)`", names)
    assert set(named) == touched
    for file, names in named.items():
        source = (ROOT / file).read_text("utf-8")
        assert names and all(
            re.search(rf"(def|class) {n.split('.')[-1]}\b|^{n} =", source, re.M) for n in names
        )


@pytest.mark.parametrize("patch", PATCHES, ids=lambda p: p.stem)
def test_the_answer_runs_through_all_stages(answers, patch):
    folder = answers / patch.stem
    status = json.loads((answers / "status.json").read_text())
    assert status[patch.stem] == 0, (folder / "out.txt").read_text("utf-8", "replace")[-2000:]
    assert (folder / "run" / "student.pt").exists() and (folder / "run" / "report.md").exists()
