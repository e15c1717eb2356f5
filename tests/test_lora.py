"""--lora: what an adapter changes, who shares weights, and that a run of it goes like any other."""

import importlib
import shutil

import pytest
import torch
from conftest import FEW, MAKING, cut_at, randn, run_of, same, updates, weights
from test_lib_parallel import RUN as MANY
from test_lib_parallel import alone, launch, taught, worst
from test_mmdit import VARIANTS, inputs, randomise

import ladd
import sample
from lib.files import save
from lib.lora import Adapted, adapt, adapter_of, build, merged, new_adapter
from mmdit import MMDiT

SHAPE = dict(depth=3, heads=2, patch=2, channels=5, context_dim=7, pooled_dim=9, pos_size=8)


def network(variant="sd3.5-medium"):
    qk_norm, dim, attn2 = VARIANTS[variant]
    shape = dict(width=2 * dim, qk_norm=qk_norm is not None, attn2_blocks=len(attn2))
    return randomise(MMDiT(**SHAPE, **shape))


def adapted(variant="sd3.5-medium", rank=3):
    """A network whose adapter is random, and a copy without."""
    plain, other = network(variant), adapt(network(variant), rank)
    start = {k: randn(*w.shape, seed=len(k)) / 8 for k, w in new_adapter(other).items()}
    other.load_state_dict(start, strict=False)
    return other, plain


def train_method(train, name, flags, method):
    distil = (ladd if method == "ladd" else importlib.import_module(f"methods.{method}")).distil
    return train(name, f"{flags} --judge-steps 5", MAKING[2:], distil=distil, method=method)


@pytest.fixture(scope="session")
def adapted_run(tmp_path_factory, cache, whole):
    """A run of LADD with --lora 3, nobody cut it."""
    out = tmp_path_factory.mktemp("adapted") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(out.parent)

        words = f"{FEW} --lora 3 --save-every 2 --from {whole} --out {out} --stage distillation"
        assert ladd.main(words.split()) == 0
    return out


# ---------------------------------------------------------------------------------------------
# The adapter
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_student_starts_bit_for_bit_as_its_teacher(whole, precision):
    """A is random and B zero: velocities and features are the same bits."""
    run = run_of(["--out", whole, "--lora", "3", "--precision", precision])
    teacher = ladd.load(run, "teacher", frozen=True)
    x, t, text = randn(4, 3, 12, 12).float(), torch.rand(4), run.text([f"a {i}" for i in range(4)])
    for student in ladd.start_student(run, teacher):
        assert all(w.any() for k, w in adapter_of(student.state_dict()).items() if k[-1] == "A")
        with run.autocast(), torch.no_grad():
            v, features = student(x, t, *text, taps=(0, 2))
            wanted, theirs = teacher(x, t, *text, taps=(0, 2))
        assert torch.equal(v, wanted) and v.any()
        assert all(map(torch.equal, features, theirs))


def test_teacher_student_and_average_share_all_weights_but_the_adapters(whole):
    """In memory, also where nobody gives a teacher; all linear layers of the blocks have one."""
    run = run_of(["--out", whole, "--lora", "3"])
    teacher = ladd.load(run, "teacher", frozen=True)
    for student, ema in (ladd.start_student(run, teacher), ladd.start_student(run)):
        layers = {n for n, m in student.named_modules() if isinstance(m, torch.nn.Linear)}
        adapters = {n for n, m in student.named_modules() if isinstance(m, Adapted)}
        assert adapters == {name for name in layers if name.startswith("joint_blocks.")}
        one, other = student.state_dict(), ema.state_dict()
        own = adapter_of(one).keys()
        assert len(own) == 2 * len(adapters)
        assert {k for k in one if one[k].data_ptr() != other[k].data_ptr()} == own
        assert {name for name, p in student.named_parameters() if p.requires_grad} == own
        assert not any(p.requires_grad for p in ema.parameters())
    student, _ = ladd.start_student(run, teacher)
    for name, tensor in teacher.state_dict().items():
        assert tensor.data_ptr() == student.state_dict()[name].data_ptr()


@pytest.mark.parametrize("variant", VARIANTS)
def test_weights_with_the_adapter_added_compute_the_same(variant):
    """W·x + b + B·(A·x) = (W + B·A)·x + b."""
    other, plain = adapted(variant)
    checkpoint = dict(model=other.config, lora=3, weights=other.state_dict())
    whole = build(MMDiT, merged(checkpoint))
    whole.load_state_dict(merged(checkpoint)["weights"])
    given = [tensor.float() for tensor in inputs(SHAPE)]
    with torch.no_grad():
        (v, _), (same, _), (without, _) = (n(*given) for n in (other, whole, plain))
    torch.testing.assert_close(v, same, rtol=0, atol=1e-5)
    assert (v - without).abs().max() > 0.05


# ---------------------------------------------------------------------------------------------
# Runs
# ---------------------------------------------------------------------------------------------


