# ruff: noqa: F811 - fixtures of test_ladd
"""Sweeps and baselines: what is shared and what is not, and the other methods' mathematics."""

import json
import math
import statistics
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from test_ladd import (  # noqa: F401 - fixtures among them
    EXACT,
    FEW,
    MAKING,
    Constant,
    Setting,
    cache,
    cut_at,
    launch,
    lines,
    randn,
    same,
    snapshot,
    train,
    update_cost,
    updates,
    weights,
    whole,
)

import data
import ladd
import sample

SWEEP = FEW + " --teacher-iterations 2 --iterations 2 --evaluation 8 --judge-steps 2 --synthetic 6"


# ---------------------------------------------------------------------------------------------
# Accumulation, and what else a student can start from
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", ["", "--no-shared-pass", "--r1 0.1"])
def test_a_batch_in_parts_gives_the_weights_of_a_whole_one(train, flags):
    """The mean of the parts' gradients is the batch's: teacher, student and heads to 1e-5."""
    flags += " --teacher-batch 8 --iterations 8 --teacher-iterations 8 --muon-lr 0"
    one, parts = train("one", flags), train("parts", f"{flags} --accumulate 4")
    for name in ("teacher.pt", "student.pt", "heads.pt"):
        a, b = weights(one / name), weights(parts / name)
        assert max((a[k] - b[k]).abs().max().item() for k in a) < 1e-5
    for a, b in zip(updates(one), updates(parts), strict=True):
        for key in a.keys() - {"stage", "step", "skipped", "diversity"}:
            assert a[key] == pytest.approx(b[key], abs=1e-4, rel=1e-4), key


