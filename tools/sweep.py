"""Students that differ in a setting or in the method, from one teacher and one set of samples.

    python ladd.py --sweep t_hat_mean=-1,0,1                a student for each value and seed
    python ladd.py --sweep taps=0,1/2 --sweep batch=16,32   all combinations; a "/" between lists
    python ladd.py --sweep method=ladd,regression,dmd --units 13200         the same work for all
    python ladd.py --sweep method=dpo --sweep beta=230,1000         a setting of the method's own
    python ladd.py --sweep … --other-judge      the same students' table by a second classifier

In the folder lie `shared`, the teachers and their samples, each made once; `members`, a run folder
for every student, named by its settings, so that sweeps in one folder share what they have in
common; and for each sweep a folder with its table, picture and sweep.json. What is finished is
skipped: the same command goes on with a sweep that was cut.
"""

import dataclasses
import hashlib
import importlib
import itertools
import json
import re
import shlex
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

import data
import ladd
import sample
from lib.errors import DataError, Parser, UsageError, plural
from lib.files import read_object, sha256, write_json, write_text
from lib.machine import device_of, facts
from lib.parallel import world
from lib.pictures import panels, save_png, stack
from lib.report import read_metrics, write_metrics
from lib.settings import bound, command_of, locked
from tools.report import given_and_truth, pictures_of
from tools.score import OTHER_JUDGE
from tools.table import STEPS, sweep_table
from tools.train import base_of, given_settings, open_given, run_program, train

COMPARED_BY = ("data", "size", "aspects", "judge_steps", "judge_width")  # a table's rows
METHODS = ("ladd", "regression", "consistency", "add", "dmd", "hyper_sd", "dpo", "inpaint", "edit")


class Member(NamedTuple):
    """A row of the table: students that differ in the seed alone."""

    values: dict  # of what is swept: name -> value, as text
    method: str
    settings: dict  # seed -> Settings, whose `out` is the student's folder


def method_of(name):
    """A method's stage of distillation, its forwards of the network in an update, its settings.
    Without a number of its own a method's updates are LADD's."""
    if name not in METHODS:
        raise UsageError(f"--sweep method={name}: must be one of {', '.join(METHODS)}")
    module = ladd if name == "ladd" else importlib.import_module(f"methods.{name}")
    own = vars(module)
    return module.distil, own.get("UNITS"), own.get("Settings", ladd.Settings)


def units_of(s):
    """Forwards of the network in an update of LADD: 6, and 2 for the share of the samples that is
    held to the student's own next picture."""
    held = s.distill_weight > 0 and len(s.levels) > 1
    return 6 + (2 * s.level_p[0] / sum(s.level_p) if held else 0)


def parse(argv, program):
    """-> the settings without what is swept, [Member], the command that makes this table, and
    whether it is of the second judge"""
    about = "Students that differ in a setting or in the method, from one teacher and its samples."
    parser = Parser(program, about, epilog="All other flags are ladd.py's.")
    add = parser.add_argument
    add("--sweep", action="append", required=True, metavar="NAME=A,B,…", help="may be repeated")
    add("--seeds", default="0,1,2", help="of the students; --seed is that of the one teacher")
    add("--units", type=int, help="instead of --iterations: a student's work, in forwards")
    add("--other-judge", action="store_true", help="the table is of a second classifier's scores")
    args, words = parser.parse_known_args(argv)
    s = given_settings(words)[0]
    if not any(word.split("=")[0] == "--out" for word in words):
        s = dataclasses.replace(s, out=f"{s.out}-sweep")
    if s.is_latent or world() > 1 or s.source:
        raise UsageError("--sweep scores images, takes one process, and no --from")
    members = members_of(s, args, words)
    unscaled = given_settings([*words, "--steps-scale=1"])[0]  # what is swept is scaled, too
    command = command_of(unscaled, base_of(s), ["python", program, "--preset", s.preset], ())
    command += f" --steps-scale {s.steps_scale:g}" if s.steps_scale != 1 else ""
    command += f" --units {args.units}" if args.units else ""
    command += "".join(f" --sweep {shlex.quote(axis)}" for axis in args.sweep)
    command += f" --seeds {args.seeds}" + (" --other-judge" if args.other_judge else "")
    return s, members, command, args.other_judge


