"""tools/sweep.py: what the students of a sweep share and what not, their table and its picture."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import FEW, run_of, same, snapshot, updates
from PIL import Image

import data
import ladd
import sample
from tools import sweep
from tools.train import given_settings

SWEEP = FEW + " --teacher-iterations 2 --iterations 2 --evaluation 8 --judge-steps 2 --synthetic 6"
AXES = "--sweep t_hat_mean=-2,0 --sweep taps=0,1/2 --seeds 3,4"


@pytest.fixture(scope="module")
def swept(tmp_path_factory, cache):
    out = tmp_path_factory.mktemp("sweep") / "out"
    assert again(out, cache, AXES) == 0
    return out


def again(out, cache, axes):
    """The exit status of a sweep into a folder."""
    return ladd.main([*SWEEP.split(), *axes.split(), "--out", f"{out}", "--data-dir", f"{cache}"])


def settings(words):
    return given_settings([*SWEEP.split(), *words.split()])[0]


def member_of(swept, pattern):
    """A run folder of the sweep."""
    return next((swept / "members").glob(pattern))


def test_a_sweep_makes_one_teacher_and_one_set_of_samples(swept):
    """Two values of each of two settings, two seeds: eight students, all of the same teacher."""
    students = sorted((swept / "members").glob("*/seed-*/student.pt"))
    assert len(students) == 8
    shared = [p.name.partition("-")[0] for p in (swept / "shared").iterdir() if p.is_dir()]
    assert sorted(shared) == ["synthesis", "teacher"]
    teachers = {(p.parent / "teacher.pt").read_bytes() for p in students}
    samples = {(p.parent / "synthetic/00000.pt").read_bytes() for p in students}
    assert len(teachers) == len(samples) == 1
    assert len({p.read_bytes() for p in students}) == 8


@pytest.mark.parametrize(
    ("flags", "teachers", "sets"),
    [
        ("--levels 1/--levels 1,0.5 --level-p 0.5,0.5/--iterations 9/--batch 8", 1, 1),
        ("--iterations 60/--iterations 120/--taps 1/--heads-warmup 0", 1, 1),
        ("--synthetic 4/--synthetic-cfg 2/--synthetic-steps 2/--shift 2", 1, 4),
        ("--cfg 2/--teacher-steps 9/--evaluation 9/--discriminator heads.pt", 1, 1),
        ("--depth 4/--width 96/--drop 0.2/--teacher-lr 0.01/--clip 2", 5, 5),
        ("--depth 1 --taps 0/--accumulate 2 --batch 6 --teacher-batch 6 --depth 1 --taps 0", 2, 2),
    ],
)
def test_teachers_and_samples_are_apart_only_where_they_depend_on_the_setting(
    tmp_path, monkeypatch, flags, teachers, sets
):
    made = dict(teacher=set(), synthesis=set())
    monkeypatch.setattr(sweep, "train", lambda s, *_: made[s.stage].add(s.out))
    for words in flags.split("/"):
        sweep.samples_for(settings(words), 0, tmp_path, None)
    assert (len(made["teacher"]), len(made["synthesis"])) == (teachers, sets)


def test_real_targets_take_no_samples(tmp_path, monkeypatch):
    stages = []
    monkeypatch.setattr(sweep, "train", lambda s, *_: stages.append(s.stage))
    sweep.samples_for(settings("--targets real"), 0, tmp_path, None)
    assert stages == ["teacher"]


def test_the_students_noise_is_the_one_that_the_shared_samples_were_made_of(swept):
    """A student of another seed than the teacher's must still start from its sample's own noise."""
    path = member_of(swept, "*-of-0/seed-4/config.json").parent
    run = run_of([*SWEEP.split(), "--levels", "1", "--seed", "4", "--out", path])
    b = ladd.draw_batch(run, ladd.distillation_samples(run), 0, own_noise="all")
    made = sample.noise_of(0, "synthesis", range(6), (3, 12, 12))
    assert b.paired.all()
    assert all(any(torch.equal(row, own) for own in made) for row in b.noise)


def test_the_table_is_mean_and_deviation_of_the_members_own_scores(swept):
    result = json.loads((swept / "t_hat_mean+taps" / "sweep.json").read_text())
    assert [m["values"]["t_hat_mean"] for m in result["members"]] == ["-2", "-2", "0", "0"]
    assert [m["values"]["taps"] for m in result["members"]] == ["0,1", "2", "0,1", "2"]
    table = (swept / "t_hat_mean+taps" / "sweep.md").read_text().splitlines()
    assert len(table) == 2 + 1 + 4 and table[2].startswith("| *untrained*")
    assert result["command"].endswith(AXES)
    member = result["members"][1]
    scores = [
        row["frechet"] for run in member["runs"] for row in run["rows"]
        if row["name"] == "student, 2 steps"
    ]  # fmt: skip
    mean, half = sum(scores) / 2, abs(scores[0] - scores[1]) / math.sqrt(2)
    assert f" {mean:.1f} ± {half:.1f} " in table[4]


def test_the_picture_has_a_row_for_every_value(swept):
    with Image.open(swept / "t_hat_mean+taps" / "sweep.png") as picture:
        _, height = picture.size
    row = 24 + 2 * (12 + 2) * (64 // 12) // 2  # a title and one row of eight images
    assert height == 4 * row


def test_a_finished_sweep_does_nothing_and_a_cut_one_goes_on(swept, cache, capsys):
    before = snapshot(swept / "members")
    student = member_of(swept, "*/seed-4")
    for name in ("student.pt", "metrics.json"):
        (student / name).unlink()
    assert again(swept, cache, AXES) == 0
    after, name = snapshot(swept / "members"), student.relative_to(swept / "members").as_posix()
    changed = {k for k in before if before[k] != after.get(k)}
    assert f"{name}/metrics.json" in changed and all(k.startswith(name) for k in changed)
    assert before[f"{name}/student.pt"][0] == after[f"{name}/student.pt"][0]  # bit for bit


def test_sweeps_in_one_folder_share_the_members_that_they_have_in_common(swept, cache, capsys):
    assert again(swept, cache, "--sweep taps=0,1 --t-hat-mean 0 --seeds 3") == 0
    assert "distillation" not in capsys.readouterr().out
    assert (swept / "taps" / "sweep.json").exists()


def test_a_sweep_does_not_overwrite_the_table_of_another_one(swept, cache):
    """The same setting is swept, with another m beside it."""
    for m in ("0", "-2"):
        assert again(swept, cache, f"--sweep taps=0,1 --seeds 3 --t-hat-mean={m}") == 0
    commands = [json.loads(p.read_text())["command"] for p in swept.glob("taps*/sweep.json")]
    assert sum("--t-hat-mean 0" in command for command in commands) == 1
    assert sum("--t-hat-mean -2" in command for command in commands) == 1


def test_a_second_judge_scores_the_same_students_in_a_table_of_its_own(swept, cache, capsys):
    """As sample.py's --evaluate --other-judge does; what the first has said stays as it is."""
    axes, before = "--sweep taps=0,1 --t-hat-mean 0 --seeds 3", snapshot(swept / "members")
    for own in (axes, f"{axes} --other-judge"):
        assert again(swept, cache, own) == 0
    after = snapshot(swept / "members")
    assert before == {name: after[name] for name in before}
    assert "distillation" not in capsys.readouterr().out
    tables = [json.loads(path.read_text()) for path in swept.glob("taps*/sweep.json")]
    (mine,) = (table for table in tables if table["command"].endswith("--other-judge"))
    (first,) = (t for t in tables if t["command"] == mine["command"].removesuffix(" --other-judge"))
    rows, others = (table["members"][0]["runs"][0]["rows"] for table in (first, mine))
    assert [row["name"] for row in rows] == [row["name"] for row in others]
    assert all(a["frechet"] != b["frechet"] for a, b in zip(rows[1:], others[1:], strict=True))
    folder = member_of(swept, "*/seed-3/other-judge.json").parent
    said = ["--evaluate", "--other-judge", "--data-dir", f"{cache}"]
    assert sample.main([f"{folder}", *said]) == 0
    assert f"| {others[-1]['frechet']:.2f} |" in capsys.readouterr().out


