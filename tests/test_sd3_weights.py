"""Weights in and out: released single files, diffusers folders, our export, hostile files."""

import json
import random
import resource
import struct
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from test_mmdit import VARIANTS, inputs, randomise

import data
import ladd
import sample
from lib.errors import CheckpointError
from mmdit import MMDiT
from sd3.weights import PREFIX, Weights, meta_sd3, open_sd3, write_tensors

safetensors = pytest.importorskip("safetensors.torch")
safe_open = pytest.importorskip("safetensors").safe_open

SHAPE = dict(depth=3, heads=2, patch=2, channels=5, context_dim=7, pooled_dim=9, pos_size=8)
OURS = {  # the three released architectures at small depth
    name: dict(SHAPE, width=2 * dim, qk_norm=qk_norm is not None, attn2_blocks=len(attn2))
    for name, (qk_norm, dim, attn2) in VARIANTS.items()
}


def tensors(variant="sd3.5-medium", seed=0):
    """Random weights of a variant, the position table included: {official name: tensor}."""
    state = randomise(MMDiT(**OURS[variant]), seed).state_dict()
    return state | dict(pos_embed=torch.randn(1, 64, OURS[variant]["width"]))


def export(path, weights, heads=2):
    named = {PREFIX + name: weights[name] for name in weights}
    write_tensors(path, named, "fp32", heads=str(heads))
    return path


def content(path):
    """A file's tensors, and what it says beside them."""
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def diffusers_model(weights, variant):
    """diffusers' own network of our export, by diffusers' own conversion of single files."""
    diffusers = pytest.importorskip("diffusers")
    from diffusers.loaders import single_file_utils as convert

    c, head_dim = OURS[variant], VARIANTS[variant][1]
    theirs = diffusers.SD3Transformer2DModel(
        sample_size=16, in_channels=5, out_channels=5, num_layers=3, num_attention_heads=2,
        attention_head_dim=head_dim, caption_projection_dim=2 * head_dim, joint_attention_dim=7,
        pooled_projection_dim=9, pos_embed_max_size=8,
        qk_norm="rms_norm" if c["qk_norm"] else None,
        dual_attention_layers=tuple(range(c["attn2_blocks"])),
    )  # fmt: skip
    theirs.load_state_dict(convert.convert_sd3_transformer_checkpoint_to_diffusers(weights))
    return theirs


