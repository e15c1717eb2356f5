"""The table of a finished run: teacher, student before and after, in their numbers of steps.

    python sample.py runs/nano --evaluate

What is scored as in the run's report goes to its metrics.json; other scores are printed alone.
"""

import copy
from pathlib import Path

import data
import sample
from lib.errors import CheckpointError, DataError, UsageError
from lib.files import read_object, write_json
from lib.report import accuracy_line, fingerprints, markdown_table, read_metrics
from lib.samples import read_samples
from lib.scores import held_out, judge_accuracy

OTHER_JUDGE = dict(seed=2, kernel=5)  # a second classifier, with which nothing is trained
MOST = dict(evaluation=10**6, judge_steps=10**6, judge_width=1024)  # of a stranger's settings
READ = ("run", "evaluate", "num", "seed", "data", "steps", "cfg", "other_judge", "to_samples")
READ += ("data_dir", "device", "precision")  # of the command line, which is in tools/draw.py


def data_of(generator, args):
    """The data set that a model was trained on, or --data."""
    s = generator.settings
    sizes, where = sample.latent_sizes(s), args.data_dir
    return data.load(args.data or s.data, sizes, data_dir=where, seed=s.seed, flip=s.flip)


def samples_of(folder, config):
    """What a run's student learned from: {(H, W): images (n, 3, H, W) uint8}."""
    if (folder / "tuned").is_dir():  # of methods.dpo: the tuned teacher's
        folder = folder / "tuned"
    parts = []
    if any((folder / "synthetic").glob("*.pt")):
        parts, *_ = read_samples(folder / "synthetic", config["channels"], config["patch"])
    if sum(len(x0) for x0, _ in parts) < 8:
        raise UsageError(f"--to-samples: {folder} has no samples of a teacher, or fewer than 8")
    return {tuple(x0.shape[2:]): data.to_uint8(x0.to("cpu").float()) for x0, _ in parts}


def score(args):
    folder = Path(args.run)
    if not folder.is_dir():
        raise UsageError(f"--evaluate needs a run folder, and {folder} is none")
    teacher = sample.load_generator(folder, True, args.device, args.precision)
    student = sample.load_generator(folder, False, args.device, args.precision)
    if "condition_channels" in student.model.config:
        raise UsageError(f"{folder}: fills or edits pictures; its scores are in its report.md")
    teacher.settings = copy.copy(student.settings)  # its own are another run's after --from
    metrics, s = read_metrics(folder), vars(student.settings)
    wrong = [k for k, most in MOST.items() if type(s.get(k)) is not int or not 0 < s[k] <= most]
    if wrong or s["downscale"] > 1:
        raise CheckpointError(f"{folder}: can't be scored: {', '.join(wrong) or 'latents'}.")
    samples = samples_of(folder, student.model.config) if args.to_samples else None
    asked = dict(evaluation=args.num, seed=args.seed, data=args.data)
    asked |= dict(teacher_steps=args.steps, cfg=args.cfg, precision=args.precision)
    other = {k: value for k, value in asked.items() if value is not None and value != s[k]}
    vars(teacher.settings).update(other)
    dataset, config = data_of(student, args), folder / "config.json"
    made_from = read_object(config).get("dataset") if config.exists() else None
    if made_from == dataset.name:  # which may lie elsewhere now
        other.pop("data", None)
    elif made_from and not args.data:
        raise DataError(
            f"{folder} was made from other images or captions than those of {s['data']} now "
            f"({made_from} → {dataset.name}). Give the data of then with --data."
        )
    own = OTHER_JUDGE if args.other_judge else {}
    judge = sample.judge_of(
        dataset, student.settings, student.device, args.data_dir, args.precision, **own
    )
    held = held_out(data.shares(dataset, 2000))
    accuracy = judge_accuracy(held, dataset.labels, dataset.attributes, judge)
    count, seed = other.get("evaluation", s["evaluation"]), other.get("seed", s["seed"])
    rows = sample.evaluate(dataset, judge, teacher, student, count, seed, samples)
    print(markdown_table(rows))
    print(f"\n{accuracy_line(accuracy)}")
    if other or args.other_judge or args.to_samples:
        own = ["the first judge", "real images", *(f"{name} {s[name]}" for name in other)]
        own = ", ".join(own)
        print(f"Not kept: the run's own metrics.json is of {own}.")
    else:
        metrics |= dict(rows=rows, judge_accuracy=accuracy, samples=count)
        write_json(metrics | dict(checkpoints=fingerprints(folder)), folder / "metrics.json")
