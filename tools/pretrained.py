"""Makes a folder to start from, such as pretrained/nano, of a finished run.

python -m tools.pretrained runs/nano pretrained/nano

Weights are rounded to bf16, and the heads lose their optimiser's moments, so that the folder is
small. Then the table of scores is made again, of what the folder holds. What it draws is known to
tests/test_tools_pretrained.py.
"""

import shutil
import sys
from pathlib import Path

import sample
from lib.errors import Parser, UsageError, UserError, exit_status
from lib.files import read_object, save, write_json
from lib.lora import merged
from lib.report import fingerprints, read_metrics


def rounded(path, kinds):
    """A checkpoint as it is published, as a dict."""
    checkpoint = merged(sample.read_checkpoint(path, kinds))
    exact = checkpoint["weights"].items()
    weights = {k: w.bfloat16() if w.is_floating_point() else w for k, w in exact}
    checkpoint.pop("optimizer", None)
    return checkpoint | dict(weights=weights, settings=vars(checkpoint["settings"]))


def publish(run, out):
    if out.exists():
        raise UsageError(f"{out} exists: delete it, or choose another folder")
    metrics = read_metrics(run)
    if not metrics:
        raise UsageError(f"{run}: no metrics.json; only a finished run is published")
    config = read_object(run / "config.json")
    parts = {kind: rounded(run / f"{kind}.pt", [kind]) for kind in ("teacher", "student", "heads")}
    for kind, checkpoint in parts.items():  # all can be read: now the folder is made
        save(checkpoint, out / f"{kind}.pt")
    write_json(config, out / "config.json")
    if (run / "words.txt").exists():
        shutil.copy(run / "words.txt", out)
    write_json(metrics | dict(checkpoints=fingerprints(out)), out / "metrics.json")


def main(argv=None):
    parser = Parser("tools/pretrained.py", "A small folder to start from, of a finished run.")
    parser.add_argument("run", type=Path, help="the folder of a finished run on pixels")
    parser.add_argument("out", type=Path, help="the folder to make")
    parser.add_argument("--data-dir", default="data", help="where judges are kept")
    args = parser.parse_args(argv)
    try:
        publish(args.run, args.out)
    except (UserError, OSError) as error:
        return exit_status("tools/pretrained.py", error)
    return sample.main([f"{args.out}", "--evaluate", "--data-dir", args.data_dir])


if __name__ == "__main__":
    sys.exit(main())