# ---------------------------------------------------------------------------------------------
# diffusers
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_diffusers_reads_our_export_and_computes_the_same(variant, tmp_path):
    """Export -> diffusers' single-file converter -> SD3Transformer2DModel: equal velocities."""
    weights = tensors(variant)
    file = safetensors.load_file(export(tmp_path / "a.safetensors", weights))
    ours = MMDiT(**OURS[variant])
    ours.load_state_dict(weights)
    x, t, context, pooled = (tensor.float() for tensor in inputs(SHAPE))
    with torch.no_grad():
        theirs = diffusers_model(file, variant)(x, context, pooled, 1000 * t, return_dict=False)[0]
        v, _ = ours(x, t, context, pooled)
    assert v.std() > 0.1
    torch.testing.assert_close(v, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("files", ["one file", "shards", "fp16 beside", "one file by its name"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_folder_of_diffusers_comes_back_bit_for_bit(variant, files, tmp_path):
    """Export -> diffusers -> its folder -> ours -> export: the same file."""
    first = export(tmp_path / "a.safetensors", tensors(variant))
    theirs, folder = diffusers_model(safetensors.load_file(first), variant), tmp_path / "folder"
    theirs.save_pretrained(folder, max_shard_size="100kB" if files == "shards" else "1GB")
    assert len(list(folder.glob("*.safetensors"))) > 1 or files != "shards"
    if files == "fp16 beside":
        theirs.half().save_pretrained(folder, variant="fp16")
    if files == "one file by its name":
        folder = folder / "diffusion_pytorch_model.safetensors"
    model, weights = open_sd3(folder)
    assert model.config == OURS[variant]
    before, after = content(first), content(export(tmp_path / "b.safetensors", weights))
    assert same(before[0], after[0]) and before[1] == after[1]


def test_a_folder_with_a_shard_missing_is_refused_by_the_shards_name(tmp_path):
    theirs = diffusers_model(tensors(), "sd3.5-medium")
    theirs.save_pretrained(tmp_path / "folder", max_shard_size="100kB")
    shard = sorted((tmp_path / "folder").glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=shard.name):
        open_sd3(tmp_path / "folder")


# ---------------------------------------------------------------------------------------------
# Single files
# ---------------------------------------------------------------------------------------------

BESIDE = {"first_stage_model.decoder.conv_in.weight": torch.ones(4, 3, dtype=torch.float64)}
BESIDE |= {"text_encoders.t5xxl.logit_scale": torch.tensor(1)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("prefix", ["", PREFIX])
def test_a_released_file_is_read_as_it_is_and_other_networks_in_it_are_counted(
    prefix, dtype, tmp_path
):
    """With and without the prefix, in its own type; VAE and text encoders are left out."""
    weights = {name: tensor.to(dtype) for name, tensor in tensors().items()}
    file = {prefix + name: tensor for name, tensor in weights.items()}
    safetensors.save_file(file | BESIDE, tmp_path / "a.safetensors")
    model, read = open_sd3(tmp_path / "a.safetensors")
    assert same(weights, dict(read)) and read.ignored == 2
    model.load_state_dict(read, assign=True)
    assert {p.dtype for p in model.parameters()} == {dtype} and model.config["attn2_blocks"] == 2


def test_heads_that_no_shape_tells_are_in_our_export_and_in_the_config_of_diffusers(tmp_path):
    """Without QK-norm, 128 channels could be any number of heads; 64 each is SD3's rule."""
    path = export(tmp_path / "diffusion_pytorch_model.safetensors", tensors("sd3-medium"), heads=4)
    assert open_sd3(path)[0].config["heads"] == 4
    (tmp_path / "config.json").write_text('{"num_attention_heads": 8}')
    assert open_sd3(tmp_path)[0].config["heads"] == 8
    safetensors.save_file(tensors("sd3-medium"), path)
    assert open_sd3(path)[0].config["heads"] == 2


def test_training_on_the_mapped_weights_leaves_the_file_alone(tmp_path):
    path = export(tmp_path / "a.safetensors", tensors())
    before, (model, weights) = path.read_bytes(), open_sd3(path)
    model.load_state_dict(weights, assign=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert path.read_bytes() == before


def test_parts_are_joined_when_they_are_asked_for_and_shapes_cost_nothing():
    """What a loader of shards needs: names and shapes unread, then one tensor at a time."""
    q, k = torch.ones(2, 3), torch.zeros(4, 3)
    weights = Weights(dict(a=[q], b=[q, k]))
    assert weights.shapes == dict(a=(2, 3), b=(6, 3)) and list(weights) == ["a", "b"]
    assert weights["a"] is q and torch.equal(weights["b"], torch.cat([q, k]))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's peak of memory")
def test_a_file_is_in_memory_once_and_only_where_it_is_read(tmp_path):
    """Peak of resident memory in a fresh process, as multiples of 200 MB: opened, then all read."""
    config = dict(depth=2, width=1024, heads=16, pos_size=8)
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in MMDiT(**config).state_dict().items()}
    zeros = {name: torch.zeros(()).expand(shape) for name, shape in shapes.items()}
    path = export(tmp_path / "big.safetensors", zeros, heads=16)
    script = """
        import sys, safetensors.torch, torch, mmdit, sd3.weights
        def peak(): return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) << 10
        with torch.device("meta"): mmdit.MMDiT(depth=1)  # what it imports is no weight
        start = peak()
        model, weights = sd3.weights.open_sd3(sys.argv[1])
        model.load_state_dict(weights, assign=True)
        opened = peak()
        for tensor in model.state_dict().values(): tensor.sum()
        print(opened - start, peak() - start)
    """
    words = [sys.executable, "-c", textwrap.dedent(script), str(path)]
    root = Path(__file__).resolve().parent.parent
    answer = subprocess.run(words, cwd=root, capture_output=True, text=True, check=True)
    size = path.stat().st_size
    opened, read = (int(word) / size for word in answer.stdout.split())
    assert size > 200e6
    assert opened < 0.2 and 0.9 < read < 1.2


WEIGHTS = tensors()


@pytest.mark.parametrize("prefix", ["transformer.", "module.", "a.b.", "_orig_mod."])
def test_any_prefix_that_all_names_have_is_taken_off(prefix, tmp_path):
    file = {prefix + name: tensor for name, tensor in WEIGHTS.items()}
    safetensors.save_file(file | BESIDE, tmp_path / "a.safetensors")
    read = open_sd3(tmp_path / "a.safetensors")[1]
    assert same(WEIGHTS, dict(read)) and read.ignored == 2


@pytest.mark.parametrize("beside", ["vae.x", "text_encoder_2.x", "t5xxl.x", "model_ema.decay"])
def test_other_networks_beside_one_without_a_prefix_are_left_out(beside, tmp_path):
    safetensors.save_file(WEIGHTS | {beside: torch.ones(1)}, tmp_path / "a.safetensors")
    read = open_sd3(tmp_path / "a.safetensors")[1]
    assert same(WEIGHTS, dict(read)) and read.ignored == 1


def test_a_file_of_several_networks_is_refused(tmp_path):
    """Which of them is meant only the user knows."""
    both = {f"{prefix}.{k}": v.clone() for prefix in "ab" for k, v in WEIGHTS.items()}
    safetensors.save_file(both, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"several networks: a\., b\.; give a file of one"):
        open_sd3(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    "wrap",
    [lambda w: w, lambda w: dict(state_dict=w, step=torch.ones(1)), lambda w: dict(model=w)],
)
@pytest.mark.parametrize("name", ["model.ckpt", "model.bin", "model.pth"])
def test_plain_weights_of_torch_save_are_read_whatever_their_name(name, wrap, tmp_path):
    torch.save(wrap({PREFIX + k: v for k, v in WEIGHTS.items()}), tmp_path / name)
    assert same(WEIGHTS, dict(open_sd3(tmp_path / name)[1]))


@pytest.mark.parametrize("content", [[1], dict(state_dict=[1]), {1: torch.ones(1)}])
def test_a_file_of_torch_save_without_names_is_told_in_plain_words(content, tmp_path):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"of torch\.save, not weights by name"):
        open_sd3(tmp_path / "a.pt")


def folders(path):
    """Ways to keep diffusers' network in a folder: {name: function that makes it}."""
    theirs = diffusers_model(dict(WEIGHTS), "sd3.5-medium")
    small = dict(max_shard_size="100kB")

    def without(name, folder, **options):
        theirs.save_pretrained(folder, **options)
        (folder / name).unlink()

    return {
        "a whole SD3 folder": lambda: theirs.save_pretrained(path / "transformer"),
        "the hub's cache": lambda: theirs.save_pretrained(path / "snapshots/ab/transformer"),
        "no config": lambda: without("config.json", path),
        "no index": lambda: without(
            "diffusion_pytorch_model.safetensors.index.json", path, **small
        ),
        "torch.save": lambda: theirs.save_pretrained(path, safe_serialization=False),
        "shards of torch.save": lambda: theirs.save_pretrained(
            path, safe_serialization=False, **small
        ),
        "one file of any name": lambda: export(path / "sd3.safetensors", WEIGHTS),
    }


@pytest.mark.parametrize(
    "case",
    ["a whole SD3 folder", "the hub's cache", "no config", "no index", "torch.save",
     "shards of torch.save", "one file of any name"],
)  # fmt: skip
def test_the_network_is_found_in_the_folders_that_people_have(case, tmp_path):
    path = tmp_path / "folder"
    path.mkdir()
    folders(path)[case]()
    assert same(WEIGHTS, dict(open_sd3(path)[1]))


# ---------------------------------------------------------------------------------------------
# What is refused
# ---------------------------------------------------------------------------------------------


def test_missing_surplus_and_misshapen_tensors_are_listed_in_one_error(tmp_path):
    """The names of the first dozen of each kind, and how many there are."""
    weights = tensors()
    for i in range(13):
        weights[f"lora.{i:02d}.weight"] = torch.zeros(1)
    del weights["joint_blocks.1.x_block.mlp.fc1.weight"], weights["t_embedder.mlp.0.bias"]
    weights["final_layer.linear.bias"] = torch.zeros(3)
    path = export(tmp_path / "a.safetensors", weights)
    with pytest.raises(CheckpointError) as refused:
        open_sd3(path)
    message = str(refused.value)
    assert str(path) in message and "\n" not in message
    assert "2 missing: joint_blocks.1.x_block.mlp.fc1.weight, t_embedder.mlp.0.bias;" in message
    assert "13 surplus: 'lora.00.weight'," in message and "'lora.11.weight', …" in message
    assert "lora.12" not in message
    assert "1 misshapen: final_layer.linear.bias (3,) for (20,)" in message


def test_without_safetensors_the_error_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(CheckpointError, match=r"a\.safetensors.*pip install safetensors"):
        open_sd3(tmp_path / "a.safetensors")


def entry(start, end, dtype="F32", shape=None):
    return dict(dtype=dtype, shape=shape or [(end - start) // 4], data_offsets=[start, end])


def official(change, variant="sd3.5-medium"):
    """The header of a good file with something changed, and the length of its body."""
    header, end = {}, 0
    for name, tensor in tensors(variant).items():
        start, end = end, end + 4 * tensor.numel()
        header[name] = entry(start, end, shape=list(tensor.shape))
    change(header)
    return header, end


def ten_thousand(header):
    end = header["final_layer.linear.bias"]["data_offsets"][1]
    header.update({f"joint_blocks.{i}.x": entry(end, end, shape=[0]) for i in range(10_000)})


def heads(value):
    return lambda header: header.update(__metadata__=dict(heads=value))


# header (a dict, or bytes), bytes of tensors, and what the header is said to measure
HOSTILE = {
    "empty file": (None, 0),
    "cut in the length": (b"", 0),
    "header longer than the file": (dict(a=entry(0, 8)), 8, 1000),
    "header of 2^63 bytes": (dict(a=entry(0, 8)), 8, 1 << 63),
    "10 GB in a kilobyte": (dict(a=entry(0, 10**10)), 800),
    "10 GB of shape in 8 bytes": (dict(a=entry(0, 8, shape=[2_500_000_000])), 8),
    "2^64 numbers": (dict(a=entry(0, 8, shape=[1 << 32, 1 << 32])), 8),
    "overlapping": (dict(a=entry(0, 8), b=entry(4, 12)), 12),
    "the same bytes twice": (dict(a=entry(0, 8), b=entry(0, 8)), 8),
    "a hole": (dict(a=entry(0, 8), b=entry(16, 24)), 24),
    "bytes left over": (dict(a=entry(0, 8)), 16),
    "end before start": (dict(a=dict(dtype="F32", shape=[2], data_offsets=[8, 0])), 8),
    "negative size": (dict(a=entry(0, 8, shape=[-2])), 8),
    "unknown type": (dict(a=entry(0, 8, "F99")), 8),
    "integers": official(lambda h: h["pos_embed"].update(dtype="I32")),
    "complex": (dict(a=entry(0, 8, "C64", [1])), 8),
    "8-bit floats": (dict(a=entry(0, 8, "F8_E4M3", [8])), 8),
    "no JSON": (b"{hello", 0),
    "not UTF-8": (b'{"\xff": 1}', 0),
    "deep JSON": (b"[" * 100_000, 0),
    "a list": (b"[]", 0),
    "no tensors": ({}, 0),
    "newline in a name": ({"a\nb": entry(0, 8)}, 8),
    "newline in a wrong name": ({"a\nb": entry(8, 16)}, 16),
    "a name of 100 kB": ({"a" * 100_000: entry(0, 8)}, 8),
    "a wrong name of 100 kB": ({"a" * 100_000: entry(8, 16)}, 16),
    "another network": (dict(a=entry(0, 8)), 8),
    "ten thousand blocks": official(ten_thousand),
    "a flat patch matrix": official(lambda h: h["x_embedder.proj.weight"].update(shape=[480])),
    "a flat table": official(lambda h: h["pos_embed"].update(shape=[1536])),
    "heads that don't divide": official(heads("7"), "sd3-medium"),
    "heads below zero": official(heads("-4"), "sd3-medium"),
    "heads that are no number": official(heads("9" * 5000)),
}


def hostile(path, header, body, length=None):
    if header is None:
        return path.write_bytes(b"")
    if isinstance(header, dict):
        header = json.dumps(header).encode()
    start = struct.pack("<Q", len(header) if length is None else length)
    return path.write_bytes((start + header + bytes(body)) if header else start[:3])


def test_names_alone_do_not_ask_for_days_of_building_blocks():
    """A name costs a stranger 20 bytes, a block of ours milliseconds."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors().items()}
    shapes |= {f"joint_blocks.{i}.x": (0,) for i in range(200)}
    with pytest.raises(CheckpointError, match="200 blocks"):
        meta_sd3(shapes)


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_file_is_one_clear_line_and_status_2(case, tmp_path, capsys):
    """The message names the file; no run folder is made."""
    path = tmp_path / "stranger.safetensors"
    hostile(path, *HOSTILE[case])
    assert ladd.main(["--teacher", str(path), "--out", str(tmp_path / "run")]) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"ladd.py: {path}: can't be read") and message.count("\n") == 1
    assert len(message) < 5000 and [p.name for p in tmp_path.iterdir()] == [path.name]


LORA = ["lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight"]
LORA += ["transformer.transformer_blocks.0.attn.to_q.lora_A.weight"]


@pytest.mark.parametrize("name", LORA)
@pytest.mark.parametrize("place", ["a.safetensors", "folder/pytorch_lora_weights.safetensors"])
def test_a_lora_is_named_as_what_it_is(name, place, tmp_path):
    path = tmp_path / place
    path.parent.mkdir(exist_ok=True)
    safetensors.save_file({name: torch.zeros(4, 4)}, path)
    given = path if path.parent == tmp_path else path.parent
    with pytest.raises(CheckpointError, match=f"{given}: .*a LoRA.*merge it into its SD3 network"):
        open_sd3(given)


def test_a_folder_of_several_single_files_asks_for_one_of_them(tmp_path):
    for name in ("sd3_medium", "sd3_medium_incl_clips"):
        export(tmp_path / f"{name}.safetensors", tensors())
    with pytest.raises(
        CheckpointError, match=r"sd3_medium\.safetensors, .*give one of these files"
    ):
        open_sd3(tmp_path)


FOLDERS = {
    "no config": dict(),
    "a damaged config": {"config.json": "{"},
    "a config of something else": {"config.json": "[]"},
    "no weights": {"config.json": '{"num_attention_heads": 2}'},
    "a damaged index": {
        "config.json": '{"num_attention_heads": 2}',
        "diffusion_pytorch_model.safetensors.index.json": '{"weight_map": 3}',
    },
    "an index that leads out": {
        "config.json": '{"num_attention_heads": 2}',
        "diffusion_pytorch_model.safetensors.index.json": '{"weight_map": {"a": "../a.pt"}}',
    },
}


@pytest.mark.parametrize("case", FOLDERS)
def test_a_folder_that_is_none_of_diffusers_is_one_clear_line_and_status_2(case, tmp_path, capsys):
    export(tmp_path / "a.pt", tensors())  # good weights outside of the folder
    folder = tmp_path / "transformer"
    folder.mkdir()
    for name, text in FOLDERS[case].items():
        (folder / name).write_text(text)
    assert ladd.main(["--teacher", str(folder), "--out", str(tmp_path / "run")]) == 2
    message = capsys.readouterr().err
    assert f"ladd.py: {folder}: can't be read" in message and message.count("\n") == 1


def test_flipped_and_cut_bytes_are_refused_or_harmless(tmp_path):
    """300 damaged files: each is read as a network of 24 channels or refused by its name."""
    good = export(tmp_path / "good.safetensors", tensors()).read_bytes()
    length, draw = 8 + int.from_bytes(good[:8], "little"), random.Random(0)
    path, refused = tmp_path / "bad.safetensors", 0
    for _ in range(300):
        bad = bytearray(good[: draw.randrange(len(good)) if draw.random() < 0.3 else len(good)])
        for _ in range(draw.choice([0, 1, 1, 4])):
            if bad:  # mostly in the header, where it matters
                place = draw.randrange(min(len(bad), draw.choice([8, length, len(good)])))
                bad[place] ^= 1 << draw.randrange(8)
        path.write_bytes(bad)
        try:
            assert open_sd3(path)[0].config["width"] == 24
        except CheckpointError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            refused += 1
    assert 100 < refused < 300


# ---------------------------------------------------------------------------------------------
# The command lines
# ---------------------------------------------------------------------------------------------

FEW = "--size 8 --width 16 --depth 2 --attention-heads 4 --no-qk-norm --text-dim 4"
FEW += " --text-length 3 --taps 0,1 --pos-size 4 --head-width 16"
FEW += " --teacher-iterations 2 --teacher-batch 4 --iterations 4 --batch 4 --heads-warmup 2"
FEW += " --synthetic 4 --synthetic-steps 1 --teacher-steps 1"
FEW += " --evaluation 8 --judge-steps 2 --judge-width 8 --device cpu --precision fp32"
MAKING = ("teacher", "synthesis", "distillation")


def train(out, *more, stages=MAKING):
    for stage in stages:
        assert ladd.main([*FEW.split(), "--stage", stage, "--out", str(out), *map(str, more)]) == 0
    return out


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A small run of two heads' worth of channels each, without QK-norm."""
    return train(tmp_path_factory.mktemp("weights") / "run")


def weights_of(path):
    return torch.load(path, weights_only=True)["weights"]


def test_a_student_exported_is_a_teacher_for_ladd(run, tmp_path, capsys):
    """sample.py --export -> ladd.py --teacher: the same weights, heads of 4 channels included."""
    out = tmp_path / "student.safetensors"
    assert sample.main([str(run), "--export", str(out)]) == 0
    train(tmp_path / "run", "--teacher", out, stages=["teacher"])
    assert same(weights_of(tmp_path / "run" / "teacher.pt"), weights_of(run / "student.pt"))
    other = ["--teacher", str(out), "--attention-heads", "2", "--out", str(tmp_path / "other")]
    assert ladd.main([*FEW.split(), *other]) == 2
    assert f"--teacher {out}: another network than the settings' (heads 4 → 2)" in (
        capsys.readouterr().err
    )


def test_a_teacher_may_bring_other_networks_which_are_said_to_be_ignored(run, tmp_path, capsys):
    """A single file in fp16 with a VAE inside; the run's own folder has the network alone."""
    half = {PREFIX + name: t.half() for name, t in weights_of(run / "teacher.pt").items()}
    path = tmp_path / "all.safetensors"
    safetensors.save_file(half | BESIDE, path, metadata=dict(heads="4"))
    train(tmp_path / "run", "--teacher", path, stages=["teacher", "synthesis"])
    assert f"--teacher {path}: 2 tensors of other networks are ignored" in capsys.readouterr().out
    assert same(
        weights_of(tmp_path / "run" / "teacher.pt"),
        {name.removeprefix(PREFIX): t for name, t in half.items()},
    )


def test_a_run_folder_gives_its_own_networks(run, tmp_path):
    """--teacher its teacher.pt, --discriminator its heads.pt; whatever the file is called."""
    given = ["--teacher", run, "--discriminator", run, "--seed", 1]
    again = train(tmp_path / "run", *given)
    assert same(weights_of(again / "teacher.pt"), weights_of(run / "teacher.pt"))
    other = tmp_path / "it.ckpt"
    other.write_bytes((run / "teacher.pt").read_bytes())
    again = train(tmp_path / "other", "--teacher", other, stages=["teacher"])
    assert same(weights_of(again / "teacher.pt"), weights_of(run / "teacher.pt"))


@pytest.mark.parametrize("number", [float("nan"), float("inf"), 1e300])
@pytest.mark.parametrize("kind", ["teacher", "discriminator"])
def test_given_weights_that_are_not_finite_are_refused_before_anything_is_made(
    run, tmp_path, capsys, kind, number
):
    """By the tensor's name: samples of them would be black, or noticed hours later. A file of
    float64 may hold numbers beyond the network's float32."""
    file = run / ("teacher.pt" if kind == "teacher" else "heads.pt")
    checkpoint = torch.load(file, weights_only=True)
    name = list(checkpoint["weights"])[-1]
    checkpoint["weights"][name] = checkpoint["weights"][name].double()
    checkpoint["weights"][name].view(-1)[0] = number
    torch.save(checkpoint, tmp_path / "bad.pt")
    words = [f"--{kind}", str(tmp_path / "bad.pt"), "--out", str(tmp_path / "run")]
    assert ladd.main([*FEW.split(), *words]) == 2
    said = f"ladd.py: --{kind} {tmp_path / 'bad.pt'}: {name} in it has numbers that are not finite"
    assert capsys.readouterr().err.startswith(said)
    assert not (tmp_path / "run").exists()


def harm_heads(checkpoint, harm):
    """A part of heads.pt is not what it should be."""
    weights, moments = checkpoint["weights"], checkpoint["optimizer"]["state"]
    name = list(weights)[-1]
    if harm == "a weight that lacks":
        del weights[name]
    elif harm == "a weight too many":
        weights["more"] = torch.ones(2)
    elif harm == "a weight of another shape":
        weights[name] = weights[name][:-1].clone()
    elif harm == "whole numbers":
        weights[name] = weights[name].to(torch.int8)
    elif harm == "moments of another shape":
        moments[0].update(exp_avg=torch.ones(1), exp_avg_sq=torch.ones(1))
    elif harm == "moments that are not finite":
        moments[0]["exp_avg"].view(-1)[0] = float("nan")
    elif harm == "moments that lack":
        del moments[0]["exp_avg_sq"]
    else:
        checkpoint.pop(harm)


HARMS = (
    "a weight that lacks", "a weight too many", "a weight of another shape", "whole numbers",
    "moments of another shape", "moments that are not finite", "moments that lack", "weights",
    "model",
)  # fmt: skip


@pytest.mark.parametrize("harm", HARMS)
def test_heads_whose_parts_dont_fit_are_refused_before_anything_is_made(
    run, tmp_path, capsys, harm
):
    """AdamW's kernel would write moments of a wrong shape beyond their memory."""
    checkpoint = torch.load(run / "heads.pt", weights_only=True)
    harm_heads(checkpoint, harm)
    torch.save(checkpoint, tmp_path / "bad.pt")
    words = ["--discriminator", str(tmp_path / "bad.pt"), "--out", str(tmp_path / "run")]
    assert ladd.main([*FEW.split(), *words]) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"ladd.py: {tmp_path / 'bad.pt'}: its parts don't fit together (")
    assert message.count("\n") == 1 and not (tmp_path / "run").exists()


def test_a_run_without_a_teacher_is_refused_by_the_missing_files_name(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.jsonl").touch()
    words = ["--teacher", str(tmp_path / "run"), "--out", str(tmp_path / "new")]
    assert ladd.main(words) == 2
    missing = tmp_path / "run" / "teacher.pt"
    assert f"{missing}: no such file. Has the run got that far?" in capsys.readouterr().err


def test_a_student_of_latents_needs_safetensors_at_the_start_and_not_only_at_the_end(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("tools.train.find_spec", lambda name: None)
    monkeypatch.setattr("tools.train.open_data", lambda s, given: (s, data.DataSet(), None))
    words = ["--preset", "sd3-2b", "--data", "shards", "--out", str(tmp_path / "run")]
    assert ladd.main(words) == 2
    assert "pip install safetensors" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


DTYPES = dict(fp32=torch.float32, bf16=torch.bfloat16, fp16=torch.float16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_export_has_official_names_and_the_type_that_was_asked_for(run, tmp_path, dtype):
    out = tmp_path / "new folder" / "teacher.safetensors"
    assert sample.main([str(run), "--teacher", "--export", str(out), "--dtype", dtype]) == 0
    want = {PREFIX + k: v.to(DTYPES[dtype]) for k, v in weights_of(run / "teacher.pt").items()}
    assert same(safetensors.load_file(out), want)


def test_an_export_overwrites_nothing_and_leaves_nothing_half_written(run, tmp_path, capsys):
    out = tmp_path / "mine.safetensors"
    out.write_bytes(b"mine")
    assert sample.main([str(run), "--export", str(out)]) == 2
    assert "mine.safetensors: exists" in capsys.readouterr().err
    checkpoint = torch.load(run / "teacher.pt", weights_only=True)
    checkpoint["weights"]["t_embedder.mlp.0.bias"][3] = 1e5  # beyond fp16
    torch.save(checkpoint, tmp_path / "large.pt")
    words = ["--export", str(tmp_path / "half.safetensors"), "--dtype", "fp16"]
    assert sample.main([str(tmp_path / "large.pt"), *words]) == 2
    assert "t_embedder.mlp.0.bias holds numbers that fp16 can't" in capsys.readouterr().err
    checkpoint["weights"]["t_embedder.mlp.0.bias"][3] = float("nan")  # in no type
    torch.save(checkpoint, tmp_path / "large.pt")
    assert sample.main([str(tmp_path / "large.pt"), *words]) == 2
    assert "t_embedder.mlp.0.bias holds numbers that are not finite" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["large.pt", "mine.safetensors"]
    assert out.read_bytes() == b"mine"


def test_an_export_to_a_full_disk_is_one_line_and_leaves_no_file(run, tmp_path, capsys):
    """A limit of 10 kB per file stands for the disk."""
    out, old = tmp_path / "student.safetensors", resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, old[1]))
    try:
        assert sample.main([str(run), "--export", str(out)]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    message = capsys.readouterr().err
    assert message.startswith(f"sample.py: {out}: ") and message.count("\n") == 1
    assert "File too large" in message and not list(tmp_path.iterdir())


def test_heads_start_from_those_of_another_run_with_their_optimiser(run, tmp_path):
    """With next to no learning rate they stay bit for bit; AdamW counts on and keeps its rate."""
    first, more = torch.load(run / "heads.pt", weights_only=True), ["--heads-lr", 1e-30]
    given = ["--discriminator", run / "heads.pt", "--seed", 1, *more]
    again = torch.load(train(tmp_path / "run", *given) / "heads.pt", weights_only=True)
    assert same(first["weights"], again["weights"])
    assert [c["optimizer"]["state"][0]["step"] for c in (first, again)] == [4, 8]
    assert again["optimizer"]["param_groups"][0]["base_lr"] == 1e-30
    fresh = train(tmp_path / "fresh", "--seed", 1, *more)
    assert not same(first["weights"], weights_of(fresh / "heads.pt"))


def test_heads_of_another_network_are_refused(run, tmp_path, capsys):
    out = ["--out", str(tmp_path / "run")]
    words = [*FEW.split(), *out, "--discriminator", str(run / "heads.pt"), "--taps", "1"]
    assert ladd.main(words) == 2
    assert "taps (0, 1) → (1,)" in capsys.readouterr().err
    assert ladd.main([*FEW.split(), *out, "--discriminator", str(run / "teacher.pt")]) == 2
    assert "teacher.pt: holds teacher, not heads" in capsys.readouterr().err
    assert sample.main([str(run / "heads.pt"), "--prompt", "x"]) == 2
    assert "heads.pt: holds heads, not student or teacher" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