def test_only_the_adapter_learns_and_is_saved(adapted_run, whole):
    """student.pt holds A and B alone; the teacher's file is as it was."""
    own = weights(adapted_run / "student.pt")
    assert own.keys() == adapter_of(own).keys() and all(w.any() for w in own.values())
    assert same(adapted_run / "teacher.pt", whole / "teacher.pt")
    read = sample.read_checkpoint(adapted_run / "student.pt")["weights"]
    teacher = weights(whole / "teacher.pt")
    assert all(torch.equal(read[name], teacher[name]) for name in teacher)


def test_training_leaves_the_shared_weights_as_they_are(train, whole, monkeypatch):
    """Of the networks in memory, after the updates."""
    kept, start = [], ladd.start_student

    def watched(run, teacher):
        kept.extend([teacher, *start(run, teacher)])
        return kept[1:]

    monkeypatch.setattr(ladd, "start_student", watched)
    train("out", f"--from {whole} --lora 3", MAKING[2:])
    teacher = weights(whole / "teacher.pt")
    for network in kept:
        state = network.state_dict()
        assert all(torch.equal(state[name], teacher[name]) for name in teacher)


@pytest.mark.parametrize("method", ["ladd", "regression", "consistency", "add", "dmd"])
def test_a_run_with_adapters_goes_on_bit_for_bit_where_it_was_cut(
    train, monkeypatch, whole, adapted_run, method
):
    flags = f"--from {whole} --save-every 2 --lora 3"
    want = adapted_run if method == "ladd" else train_method(train, "want", flags, method)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        cut_at(patch, "distillation", 4)
        train_method(train, "cut", flags, method)
    cut = train_method(train, "cut", flags, method)
    assert same(want / "student.pt", cut / "student.pt") and updates(want) == updates(cut)
    assert adapter_of(weights(cut / "student.pt")).keys() == weights(cut / "student.pt").keys()


def test_checkpointing_and_parts_of_a_batch_change_nothing(train, whole, adapted_run):
    flags = f"--from {whole} --teacher {whole / 'teacher.pt'} --lora 3"
    out = train("out", f"{flags} --checkpointing --accumulate 2", MAKING[2:])
    assert worst(out, adapted_run, "student.pt", "weights") < 1e-6
    assert worst(out, whole, "heads.pt", "weights") > 1e-6  # another student, so others


def test_two_processes_that_divide_the_shared_weights_train_the_same_adapter(tmp_path):
    """By FSDP, also after a cut; what each holds of the base is one part, for all networks."""
    alone(f"{MANY} --lora 3 --out {tmp_path / 'one'}")
    for name in ("two", "cut"):
        taught(tmp_path / "one", tmp_path / name)
    flags = f"{MANY} --lora 3 --shard --checkpointing --out"
    commands = [f"{flags} {tmp_path / 'two'}", f"stop 11|{flags} {tmp_path / 'cut'}"]
    commands += [f"{flags} {tmp_path / 'cut'}"]
    status, errors = launch(2, commands, tmp_path / "errors")
    assert status == [0, 0], errors
    assert worst(tmp_path / "one", tmp_path / "two", "student.pt", "weights") < 1e-6
    assert same(tmp_path / "two" / "student.pt", tmp_path / "cut" / "student.pt")


# ---------------------------------------------------------------------------------------------
# What is refused
# ---------------------------------------------------------------------------------------------


def test_a_run_of_another_rank_is_refused(launch, adapted_run, tmp_path, capsys):

    out = shutil.copytree(adapted_run, tmp_path / "run")
    (out / "student.pt").unlink()
    for rank in ("4", "0"):
        assert ladd.main([*FEW.split(), "--lora", rank, "--out", str(out)]) == 2
        assert f"lora 3 → {rank}" in capsys.readouterr().err.strip()


def changed(path, **changes):
    """A checkpoint with other parts; in `weights`, of each tensor."""
    checkpoint = torch.load(path, weights_only=True)
    save(checkpoint | changes, path)


STRANGE = {  # what is done to a run with an adapter -> what the refusal says
    "another rank": lambda run: changed(run / "student.pt", lora=4),
    "no rank": lambda run: changed(run / "student.pt", lora=0),
    "a negative rank": lambda run: changed(run / "student.pt", lora=-1),
    "a rank that is none": lambda run: changed(run / "student.pt", lora="3"),
    "another teacher": lambda run: changed(run / "teacher.pt", step=7),
    "no teacher": lambda run: (run / "teacher.pt").unlink(),
    "an adapter as the teacher": lambda run: (
        changed(run / "student.pt", kind="teacher")
        or shutil.move(run / "student.pt", run / "teacher.pt")
    ),
}


@pytest.mark.parametrize("case", STRANGE)
def test_an_adapter_without_its_network_is_refused_in_one_line(case, adapted_run, tmp_path, capsys):
    out = shutil.copytree(adapted_run, tmp_path / "run")
    STRANGE[case](out)
    own = ["--teacher"] if (out / "student.pt").exists() is False else []
    assert sample.main([str(out), "--prompts", "@captions", *own]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and str(out) in line


@pytest.mark.parametrize("flags", ["--lora -1", "--lora 17", "--lora 4 --shard --offload"])
def test_settings_of_no_adapter_are_refused_in_one_line(flags, refused):

    refused(ladd, [*FEW.split(), *flags.split()], 2, flags.split()[0][:4])
