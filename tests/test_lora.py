"""--lora: what an adapter changes, who shares weights, and that a run of it goes like any other."""

import importlib
import shutil

import pytest
import torch
from conftest import (
    CPU,
    FEW,
    MAKING,
    NETWORK,
    SETTINGS,
    cut_at,
    randn,
    run_of,
    same,
    updates,
    weights,
)
from test_lib_parallel import RUN as MANY
from test_lib_parallel import alone, launch, taught, worst
from test_mmdit import VARIANTS, inputs, randomise

import ladd
import sample
from lib.files import checksum, save
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


def lora_folder(path, **shape):
    """A run folder with random networks: a teacher, and a student that is an adapter of it."""
    network = randomise(MMDiT(**NETWORK | shape))
    config, own = network.config, adapt(randomise(MMDiT(**NETWORK | shape)), 3)
    whole = dict(format="ladd-1", model=config, settings=SETTINGS, step=1)
    save(whole | dict(kind="teacher", weights=network.state_dict()), path / "teacher.pt")
    adapter = {k: randn(*w.shape, seed=len(k)).float() / 4 for k, w in new_adapter(own).items()}
    student = dict(kind="student", weights=adapter, lora=3, base=checksum(path / "teacher.pt"))
    save(whole | student, path / "student.pt")
    return path


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
    x, t = randn(4, 3, 12, 12).float(), torch.rand(4)
    text = run.text_encoder([f"a {i}" for i in range(4)])
    for student in ladd.start_student(run, teacher)[:2]:  # and its average
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
    for student, ema, _ in (ladd.start_student(run, teacher), ladd.start_student(run)):
        layers = {n for n, m in student.named_modules() if isinstance(m, torch.nn.Linear)}
        adapters = {n for n, m in student.named_modules() if isinstance(m, Adapted)}
        assert adapters == {name for name in layers if name.startswith("joint_blocks.")}
        one, other = student.state_dict(), ema.state_dict()
        own = adapter_of(one).keys()
        assert len(own) == 2 * len(adapters)
        assert {k for k in one if one[k].data_ptr() != other[k].data_ptr()} == own
        assert {name for name, p in student.named_parameters() if p.requires_grad} == own
        assert not any(p.requires_grad for p in ema.parameters())
    student, *_ = ladd.start_student(run, teacher)
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
        student, ema, optimizers = start(run, teacher)
        kept.extend([teacher, student, ema])
        return student, ema, optimizers

    monkeypatch.setattr(ladd, "start_student", watched)
    train("out", f"--from {whole} --lora 3", MAKING[2:])
    teacher = weights(whole / "teacher.pt")
    for network in kept:
        state = network.state_dict()
        assert all(torch.equal(state[name], teacher[name]) for name in teacher)


@pytest.mark.parametrize("method", ["ladd", "regression", "consistency", "add", "dmd"])
def test_a_run_with_adapters_goes_on_bit_for_bit_where_it_was_cut(
    train_and_show, monkeypatch, whole, adapted_run, method
):
    flags = f"--from {whole} --save-every 2 --lora 3"
    want = adapted_run if method == "ladd" else train_method(train_and_show, "want", flags, method)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        cut_at(patch, "distillation", 4)
        train_method(train_and_show, "cut", flags, method)
    cut = train_method(train_and_show, "cut", flags, method)
    assert same(want / "student.pt", cut / "student.pt") and updates(want) == updates(cut)
    assert adapter_of(weights(cut / "student.pt")).keys() == weights(cut / "student.pt").keys()


def test_checkpointing_and_parts_of_a_batch_change_nothing(train, whole, adapted_run):
    flags = f"--from {whole} --teacher {whole / 'teacher.pt'} --lora 3"
    out = train("out", f"{flags} --checkpointing --accumulate 2", MAKING[2:])
    assert worst(out, adapted_run, "student.pt", "weights") < 1e-6
    assert worst(out, whole, "heads.pt", "weights") > 1e-6  # another student, so others


def test_compiled_blocks_train_the_same_adapter(train, whole, adapted_run, monkeypatch):
    """Traced, and run by PyTorch as it stands: the student's with its adapter."""
    compiled, traced = torch.nn.Module.compile, []

    def trace(module):
        traced.append(module)
        compiled(module, backend="eager")

    monkeypatch.setattr(torch.nn.Module, "compile", trace)
    monkeypatch.setattr("tools.train.check_compiler", lambda device: None)
    out = train("out", f"--from {whole} --lora 3 --compile yes", MAKING[2:])
    assert any(isinstance(part, Adapted) for module in traced for part in module.modules())
    assert worst(out, adapted_run, "student.pt", "weights") < 1e-5