def test_the_second_judge_scores_a_student_that_was_made_anew_once_more(swept, cache):
    axes = "--sweep taps=0,1 --t-hat-mean 0 --seeds 3 --other-judge"
    assert again(swept, cache, axes) == 0
    path = member_of(swept, "*/seed-3/other-judge.json")
    kept = json.loads(path.read_text())
    path.write_text(json.dumps(kept | dict(checkpoints={}, rows=[])))
    assert again(swept, cache, axes) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [row["frechet"] for row in rows] == [row["frechet"] for row in kept["rows"]]


def test_a_finished_sweep_whose_data_have_changed_says_so(swept, cache, capsys):
    """Its students are of the images and captions of then."""
    config = member_of(swept, "*-of-0/seed-3/config.json")
    kept = config.read_text()
    config.write_text(json.dumps(json.loads(kept) | dict(dataset="other images")))
    assert again(swept, cache, AXES) == 2
    config.write_text(kept)
    assert "was made from other data (other images" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--teacher", "--discriminator"])
def test_a_student_of_a_file_that_was_made_anew_is_another_student(tmp_path, flag):
    """The name of a member holds the content of what it starts from, not its path alone."""
    names, file = [], tmp_path / "file.pt"
    for content in (b"one", b"two", b"two"):
        file.write_bytes(content)
        names.append(sweep.name_of(settings(f"{flag} {file}")))
    assert names[0] != names[1] == names[2]


