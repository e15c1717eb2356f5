"""The program behind ladd.py and behind every method of methods/: its command line, and the life of
a run: what it is given, its folder, its stages.
"""

import dataclasses
import importlib
import shlex
import sys
from importlib.util import find_spec
from pathlib import Path

import torch

import data
import ladd
import sample
from lib.captions import known_words, unread_words
from lib.checkpoints import is_ours, not_finite, same_network
from lib.checks import check_captions, check_for_method
from lib.errors import ENDS, NotFetched, Stop, UsageError, UserError, exit_status
from lib.files import link, save, write_text
from lib.loop import Watch
from lib.lora import merged
from lib.machine import check_compiler, device_of, keep_memory
from lib.parallel import barrier, broadcast, processes, rank, world
from lib.pictures import refuse_strangers
from lib.report import read_metrics
from lib.run import Run
from lib.settings import bound, check_same, lasting, parse_settings, read_config, refuse
from mmdit import MMDiT
from tools import report

TOOLS = {"--explain": "explain", "--dry-run": "plan", "--sweep": "sweep"}
EPILOG = "Also: --explain, --dry-run and --sweep, which are tools/explain.py, plan.py and sweep.py."


def base_of(s):
    """The settings of the preset alone, for names and defaults: they need not fit together, nor
    this machine."""
    unchecked = type("Base", (type(s),), dict(__post_init__=lambda _: None))
    return unchecked(preset=s.preset, **ladd.PRESETS[s.preset]).scaled()


def given_settings(argv, program="ladd.py", kind=ladd.Settings):
    """The command line -> settings of that kind, and whether --data was given: a preset's row, with
    every flag replacing a field; then --smoke and --steps-scale are worked in."""
    about = "LADD, latent adversarial diffusion distillation: all stages of a run."
    epilog = EPILOG if program == "ladd.py" else ""
    s, given = parse_settings(kind, ladd.PRESETS, argv, program, about, epilog)
    out = f"runs/{s.preset}"
    if program.startswith("-m methods."):
        out += "-" + program.split(".")[-1]
    if s.data != ladd.PRESETS[s.preset].get("data", "shapes"):
        out += "-" + Path(s.data).stem
    return dataclasses.replace(s, out=s.out or out).scaled(), "data" in given


def given_teacher(s):
    """The checkpoint of --teacher, ours or released, if its network is that of the settings."""
    if is_ours(Path(s.teacher)):
        checkpoint = merged(sample.read_checkpoint(s.teacher, ["teacher"]))
        checkpoint["settings"] = vars(checkpoint["settings"])  # as they are saved
    else:
        from sd3.weights import released_checkpoint

        checkpoint = released_checkpoint(s.teacher, lasting(s))
    with torch.device("meta"):
        same_network("--teacher", s.teacher, checkpoint["model"], MMDiT(**s.model()).config)
    return checkpoint | dict(kind="teacher")


def given_heads(s):
    """The checkpoint of --discriminator, if its heads are those of the settings."""
    checkpoint = sample.read_checkpoint(s.discriminator, ["heads"])
    same_network("--discriminator", s.discriminator, checkpoint["model"], s.head_sizes())
    return checkpoint


def open_data(s, given):
    """The settings' data set, if it fits them. -> settings, data set, note

    given: whether --data was. A preset's own data that can't be fetched is replaced by the shapes,
    and the note says so; data that is there is never replaced."""
    note = None
    try:
        dataset = data.load(s.data, s.sizes, data_dir=s.data_dir, seed=s.seed, flip=s.flip)
    except NotFetched as error:
        if given or s.is_latent:
            raise
        note = f"{s.data} can't be had, so this run uses the built-in shapes. {error}"
        s = dataclasses.replace(s, data="shapes")
        dataset = data.load("shapes", s.sizes, seed=s.seed)
    taught = s.teacher or s.source or (Path(s.out) / "teacher.pt").exists()
    data.check(dataset, s, world(), needs_images=s.targets == "real" or not taught)
    return s, dataset, note


