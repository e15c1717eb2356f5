"""Makes a folder to start from, such as pretrained/nano, of a finished run.

python -m tools.pretrained runs/nano pretrained/nano

Weights are rounded to bf16, and the heads lose their optimiser's moments, so that the folder is
small. Then the table of scores is made again, of what the folder holds.
"""

import shutil
import sys
from pathlib import Path

import torch

import data
import ladd
import sample
from lib.errors import Parser, UsageError, UserError, exit_status
from lib.files import read_object, save, write_json
from lib.lora import merged
from lib.report import fingerprints, read_metrics
from tools import score

PROMPT = "a large red circle on a plain blue background"


def rounded(path, kinds):
    """A checkpoint as it is published, as a dict."""
    checkpoint = merged(sample.read_checkpoint(path, kinds))
    exact = checkpoint["weights"].items()
    weights = {k: w.bfloat16() if w.is_floating_point() else w for k, w in exact}
    checkpoint.pop("optimizer", None)
    settings = vars(checkpoint["settings"])
    for name in ("out", "data_dir", "source"):  # paths of the machine, in an older version's
        settings.pop(name, None)
    return checkpoint | dict(weights=weights, settings=settings)


@torch.no_grad()
def known_numbers(folder, data_dir="data"):
    """Numbers of a folder's networks that take a second to make again, in float32 on a CPU:
    whoever uses the folder can see that it still draws what it drew.

    teacher_loss: over 64 held-out images at even noise levels. centre, corner: two pixels of what
    the student draws by default of `prompt`."""
    teacher, student = (sample.load_generator(folder, t, "cpu", "fp32") for t in (True, False))
    s = teacher.settings
    dataset = data.load(s.data, sample.latent_sizes(s), data_dir=data_dir).sets[0]
    images, caption = dataset.batch(range(64), held_out=True)
    x0, text = data.to_float(images), teacher.text([dataset.captions[i] for i in caption])
    noise = sample.noise_of(0, "known numbers", range(64), x0.shape[1:])
    loss = ladd.teacher_loss(teacher.model, x0, text, torch.linspace(0.01, 0.99, 64), noise)
    (picture,) = data.to_picture(student.sample([PROMPT]))
    centre, corner = picture[:, picture.shape[1] // 2, picture.shape[2] // 2], picture[:, 0, 0]
    pixels = dict(prompt=PROMPT, centre=centre.tolist(), corner=corner.tolist())
    return dict(teacher_loss=loss.item(), **pixels)


def publish(run, out, data_dir="data"):
    if out.exists():
        raise UsageError(f"{out} exists: delete it, or choose another folder")
    metrics = read_metrics(run)
    if not metrics:
        raise UsageError(f"{run}: no metrics.json; only a finished run is published")
    for kind in ("teacher", "student", "heads"):
        save(rounded(run / f"{kind}.pt", [kind]), out / f"{kind}.pt")
    write_json(read_object(run / "config.json"), out / "config.json")
    if (run / "words.txt").exists():
        shutil.copy(run / "words.txt", out)
    known = known_numbers(out, data_dir)
    write_json(metrics | dict(checkpoints=fingerprints(out), known=known), out / "metrics.json")


def main(argv=None):
    parser = Parser("tools/pretrained.py", "A small folder to start from, of a finished run.")
    parser.add_argument("run", type=Path, help="the folder of a finished run on pixels")
    parser.add_argument("out", type=Path, help="the folder to make")
    parser.add_argument("--data-dir", default="data", help="where judges are kept")
    args = parser.parse_args(argv)
    try:
        publish(args.run, args.out, args.data_dir)
    except (UserError, OSError) as error:
        return exit_status("tools/pretrained.py", error)
    return score.main([f"{args.out}", "--evaluate", "--data-dir", args.data_dir])


if __name__ == "__main__":
    sys.exit(main())