def members_of(s, args, words):
    """All combinations of the swept values. s: the settings without them"""
    named = [text.partition("=")[::2] for text in args.sweep]
    named = [(name.strip().lstrip("-").replace("-", "_"), values) for name, values in named]
    methods = dict(named).get("method", "ladd").split(",")
    if len(dict(named)) < len(named):
        raise UsageError("--sweep: a name is there twice; give all of its values at once")
    axes, members = [axis_of(*each, methods) for each in named], []
    seeds = args.seeds.split(",")
    if not all(seed.isdecimal() for seed in seeds) or len(set(seeds)) < len(seeds):
        raise UsageError(f"--seeds {args.seeds}: must be numbers, none twice: 0,1,2")
    for values in map(dict, itertools.product(*axes)):
        settings = dict(values)
        method, units = settings.pop("method", "ladd"), settings.pop("units", args.units)
        _, cost, kind = method_of(method)
        if units is not None and "iterations" in settings:
            raise UsageError("--sweep iterations: --units decides them")
        if units is not None:
            own = [*words, *itertools.starmap(word_of, settings.items())]
            cost = cost or units_of(given_settings(own, kind=kind)[0])
            settings["iterations"] = round(int(units) / cost)
        own = [*words, *itertools.starmap(word_of, settings.items())]
        member = Member(values, method, {})
        for seed in seeds:
            run = given_settings([*own, f"--seed={seed}"], kind=kind)[0]
            folder = f"{s.out}/members/{name_of(run, method)}-of-{s.seed}/seed-{run.seed}"
            member.settings[run.seed] = dataclasses.replace(run, out=folder)
        if member[1:] in [other[1:] for other in members]:
            raise UsageError(f"--sweep: {told(member)} makes the same students as another value")
        members.append(member)
        first = members[0].method
        if kind.conditioned is not method_of(first)[2].conditioned:
            what = f"the networks of {first} and {method} are told different things"
            raise UsageError(f"--sweep method: {what}, so no table can compare them")
    return members


def axis_of(name, text, methods):
    """The values of a setting that every method has -> [(name, value as text), …]"""
    wrong, mark = f"--sweep {name}={text}: must be", ","
    if name in COMPARED_BY:
        raise UsageError(f"--sweep {name}: other images or another judge, so no table can compare")
    for method in methods if name not in ("method", "units") else ():
        fields = dataclasses.fields(method_of(method)[2])
        known = {field.name: field.default for field in fields if not field.metadata["free"]}
        if name not in known or name in ("preset", "seed"):
            raise UsageError(f"{wrong} a setting of {method} that changes results")
        mark = "/" if isinstance(known[name], tuple) else ","
    values = text.split(mark)
    if not all(values) or (name == "units" and not all(map(str.isdecimal, values))):
        raise UsageError(f"{wrong} a name and its values: t_hat_mean=-1,0,1 or taps=0,1/1,2")
    return [(name, value) for value in values]


def word_of(name, value):
    """A setting's name and value -> the word of a command line."""
    flag = name.replace("_", "-")
    if value in ("true", "false"):
        return f"--{flag}" if value == "true" else f"--no-{flag}"
    return f"--{flag}={value}"


def name_of(s, method="ladd"):
    """What differs from the preset, and a digest of all settings but the seed."""
    base = bound(base_of(s)) | dict(method="ladd")
    own = bound(s) | dict(method=method, seed=base["seed"])
    paths = [s.teacher, f"{s.teacher}/teacher.pt", s.discriminator, f"{s.discriminator}/heads.pt"]
    files = [sha256(path) for path in paths if Path(path).is_file()]
    # what is attention_heads now was heads: sweeps of before find their folders
    older = {name.removeprefix("attention_"): value for name, value in own.items()}
    digest = hashlib.sha256(json.dumps([older, *files]).encode()).hexdigest()[:8]
    differs = ",".join(f"{k}={v}" for k, v in own.items() if v != base[k])
    differs = re.sub(r"[^\w=.,-]+", "", differs.replace(", ", "-"), flags=re.ASCII)
    return f"{differs[:120] or s.preset}.{digest}"


def samples_for(s, seed, out, watch, method="ladd"):
    """The run with the teacher, tuned if need be, and the samples that a student learns from: those
    stages are run where no other student has needed them yet, with this seed for all."""
    names = [field.name for field in dataclasses.fields(ladd.Settings)]
    plain = ladd.Settings(**{name: getattr(s, name) for name in names})  # without a method's own
    source, work = "", [(plain, "teacher", "synthetic", None, "ladd")]
    if s.targets == "synthetic":
        work.append((plain, "synthesis", "iterations", None, "ladd"))
    if s.condition_channels:
        tune = importlib.import_module(f"methods.{method}").tune
        work.append((s, "distillation", "synthetic", tune, method))
    for own, stage, later, distil, name in work:
        base = base_of(own)
        unread = {field: getattr(base, field) for field in names[names.index(later) :]}
        unread |= dict(taps=(), batch=s.accumulate)  # the preset's might not fit this network
        own = dataclasses.replace(own, **unread, seed=seed)
        title = "tuning" if distil else stage
        folder = out / "shared" / f"{title}-{name_of(own, name)}-seed-{seed}"
        own = dataclasses.replace(own, stage=stage, out=str(folder), source=source)
        run, source = train(own, watch, distil, name), str(folder)
    return run


def make_student(s, method, source, watch):
    """One student in its run folder, with its scores. source: the folder of its samples"""
    own = dataclasses.replace(s, stage="distillation", source=source)
    run = train(own, watch, method_of(method)[0], method)
    watch.patient = False  # scoring saves nothing on its way
    watch.check()
    took = [row.get("seconds") for row in run.log.rows() if row.get("finished")]
    took = took[-1] if took else None  # None: cut between the student and its row
    rows = student_rows(s, s.conditioned(run.dataset))
    write_metrics(run, rows, dict(distillation=took))