def to_take(run, given=None):
    """The files that are taken --from a run: its teacher, and its samples if all are there; its
    seed may be another. given: --teacher's checkpoint, if any, which must be the same teacher, or
    the one that the other was tuned from."""
    s, source = run.settings, Path(run.settings.source)
    fields = dataclasses.fields(s)
    names = [field.name for field in fields if field.name not in ("seed", "teacher")]
    files, unread = ["teacher.pt"], "synthetic"  # the first setting that changes none
    if s.targets == "synthetic" and any(source.glob("synthetic/*.pt")):
        made, unread = sample_files(run), "iterations"
        if all((source / name).exists() for name in made):
            files += made
    theirs = bound(run.base) | read_config(source / "config.json")  # it may be older than a setting
    check_same("--from", source, theirs, run.signature(), names[: names.index(unread)])
    if not run.path("teacher").exists():
        teacher = sample.read_checkpoint(source, ["teacher"])
        if bad := not_finite(teacher["weights"]):
            refuse(s, "source", f"{bad} of its teacher has numbers that are not finite")
        if teacher["model"].get("condition_channels", 0) not in (0, s.condition_channels):
            refuse(s, "source", "its teacher is tuned to what this method does not give")
        both = given and given["model"] == teacher["model"]  # else it is tuned from the given one
        weights = teacher["weights"].items()
        if both and not all(torch.equal(given["weights"][name], w) for name, w in weights):
            refuse(s, "source", "its teacher is not that of --teacher; give one of them")
    return files


def sample_files(run):
    """The names of the files that the synthesis makes, in a run's folder."""
    return [f"synthetic/{i:05d}.pt" for i in range(len(ladd.planned_samples(run)[0]))]


def finished(run, coming=()):
    """Which stages have left their result in the run's folder, or have it among what is coming."""
    found = [*run.out.glob("*"), *run.out.glob("synthetic/*.pt")]
    there = {path.relative_to(run.out).as_posix() for path in found} | set(coming)
    return dict(
        teacher="teacher.pt" in there,
        synthesis=run.settings.targets == "real" or there.issuperset(sample_files(run)),
        distillation="student.pt" in there,
        report="report.md" in there,
    )


def check_folder(run, done):
    """Refuses a stage before its turn, and a folder with pictures that the run must not replace."""
    wanted = run.settings.stage
    before = [] if wanted == "all" else ladd.STAGES[: ladd.STAGES.index(wanted)]
    for stage in before:
        if not done[stage]:
            raise UsageError(f"--stage {wanted} needs the stage {stage} first.")
    for name in ("samples", "synthetic", "tensorboard"):
        if (run.out / name).is_file():
            raise UsageError(f"{run.out / name} is a file: choose another folder with --out.")
    if not all(done.values()):
        pictures = [run.out / name for name in ("curves.png", "samples.png", "student.gif")]
        for path in [*pictures, *run.out.glob("samples/*-*.png")]:
            refuse_strangers(path)


def compiling(s):
    """--compile, with `auto` decided: "yes" or "no".

    On an H100 an update of `tiny` took two thirds of its time compiled, and compiling both stages
    two minutes (docs/gpu.md): that pays for itself in some thousand updates."""
    if s.compile == "no":
        return "no"
    device = device_of(s.device)
    if s.compile == "auto":
        long = max(s.teacher_iterations, s.iterations) >= 5_000
        one_gpu = device.type == "cuda" and world() == 1
        if not long or not one_gpu or s.r1 or s.deterministic:
            return "no"
    try:
        check_compiler(device)
    except UsageError:
        if s.compile == "yes":
            raise
        return "no"
    return "yes"


