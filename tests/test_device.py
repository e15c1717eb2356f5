"""Runs on a device that is not the CPU (pretend.py): no two are mixed, and updates don't wait."""

import importlib
import math

import numpy as np
import pretend
import pytest
import torch
from conftest import FEW, cut_at, run_of, same
from PIL import Image

import data
import ladd
import sample
from lib.loop import Loop
from lib.optim import make_optimizers, step_all
from lib.streams import normal

SMALL = FEW.replace("--device cpu", "") + " --device pretend --size 8 --log-every 3 "
SMALL += "--sample-every 99 --evaluation 8 --judge-steps 2 --judge-width 8"


@pytest.fixture(scope="module")
def waits():
    """{(folder, stage, update): what the host waited for}, of all updates of this module's runs."""
    steps, found = Loop.__iter__, {}

    def watched(loop):
        for step in steps(loop):
            before = len(pretend.WAITS)
            yield step
            found[loop.run.out.name, loop.stage, step + 1] = pretend.WAITS[before:]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loop, "__iter__", watched)
        yield found


@pytest.fixture(scope="module")
def finished(tmp_path_factory, cache, waits):
    """A run through all stages on the device."""
    out = tmp_path_factory.mktemp("device") / "run"
    assert ladd.main([*SMALL.split(), "--data-dir", f"{cache}", "--out", f"{out}"]) == 0
    return out


def test_a_run_ends_in_its_report(finished):
    assert "student, 1 step" in (finished / "report.md").read_text()


def test_between_log_lines_an_update_never_waits_for_the_device(finished, waits):
    """Nothing is read from the device, and all that goes there goes on its own."""
    for stage in ("teacher", "distillation"):
        assert waits["run", stage, 3], "a log line does wait"
        for update in (1, 2, 4, 5):
            assert waits["run", stage, update] == []


@pytest.mark.parametrize("method", ["regression", "consistency", "add", "dmd", "hyper_sd"])
def test_every_method_runs_and_does_not_wait_either(finished, launch, waits, method):
    module = importlib.import_module(f"methods.{method}")
    flags = f"{SMALL} --from {finished} --stage distillation --iterations 5"
    kind = getattr(module, "Settings", ladd.Settings)
    assert launch(method, flags, distil=module.distil, method=method, kind=kind) == 0
    assert [waits[method, "distillation", update] for update in (1, 2)] == [[], []]


WAYS = ["--steps 4", "--steps 2 --eta 1", "--teacher", "--sampler euler --cfg 2 --steps 2"]
WAYS += ["--teacher --sampler renoise", "--init-image picture.png --strength 0.5", "--size 12"]
WAYS += ["--trajectory way.gif"]


@pytest.mark.parametrize("words", WAYS)
def test_a_run_is_sampled_from_in_every_way(finished, tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    picture().save("picture.png")
    prompt = ["--prompt", "a red fox", "--num", "2", "--device", "pretend"]
    assert sample.main([f"{finished}", *prompt, *words.split()]) == 0
    assert (tmp_path / "samples.png").exists()


def picture(seed=0, side=8):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (side, side, 3), np.uint8))


def test_a_run_is_scored_again(finished, cache):
    where = ["--device", "pretend", "--data-dir", f"{cache}"]
    assert sample.main([f"{finished}", "--evaluate", *where]) == 0


def test_a_batch_is_explained(finished, capsys):
    assert ladd.main([*SMALL.split(), "--out", f"{finished}", "--explain"]) == 0
    assert "gradient of L_G to the student: norm" in capsys.readouterr().out