@pytest.mark.parametrize(("flag", "name"), [("--teacher", "teacher"), ("--discriminator", "heads")])
def test_a_student_of_a_run_that_was_made_anew_is_another_student(tmp_path, flag, name):
    names = []
    for content in (b"one", b"two", b"two"):
        (tmp_path / f"{name}.pt").write_bytes(content)
        names.append(sweep.name_of(settings(f"{flag} {tmp_path}")))
    assert names[0] != names[1] == names[2]


def test_a_long_path_in_any_script_gives_a_name_that_a_folder_can_have():
    """A file system counts bytes, 255 of them."""
    names = [sweep.name_of(settings(f"--teacher {letter * 80}/a.pt")) for letter in "猫犬"]
    assert names[0] != names[1]
    assert all(len(f"synthesis-{name}-seed-999999".encode()) < 255 for name in names)


def test_a_sweep_keeps_out_of_a_folder_that_is_none_of_sweeps(launch, tmp_path, capsys):
    (folder := tmp_path / "out").mkdir()
    (folder / "photo.png").write_bytes(b"mine")
    assert launch("out", f"{SWEEP} --sweep batch=2") == 2
    assert "out is not empty and not a sweep's folder" in capsys.readouterr().err
    assert [path.name for path in folder.iterdir()] == ["photo.png"]


