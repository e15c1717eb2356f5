"""lib/checks.py: what is not there is told by its flag. Its other checks are tested in place."""

import pytest
from conftest import FEW


@pytest.mark.parametrize("source", ["a.pt", "gone"])
def test_a_run_to_start_from_that_is_no_folder_is_refused_with_its_flag(
    launch, tmp_path, capsys, source
):
    (tmp_path / "a.pt").touch()
    assert launch("out", f"{FEW} --from {source}") == 2
    said = capsys.readouterr().err
    assert f"--from {source}: is no folder of a run" in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()
