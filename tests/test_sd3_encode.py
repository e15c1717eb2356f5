"""SD3's encoders, the shards that `python -m sd3.encode` writes, and `sample.py --decode`.

The encoders are those of a tiny random pipeline in diffusers' layout, built and saved here; the
features are compared with diffusers' own. All widths differ, so that a swapped part would show.
"""

import errno
import json
import os
import re
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import data
import ladd
import sample
from data import SYNTHETIC_INDEX
from lib.errors import DataError, RunError
from lib.images import decode
from lib.run import Run
from mmdit import MMDiT
from sd3.encode import main
from sd3.encoders import Encoders, codec_of
from sd3.weights import open_sd3
from tools.report import report
from tools.train import given_settings

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytest.importorskip("safetensors")

PROMPTS = [
    "a small red fox",
    "Two geese,  above a lake!",
    "a very long prompt " * 40,  # cut to 77 tokens
    "x",
]


@pytest.fixture(scope="module")
def pipeline():
    """A whole SD3 pipeline with random weights: CLIPs 8 and 12 wide, T5 24, pooled 6 + 10."""
    import transformers
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )

    letters = [chr(c) + end for end in ("", "</w>") for c in range(33, 127)]
    words = {w: i for i, w in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("▁", -2.0)]
    pieces += [(chr(c), -3.0) for c in range(33, 127)] + [("▁a", -1.0), ("ed", -1.0)]

    def clip(width, pooled):
        config = transformers.CLIPTextConfig(
            vocab_size=len(words), hidden_size=width, intermediate_size=16, projection_dim=pooled,
            num_hidden_layers=3, num_attention_heads=2, max_position_embeddings=77,
            bos_token_id=words["<|startoftext|>"], eos_token_id=words["<|endoftext|>"],
            pad_token_id=words["<|endoftext|>"],
        )  # fmt: skip
        return transformers.CLIPTextModelWithProjection(config)

    def tokenizer():
        return transformers.CLIPTokenizer(words, [], model_max_length=77)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        t5 = transformers.T5Config(
            vocab_size=len(pieces), d_model=24, d_kv=4, d_ff=16, num_layers=2, num_heads=2
        )
        return StableDiffusion3Pipeline(
            transformer=SD3Transformer2DModel(
                sample_size=8, num_layers=1, attention_head_dim=8, num_attention_heads=2,
                joint_attention_dim=24, caption_projection_dim=16, pooled_projection_dim=16,
            ),
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=AutoencoderKL(
                latent_channels=16, block_out_channels=(4, 4, 8, 8), norm_num_groups=2,
                down_block_types=["DownEncoderBlock2D"] * 4,
                up_block_types=["UpDecoderBlock2D"] * 4,
                scaling_factor=1.4, shift_factor=0.25, use_quant_conv=False,
                use_post_quant_conv=False,
            ).eval(),
            text_encoder=clip(8, 6).eval(), tokenizer=tokenizer(),
            text_encoder_2=clip(12, 10).eval(), tokenizer_2=tokenizer(),
            text_encoder_3=transformers.T5EncoderModel(t5).eval(),
            tokenizer_3=transformers.T5TokenizerFast(pieces, extra_ids=0, model_max_length=77),
        )  # fmt: skip


