"""Hyper-SD: its segments, its feedback, and that its three parts train one adapter."""

from types import SimpleNamespace

import pytest
import torch
from conftest import FEW, MAKING, Constant, cut_at, randn, same, updates, weights

import data
import sample
from lib.lora import ENDS
from methods import hyper_sd
from methods.consistency import LEVELS, consistency_loss
from methods.hyper_sd import SEGMENTS, Settings, segment
from tools.table import sweep_table

HOW = dict(distil=hyper_sd.distil, method="hyper_sd", kind=Settings)
QUICK = "--lora 3 --judge-steps 5"
BATCH = SimpleNamespace(x0=randn(8, 3, 4, 4, seed=4), noise=randn(8, 3, 4, 4, seed=5), text=())
TIMES = sample.euler_times(LEVELS).double()
I = torch.tensor([0, 3, 7, 8, 15, 16, 30, 31])  # noqa: E741


class Bent:
    """A stand-in for a network, whose velocity depends on all that it is given."""

    def __init__(self, seed):
        self.w = randn(3, 4, 4, seed=seed)

    def __call__(self, x, t, *text):
        return torch.sin(x * self.w + t.view(-1, 1, 1, 1)), []


# ---------------------------------------------------------------------------------------------
# Segments
# ---------------------------------------------------------------------------------------------


def segment_loss(student, average, teacher, i, k):
    return consistency_loss(student, average, teacher, BATCH, *TIMES[segment(i, k)])


def test_one_segment_is_the_consistency_loss():
    student, average, teacher = Bent(1), Bent(2), lambda x, t: Bent(3)(x, t)[0]
    want = consistency_loss(student, average, teacher, BATCH, TIMES[I], TIMES[I + 1])
    assert torch.equal(segment_loss(student, average, teacher, I, 1), want)
    assert segment_loss(student, average, teacher, I, 2) != want


@pytest.mark.parametrize("k", SEGMENTS)
def test_k_segments_are_equal_and_hold_every_step(k):
    """The lower end of each of 32 levels is the nearest multiple of 1/k that is below it."""
    i = torch.arange(LEVELS)
    t, t_next, s = TIMES[segment(i, k)]
    assert torch.equal(t, TIMES[i]) and torch.equal(t_next, TIMES[i + 1])
    assert (t > t_next).all() and (t_next >= s).all() and (t - s <= 1 / k).all()
    assert torch.equal(s, ((t * k).ceil() - 1) / k)
    assert len(set(s.tolist())) == k and (t_next == s).sum() == k


