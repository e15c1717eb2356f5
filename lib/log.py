"""log.jsonl of a run folder: a row of numbers every few updates, and tensorboard's copy of them."""

import contextlib
import functools
import json
import os

from lib.errors import RunError
from lib.files import write_text
from lib.parallel import rank


class Log:
    """The rows of a run folder's log.jsonl. Rank 0 alone writes."""

    def __init__(self, folder, tensorboard=False):
        self.path, self.board = folder / "log.jsonl", None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise RunError("--tensorboard needs: pip install tensorboard") from None
            # made at its first number: a folder must be empty to become a run's
            self.board = functools.cache(lambda: SummaryWriter(str(folder / "tensorboard")))

    def write(self, **row):
        if rank() > 0:
            return
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        if self.board is not None and "step" in row:
            for name in row.keys() - {"stage", "step"}:
                if isinstance(row[name], (int, float)):
                    self.board().add_scalar(f"{row['stage']}/{name}", row[name], row["step"])
            self.board().flush()  # its thread writes late, and not at all where the process ends

    def rows(self):
        """The rows; what a cut or damage left of others is passed over."""
        lines = self.path.read_bytes().splitlines() if self.path.exists() else []
        for line in lines:
            with contextlib.suppress(ValueError, RecursionError):
                row = json.loads(line)
                known = isinstance(row, dict) and row.keys() & {"stage", "settings"}
                if known and isinstance(row.get("step", 0), int):
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