@pytest.fixture(scope="module")
def sd3(pipeline, tmp_path_factory):
    """The folder of the tiny pipeline."""
    folder = tmp_path_factory.mktemp("sd3")
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("".join(f"prompt number {i}\n" for i in range(40)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Nine pictures with captions: wide, tall, square; one tall by its EXIF alone."""
    folder, rows = tmp_path_factory.mktemp("images"), []
    random = np.random.default_rng(0)
    for i, (height, width) in enumerate([(40, 80), (80, 40), (50, 50)] * 3):
        picture = Image.fromarray(random.integers(0, 255, (height, width, 3), np.uint8))
        exif = picture.getexif()
        exif[0x0112] = 6 if i == 0 else 1
        picture.save(folder / f"{i}.png", exif=exif)
        rows.append(json.dumps(dict(file=f"{i}.png", caption=f"picture {i % 8}")))
    (folder / "captions.jsonl").write_text("\n".join(rows), encoding="utf-8")
    return folder


def encode(*arguments):
    """`python -m sd3.encode …` in this process. -> exit status"""
    return main(["--device", "cpu", *map(str, arguments)])


def network(**changes):
    """The settings of a network that takes the tiny pipeline's features and latents."""
    settings = dict(text_dim=24, pooled_dim=16, channels=16, patch=1, data="shards")
    settings |= dict(pos_size=10, positions=64, downscale=8)
    return SimpleNamespace(**settings | changes)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---------------------------------------------------------------------------------------------
# Encoders
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("t5", [True, False])
def test_text_features_are_those_of_diffusers(pipeline, sd3, t5):
    """77 CLIP tokens, padded, then 77 of T5 (or zeros); pooled of both; the empty caption too."""
    from diffusers import StableDiffusion3Pipeline

    parts = pipeline.components if t5 else pipeline.components | dict(text_encoder_3=None)
    with torch.no_grad():
        context, empty, pooled, empty_pooled = StableDiffusion3Pipeline(**parts).encode_prompt(
            PROMPTS, None, None, max_sequence_length=77
        )
    mine, mine_pooled = Encoders(sd3, t5=t5).text([*PROMPTS, ""])
    assert mine.shape == (5, 154, 24) and mine_pooled.shape == (5, 16)
    torch.testing.assert_close(mine, torch.cat([context, empty[:1]]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        mine_pooled, torch.cat([pooled, empty_pooled[:1]]), rtol=1e-5, atol=1e-5
    )
    assert (mine[:, 77:] == 0).all() != t5 and (mine[:, :77, 20:] == 0).all()


def test_latents_are_shifted_and_scaled_as_the_vae_says(pipeline, sd3):
    """x_0 = (mean - 0.25)·1.4, and pixels are the decoded x_0 / 1.4 + 0.25."""
    images = torch.randint(0, 256, (5, 3, 32, 48), generator=torch.manual_seed(0)).byte()
    encoders = Encoders(sd3, vae=True)
    x0 = encoders.encode(images)
    with torch.no_grad():
        z = pipeline.vae.encode(images / 127.5 - 1).latent_dist.mean
        pixels = pipeline.vae.decode(z).sample
    torch.testing.assert_close(x0, (z - 0.25) * 1.4, rtol=1e-4, atol=1e-5)
    difference = encoders.decode(x0).float() - data.to_uint8(pixels).float()
    assert x0.shape == (5, 16, 4, 6) and difference.abs().max() <= 1


def vae_with(sd3, folder, **config):
    """The folder of a VAE whose config.json says this of its scale and shift, and nothing else."""
    shutil.copytree(sd3, folder)
    path = folder / "vae" / "config.json"
    old = json.loads(path.read_text())
    del old["scaling_factor"], old["shift_factor"]
    path.write_text(json.dumps(old | config))
    return folder


SCALES = [
    (dict(), (1.5305, 0.0609)),  # SD3's
    (dict(scaling_factor=0.18215, shift_factor=None), (0.18215, 0)),
    (dict(scaling_factor=0.18215), (0.18215, 0)),
    (dict(scaling_factor=2, shift_factor=0), (2, 0)),
    (dict(scaling_factor=0.5, shift_factor=-0.25), (0.5, -0.25)),
]


@pytest.mark.parametrize(("config", "pair"), SCALES)
def test_a_vaes_own_scale_is_kept_and_only_one_that_says_nothing_has_sd3s(
    sd3, tmp_path, config, pair
):
    """No shift is a shift of 0."""
    assert Encoders(vae_with(sd3, tmp_path / "sd3", **config), vae=True).scale() == pair


NO_SCALES = [
    (dict(scaling_factor=None, shift_factor=0.1), "scaling_factor is None"),
    (dict(shift_factor=0.1), "scaling_factor is None"),
    (dict(scaling_factor=0, shift_factor=0.1), "scaling_factor is 0"),
    (dict(scaling_factor=-1.5), "scaling_factor is -1.5"),
    (dict(scaling_factor=True), "scaling_factor is True"),
    (dict(scaling_factor="1.5"), "scaling_factor is '1.5'"),
    (dict(scaling_factor=float("nan")), "scaling_factor is nan"),
    (dict(scaling_factor=10**400), "scaling_factor is 1000"),
    (dict(scaling_factor=1.5, shift_factor=float("inf")), "shift_factor is inf"),
    (dict(scaling_factor=1.5, shift_factor=[0.1]), r"shift_factor is \[0.1\]"),
    (dict(scaling_factor=1.5, shift_factor=False), "shift_factor is False"),
    (dict(scaling_factor=1.5, shift_factor=""), "shift_factor is ''"),
]


@pytest.mark.parametrize(("config", "named"), NO_SCALES, ids=[why for _, why in NO_SCALES])
def test_a_scale_that_is_no_number_to_use_is_refused_at_once_by_key_and_file(
    sd3, tmp_path, config, named
):
    """It would make black pictures, or end in a traceback once all prompts are encoded."""
    with pytest.raises(DataError, match=f"vae/config.json: {named}"):
        Encoders(vae_with(sd3, tmp_path / "sd3", **config), vae=True)


def test_every_encoder_is_on_the_device_only_while_it_works(sd3, monkeypatch):
    """Moves are recorded: one encoder's way back comes before the next one's way there."""
    encoders, moves = Encoders(sd3), []
    for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        model = encoders.part(name)
        monkeypatch.setattr(
            model, "to", lambda device, m=model, n=name: (moves.append((n, str(device))), m)[1]
        )
    encoders.device = torch.device("cpu", 0)  # told apart from the "cpu" they go back to
    encoders.text(["a"])
    names = ("text_encoder", "text_encoder_2", "text_encoder_3")
    assert moves == [(name, device) for name in names for device in ("cpu:0", "cpu")]


@pytest.mark.parametrize("t5", [True, False])
@pytest.mark.parametrize("width", [None, "24", 19, 24.0])
def test_a_width_of_t5_that_can_not_be_is_refused_by_key_and_file(sd3, tmp_path, t5, width):
    """Narrower than the CLIPs' 20, it would cut their features."""
    folder = shutil.copytree(sd3, tmp_path / "sd3")
    path = folder / "text_encoder_3" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(d_model=width)))
    with pytest.raises(DataError, match=f"text_encoder_3/config.json: d_model is {width!r}"):
        Encoders(folder, t5=t5).text(["a"])


@pytest.mark.parametrize("part", ["text_encoder_2", "tokenizer_3", "vae"])
def test_a_missing_part_is_named(sd3, images, tmp_path, capsys, part):
    folder = shutil.copytree(sd3, tmp_path / "sd3", ignore=shutil.ignore_patterns(part))
    assert encode("--model", folder, "--images", images, "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert f"lacks {part}/" in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


DAMAGES = ["cut", "a tensor missing", "a tensor misshapen", "no config.json"]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_encoder_is_named_and_once_repaired_it_goes_on(
    sd3, prompts, tmp_path, capfd, damage
):
    """transformers alone would go on with random numbers for the missing tensor."""
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(sd3, tmp_path / "sd3")
    path, name = folder / "text_encoder_2" / "model.safetensors", "text_projection.weight"
    tensors, why = load_file(path), f"1 tensors are missing or misshapen: {name}"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-100])
        why = "incomplete"
    elif damage == "no config.json":
        (path.parent / "config.json").unlink()
        why = "text_encoder_2/config.json is missing"
    else:
        old = tensors.pop(name)
        changes = {name: old[:, :-1].clone()} if damage == "a tensor misshapen" else {}
        save_file(tensors | changes, path, {"format": "pt"})
    arguments = ("--model", folder, "--prompts", prompts, "--out", tmp_path / "out")
    capfd.readouterr()
    assert encode(*arguments) == 2
    error = capfd.readouterr().err
    assert "text_encoder_2 can't be loaded" in error and why in error and error.count("\n") == 1
    shutil.copytree(sd3, folder, dirs_exist_ok=True)
    assert encode(*arguments) == 0