def make_divided(root):
    """Runs with an adapter: "one" by one process; "two" by two that divide the shared weights by
    FSDP; "cut" by two as well, that were cut and went on."""
    few = f"{MANY} --lora 3 --teacher-iterations 2 --iterations 7 --save-every 2"
    alone(f"{few} --out {root / 'one'}")
    for name in ("two", "cut"):
        taught(root / "one", root / name)
    flags = f"{few} --shard --checkpointing --out"
    commands = [f"{flags} {root / 'two'}", f"stop 5|{flags} {root / 'cut'}"]
    commands += [f"{flags} {root / 'cut'}"]
    status, errors = launch(2, commands, root / "errors")
    assert status == [0, 0], errors


@pytest.fixture
def divided(beside):
    return beside(make_divided)


def test_two_processes_that_divide_the_shared_weights_train_the_same_adapter(divided):
    """By FSDP, also after a cut."""
    assert worst(divided / "one", divided / "two", "student.pt", "weights") < 1e-6
    assert same(divided / "two" / "student.pt", divided / "cut" / "student.pt")


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
    """A checkpoint with other parts."""
    save(torch.load(path, weights_only=True) | changes, path)


STRANGE = {  # what is done to a run with an adapter
    "another rank": lambda run: changed(run / "student.pt", lora=4),
    "no rank": lambda run: changed(run / "student.pt", lora=0),
    "a negative rank": lambda run: changed(run / "student.pt", lora=-1),
    "a rank that is none": lambda run: changed(run / "student.pt", lora="3"),
    "another teacher": lambda run: changed(run / "teacher.pt", step=7),
    "no teacher": lambda run: (run / "teacher.pt").unlink(),
    "an adapter as the teacher": lambda run: shutil.copy(run / "tuned.pt", run / "teacher.pt"),
}


@pytest.mark.parametrize("case", STRANGE)
def test_an_adapter_without_its_network_is_refused_in_one_line(case, refused, tmp_path):
    run = lora_folder(tmp_path / "run")
    shutil.copy(run / "student.pt", run / "tuned.pt")
    changed(run / "tuned.pt", kind="teacher")
    STRANGE[case](run)
    for own in ([], ["--teacher"]) if case == "an adapter as the teacher" else ([],):
        refused(sample, [run, "--prompt", "a", *CPU, *own], 2, run)


@pytest.mark.parametrize("flags", ["--lora -1", "--lora 17", "--lora 4 --shard --offload"])
def test_settings_of_no_adapter_are_refused_in_one_line(flags, refused):
    refused(ladd, [*FEW.split(), *flags.split()], 2, flags.split()[0][:4])


def test_an_adapter_that_does_not_fit_is_refused_in_one_line(refused, tmp_path):
    """Another network's; a whole network; a LoRA of other programs."""
    run, other = lora_folder(tmp_path / "run"), lora_folder(tmp_path / "other", width=32)
    words = [run, "--prompt", "a", *CPU, "--adapter"]
    refused(sample, [*words, other / "student.pt"], 2, other, "width 32 → 16")
    refused(sample, [*words, run / "teacher.pt"], 2, "a whole network")
    refused(sample, [*words, tmp_path / "none.pt"], 2, "none.pt: no such file")
    refused(
        sample, [*words, run / "student.pt", "--adapter-scale", "nan"], 2, "--adapter-scale nan"
    )
    refused(sample, [run, "--prompt", "a", *CPU, "--adapter-scale", "2"], 2, "is for --adapter")
    refused(sample, [run, "--prompt", "a", *CPU, "--merge"], 2, "--merge")
    refused(sample, [run, "--teacher", "--export", tmp_path / "a", "--merge"], 2, "--merge")


# ---------------------------------------------------------------------------------------------
# sample.py
# ---------------------------------------------------------------------------------------------


def velocity(run, **options):
    """Of the network that sample.py samples with, at some x_t."""
    generator = sample.load_generator(run, device="cpu", precision="fp32", **options)
    x, t, *text = (tensor.float() for tensor in inputs(generator.model.config, H=8, W=8))
    with torch.no_grad():
        return generator.network(x, t, *text)[0]