def test_a_run_in_parts_that_was_cut_is_bit_for_bit_the_one_that_was_not(
    launch,
    train,
    monkeypatch,
):
    flags = "--accumulate 2 --teacher-batch 4 --save-every 3"
    want = train("want", flags)
    for stage in ("teacher", "distillation"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            cut_at(patch, stage, 5)
            launch("cut", f"{FEW} {flags} --stage {stage}")
        assert launch("cut", f"{FEW} {flags} --stage {stage}") == 0
        if stage == "teacher":
            assert launch("cut", f"{FEW} {flags} --stage synthesis") == 0
    cut = want.parent / "cut"
    assert all(same(want / name, cut / name) for name in ("teacher.pt", "student.pt", "heads.pt"))
    assert updates(cut) == updates(want)


def test_two_passes_draw_fresh_noise_for_the_student(train):
    """Same teacher, samples and heads' batches; the student's weights differ, the heads' first
    loss does not."""
    one, two = train("one"), train("two", "--no-shared-pass")
    assert same(one / "teacher.pt", two / "teacher.pt")
    assert not same(one / "student.pt", two / "student.pt")
    first = [next(r for r in updates(f) if "loss_d" in r)["loss_d"] for f in (one, two)]
    assert first[0] == first[1]


@pytest.mark.parametrize(
    "flags",
    ["--level-p 1,0 --warmup-p 0,1", "--level-p 0,1 --warmup-p 1,0 --warmup-iterations 1"],
)
def test_the_heads_learn_alone_on_the_levels_that_the_student_starts_with(whole, flags):
    """By level_p, or where there are first updates with other probabilities, by those."""
    flags += " --levels 1,0.5 --heads-warmup 3"
    run = ladd.Run(ladd.parse([*FEW.split(), *flags.split(), "--out", f"{whole}"])[0])
    draw = ladd.distillation_batches(run)
    assert all((ladd.draw_batch(run, draw, step).t == 1).all() for step in range(4))


def test_a_student_of_one_level_learns(train):
    """warmup_p, of four levels, is nothing to it."""
    assert (train("one_level", "--levels 1") / "student.pt").exists()


@pytest.mark.parametrize(("depth", "blocks"), [(1, [2]), (2, [0, 2]), (3, [0, 1, 2])])
def test_a_shallower_student_starts_with_blocks_of_the_teacher(whole, depth, blocks):
    """Equally far apart, the last one among them, which alone has no text to write."""
    settings = ladd.parse([*FEW.split(), "--student-depth", f"{depth}", "--out", f"{whole}"])[0]
    run = ladd.Run(settings)
    student, ema, _ = ladd.start_student(run)
    own, teacher = student.state_dict(), run.load("teacher").state_dict()
    for i, block in enumerate(blocks):
        names = [k for k in teacher if k.startswith(f"joint_blocks.{block}.")]
        renamed = [k.replace(f".{block}.", f".{i}.", 1) for k in names]
        assert all(torch.equal(own[a], teacher[b]) for a, b in zip(renamed, names, strict=True))
    assert student.config["depth"] == depth == len(ema.joint_blocks)
    assert not any(p.requires_grad for p in ema.parameters())


def test_a_student_from_scratch_is_not_the_teacher(whole):
    settings = ladd.parse([*FEW.split(), "--student-init", "scratch", "--out", f"{whole}"])[0]
    run = ladd.Run(settings)
    student, ema, _ = ladd.start_student(run)
    name = "joint_blocks.0.x_block.attn.qkv.weight"
    assert not torch.equal(student.state_dict()[name], run.load("teacher").state_dict()[name])
    assert torch.equal(student.state_dict()[name], ema.state_dict()[name])


# ---------------------------------------------------------------------------------------------
# Baselines
# ---------------------------------------------------------------------------------------------


def test_a_consistent_student_has_no_consistency_loss():
    """On straight paths of one velocity v every x_t leads to the same x̂_0 = x_t - t·v; a student
    that is off by d in v is off by t·d, its average that is off by e by t'·e."""
    s, v = Setting(), randn(4, 3, 4, 16, seed=1)
    b = SimpleNamespace(x0=s.x0, noise=s.noise, text=())
    t, t_next = torch.tensor([0.8, 0.5, 0.3, 1.0]), torch.tensor([0.6, 0.4, 0.0, 0.9])
    true, student, average = Constant(v), Constant(v + 3), Constant(v + 1)
    teacher, seen = lambda x, t: seen.append((x, t)) or v, []
    assert ladd.consistency_loss(true, true, teacher, b, t, t_next).abs() < 1e-9
    loss = ladd.consistency_loss(student, average, teacher, b, t, t_next)
    assert loss.item() == pytest.approx((3 * t - t_next).abs().mean().item(), abs=2e-3)
    xt = sample.add_noise(s.x0, s.noise, t)
    assert torch.equal(student.x, xt) and torch.equal(student.t, t)
    assert torch.equal(seen[-1][0], xt) and torch.equal(seen[-1][1], t)
    x_next = xt + (t_next - t).view(-1, 1, 1, 1) * v  # one Euler step of the teacher
    torch.testing.assert_close(average.x, x_next)
    assert torch.equal(average.t, t_next)


def test_the_consistent_students_levels_go_down_to_the_image(launch, tmp_path, monkeypatch, whole):
    """Each to the next lower one of 32, the last to 0."""
    steps, loss = set(), ladd.consistency_loss

    def watched(student, ema, velocity, b, t, t_next):
        steps.update(zip((32 * t).tolist(), (32 * t_next).tolist(), strict=True))
        return loss(student, ema, velocity, b, t, t_next)

    monkeypatch.setattr(ladd, "consistency_loss", watched)
    flags = f"{FEW} --method consistency --teacher {whole / 'teacher.pt'} --iterations 20"
    assert all(launch("out", f"{flags} --stage {stage}") == 0 for stage in MAKING[1:])
    assert len(steps) > 20 and all(a == pytest.approx(b + 1, abs=1e-4) for a, b in steps)
    assert min(b for _, b in steps) == 0


def test_matching_stops_where_the_two_scores_agree():
    """The gradient is zero where the fakes' score is the teacher's, and points from the teacher's
    prediction to the other one: (t·(v - s)) / mean|x̂_0 - (x_t - t·v)|."""
    s, t = Setting(), torch.tensor([0.8, 0.5, 0.3, 0.9], dtype=torch.float64)
    v, other = randn(4, 3, 4, 16, seed=1), randn(4, 3, 4, 16, seed=2)
    teacher = lambda x, t: v  # noqa: E731
    assert ladd.matching_gradient(s.x0, s.noise, t, teacher, teacher).abs().max() == 0
    got = ladd.matching_gradient(s.x0, s.noise, t, teacher, lambda x, t: other)
    far = t.view(-1, 1, 1, 1) * (s.noise - s.x0 - v)  # x̂_0 - real = -t·(ε - x̂_0 - v)
    want = t.view(-1, 1, 1, 1) * (v - other) / far.abs().mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_the_judges_maps_are_those_that_it_reads_with():
    """As many as it has convolutions, tokens row by row, the first of the image's own size."""
    judge = sample.Judge([2, 3], 8, (16, 16)).requires_grad_(False)
    x = randn(2, 3, 16, 16, dtype=torch.float32)
    maps = ladd.judge_features(judge, x)
    tokens, (h, w) = maps[0]
    assert (h, w) == (16, 16) and len(maps) == sum(
        isinstance(layer, torch.nn.Conv2d) for layer in judge.body
    )
    torch.testing.assert_close(tokens[:, 5 * w + 3], judge.body[0](x)[:, :, 5, 3])


def test_a_step_on_the_matching_loss_goes_where_the_gradient_says():
    """Away from the fakes' prediction, towards the teacher's: against fake - real."""
    x0_hat = randn(4, 3, 4, 16, seed=1).requires_grad_()
    gradient = randn(4, 3, 4, 16, seed=2)
    ladd.matching_loss(x0_hat, gradient).backward()
    torch.testing.assert_close(x0_hat.grad, gradient / gradient.numel())


def test_regression_comes_nearer_to_the_teachers_samples(launch, tmp_path, whole):
    flags = f"{FEW} --method regression --teacher {whole / 'teacher.pt'} --iterations 60"
    flags += " --levels 1 --student-lr 2e-3"  # always from pure noise, so that losses compare
    assert all(launch("out", f"{flags} --stage {stage}") == 0 for stage in MAKING[1:])
    losses = [row["loss"] for row in updates(tmp_path / "out") if row["stage"] == "distillation"]
    assert statistics.fmean(losses[-10:]) < 0.8 * statistics.fmean(losses[:10])


def test_adds_heads_learn_to_tell_and_its_student_to_please_them(launch, tmp_path, whole):
    """Heads alone rank real above fake more and more often; to heads that stay as they are the
    student's samples look more and more real."""
    flags = f"{FEW} --method add --teacher {whole / 'teacher.pt'} --judge-steps 5 --iterations 60"
    flags += " --distill-weight 0"
    for name, own in (("heads", "--heads-warmup 59"), ("student", "--heads-lr 1e-9")):
        assert all(launch(name, f"{flags} {own} --stage {stage}") == 0 for stage in MAKING[1:])
    rows = {name: updates(tmp_path / name)[-60:] for name in ("heads", "student")}
    assert statistics.fmean(row["ranked"] for row in rows["heads"][-15:]) > 0.7
    early, late = rows["student"][5:15], rows["student"][-10:]
    assert statistics.fmean(r["d_fake"] for r in late) > statistics.fmean(
        r["d_fake"] for r in early
    )


@pytest.mark.parametrize(("method", "paired"), [("ladd", 1), ("add", 1), ("regression", 1),
                                                ("consistency", 0), ("dmd", 0)])  # fmt: skip
def test_the_samples_own_noise_is_for_those_who_are_held_to_the_sample(whole, method, paired):
    """Elsewhere x_t must be the sample with fresh noise: on the line to its own noise there is
    nothing but the teacher's way to it."""
    flags = [*FEW.split(), "--method", method, "--out", f"{whole}"]
    run = ladd.Run(ladd.parse(flags)[0])
    assert (ladd.distillation_batches(run)(0)[2] is not None) == bool(paired)


@pytest.mark.parametrize("method", ["regression", "consistency", "add", "dmd"])
def test_every_baseline_trains_the_student_and_goes_on_where_it_was_cut(
    launch,
    tmp_path,
    monkeypatch,
    whole,
    method,
):
    """From the same teacher and samples as LADD; bit for bit also after a cut."""
    root = tmp_path
    flags = f"{FEW} --method {method} --save-every 2 --judge-steps 5"
    flags += f" --teacher {whole / 'teacher.pt'}"
    for name in ("want", "cut"):
        assert launch(name, f"{flags} --stage synthesis") == 0
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        cut_at(patch, "distillation", 4)
        launch("cut", f"{flags} --stage distillation")
    for name in ("want", "cut"):
        assert launch(name, f"{flags} --stage distillation") == 0
    assert same(root / "want/student.pt", root / "cut/student.pt")
    assert not same(root / "want/student.pt", whole / "student.pt")
    assert not same(root / "want/student.pt", whole / "teacher.pt")
    assert updates(root / "want") == updates(root / "cut")
    assert not list((root / "cut").glob("*state*"))


def test_a_budget_of_units_gives_every_method_the_same_work():
    """Forwards of the network: LADD 6 an update, its two-pass form 8, regression 3."""
    for flags, count in (
        ("", 1000), ("--no-shared-pass", 750), ("--method regression", 2000),
        ("--method regression --steps-scale 0.5", 1000),
        ("--method dmd", 667), ("--method consistency", 1000), ("--method add", 1200),
    ):  # fmt: skip
        assert ladd.parse([*flags.split(), "--units", "6000"])[0].iterations == count


@pytest.mark.parametrize("method", ["regression", "consistency", "dmd"])
def test_a_baselines_update_costs_its_units(train, whole, method):
    """The loop itself, in forwards of the network."""
    cost, forward = update_cost(train, whole / "teacher.pt", f"--method {method}")
    units = cost / forward
    assert ladd.UNITS[method] - 0.5 < units <= ladd.UNITS[method] + 0.05


# ---------------------------------------------------------------------------------------------
# Sweeps
# ---------------------------------------------------------------------------------------------

AXES = "--sweep t_hat_mean=-2,0 --sweep taps=0,1/2 --seeds 3,4"


@pytest.fixture(scope="module")
def swept(tmp_path_factory, cache):
    out = tmp_path_factory.mktemp("sweep") / "out"
    assert (
        ladd.main([*SWEEP.split(), *AXES.split(), "--out", f"{out}", "--data-dir", f"{cache}"]) == 0
    )
    return out


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
        ("--levels 1/--levels 1,0.5 --level-p 0.5,0.5/--iterations 9/--method add", 1, 1),
        ("--units 60/--units 120/--taps 1/--student-depth 1", 1, 1),
        ("--synthetic 4/--synthetic-cfg 2/--synthetic-steps 2/--shift 2", 1, 4),
        ("--cfg 2/--teacher-steps 9", 1, 1),
        ("--depth 4/--width 96/--drop 0.2/--teacher-lr 0.01/--clip 2", 5, 5),
    ],
)
def test_teachers_and_samples_are_apart_only_where_they_depend_on_the_setting(
    tmp_path,
    monkeypatch,
    flags,
    teachers,
    sets,
):
    made = dict(teacher=set(), synthesis=set())
    monkeypatch.setattr(ladd, "train", lambda s, *_: made[s.stage].add(s.out))
    for words in flags.split("/"):
        ladd.samples_for(ladd.parse([*SWEEP.split(), *words.split()])[0], 0, tmp_path, None)
    assert (len(made["teacher"]), len(made["synthesis"])) == (teachers, sets)