def with_tensors(sd3, folder, part, change):
    """A copy of the tiny pipeline; change: {name: tensor} of a part -> what is new of them."""
    from safetensors.torch import load_file, save_file

    (path,) = (shutil.copytree(sd3, folder) / part).glob("*.safetensors")
    tensors = load_file(path)
    save_file(tensors | change(tensors), path, {"format": "pt"})
    return folder


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("part", ["text_encoder", "vae"])
def test_quantised_weights_are_refused_and_not_read_as_they_are(
    sd3, images, tmp_path, capfd, part, suffix
):
    """Whole numbers from -127 to 127, with their scale beside them: features of garbage."""
    from safetensors.torch import load_file

    def quantised(tensors):
        matrices = {name: w for name, w in tensors.items() if w.ndim > 1}
        scales = {f"{name}.SCB": w.flatten(1).abs().amax(1) for name, w in matrices.items()}
        whole = {n: (w / w.abs().max() * 127).round().char() for n, w in matrices.items()}
        return whole | scales

    folder = with_tensors(sd3, tmp_path / "sd3", part, quantised)
    if suffix == ".bin":
        (path,) = (folder / part).glob("*.safetensors")
        name = "diffusion_pytorch_model.bin" if part == "vae" else "pytorch_model.bin"
        torch.save(load_file(path), path.with_name(name))
        path.unlink()
    capfd.readouterr()
    assert encode("--model", folder, "--images", images, "--out", tmp_path / "out") == 2
    error = capfd.readouterr().err.splitlines()[-1]
    assert f"{part} can't be loaded" in error and "whole numbers (" in error
    assert not [*(tmp_path / "out").iterdir()]


def test_an_encoder_that_its_tokenizer_does_not_fit_is_refused_and_signs_no_folder(
    sd3, prompts, tmp_path, capfd
):
    """Its words are numbers beyond the encoder's table."""
    name = "text_model.embeddings.token_embedding.weight"
    folder = with_tensors(
        sd3, tmp_path / "sd3", "text_encoder", lambda tensors: {name: tensors[name][:50].clone()}
    )
    config = folder / "text_encoder" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | dict(vocab_size=50)))
    arguments = ("--model", folder, "--prompts", prompts, "--out", tmp_path / "out")
    capfd.readouterr()
    assert encode(*arguments) == 2
    error = capfd.readouterr().err
    assert "text_encoder can't be used: index out of range" in error and error.count("\n") == 1
    shutil.copytree(sd3, folder, dirs_exist_ok=True)
    assert encode(*arguments) == 0


