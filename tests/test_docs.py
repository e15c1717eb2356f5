"""The documents say what the runs say."""

import json
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
from tools import pictures

ROOT = Path(__file__).resolve().parent.parent


README = ROOT / "README.md"
DOCUMENTS = [README, *sorted((ROOT / "docs").glob("*.md"))]
NOW = [path for path in DOCUMENTS if path.name != "log.md"]  # which tells what was, not what is
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]+")
TORCHRUN = {"--nproc-per-node", "--nnodes", "--rdzv-backend", "--rdzv-endpoint", "--max-restarts"}
PROGRAMS = [
    "ladd", "ladd --sweep=a", "ladd --dry-run", "sample", "sample --evaluate", "sd3.encode",
    "tools.benchmark", "tools.gpu_check", "tools.pictures", "tools.table", "methods.hyper_sd",
    "methods.dpo", "methods.inpaint",
]  # fmt: skip


@pytest.fixture
def flags(monkeypatch, capsys):
    """All flags of all programs, by their --help."""
    monkeypatch.setattr(sys, "modules", dict(sys.modules))  # what is imported here stays here
    for words in PROGRAMS:
        name, *words = words.split()
        monkeypatch.setattr(sys, "argv", [name, *words, "--help"])
        monkeypatch.delitem(sys.modules, name, raising=False)  # of which runpy would warn
        with pytest.raises(SystemExit) as stop:
            runpy.run_module(name, run_name="__main__")
        assert stop.value.code == 0, name
    return set(FLAG.findall(capsys.readouterr().out)) | TORCHRUN


def test_every_flag_that_the_documents_name_exists(flags):
    for path in NOW:
        text = re.sub("```diff.*?```", "", path.read_text("utf-8"), flags=re.S)
        named = set(FLAG.findall(text))
        assert named <= flags, (path.name, named - flags)


def slug(heading):
    """The anchor that a Markdown heading gets."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def headings(path):
    return re.findall(r"^#+ (.+)$", path.read_text("utf-8"), flags=re.M)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_of_a_document_leads_somewhere(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text("utf-8")):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        found = path.parent / file if file else path
        assert found.exists(), target
        assert not anchor or anchor in map(slug, headings(found)), target


def test_the_readme_leads_to_every_document_and_is_short():
    text = README.read_text("utf-8")
    assert len(text.splitlines()) <= 180
    for path in DOCUMENTS[1:]:
        assert f"docs/{path.name}" in text, path.name


@pytest.mark.parametrize("path", NOW, ids=lambda path: path.name)
def test_every_program_that_a_document_names_exists(path):
    for name in re.findall(r"python -m ([a-z][\w.]*)", path.read_text("utf-8")):
        module = ROOT / Path(*name.split(".")).with_suffix(".py")
        assert name == "pytest" or module.exists(), name


def test_the_warning_of_a_bad_sign_names_a_section_that_exists():
    file, heading = re.search(
        r"docs/(\w+\.md): ([\w ]+)", (ROOT / "lib" / "loop.py").read_text("utf-8")
    ).groups()
    assert heading in headings(ROOT / "docs" / file)


def test_the_table_of_passes_is_that_of_the_code():
    text = (ROOT / "docs" / "passes.md").read_text("utf-8")
    assert f"<!-- passes -->\n{pictures.pass_table()}\n<!-- end -->" in text


def test_the_page_on_gpus_has_the_figures_of_its_run():
    rows = json.loads((ROOT / "docs" / "results" / "gpu-nano.json").read_text("utf-8"))["rows"]
    rows = {row["name"]: row for row in rows}
    student, teacher = rows["student, 1 step"], rows["teacher, 32 steps, CFG 4"]
    told = f"aligned {student['alignment']:.3f} with Fréchet distance {student['frechet']:.1f}"
    told += f", its teacher in 32 steps {teacher['alignment']:.3f} and {teacher['frechet']:.1f} "
    assert told.replace(" 0.", " .") in (ROOT / "docs" / "gpu.md").read_text("utf-8")


def test_the_page_on_fid_writes_the_training_set_as_pictures(tmp_path, monkeypatch):
    """Its first block of Python, with five images in the place of CIFAR-10."""
    images = torch.arange(5, dtype=torch.uint8)[:, None, None, None].expand(5, 3, 32, 32)
    monkeypatch.setattr(data, "load", lambda name, sizes: data.ImageSet(name, (images, None)))
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "fid.md").read_text("utf-8")
    exec(re.search("```python\n(.*?)```", text, re.S)[1], {})
    for i in range(5):
        with Image.open(tmp_path / "fid" / "real" / f"0000{i}.png") as picture:
            assert (np.asarray(picture) == i).all() and picture.size == (32, 32)


def test_the_pictures_of_levels_and_health_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    kept = ROOT / "docs" / "results"
    logs = {name: kept / f"health-{name}.jsonl" for name in ("healthy", "broken")}
    for figure in (pictures.draw_levels(), pictures.draw_health(logs)):
        figure.savefig(tmp_path / "a.png")
        with Image.open(tmp_path / "a.png") as image:
            assert np.asarray(image.convert("L")).std() > 10


def test_pictures_without_matplotlib_name_the_command(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert pictures.main(["a", "b"]) == 2
    assert "pip install matplotlib" in capsys.readouterr().err


def test_a_log_that_can_not_be_drawn_leaves_the_pictures_as_they_are(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").mkdir()
    assert pictures.main(["no.jsonl", "no.jsonl"]) == 1
    assert "no.jsonl" in capsys.readouterr().err and not any((tmp_path / "docs").iterdir())


def test_a_log_without_one_of_the_numbers_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "log.jsonl").write_text(json.dumps(dict(step=1, loss_g=0, loss_d=2, ranked=0.5)))
    pictures.draw_health(dict(own=tmp_path / "log.jsonl")).savefig(tmp_path / "a.png")