def test_no_student_is_scored_from_the_noise_of_what_it_learned_from(monkeypatch):
    """Samples are made from the noise of the teacher's seed, and students have seeds nearby."""
    drawn = []
    monkeypatch.setattr("lib.scores.score", lambda *_: {})
    judge, dataset = SimpleNamespace(read=lambda x: (x, x)), data.load("shapes", [(12, 12)])

    def draw(parts, seed, stream, **_):
        drawn.append(sample.noise_of(seed, stream, [0], (2,)))
        return []

    student = SimpleNamespace(settings=SimpleNamespace(levels=(1.0,)), sample_parts=draw)
    for seed in range(20):
        sample.evaluate(dataset, judge, None, student, 8, seed)
    learned = [sample.noise_of(seed, "synthesis", [0], (2,)) for seed in range(1000)]
    assert len({tuple(x.flatten().tolist()) for x in drawn}) == 20
    assert not any(torch.equal(a, b) for a in drawn for b in learned)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("t_hat_mean", "t_hat_mean"), ("colour=1,2", "colour"), ("out=a,b", "out"),
        ("batch=4,x", "--batch"), ("seed=1,2", "seed"), ("taps=0,1/9", "--taps"),
        ("iterations=1,2 --units 60", "--units"), ("method=ladd,gan", "method"),
        ("units=60,x", "units"), ("batch=2,4 --seeds 1,1", "--seeds"), ("batch=2,", "batch"),
        ("units=²", "units"), ("batch=2,4 --seeds ²", "--seeds"), ("batch=2 --units 0", "0: must"),
        ("t_hat_mean=1,1.0", "t_hat_mean=1.0 makes the same students"),
        ("method=dmd --accumulate 2 --teacher-batch 4", "--accumulate 2: is for LADD alone"),
        ("method=ladd,dmd --shard --muon-lr 0", "--shard True: is for LADD alone"),
        ("method=regression,inpaint", "regression and inpaint are told"),
        ("method=edit,inpaint", "edit and inpaint are told"), ("beta=1,2", "setting of ladd"),
        ("beta=1,2 --sweep method=dpo,ladd", "beta=1,2: must be a setting of ladd"),
        ("method=dpo,hyper_sd --sweep anchor=1", "anchor=1: must be a setting of dpo"),
        ("method=dpo --sweep beta=0,1", "--beta 0.0"), ("method=dpo --sweep beta=", "beta"),
        ("taps=0 --sweep method=gan", "method=gan"), ("method=dpo --sweep out=a,b", "out"),
        ("batch=2 --sweep batch=4", "a name is there twice"),
        ("discriminator=no.pt", "no.pt: no such file"),
        ("data=shapes,no.zip", "data: other images"), ("size=8/16", "size: other images"),
        ("judge_width=8,16", "judge_width: other images or another judge"),
        ("batch=2,4 --data no.zip", "--data no.zip: no such folder or file"),
        ("batch=2,4 --from elsewhere", "--from"), ("batch=2,4 --downscale 4 --size 32", "images"),
    ],
)  # fmt: skip
def test_a_sweep_that_can_not_be_is_refused_before_anything_is_made(
    launch, tmp_path, capsys, words, named
):
    assert launch("out", f"{SWEEP} --sweep {words}") == 2
    said = capsys.readouterr().err
    assert named in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_what_a_later_student_can_not_be_made_of_is_refused_before_the_first(
    launch, teacher, tmp_path, capsys
):
    assert launch("out", f"{SWEEP} --sweep width=16,24 --teacher {teacher}") == 2
    assert "width 16 → 24" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_captions_that_a_later_student_can_not_learn_from_are_refused_before_the_first(
    launch, monkeypatch, tmp_path, capsys
):
    (dataset := data.load("shapes", [(12, 12)])).attributes = {}
    monkeypatch.setattr(data, "load", lambda *_, **__: dataset)
    assert launch("out", f"{SWEEP} --sweep method=ladd,hyper_sd") == 2
    assert "the fifth must be 0" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_another_teachers_students_are_not_taken_for_this_ones(swept, cache):
    """--seed is the teacher's: with another one everything is made anew, in folders of its own."""
    assert again(swept, cache, "--sweep taps=0,1 --t-hat-mean 0 --seeds 3 --seed 1") == 0
    own = [member_of(swept, f"*-of-{n}/seed-3/teacher.pt") for n in (0, 1)]
    assert own[0].read_bytes() != own[1].read_bytes()
    tables = [json.loads(p.read_text()) for p in swept.glob("taps*/sweep.json")]
    assert sum("--seed 1 " in table["command"] for table in tables) == 1


def test_a_member_cut_between_its_student_and_the_log_goes_on(swept, cache):
    """Its seconds are not known any more; its scores are."""
    folder = member_of(swept, "*-of-0/seed-4")
    (folder / "metrics.json").unlink()
    rows = (folder / "log.jsonl").read_text().splitlines(keepends=True)
    (folder / "log.jsonl").write_text("".join(r for r in rows if "finished" not in r))
    assert again(swept, cache, AXES) == 0
    assert json.loads((folder / "metrics.json").read_text())["seconds"]["distillation"] is None