@pytest.mark.parametrize("part", ["tokenizer", "tokenizer_3"])
@pytest.mark.parametrize("kept", [[], ["tokenizer_config.json"]])
def test_a_tokenizer_without_its_vocabulary_is_refused(sd3, prompts, tmp_path, capfd, part, kept):
    """transformers alone would read every prompt as the same tokens."""
    folder = shutil.copytree(sd3, tmp_path / "sd3")
    for path in (folder / part).iterdir():
        if path.name not in kept:
            path.unlink()
    capfd.readouterr()
    assert encode("--model", folder, "--prompts", prompts, "--out", tmp_path / "out") == 2
    error = capfd.readouterr().err
    assert f"/{part} can't be loaded: it has no vocabulary" in error and error.count("\n") == 1


# ---------------------------------------------------------------------------------------------
# Shards
# ---------------------------------------------------------------------------------------------


def test_shards_give_back_the_features_of_every_prompt(sd3, prompts, tmp_path):
    """The encoders' numbers in bf16, for any order of captions, and row 0 the empty caption."""
    out = tmp_path / "shards"
    assert encode("--model", sd3, "--prompts", prompts, "--out", out, "--shard", 16) == 0
    dataset, encoders = data.load(str(out), [(8, 8)]), Encoders(sd3)
    assert len(list(out.glob("*.pt"))) == 1 + 3
    assert dataset.captions == ["", *(f"prompt number {i}" for i in range(40))]
    asked = ["prompt number 39", "", "prompt number 16", "prompt number 39"]
    for got, wanted in zip(dataset(asked), encoders(asked), strict=True):
        torch.testing.assert_close(got, wanted.bfloat16().float(), rtol=0.01, atol=1e-4)
    dropped = dataset.features(dataset.ids(asked) * torch.tensor([[0], [1], [1], [0]]))
    assert torch.equal(dropped[0][0], dataset([""])[0][0])  # as teachers drop captions
    with pytest.raises(DataError, match="no features of the caption 'unheard'"):
        dataset(["unheard"])


def test_prompts_are_drawn_without_gaps_or_doubles(sd3, prompts, tmp_path):
    out = tmp_path / "shards"
    encode("--model", sd3, "--prompts", prompts, "--out", out, "--shard", 16)
    sizes = [(4, 4), (2, 6), (6, 2)]
    dataset, drawn = data.load(str(out), sizes, seed=3), []
    for bucket in dataset.sets:
        images, caption = bucket.batch(np.arange(bucket.train_size) + SYNTHETIC_INDEX)
        assert images is None and bucket.size in sizes and bucket.train_size in (13, 14)
        drawn += caption.tolist()
    assert sorted(drawn) == list(range(1, 41))


def test_a_sample_costs_its_tensors_and_one_percent(sd3, prompts, tmp_path):
    out = tmp_path / "shards"
    prompts.write_text("".join(f"prompt number {i}\n" for i in range(200)), encoding="utf-8")
    encode("--model", sd3, "--prompts", prompts, "--out", out)
    on_disk = sum(path.stat().st_size for path in out.iterdir())
    assert on_disk <= 1.01 * 201 * 2 * (154 * 24 + 16) + 1500  # once: the folder's own index


def test_images_are_sorted_into_buckets_of_one_size(sd3, images, tmp_path):
    """Of nine pictures the one turned by its EXIF is tall; latents are those of its caption."""
    out = tmp_path / "shards"
    options = ("--size", 64, "--multiple", 16, "--shard", 3, "--aspects", "1:1,5:3,3:5")
    assert encode("--model", sd3, "--images", images, "--out", out, *options) == 0
    dataset, encoders = data.load(str(out), [(8, 8)]), Encoders(sd3, vae=True)
    dataset.check(network(), 1, True)
    assert {s.size: s.train_size for s in dataset.sets} == {(6, 10): 2, (8, 8): 3, (10, 6): 4}
    x0, caption = dataset.sets[2].batch(np.arange(4))
    assert x0.shape == (4, 16, 10, 6) and x0.dtype == torch.float32
    assert {dataset.captions[i] for i in caption} == {f"picture {i}" for i in (0, 1, 4, 7)}
    row = [dataset.captions[i] for i in caption].index("picture 4")
    pixels = torch.from_numpy(decode((images / "4.png").read_bytes(), [(80, 48)]).copy())
    wanted = encoders.encode(pixels[None])[0]
    torch.testing.assert_close(x0[row], wanted, rtol=0.01, atol=1e-3)


def test_a_cut_run_goes_on_and_keeps_what_is_finished(sd3, prompts, tmp_path, monkeypatch):
    """A full disk at the third shard ends the run; the same command makes the same folder."""
    arguments = ("--model", sd3, "--prompts", prompts, "--shard", 16, "--out")
    encode(*arguments, tmp_path / "whole")
    real, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == 7:  # shards.json and two shards, each with its folder
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor)

    out = tmp_path / "cut"
    monkeypatch.setattr(os, "fsync", full)
    assert encode(*arguments, out) == 1
    monkeypatch.undo()
    before = contents(out)
    assert sorted(before) == ["000000.pt", "000001.pt", "shards.json"]
    with pytest.raises(DataError, match=r"000002\.pt: not a shard \(.*no such file"):
        data.load(str(out), [(8, 8)])
    old = (out / "000001.pt").stat().st_mtime_ns
    assert encode(*arguments, out) == 0
    assert contents(out) == contents(tmp_path / "whole")
    assert (out / "000001.pt").stat().st_mtime_ns == old