def test_the_students_noise_is_the_one_that_the_shared_samples_were_made_of(swept):
    """A student of another seed than the teacher's must still start from its sample's own noise."""
    path = next((swept / "members").glob("*-of-0/seed-4/config.json")).parent
    settings = ladd.parse([*SWEEP.split(), "--seed", "4", "--out", f"{path}"])[0]
    run = ladd.Run(settings)
    _, _, source = ladd.distillation_batches(run)(0)
    made = sample.noise_of(0 + 2, range(6), (3, 12, 12))
    assert all(any(torch.equal(row, own) for own in made) for row in source)


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
    words = [*SWEEP.split(), *AXES.split(), "--out", f"{swept}", "--data-dir", f"{cache}"]
    before = snapshot(swept / "members")
    student = next((swept / "members").glob("*/seed-4"))
    for name in ("student.pt", "metrics.json"):
        (student / name).unlink()
    assert ladd.main(words) == 0
    after, name = snapshot(swept / "members"), student.relative_to(swept / "members").as_posix()
    changed = {k for k in before if before[k] != after.get(k)}
    assert f"{name}/metrics.json" in changed and all(k.startswith(name) for k in changed)
    assert before[f"{name}/student.pt"][0] == after[f"{name}/student.pt"][0]  # bit for bit