# ---------------------------------------------------------------------------------------------
# Methods, units
# ---------------------------------------------------------------------------------------------


def test_a_method_is_what_a_student_is_named_by_and_made_with(swept, cache):
    """From the same teacher and samples; the student is scored as the others are."""
    shared = sorted(p.name for p in (swept / "shared").iterdir() if p.is_dir())
    axes = "--sweep method=ladd,regression --sweep units=12,24 --t-hat-mean 0 --taps 0,1 --seeds 3"
    assert again(swept, cache, axes) == 0
    assert sorted(p.name for p in (swept / "shared").iterdir() if p.is_dir()) == shared
    result = json.loads((swept / "method+units" / "sweep.json").read_text())
    runs = [(m["values"]["method"], m["runs"][0]) for m in result["members"]]
    assert [method for method, _ in runs] == ["ladd", "ladd", "regression", "regression"]
    assert all(run["method"] == method for method, run in runs)
    kinds = {run["checkpoints"]["student"] for _, run in runs}
    assert len(kinds) == 4 and len({run["checkpoints"]["teacher"] for _, run in runs}) == 1
    assert sweep.name_of(settings("")) != sweep.name_of(settings(""), "dmd")


@pytest.mark.parametrize(
    ("words", "count"),
    [
        ("method=ladd", 882), ("method=regression", 2000), ("method=dmd", 667),
        ("method=ladd --distill-weight 0", 1000), ("method=ladd --levels 1", 1000),
        ("method=regression --steps-scale 0.5", 1000), ("method=consistency", 1000),
        ("method=add", 1200), ("method=edit", 882), ("batch=32", 882),
    ],
)  # fmt: skip
def test_a_budget_of_units_gives_every_method_the_same_work(words, count):
    """Forwards of the network: LADD 6 an update, 0.8 for its distillation loss; regression 3."""
    words = ["--sweep", *words.split(), "--units", "6000", "--seeds", "0"]
    _, (member,), *_ = sweep.parse(words, "ladd.py")
    assert member.settings[0].iterations == count


@pytest.mark.parametrize(
    ("words", "values"),
    [
        ("method=dpo --sweep beta=230,1000", [230, 1000]),
        ("anchor=1,10 --sweep method=hyper_sd", [1, 10]),
        ("method=hyper_sd --sweep shares=0,0,0,1,0,0/1,1,1,1,1,1", [(0, 0, 0, 1, 0, 0), (1,) * 6]),
        ("tune-iterations=2,4 --sweep method=inpaint", [2, 4]),
    ],
)
def test_a_setting_of_a_methods_own_is_swept_as_ladds_are(words, values):
    """The students differ in it, by name, too; and the command makes the same ones again."""
    words = ["--sweep", *words.split(), "--seeds", "0"]
    _, members, command, _ = sweep.parse(words, "ladd.py")
    (name,) = members[0].values.keys() - {"method"}
    assert [getattr(member.settings[0], name) for member in members] == values
    _, again, *_ = sweep.parse(command.split()[2:], "ladd.py")
    names = [[sweep.name_of(m.settings[0], m.method) for m in own] for own in (members, again)]
    assert names[0] == names[1] and len(set(names[0])) == 2


def test_the_command_of_a_sweep_makes_the_same_students_again():
    """Its folder and its device apart; a scale works on what is swept, too."""
    words = "--size 12 --steps-scale 0.5 --device cpu --seed 2 --units 6000 --seeds 4,5 "
    words += "--sweep t_hat_mean=-1,0 --sweep qk_norm=true,false"
    _, members, command, _ = sweep.parse(words.split(), "ladd.py")
    python, program, *words = command.split()
    s, again, same, _ = sweep.parse(words, "ladd.py")
    assert (python, program, same, s.seed) == ("python", "ladd.py", command, 2)
    names = [[sweep.name_of(m.settings[5], m.method) for m in own] for own in (members, again)]
    assert names[0] == names[1] and len(set(names[0])) == 4