def test_what_a_killed_process_left_of_its_own_shards_is_removed(sd3, prompts, tmp_path):
    """And what another one may be writing is not."""
    arguments = ("--model", sd3, "--prompts", prompts, "--out", tmp_path / "out", "--shard", 20)
    assert encode(*arguments) == 0
    (tmp_path / "out" / "000001.pt").rename(tmp_path / "out" / ".000001.pt.0123cdef.tmp")
    (tmp_path / "out" / ".000009.pt.0123cdef.tmp").write_bytes(b"another's")
    assert encode(*arguments) == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    shards = {f"00000{i}.pt" for i in range(3)}
    assert names == shards | {"shards.json", ".000009.pt.0123cdef.tmp"}


def test_two_processes_share_the_work(sd3, prompts, tmp_path, monkeypatch):
    """Each writes its own shards and nothing else, in any order, as torchrun's variables say."""
    arguments = ("--model", sd3, "--prompts", prompts, "--shard", 8, "--out")
    encode(*arguments, tmp_path / "one")
    out = tmp_path / "two"
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert encode(*arguments, out) == 0
    assert {int(p.stem) % 2 for p in out.glob("*.pt")} == {1}
    monkeypatch.setenv("RANK", "0")
    assert encode(*arguments, out) == 0
    assert contents(out) == contents(tmp_path / "one")


def test_processes_that_start_together_finish_one_folder(sd3, prompts, tmp_path, monkeypatch):
    """All of rank 0's work falls between rank 1's first encoding and its first file."""
    arguments = ("--model", sd3, "--prompts", prompts, "--out", tmp_path / "out", "--shard", 4)
    text, status = Encoders.text, []

    def interrupted(self, captions):
        if not status:
            status.append(None)
            monkeypatch.setenv("RANK", "0")
            status[0] = encode(*arguments)
            monkeypatch.setenv("RANK", "1")
        return text(self, captions)

    monkeypatch.setattr(Encoders, "text", interrupted)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert encode(*arguments) == 0 and status == [0]
    assert data.load(str(tmp_path / "out"), [(8, 8)]).sets[0].train_size == 40


@pytest.mark.parametrize("damage", ["cut", "altered", "missing"])
def test_damaged_shards_are_refused(sd3, prompts, tmp_path, damage):
    out = tmp_path / "shards"
    encode("--model", sd3, "--prompts", prompts, "--out", out, "--shard", 16)
    path = out / "000002.pt"
    content = path.read_bytes()
    if damage == "cut":
        path.write_bytes(content[:-100])
    elif damage == "altered":
        half = len(content) // 2
        path.write_bytes(content[:half] + bytes([content[half] ^ 1]) + content[half + 1 :])
    else:
        path.unlink()
    with pytest.raises(DataError, match="000002"):
        data.load(str(out), [(8, 8)])


def test_features_of_another_width_are_refused(sd3, prompts, tmp_path):
    out = tmp_path / "shards"
    encode("--model", sd3, "--prompts", prompts, "--out", out)
    dataset = data.load(str(out), [(8, 8)])
    dataset.check(network(), 1, False)
    with pytest.raises(DataError, match="text features 24 wide, but the network takes 4096"):
        dataset.check(network(text_dim=4096), 1, False)
    with pytest.raises(DataError, match="pooled text features 16 wide, but the network takes 24"):
        dataset.check(network(pooled_dim=0), 1, False)
    with pytest.raises(DataError, match="40 prompts are fewer than the 41 processes"):
        dataset.check(network(), 41, False)
    with pytest.raises(DataError, match="has prompts alone"):
        dataset.check(network(), 1, True)