@pytest.mark.parametrize("k", SEGMENTS)
def test_at_its_segments_end_the_target_is_the_teachers_step_itself(k):
    """There the average says nothing: b = x_t'. A student whose v is the teacher's has no loss."""
    i = torch.arange(8) % k * (LEVELS // k) + LEVELS // k - 1
    teacher, v = Bent(3), lambda x, t: Bent(3)(x, t)[0]
    for average in (Bent(2), Constant(torch.tensor(1e3))):
        assert segment_loss(teacher, average, v, i, k).abs() < 1e-9
        assert segment_loss(Bent(1), average, v, i, k) > 1e-4


@pytest.mark.parametrize("k", SEGMENTS)
def test_on_straight_paths_the_target_is_exact(k):
    """Of one velocity v every x_t leads to the same x_s = x_t + (s - t)·v; a student that is off by
    d in v is off by (t - s)·d."""
    v = randn(8, 3, 4, 4, seed=1)
    true, other, teacher = Constant(v), Constant(v + 3), lambda x, t: v
    assert segment_loss(true, true, teacher, I, k).abs() < 1e-9
    loss = segment_loss(other, true, teacher, I, k)
    far = TIMES[I] - TIMES[segment(I, k)[2]]
    assert loss.item() == pytest.approx((3 * far).mean().item(), abs=2e-3)


# ---------------------------------------------------------------------------------------------
# Feedback
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("anchor", [0, 10])
def test_the_anchor_costs_what_leads_away_from_the_average(train, whole, anchor):
    """Which the student still is at its first update; the reward is the rest of the loss."""
    flags = f"--from {whole} {QUICK} --shares 0,0,0,0,1,0 --iterations 4 --anchor {anchor}"
    flags += " --lora 0 --student-lr 0.1"  # far enough to be seen in float32
    first, *others = updates(train("out", flags, MAKING[2:], **HOW))[-4:]
    assert first["loss"] == -first["reward"]
    for row in others:
        assert row["loss"] > -row["reward"] if anchor else row["loss"] == -row["reward"]


def test_the_feedback_asks_for_what_the_batchs_captions_say(train, monkeypatch, whole):
    """Each image's answers are those of its own caption."""
    batches, asked = [], []
    draw, reward = hyper_sd.draw_batch, hyper_sd.log_p

    def watched(run, *arguments, **options):
        batches.append((run, draw(run, *arguments, **options)))
        return batches[-1][1]

    monkeypatch.setattr(hyper_sd, "draw_batch", watched)
    monkeypatch.setattr(hyper_sd, "log_p", lambda *a: asked.append(a[2]) or reward(*a))
    train("out", f"--from {whole} {QUICK} --shares 0,0,0,0,1,0", MAKING[2:], **HOW)
    rows = [row.tolist() for row in batches[0][0].dataset.labels]
    for (run, b), labels in zip(batches, asked, strict=True):
        captions = [run.dataset.captions[rows.index(row)] for row in labels.tolist()]
        torch.testing.assert_close(run.text_encoder(captions).context, b.text.context)


# ---------------------------------------------------------------------------------------------
# The whole
# ---------------------------------------------------------------------------------------------


def test_the_parts_come_in_their_order_each_with_its_share():
    s = Settings(iterations=200, shares=(1, 1, 1, 1, 4, 2))
    parts = [s.part(step) for step in range(200)]
    assert parts == sorted(parts)
    assert [parts.count(k) for k in range(6)] == [20, 20, 20, 20, 80, 40]
    one = Settings(iterations=3, shares=(0, 0, 0, 1, 0, 0))
    assert [one.part(step) for step in range(3)] == [3, 3, 3]
    smoke = Settings(smoke=True).scaled()
    assert {smoke.part(step) for step in range(smoke.iterations)} == set(range(6))


def test_a_cut_run_goes_on_bit_for_bit_in_every_part(train, monkeypatch, whole):
    """Six updates, of all kinds; the student after each part is kept, too."""
    flags, stage = f"--from {whole} {QUICK} --save-every 1", MAKING[2:]
    want = train("want", flags, stage, **HOW)
    for update in (3, 5):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            cut_at(patch, "distillation", update)
            train("cut", flags, stage, **HOW)
    cut = train("cut", flags, stage, **HOW)
    kept = ("student-segments", "student-segments+feedback", "student")
    assert sorted(path.stem for path in cut.glob("student*.pt")) == sorted(kept)
    assert all(same(want / f"{kind}.pt", cut / f"{kind}.pt") for kind in kept)
    assert not same(cut / f"{kept[0]}.pt", cut / f"{kept[1]}.pt")
    assert not same(cut / f"{kept[1]}.pt", cut / "student.pt")
    assert updates(want) == updates(cut)
    assert [name for name in ("reward", "loss_score") for row in updates(cut) if name in row] == [
        "reward",
        "loss_score",
    ]


def test_every_part_starts_its_optimiser_anew(train, monkeypatch, whole):
    """The feedback's gradients are ten times as large as the segments', and Adam would be slow to
    notice: its first steps would be far too long."""
    known, step_all = [], hyper_sd.step_all

    def watched(*players):
        known.append(len(players[0][0][0].state) > 0)
        return step_all(*players)

    monkeypatch.setattr(hyper_sd, "step_all", watched)
    train("out", f"--from {whole} {QUICK} --iterations 4 --shares 0,0,0,1,0,1", MAKING[2:], **HOW)
    assert known == [False, True, False, True]


def test_all_parts_learn_in_one_adapter_and_the_teacher_stays(train, whole):
    out = train("out", f"--from {whole} {QUICK}", MAKING[2:], **HOW)
    assert same(out / "teacher.pt", whole / "teacher.pt")
    for kind in ("student-segments", "student"):
        own = weights(out / f"{kind}.pt")
        assert own and all(name.endswith(ENDS) for name in own)
    for path in (out, out / "student-segments.pt"):
        made = sample.load_generator(path, device="cpu").sample(["a red circle"], steps=8)
        assert made.isfinite().all()


def test_smoke_runs_to_its_report(launch, tmp_path, teacher):
    flags = f"--smoke {QUICK} --teacher {teacher} --size 12 --width 16 --depth 3"
    flags += " --attention-heads 2 --text-dim 10 --judge-width 8 --device cpu --precision fp32"
    assert launch("out", flags, **HOW) == 0
    assert "| student, 8 steps |" in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.parametrize(("words", "named"), [
    ("--shares 1,1", "six"), ("--shares 0,0,0,0,0,0", "above 0"),
    ("--shares 1,1,1,1,1,-1", "at least"),
    ("--preset sd3-2b --level-p 1,0,0,0,0,0,0,0 --level-warmup 0", "fifth must be 0"),
])  # fmt: skip
def test_shares_that_make_no_sense_are_refused(launch, capsys, words, named):
    assert launch("out", words, **HOW) == 2
    said = capsys.readouterr().err
    assert "--shares" in said and named in said


def test_captions_of_other_answers_that_are_read_alike_are_refused_with_feedback(
    launch, tmp_path, capsys
):
    """Eight words of nine leave out "background" alone; seven the colour, too."""
    words = f"{FEW} {QUICK} --smoke --shares 0,0,0,0,1,0 --text-length"
    assert launch("out", f"{words} 7", **HOW) == 2
    assert "--text-length 7: captions that differ" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert launch("out", f"{words} 8 --stage teacher", **HOW) == 0
    assert launch("more", f"{FEW} --text-length 7 --shares 1,1,1,1,0,1 --stage teacher", **HOW) == 0


def test_captions_that_ask_nothing_are_enough_without_feedback(train, monkeypatch, whole):
    """As free captions do that have no word in common."""
    (dataset := data.load("shapes", [(12, 12)])).attributes = {}
    monkeypatch.setattr(data, "load", lambda *_, **__: dataset)
    train("other", f"--from {whole} {QUICK} --shares 1,1,1,1,0,1", MAKING[2:], **HOW)


def test_the_table_has_a_row_after_each_part_and_the_steps_that_there_are():
    def rows(who, steps):
        return [dict(name=f"{who}, {n} step{'s' * (n > 1)}", alignment=n / 10, frechet=n, recall=1)
                for n in steps]  # fmt: skip

    parts = rows("student", (8, 1)) + rows("student-a+b", (8, 1)) + rows("student-a", (8, 1))
    runs = [
        [dict(rows=own, seconds=dict(distillation=3.0))] for own in (parts, rows("student", [1]))
    ]
    members = [dict(values=dict(method=m), runs=own) for m, own in zip("xy", runs, strict=True)]
    result = dict(reference=rows("untrained", (8, 1)), members=members)
    table = [line.split(" | ") for line in sweep_table(result).splitlines()]
    assert [row[0] for row in table[2:]] == ["| *untrained*", "| x, a", "| x, a+b", "| x", "| y"]
    assert table[0][1:3] == ["alignment, 1", "alignment, 8"]
    assert table[3][1:3] == ["0.10", "0.80"] and table[-1][1:3] == ["0.10", "–"]
