"""log.jsonl of a run folder: a row of numbers every few updates."""

import contextlib
import json
import os

from lib.files import write_text
from lib.parallel import rank


class Log:
    """The rows of a run folder's log.jsonl. Rank 0 alone writes."""

    def __init__(self, folder):
        self.path = folder / "log.jsonl"

    def write(self, **row):
        if rank() > 0:
            return
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def rows(self):
        """The rows; what a cut or damage left of others is passed over."""
        lines = self.path.read_bytes().splitlines() if self.path.exists() else []
        for line in lines:
            with contextlib.suppress(ValueError, RecursionError):
                row = json.loads(line)
                if isinstance(row, dict) and isinstance(row.get("step", 0), int):
                    yield row

    def forget(self, stage=None, step=0):
        """Drops what a cut left of a row, and a stage's rows after its saved state: the updates
        that they tell of are done again."""
        if rank() == 0:
            kept = [r for r in self.rows() if r.get("stage") != stage or r.get("step", 0) <= step]
            write_text("".join(json.dumps(row) + "\n" for row in kept), self.path)

    def sync(self):
        """Has the rows on the disk: they must not be lost where a state is not."""
        if rank() == 0:
            with open(self.path, "ab") as file:
                os.fsync(file.fileno())
