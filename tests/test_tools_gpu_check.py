"""tools/gpu_check.py: its parts end at their limits, and one that fails stops no other."""

import json
import os
import re
import subprocess
import time

import pytest
import torch

from tools import benchmark, gpu_check
from tools.train import given_settings


def python(name, code, limit=60):
    return gpu_check.Part(name, ["-c", code], limit)


@pytest.fixture
def check(tmp_path):
    """check(parts, minutes) -> statuses, what the JSON and the Markdown file say"""

    def check(parts, minutes=1):
        statuses = gpu_check.check(parts, tmp_path, tmp_path / "kept", minutes)
        texts = [
            (tmp_path / "kept" / f"gpu-check.{end}").read_text("utf-8") for end in ("json", "md")
        ]
        return statuses, json.loads(texts[0]), texts[1]

    return check


def test_a_part_that_fails_stops_no_other_and_its_last_words_are_kept(check):
    parts = [python("a", "print('| x | 1 |')"), python("b", "1 / 0"), python("c", "exit(75)")]
    statuses, result, text = check(parts)
    assert statuses == ["passed", "failed: status 1", "stopped by --stop-after"]
    assert [part["name"] for part in result["parts"]] == ["a", "b", "c"]
    assert result["parts"][0]["table"] == ["| x | 1 |"] and result["torch"] == torch.__version__
    assert "ZeroDivisionError" in result["parts"][1]["output"][-1]
    assert "| x | 1 |" in text and "ZeroDivisionError" in text and str(result["commit"]) in text


def test_a_part_ends_at_its_limit_with_all_that_it_started_and_what_it_said_is_kept(
    check, tmp_path
):
    """Also the parts together: the last has what is left of the minutes."""
    mark = tmp_path / "mark"
    child = f"import time; time.sleep(2); open({str(mark)!r}, 'w')"
    code = (
        f"import subprocess, sys; print('| x |'); subprocess.run([sys.executable, '-c', {child!r}])"
    )
    statuses, result, _ = check([python("a", code, 1), python("b", code)], minutes=2 / 60)
    assert statuses == ["out of time"] * 2
    assert [part["limit"] for part in result["parts"]] == [1, 1]
    assert result["parts"][0]["table"] == ["| x |"]
    time.sleep(1.5)
    assert not mark.exists()


def test_the_files_name_no_folder_of_this_machine(check):
    code = "import os; print(f'{os.getcwd()}/x.py: wrong'); exit(1)"
    _, result, text = check([gpu_check.Part("a", ["-c", code, "/home/me/a.zip"], 60)])
    assert result["parts"][0]["output"] == ["x.py: wrong"] and f"{gpu_check.ROOT}/" not in text
    assert "a.zip" in text and "/home/me" not in text


def test_the_commands_of_the_parts_can_be_given(monkeypatch):
    """One is ladd.py's; the limits of all but the last leave it at least a minute and a half."""
    tests, tiny, last = gpu_check.parts_of("shapes", "runs/x")
    assert (gpu_check.ROOT / tests.words[-1]).exists()
    assert given_settings(tiny.words[1:])[0].preset == "tiny"
    assert 60 * gpu_check.MINUTES - tests.limit - tiny.limit >= 90
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        benchmark.main(last.words[2:])


def test_a_part_can_be_run_again_alone(monkeypatch, tmp_path, refused):
    ran = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_check, "check", lambda parts, *_: ran.extend(parts) or ["passed"])
    assert gpu_check.main(["--parts", "benchmark", "tests"]) == 0
    assert [part.name for part in ran] == ["tests", "benchmark"]
    refused(gpu_check, ["--parts", "test"], 2, "invalid choice: 'test'")


def test_without_a_gpu_it_says_so_in_one_line(refused, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused(gpu_check, ["--out", "out"], 2, "no CUDA GPU is here")


@pytest.mark.parametrize("torch_is_there", [True, False])
def test_the_shell_script_finds_python_and_says_where_torch_is_missing(tmp_path, torch_is_there):
    """From any folder; here with a Python that tells what it was given."""
    import_fails = "" if torch_is_there else 'if [ "$1" = -c ]; then exit 1; fi'
    python = f'#!/bin/sh\n{import_fails}\n[ "$1" = -c ] || echo "$PYTHONPATH $@"\n'
    (tmp_path / "python").write_text(python)
    (tmp_path / "python").chmod(0o755)
    environment = os.environ | dict(PATH=f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    words = ["bash", f"{gpu_check.ROOT}/tools/gpu_check.sh", "a b.zip"]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    if torch_is_there:
        assert done.stdout == f"{gpu_check.ROOT} -m tools.gpu_check a b.zip\n"
    else:
        assert done.returncode == 2 and "pip install -r" in done.stderr


def test_docs_gpu_names_the_parts_with_their_limits_and_the_oldest_torch():
    text = (gpu_check.ROOT / "docs" / "gpu.md").read_text("utf-8")
    for part in gpu_check.parts_of("shapes", "runs/x")[:-1]:
        assert re.search(rf"^\| {part.name} \|.*\| {part.limit} s \|$", text, flags=re.M)
        if part.name == "tiny":
            assert f"{' '.join(part.words[5:13])}` with its table" in text
    (oldest,) = re.findall(r"torch below (\S+) \|", text)
    assert f"torch>={oldest}\n" in (gpu_check.ROOT / "requirements.txt").read_text("utf-8")