def open_given(s, method, given=True):
    """What a run is given: data and checkpoints that fit its settings, which fit the method.
    -> settings, --teacher's checkpoint, data set, note"""
    if method != "ladd" and (s.shard or s.accumulate > 1):
        refuse(s, "shard" if s.shard else "accumulate", "is for LADD alone")
    check_for_method(s, method)
    start = given_teacher(s) if s.teacher else None  # its tensors are views of the file
    heads = given_heads(s) if s.discriminator else None
    if (Path(s.out) / "teacher.pt").exists():
        start = None  # taken over before
    for name, checkpoint in dict(teacher=start, discriminator=heads).items():
        if checkpoint and rank() == 0 and (bad := not_finite(checkpoint["weights"])):
            refuse(s, name, f"{bad} in it has numbers that are not finite; give another")
    if rank() > 0:  # rank 0 downloads
        barrier()
    s, dataset, note = open_data(s, given)
    if rank() == 0:
        barrier()
    check_captions(s, method, dataset)
    if s.is_latent and find_spec("safetensors") is None:
        raise UsageError("a student of latents is written as .safetensors: pip install safetensors")
    return s, start, dataset, note


def train(s, watch, distil=ladd.distil, method="ladd", given=True):
    """One run: checks what it is given, opens its folder, goes through its stages. -> the run"""
    s, start, dataset, note = open_given(s, method, given)
    s = dataclasses.replace(s, compile=compiling(s))
    if s.compile == "yes" and rank() == 0:
        print("compiling: the first updates of a stage take a minute or two", flush=True)
    text = data.text_features(dataset, s.text_dim, s.text_length)
    if text is not dataset:  # which brings features of its own
        note = " ".join(filter(None, [note, unread_words(dataset.captions, s.text_length)])) or None
    run = Run(s, dataset, text, watch, method, base_of(s), report.show)
    taken = []
    if rank() == 0:  # all that can be refused is refused before the folder is the run's
        taken = to_take(run, start) if s.source else []
        check_folder(run, finished(run, [*taken, "teacher.pt"] if start else taken))
    with run.opened(note):
        file = run.out / "words.txt"
        if text is not dataset and rank() == 0 and not file.exists():
            own = s.conditioned(dataset).captions  # a method may tell others
            if words := known_words({*dataset.captions, *own}, s.text_length):
                write_text("\n".join(words) + "\n", file)
        for name in taken:
            link(Path(s.source, name), run.out / name)
        if start and rank() == 0 and "teacher.pt" not in taken:  # tuned, perhaps
            save(start | dict(weights=dict(start["weights"])), run.path("teacher"))
        done = finished(run)
        if done["distillation"] and done["report"] and not s.is_latent:
            read_metrics(run.out)
        work = (ladd.train_teacher, ladd.synthesise, distil, report.report)
        run.stages(dict(zip(ladd.STAGES, work, strict=True)), broadcast(done), s.stage)
    return run


def run_program(argv, program, parse, work):
    """A program around a run: signals, processes, errors in one line. -> exit status

    parse(argv, program) -> settings, …; work(settings, watch, …)"""
    keep_memory()
    try:
        s, *more = parse(argv, program)
        with processes(device_of(s.device), program), Watch(s.stop_after, program) as watch:
            work(s, watch, *more)
    except Stop as stop:
        if rank() == 0:
            start = "torchrun …" if world() > 1 else "python"
            again = shlex.join([*program.split(), *argv])
            told = f"{program}: stopped, and saved what is done. To go on:"
            print(f"{told}\n    {start} {again}", file=sys.stderr)
        return stop.args[0]
    except ENDS as error:
        if rank() > 0 and isinstance(error, UserError):
            return 2  # rank 0 says it
        return exit_status(program, error)
    return 0


def main(argv, distil, method, kind):
    """The program of ladd.py and of methods/, after its command line; or the tool of a flag."""
    program = "ladd.py" if method == "ladd" else f"-m methods.{method}"
    for flag, tool in TOOLS.items():
        if any(word.split("=")[0] == flag for word in argv):
            if method != "ladd":
                instead = f"to sweep: python ladd.py … --sweep method={method}"
                return exit_status(program, UsageError(f"{flag} is ladd.py's alone; {instead}"))
            return importlib.import_module(f"tools.{tool}").main(argv)
    return run_program(
        argv,
        program,
        lambda argv, program: given_settings(argv, program, kind),
        lambda s, watch, given: train(s, watch, distil, method, given),
    )