@pytest.mark.parametrize(
    "content, words", [(None, "can't be read"), ("\n \n", "no prompt in it"), (b"\xff", "decode")]
)
def test_a_prompts_file_without_prompts_is_one_line(sd3, tmp_path, capsys, content, words):
    path = tmp_path / "prompts.txt"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert encode("--model", sd3, "--prompts", path, "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_other_folders_are_left_alone(sd3, prompts, tmp_path, capsys):
    """A folder with something else in it, or with the shards of other prompts."""
    out = tmp_path / "theirs"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    arguments = ("--model", sd3, "--prompts", prompts, "--out")
    assert encode(*arguments, out) == 2 and contents(out) == {"thesis.txt": b"mine"}
    assert "thesis.txt" in capsys.readouterr().err
    (tmp_path / "dangling").symlink_to("nowhere")
    for file in (out / "thesis.txt", out / "thesis.txt/more", "/dev/null", tmp_path / "dangling"):
        assert encode(*arguments, file) == 2 and contents(out) == {"thesis.txt": b"mine"}
        assert f"--out {file}: is a file" in capsys.readouterr().err
    encode(*arguments, tmp_path / "shards")
    before = contents(tmp_path / "shards")
    capsys.readouterr()
    assert encode(*arguments, tmp_path / "shards", "--no-t5") == 2
    error = capsys.readouterr().err
    assert "made with other settings (model" in error and "t5 True → False" in error
    assert contents(tmp_path / "shards") == before


@pytest.mark.parametrize("place", [100, -100])
def test_a_folder_made_with_an_encoder_of_other_numbers_is_not_gone_on_with(
    sd3, prompts, tmp_path, capsys, place
):
    """Its files have the same names and sizes."""
    folder = shutil.copytree(sd3, tmp_path / "sd3")
    arguments = ("--model", folder, "--prompts", prompts, "--out", tmp_path / "out")
    assert encode(*arguments) == 0
    path = folder / "text_encoder_3" / "model.safetensors"
    for size in (path.stat().st_size, 5 << 20):
        content = bytearray(path.read_bytes().ljust(size, b"\0"))
        path.write_bytes(content)
        before = Encoders(folder).identity()
        content[place] ^= 1
        path.write_bytes(content)
        assert Encoders(folder).identity() != before
    assert encode(*arguments) == 2
    assert "made with other settings (model" in capsys.readouterr().err


@pytest.mark.parametrize("packed", [False, True])
def test_a_folder_made_of_other_images_of_the_same_names_is_not_gone_on_with(
    sd3, images, tmp_path, capsys, packed
):
    """Wherever they lie."""
    folder = shutil.copytree(images, tmp_path / "images")

    def again(folder):
        path = shutil.make_archive(str(folder), "zip", folder) if packed else folder
        options = ("--size", 16, "--multiple", 16, "--out", tmp_path / "out")
        return encode("--model", sd3, "--images", path, *options)

    assert again(folder) == 0
    folder = folder.rename(tmp_path / "moved")
    assert again(folder) == 0
    Image.new("RGB", (50, 50)).save(folder / "2.png")
    assert again(folder) == 2
    assert "made with other settings (source" in capsys.readouterr().err


def test_a_size_that_is_no_multiple_is_refused_at_once(images, tmp_path, capsys):
    """No run could use the latents."""
    for size in ("200", "0", "-64"):
        with pytest.raises(SystemExit) as end:
            encode("--model", "nowhere", "--images", images, "--out", tmp_path, "--size", size)
        error = capsys.readouterr().err
        assert end.value.code == 2 and error.count("\n") == 1
        assert f"--size {size}: must be a multiple of --multiple 64" in error


def test_an_unreadable_image_among_many_is_named_and_left_out(sd3, tmp_path, capsys):
    folder = tmp_path / "many" / "red_fox"
    folder.mkdir(parents=True)
    for i in range(110):
        Image.new("RGB", (20, 20), (i, 0, 0)).save(folder / f"{i}.png")
    path = folder / "7.png"
    path.write_bytes(b"no picture")
    arguments = ("--model", sd3, "--images", folder.parent, "--size", 16, "--multiple", 8)
    arguments += ("--aspects", "4:1,1:1")
    assert encode(*arguments, "--out", tmp_path / "shards") == 0
    assert "7.png" in capsys.readouterr().err
    dataset = data.load(str(tmp_path / "shards"), [(8, 8)])
    (bucket,) = dataset.sets  # another had only the bad image
    assert bucket.size == (2, 2) and bucket.train_size == 109
    assert dataset.captions == ["", "a photo of a red fox"]


def test_missing_packages_are_named(sd3, prompts, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert encode("--model", sd3, "--prompts", prompts, "--out", tmp_path / "out") == 2
    assert "pip install diffusers transformers safetensors" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------
# ladd.py --data shards/
# ---------------------------------------------------------------------------------------------

TINY = "--smoke --device cpu --precision fp32 --channels 16 --downscale 8 --size 64 --width 32"
TINY += " --attention-heads 2 --text-dim 24 --pooled-dim 16 --depth 3 --head-width 16"


def test_latents_are_taught_distilled_and_decoded(sd3, images, prompts, tmp_path, capsys):
    """encode → ladd.py → sample.py --decode; then LADD from prompts alone with that teacher."""
    options = ("--size", 64, "--multiple", 16, "--aspects", "1:1,5:3,3:5")
    encode("--model", sd3, "--images", images, "--out", tmp_path / "latents", *options)
    encode("--model", sd3, "--prompts", prompts, "--out", tmp_path / "prompts")
    first, second = tmp_path / "first", tmp_path / "second"
    tiny = [*TINY.split(), "--data"]
    assert ladd.main([*tiny, str(tmp_path / "latents"), "--out", str(first)]) == 0
    shapes = {tuple(torch.load(p)["x0"].shape[1:]) for p in (first / "synthetic").iterdir()}
    assert shapes == {(16, 6, 10), (16, 8, 8), (16, 10, 6)}
    assert "--decode" in (first / "report.md").read_text()
    own, exported = torch.load(first / "student.pt")["weights"], first / "student.safetensors"
    weights = open_sd3(exported)[1]
    assert all(torch.equal(weights[name], own[name].bfloat16()) for name in own)

    alone = [*tiny, str(tmp_path / "prompts"), "--out", str(second), "--aspects", "1:1,4:1"]
    assert ladd.main(alone) == 2 and not second.exists()
    assert "prompts alone: that takes --teacher" in capsys.readouterr().err
    assert ladd.main([*alone, "--teacher", str(first / "teacher.pt")]) == 0
    made = [torch.load(path) for path in sorted((second / "synthetic").iterdir())]
    assert [shard["x0"].shape[1:] for shard in made] == [(16, 8, 8), (16, 8, 16)]
    assert len({caption for shard in made for caption in shard["captions"]}) == 32  # no doubles
    out = tmp_path / "fox.png"
    arguments = ["--decode", str(sd3), "--prompt", "a fox", "--device", "cpu", "--out", str(out)]
    assert sample.main([str(second), *arguments]) == 0
    with Image.open(out) as picture:
        assert picture.size == (66, 66)  # 64 × 64 in the frame of a grid


def test_features_reach_the_teacher_and_dropped_captions_are_empty(sd3, prompts, tmp_path):
    """Run.text_encoder is the shards': what HashedText does with words, they do with rows."""
    encode("--model", sd3, "--prompts", prompts, "--out", tmp_path / "shards")
    settings, _ = given_settings([*TINY.split(), "--data", str(tmp_path / "shards")])
    dataset = data.load(settings.data, settings.sizes)
    text = data.text_features(dataset, settings.text_dim, settings.text_length)
    run = Run(settings, dataset, text, watch=None)
    ids = run.text_encoder.ids(["prompt number 3", "prompt number 5"])
    context, pooled = run.text_encoder.features(ids * torch.tensor([[0], [1]]))
    wanted = run.text_encoder(["", "prompt number 5"])
    assert torch.equal(context, wanted[0]) and torch.equal(pooled, wanted[1])
    generator = ladd.generator(run, "teacher", MMDiT(**settings.model()))
    assert generator.text_encoder is run.text_encoder


# ---------------------------------------------------------------------------------------------
# sample.py --decode
# ---------------------------------------------------------------------------------------------


@pytest.fixture
def student(tmp_path):
    """A tiny student of latents 8 × 8, for the tiny pipeline's text features."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MMDiT(depth=1, width=16, heads=2, context_dim=24, pooled_dim=16, pos_size=8)
        for p in model.parameters():
            p.data.normal_(std=0.1)
    settings = dict(
        size=64, downscale=8, patch=2, pos_size=8, text_dim=24, text_length=8, levels=(1.0, 0.5)
    )
    settings["pooled_dim"] = 16
    settings |= dict(data="shards", seed=0, shift=3.0, teacher_steps=4, cfg=4.0)
    checkpoint = dict(format="ladd-1", kind="student", model=model.config, settings=settings)
    torch.save(checkpoint | dict(weights=model.state_dict(), step=1), tmp_path / "student.pt")
    return tmp_path


def test_decode_makes_pictures_of_any_size_from_real_prompts(student, sd3, tmp_path):
    """sample.py --decode: the encoders' features in, the VAE's pixels out, --size in pixels."""
    out = tmp_path / "pictures"
    arguments = [str(student), "--decode", str(sd3), "--prompt", "a fox", "--prompt", "x"]
    arguments += ["--size", "48x112", "--device", "cpu", "--precision", "fp32"]
    assert sample.main([*arguments, "--out", str(out)]) == 0
    encoders = Encoders(sd3, vae=True)
    generator = sample.load_generator(student, device="cpu", precision="fp32")
    generator.text_encoder = encoders.text
    wanted = encoders.decode(generator.sample(["a fox", "x"], size=(6, 14)))
    for i in range(2):
        pixels = np.asarray(Image.open(out / f"{i:05d}.png")).transpose(2, 0, 1)
        assert pixels.shape == (3, 48, 112) and np.array_equal(pixels, wanted[i].numpy())
    assert not torch.equal(wanted[0], wanted[1])


def test_a_run_on_shards_without_t5_is_decoded_without_it(student, sd3, prompts, tmp_path):
    """Its report says how; and nobody needs T5 who has none."""
    folder = shutil.copytree(sd3, tmp_path / "sd3", ignore=shutil.ignore_patterns("tokenizer_3"))
    shards, run = tmp_path / "shards", tmp_path / "run"
    assert encode("--model", folder, "--prompts", prompts, "--out", shards, "--no-t5") == 0
    s, _ = given_settings([*TINY.split(), "--data", str(shards), "--out", str(run)])
    run.mkdir()
    shutil.copy(student / "student.pt", run)
    told = SimpleNamespace(settings=s, out=run, dataset=data.load(s.data, s.sizes))
    told.alone, told.path = lambda: told, lambda kind: run / f"{kind}.pt"
    report(told)
    (command,) = re.findall("`python sample.py (.*)`", (run / "report.md").read_text())
    assert command.endswith("--no-t5")
    words = [str(folder) if w == "SD3_DIR" else w for w in command.split()]
    out = tmp_path / "a.png"
    assert sample.main([*words, "--device", "cpu", "--out", str(out)]) == 0
    assert sample.main([w for w in words if w != "--no-t5"]) == 2  # it has no tokenizer_3
    generator = sample.load_generator(student, device="cpu")
    context, _ = codec_of(sd3, generator, t5=False)(["a fox"])
    assert (context[:, 77:] == 0).all()


def test_decode_starts_at_images_and_shows_the_way(student, sd3, tmp_path):
    """From an image with hardly any noise on it comes that image, through the VAE and back."""
    pixels = torch.randint(0, 256, (1, 3, 64, 32), generator=torch.manual_seed(1)).byte()
    Image.fromarray(pixels[0].permute(1, 2, 0).numpy()).save(tmp_path / "start.png")
    arguments = [str(student), "--decode", str(sd3), "--prompt", "a fox", "--size", "64x32"]
    arguments += ["--init-image", str(tmp_path / "start.png"), "--device", "cpu"]
    arguments += ["--precision", "fp32", "--out", str(tmp_path / "out"), "--strength"]
    assert sample.main([*arguments, "0.0001"]) == 0
    encoders = Encoders(sd3, vae=True)
    wanted = encoders.decode(encoders.encode(pixels))[0].numpy()
    got = np.asarray(Image.open(tmp_path / "out" / "00000.png")).transpose(2, 0, 1)
    assert np.abs(got.astype(int) - wanted).max() <= 2
    assert sample.main([*arguments, "1", "--trajectory", str(tmp_path / "way.gif")]) == 0
    with Image.open(tmp_path / "way.gif") as moving:
        assert moving.n_frames == 2 and moving.size == (34, 66)


def test_decode_refuses_what_does_not_fit(student, sd3, capsys, tmp_path):
    run = [str(student), "--prompt", "x", "--device", "cpu", "--out", str(tmp_path / "a.png")]
    assert sample.main(run) == 2
    assert "makes latents: add --decode SD3_DIR" in capsys.readouterr().err
    assert sample.main([*run, "--decode", str(sd3), "--size", "40x64"]) == 2
    assert "multiples of the patch, 16" in capsys.readouterr().err
    checkpoint = torch.load(student / "student.pt")
    model = MMDiT(**checkpoint["model"] | dict(context_dim=32))
    checkpoint["settings"]["text_dim"] = 32
    torch.save(
        checkpoint | dict(model=model.config, weights=model.state_dict()), student / "student.pt"
    )
    assert sample.main([*run, "--decode", str(sd3)]) == 2
    assert "(24, 16, 16, 8), but the model has (32, 16, 16, 8)" in capsys.readouterr().err


def test_decode_refuses_a_vae_of_another_factor(student, sd3):
    """Which would draw the picture in another size."""
    generator = sample.load_generator(student, device="cpu")
    generator.settings.downscale = 4
    with pytest.raises(DataError, match=r"\(24, 16, 16, 8\), but the model has \(24, 16, 16, 4\)"):
        codec_of(sd3, generator)


def test_ctrl_c_says_that_what_is_finished_is_kept(sd3, prompts, tmp_path, monkeypatch, capsys):
    """One line and status 130."""

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Encoders, "text", interrupted)
    assert encode("--model", sd3, "--prompts", prompts, "--out", tmp_path / "out") == 130
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("sd3/encode.py: interrupted; what is finished in")


def test_prompts_that_are_cut_are_told_with_their_number(sd3, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS), "utf-8")
    prompts = tmp_path / "prompts.txt"
    assert encode("--model", sd3, "--prompts", prompts, "--out", tmp_path / "out") == 0
    said = capsys.readouterr().err
    assert "of 1 caption only the first 77 tokens are read: a very long prompt" in said


def test_what_a_vae_decodes_is_finite_or_no_picture(sd3):
    """Not black."""
    encoders = Encoders(sd3, vae=True)
    vae = encoders.part("vae")
    vae.decoder.conv_out.bias.data[0] = float("inf")
    with pytest.raises(RunError, match="what it decodes is not finite"):
        encoders.decode(torch.zeros(1, 16, 4, 4))


@pytest.mark.parametrize("device", ["gpu", "meta"])
def test_encode_refuses_a_device_as_all_programs_do(sd3, prompts, tmp_path, capsys, device):
    words = ["--model", sd3, "--prompts", prompts, "--out", tmp_path / "out", "--device", device]
    assert main([*map(str, words)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"sd3/encode.py: --device {device}: ") and said.count("\n") == 1
    assert not (tmp_path / "out").exists()