def test_a_run_that_was_cut_goes_on_bit_for_bit(finished, launch, tmp_path, monkeypatch):
    for stage in ("teacher", "distillation"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            cut_at(patch, stage, 3)
            launch("run", f"{SMALL} --save-every 3")
    assert launch("run", f"{SMALL} --stage distillation") == 0
    for kind in ("teacher", "student"):
        assert same(tmp_path / "run" / f"{kind}.pt", finished / f"{kind}.pt")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of photographs of two shapes."""
    folder = tmp_path_factory.mktemp("photos")
    for i in range(100):
        path = folder / ("fox" if i % 2 else "owl") / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        picture(i).resize((8, 8 + 8 * (i % 3 > 0))).save(path)
    return folder


def test_images_are_kept_on_the_device_where_they_fit(finished, photos, monkeypatch):
    """A folder's and the teacher's samples. Batches are drawn there, the same ones as elsewhere,
    and nothing waits."""

    def sets():
        run = run_of([*SMALL.split(), "--data", photos, "--aspects", "1:1,1:2", "--out", finished])
        samples = ladd.distillation_samples(run).dataset
        return [*run.dataset.sets, *samples.sets]

    kept = sets()
    monkeypatch.setattr(data, "RESIDENT", 0)
    for there, here in zip(kept, sets(), strict=True):
        waited = len(pretend.WAITS)
        images, caption = there.batch(np.arange(9))
        assert len(pretend.WAITS) == waited and images.device.type == "pretend"
        wanted, wanted_caption = here.batch(np.arange(9))
        assert wanted.device.type == "cpu" and torch.equal(images.cpu(), wanted)
        assert torch.equal(caption, wanted_caption)


def test_photographs_are_learned_from(launch, photos, waits):
    """Of two shapes, as what is real to the heads."""
    flags = f"{SMALL} --data {photos} --targets real --aspects 1:1,1:2 --accumulate 2 "
    flags += "--teacher-batch 4 --checkpointing --teacher-iterations 3 --iterations 3"
    assert launch("photos-run", flags) == 0
    for stage in ("teacher", "distillation"):
        assert [waits["photos-run", stage, update] for update in (1, 2)] == [[], []]


@pytest.mark.parametrize("muon_lr", [0.0, 0.02])
def test_a_gradient_that_is_not_finite_is_undone_on_the_device(muon_lr):
    """Weights and moments are as they were, at the first update, too; the next one is applied."""
    model = torch.nn.ModuleDict(dict(blocks=torch.nn.Linear(4, 4), rest=torch.nn.Linear(4, 4)))
    model = model.to("pretend")
    optimizers = make_optimizers(model, 0.1, 0.9, muon_lr=muon_lr)

    def update(factor):
        before = [p.detach().cpu() for p in model.parameters()]
        x = torch.ones(2, 4, device="pretend")
        (model["rest"](model["blocks"](x)).square().mean() * factor).backward()
        waited = len(pretend.WAITS)
        (norm,) = step_all((optimizers, model, 1.0, 1.0))
        assert len(pretend.WAITS) == waited
        moved = [
            not torch.equal(a, p.cpu()) for a, p in zip(before, model.parameters(), strict=True)
        ]
        return math.isfinite(norm.item()), moved

    assert update(math.nan) == (False, [False] * 4)
    assert all(
        not moment.cpu().any()
        for o in optimizers
        for s in o.state.values()
        for moment in s.values()
    )
    assert update(1.0) == (True, [True] * 4)
    moments = [moment.cpu() for o in optimizers for s in o.state.values() for moment in s.values()]
    assert update(math.inf) == (False, [False] * 4)
    after = [moment.cpu() for o in optimizers for s in o.state.values() for moment in s.values()]
    assert all(map(torch.equal, moments, after))
    assert update(1.0) == (True, [True] * 4)


@pytest.mark.parametrize("flags", ["", "--muon-lr 0"])
def test_a_device_without_float64_and_bf16_is_enough(launch, monkeypatch, flags):
    """Apple's has no float64. `--precision auto` is float32 there, and without Muon, whose products
    PyTorch computes in bf16, nothing else is in bf16."""
    refused = {torch.float64, torch.bfloat16} if flags else {torch.float64}
    monkeypatch.setattr(pretend, "REFUSED", refused)
    auto = SMALL.replace("--precision fp32", "--precision auto")
    assert launch("apple", f"{auto} --iterations 2 --teacher-iterations 2 {flags}") == 0


def test_noise_on_the_device_is_that_of_the_cpu():
    there = normal(3, "a", range(4), (3, 5, 3), "pretend")
    assert torch.equal(there.cpu(), normal(3, "a", range(4), (3, 5, 3)))