def test_a_run_is_sampled_with_its_adapter_and_its_teacher_without(tmp_path):
    run = lora_folder(tmp_path / "run")
    adapter = weights(run / "student.pt")
    network = build(MMDiT, dict(model=NETWORK, lora=3))
    network.load_state_dict(weights(run / "teacher.pt") | adapter)
    x, t, *text = (tensor.float() for tensor in inputs(NETWORK, H=8, W=8))
    with torch.no_grad():
        assert torch.equal(velocity(run), network(x, t, *text)[0])
    assert (velocity(run) - velocity(run, teacher=True)).abs().max() > 0.01
    assert sample.main([str(run), "--prompt", "a", *CPU, "--out", str(tmp_path / "a.png")]) == 0


def test_an_adapter_is_added_at_a_scale(tmp_path):
    """At 1 the teacher is the student, at 0 itself; on a student it comes on top of its own, and
    at -1 takes that away."""
    run = lora_folder(tmp_path / "run")
    own = dict(adapter=run / "student.pt")
    teacher, student = velocity(run, teacher=True), velocity(run)
    for scale, wanted in ((1, student), (0, teacher)):
        got = velocity(run, teacher=True, **own, scale=scale)
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)
    torch.testing.assert_close(velocity(run, **own, scale=-1), teacher, rtol=0, atol=1e-5)
    half = velocity(run, teacher=True, **own, scale=0.5)
    twice = velocity(run, **own, scale=-0.5)
    torch.testing.assert_close(half, twice, rtol=0, atol=1e-5)


# ---------------------------------------------------------------------------------------------
# For other programs
# ---------------------------------------------------------------------------------------------


def test_merged_weights_are_exported_whole(tmp_path):
    """--merge: the network of the file computes what the run's student computes."""
    pytest.importorskip("safetensors")
    from sd3.weights import open_sd3

    run, file = lora_folder(tmp_path / "run"), tmp_path / "whole.safetensors"
    assert sample.main([str(run), "--export", str(file), "--merge"]) == 0
    network, tensors = open_sd3(file)
    network.load_state_dict(tensors, assign=True)
    x, t, *text = (tensor.float() for tensor in inputs(NETWORK, H=8, W=8))
    with torch.no_grad():
        v, _ = network(x, t, *text)
    torch.testing.assert_close(v, velocity(run), rtol=0, atol=1e-5)


def test_a_run_with_an_adapter_is_a_teacher_by_its_merged_weights(tmp_path):
    run = lora_folder(tmp_path / "run")
    plain = merged(sample.read_checkpoint(run / "student.pt"))
    save(plain | dict(settings=SETTINGS), tmp_path / "student.pt")
    assert not plain.keys() & {"lora", "base"} and not adapter_of(plain["weights"])
    torch.testing.assert_close(velocity(tmp_path / "student.pt"), velocity(run), rtol=0, atol=1e-5)


def test_an_exported_adapter_given_as_a_teacher_is_named_and_refused(tmp_path, refused):
    pytest.importorskip("safetensors")
    run, file = lora_folder(tmp_path / "run"), tmp_path / "lora.safetensors"
    assert sample.main([str(run), "--export", str(file)]) == 0
    words = ["--smoke", "--teacher", file, "--out", tmp_path / "out", *CPU]
    refused(ladd, words, 2, file, "a LoRA, which is no network")


@pytest.mark.parametrize("variant", VARIANTS)
def test_diffusers_pipeline_loads_our_adapter_and_computes_the_same(variant, tmp_path):
    """load_lora_weights of a pipeline with the teacher's network: the student's velocity."""
    pytest.importorskip("peft")
    diffusers = pytest.importorskip("diffusers")
    from test_sd3_weights import diffusers_model

    from sd3.weights import PREFIX, export

    other, plain = adapted(variant)
    weights = other.state_dict()
    export(
        dict(kind="student", lora=3, model=other.config, weights=weights),
        tmp_path / "lora.safetensors",
        "fp32",
    )
    released = {PREFIX + name: w for name, w in plain.state_dict().items()}
    theirs = diffusers_model(released, variant)
    pipeline = diffusers.StableDiffusion3Pipeline(
        theirs, diffusers.FlowMatchEulerDiscreteScheduler(), *[None] * 7
    )
    x, t, context, pooled = (tensor.float() for tensor in inputs(SHAPE))
    with torch.no_grad():
        v, _ = other(x, t, context, pooled)
        before = theirs(x, context, pooled, 1000 * t, return_dict=False)[0]
        pipeline.load_lora_weights(tmp_path, weight_name="lora.safetensors")
        after = theirs(x, context, pooled, 1000 * t, return_dict=False)[0]
    torch.testing.assert_close(after, v, rtol=0, atol=1e-5)
    assert (after - before).abs().max() > 0.05