def dataset_of(s):
    """The data of a finished student, if they are those that it was made from."""
    dataset = data.load(s.data, s.sizes, data_dir=s.data_dir, seed=s.seed, flip=s.flip)
    made_from = read_object(f"{s.out}/config.json").get("dataset", dataset.name)
    if made_from != dataset.name:
        raise DataError(f"{s.out} was made from other data ({made_from} → {dataset.name}).")
    return s.conditioned(dataset)


def student_of(s, dataset, path):
    """The network of a run folder or a file, with all that it takes to sample from it."""
    student = sample.load_generator(path, device=s.device, precision=s.precision)
    if s.condition_channels:
        student.condition = partial(dataset.condition, held_out=True)
    return student


def student_rows(s, dataset, other=False):
    """A student's scores, and those after each part of a method that learns in parts."""
    rows = scores(s, dataset, None, student_of(s, dataset, s.out), other)
    for path in Path(s.out).glob("student-*.pt"):
        for row in scores(s, dataset, None, student_of(s, dataset, path), other)[1:]:
            rows.append(row | dict(name=row["name"].replace("student", path.stem)))
    return rows


def scores(s, dataset, teacher, student, other=False):
    own, device = OTHER_JUDGE if other else {}, device_of(s.device)
    judge = sample.judge_of(dataset, s, device, s.data_dir, s.precision, **own)
    return sample.evaluate(dataset, judge, teacher, student, s.evaluation, s.seed)


def scored(s, other):
    """A finished student's metrics; with the second judge's scores, which lie beside its own."""
    metrics, path = read_metrics(s.out), Path(s.out) / "other-judge.json"
    if not other:
        return metrics
    if not path.exists() or read_object(path).get("checkpoints") != metrics["checkpoints"]:
        write_json(metrics | dict(rows=student_rows(s, dataset_of(s), other)), path)
    return read_object(path)


def reference(s, method, out, watch, other):
    """The rows of teacher and untrained student, with the settings of the first value."""
    title = "reference-by-other-judge" if other else "reference"
    path = out / "shared" / f"{title}-{name_of(s, method)}-seed-{s.seed}.json"
    if not path.exists():
        run = samples_for(s, s.seed, out, watch, method)
        teacher = ladd.generator(run, "teacher")
        teacher.settings = s
        write_json(dict(rows=scores(s, s.conditioned(run.dataset), teacher, None, other)), path)
    return read_object(path)["rows"]


def told(member):
    return ", ".join(f"{name}={value}" for name, value in member.values.items())


def picture(members, path):
    """A row of samples for every value, of the first seed, from the same captions and noise."""
    rows, captions = [], []
    for member in members:
        s = next(iter(member.settings.values()))
        dataset = dataset_of(s)
        parts, titled = data.held_out_captions(dataset, 8), given_and_truth(dataset, 8)
        captions += [caption for own, _ in parts for caption in own]
        generator = student_of(s, dataset, s.out)
        for n in (n for n in STEPS if n <= len(s.levels)):
            made = pictures_of(generator, parts, s.seed, steps=n)
            titled.append((f"{told(member)}: {plural(n, 'step')}", made))
        rows.append(panels(titled, 8))
    save_png(stack(rows), path, captions="; ".join(captions))


def sweep(s, watch, members, command, other):
    """Every student, seed by seed, then the table. What is finished is skipped."""
    out, seeds = Path(s.out), list(members[0].settings)
    first = dataclasses.replace(members[0].settings[seeds[0]], seed=s.seed)
    for member in members:  # what can be refused is refused before anything is made
        if not all(read_metrics(own.out) for own in member.settings.values()):
            open_given(member.settings[seeds[0]], member.method)
    with locked(out):
        if not (out / "shared").is_dir() and any(out.iterdir()):
            raise UsageError(f"{out} is not empty and not a sweep's folder: choose another --out.")
        students = list(itertools.product(seeds, members))
        for i, (seed, member) in enumerate(students, 1):
            print(f"student {i} of {len(students)}: {told(member)}, seed {seed}")
            own = member.settings[seed]
            if not read_metrics(own.out):
                source = samples_for(own, s.seed, out, watch, member.method).settings.out
                make_student(own, member.method, source, watch)
        rows, results = reference(first, members[0].method, out, watch, other), []
        for member in members:
            runs = [scored(own, other) for own in member.settings.values()]
            results.append(dict(values=member.values, runs=runs))
        result = dict(command=command, seeds=seeds, reference=rows, members=results, **facts())
        folder = out / "+".join(members[0].values)
        made = folder / "sweep.json"
        if made.exists() and read_object(made).get("command") != command:  # another sweep's
            folder = out / f"{folder.name}.{hashlib.sha256(command.encode()).hexdigest()[:8]}"
        write_json(result, folder / "sweep.json")
        table = sweep_table(result)
        write_text(table + "\n", folder / "sweep.md")
        watch.check()
        picture(members, folder / "sweep.png")
    print(f"{table}\n\n{folder}", flush=True)


def main(argv):
    return run_program(argv, "ladd.py", parse, sweep)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
