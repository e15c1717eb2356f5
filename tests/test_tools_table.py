"""tools/table.py: the documents' tables are those of the kept results."""

import re
import shutil

import pytest

from tools import table


@pytest.fixture
def docs(tmp_path, monkeypatch):
    """A copy of the documents and of the kept results."""
    shutil.copytree(table.DOCS / "results", tmp_path / "docs/results")
    for name in table.DOCUMENTS:
        shutil.copy(table.DOCS / name, tmp_path / "docs" / name)
    monkeypatch.setattr(table, "DOCS", tmp_path / "docs")
    return tmp_path / "docs"


def test_the_tables_of_the_documents_are_those_of_the_kept_results():
    assert table.main([]) == 0


@pytest.mark.parametrize("name", ["../README.md", "results.md", "ablations.md"])
def test_a_number_that_is_not_in_the_results_is_found_and_mended(docs, capsys, name):
    text = (docs / name).read_text("utf-8")
    mean = re.search(r"\| \d+\.\d+(?= )", text)  # the first one of a table
    (docs / name).write_text(text.replace(mean[0], "| 9.999", 1), "utf-8")
    assert table.main([]) == 1
    said = capsys.readouterr().out
    assert said.startswith(name.removeprefix("../")) and said.count("\n") == 1
    assert table.main(["--write"]) == table.main([]) == 0
    assert (docs / name).read_text("utf-8") == text


def test_text_beside_the_tables_stays(docs):
    for name in table.DOCUMENTS:
        text = (docs / name).read_text("utf-8")
        assert table.filled(f"before\n{text}\nafter") == f"before\n{text}\nafter"


def test_what_is_not_known_has_no_part_in_a_mean():
    assert table.mean_and_deviation([1.0, None, 3.0], 1) == "2.0 ± 1.4"
    assert table.mean_and_deviation([2.0], 2) == "2.00"
    assert table.mean_and_deviation([None], 2) == "–"