def test_a_sweep_has_a_folder_of_its_own():
    s, *_ = sweep.parse(["--sweep", "batch=2,4", "--preset", "tiny"], "ladd.py")
    assert s.out == "runs/tiny-sweep"


# ---------------------------------------------------------------------------------------------
# Networks that are told more than text
# ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["inpaint", "edit"])
def told(request, tmp_path_factory, cache, teacher):
    """A sweep of a method that tunes its teacher, here a given one, first -> its folder, axes."""
    out = tmp_path_factory.mktemp("told") / "out"
    axes = f"--sweep method={request.param} --seeds 3,4 --smoke --teacher {teacher}"
    assert again(out, cache, axes) == 0
    return out, axes


def test_the_students_share_one_teacher_that_was_tuned_once(told):
    """With the sweep's seed, not by the students."""
    out, _ = told
    students = sorted((out / "members").glob("*/seed-*"))
    tuned = [run for run in (out / "shared").iterdir() if run.name.startswith("tuning-")]
    assert len(students) == 2 and len(tuned) == 1 and tuned[0].name.endswith("-seed-0")
    for run in students:
        assert same(run / "teacher.pt", tuned[0] / "teacher.pt")
        assert not any(row["stage"] == "tuning" for row in updates(run))
    assert [row["step"] for row in updates(tuned[0]) if row["stage"] == "tuning"] == [1, 2]
    assert not same(students[0] / "student.pt", students[1] / "student.pt")


def test_the_table_tells_how_far_from_the_truth_a_told_network_is(told):
    """The reference, too, is of the tuned teacher, which is told the same as the students."""
    out, axes = told
    result = json.loads((out / "method" / "sweep.json").read_text())
    names = {row["name"] for row in result["reference"] if "inside" in row}
    assert names >= {"teacher, 4 steps, CFG 2", "untrained, 1 step", "as given"}
    if "inpaint" in axes:  # whose known pixels are put back
        assert {row["outside"] for row in result["reference"][1:]} == {0}
    head, _, untrained, row = (out / "method" / "sweep.md").read_text().splitlines()
    assert "| inside, 1 |" in head and "| outside, 4 |" in head
    rows = [row for run in result["members"][0]["runs"] for row in run["rows"]]
    a, b = (row["inside"] for row in rows if row["name"] == "student, 1 step")
    assert f"| {(a + b) / 2:.1f} ± " in row and "–" not in untrained + row


def test_the_picture_shows_what_a_network_was_told_and_the_truth(told):
    """Beside the samples in 1, 2 and 4 steps, and in the same places."""
    out, axes = told
    with Image.open(out / "method" / "sweep.png") as picture:
        pixels = np.asarray(picture)[24:]
    width, one = 8 * 14 * 5, 14 * 5
    assert pixels.shape[1] == 5 * width + 4 * 16
    given, truth, made = (pixels[:, i * (width + 16) :][:, :width] for i in range(3))
    assert (given != truth).any()
    if "inpaint" in axes:
        known = (given == truth).all(axis=2)
        assert known[:, :one].mean() > 0.3 and (made[known] == truth[known]).all()


@pytest.mark.parametrize("lost", [("student.pt", "metrics.json"), ("metrics.json",)])
def test_a_cut_sweep_of_told_networks_goes_on(told, cache, lost):
    """In a student's updates, and between the student and its scores."""
    out, axes = told
    run = member_of(out, "*/seed-4")
    rows = json.loads((run / "metrics.json").read_text())["rows"]
    student = (run / "student.pt").read_bytes()
    for name in lost:
        (run / name).unlink()
    assert again(out, cache, axes) == 0
    assert (run / "student.pt").read_bytes() == student
    for old, new in zip(rows, json.loads((run / "metrics.json").read_text())["rows"], strict=True):
        assert old | dict(seconds=0) == new | dict(seconds=0)