def test_sweeps_in_one_folder_share_the_members_that_they_have_in_common(
    swept,
    cache,
    capsys,
):
    words = [*SWEEP.split(), *["--sweep", "taps=0,1", "--t-hat-mean", "0", "--seeds", "3"]]
    assert ladd.main([*words, "--out", f"{swept}", "--data-dir", f"{cache}"]) == 0
    assert "distillation" not in capsys.readouterr().out
    assert (swept / "taps" / "sweep.json").exists()


def test_a_sweep_does_not_overwrite_the_table_of_another_one(swept, cache):
    """The same setting is swept, with another m beside it."""
    words = [*SWEEP.split(), "--sweep", "taps=0,1", "--seeds", "3"]
    for m in ("0", "-2"):
        own = [*words, f"--t-hat-mean={m}", "--out", f"{swept}", "--data-dir", f"{cache}"]
        assert ladd.main(own) == 0
    commands = [json.loads(p.read_text())["command"] for p in swept.glob("taps*/sweep.json")]
    assert sum("--t-hat-mean 0" in command for command in commands) == 1
    assert sum("--t-hat-mean -2" in command for command in commands) == 1


@pytest.mark.parametrize("flag", ["--teacher", "--discriminator"])
def test_a_student_of_a_file_that_was_made_anew_is_another_student(tmp_path, flag):
    """The name of a member holds the content of what it starts from, not its path alone."""
    names, file = [], tmp_path / "file.pt"
    for content in (b"one", b"two", b"two"):
        file.write_bytes(content)
        names.append(ladd.member_name(ladd.parse([*SWEEP.split(), flag, f"{file}"])[0]))
    assert names[0] != names[1] == names[2]


def test_no_student_is_scored_from_the_noise_of_what_it_learned_from(monkeypatch):
    """Samples are made from the noise of the teacher's seed + 2, and students have seeds nearby."""
    drawn = []
    monkeypatch.setattr(sample, "sample_buckets", lambda *_, seed, **__: drawn.append(seed) or [])
    monkeypatch.setattr(sample, "score", lambda *_: {})
    judge, dataset = SimpleNamespace(read=lambda x: (x, x)), data.load("shapes", 12, 12)
    student = SimpleNamespace(settings=dict(levels=(1.0,)))
    monkeypatch.setattr(data, "to_uint8", lambda x: x)
    for seed in range(20):
        sample.evaluate(dataset, judge, None, student, 8, seed)
    assert len(set(drawn)) == 20 and not set(drawn) & {seed + 2 for seed in range(1000)}


@pytest.mark.parametrize(
    ("sweep", "named"),
    [
        ("t_hat_mean", "t_hat_mean"), ("colour=1,2", "colour"), ("out=a,b", "out"),
        ("batch=4,x", "--batch"), ("seed=1,2", "seed"), ("taps=0,1/9", "--taps"),
        ("iterations=1,2 --units 60", "--units"),
    ],
)  # fmt: skip
def test_a_sweep_that_can_not_be_is_refused_before_anything_is_made(
    launch,
    tmp_path,
    capsys,
    sweep,
    named,
):
    assert launch("out", f"{SWEEP} --sweep {sweep}") == 2
    said = capsys.readouterr().err
    assert named in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_another_teachers_students_are_not_taken_for_this_ones(swept, cache):
    """--seed is the teacher's: with another one everything is made anew, in folders of its own."""
    axes = "--sweep taps=0,1 --t-hat-mean 0 --seeds 3 --seed 1"
    words = [*SWEEP.split(), *axes.split()]
    assert ladd.main([*words, "--out", f"{swept}", "--data-dir", f"{cache}"]) == 0
    own = [next((swept / "members").glob(f"*-of-{n}/seed-3/teacher.pt")) for n in (0, 1)]
    assert own[0].read_bytes() != own[1].read_bytes()
    tables = [json.loads(p.read_text()) for p in swept.glob("taps*/sweep.json")]
    assert sum("--seed 1 " in table["command"] for table in tables) == 1


def test_a_member_cut_between_its_student_and_the_log_goes_on(swept, cache):
    """Its seconds are not known any more; its scores are."""
    folder = next((swept / "members").glob("*-of-0/seed-4"))
    (folder / "metrics.json").unlink()
    rows = (folder / "log.jsonl").read_text().splitlines(keepends=True)
    (folder / "log.jsonl").write_text("".join(r for r in rows if "finished" not in r))
    words = [*SWEEP.split(), *AXES.split(), "--out", f"{swept}", "--data-dir", f"{cache}"]
    assert ladd.main(words) == 0
    assert json.loads((folder / "metrics.json").read_text())["seconds"]["distillation"] is None
