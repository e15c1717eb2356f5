"""Released weights in and out: SD3-medium, SD3.5-medium, SD3.5-large, and diffusers' folders."""

import math
import re
from collections import UserDict
from pathlib import Path

import torch

from lib.checkpoints import check_weights, not_finite
from lib.errors import CheckpointError, UsageError, pass_on, reason, some
from lib.files import kind_of, read, read_object, replacing
from lib.lora import adapter_of, merged
from mmdit import MMDiT

PREFIX = "model.diffusion_model."  # of the network's tensors inside released single files
OTHERS = (  # how the names of other networks begin that stand beside it
    "first_stage_model.", "vae.", "text_encoder", "cond_stage_model.", "conditioner.", "clip_",
    "t5xxl.", "model_ema.", "optimizer.",
)  # fmt: skip
DTYPES = dict(fp32=torch.float32, bf16=torch.bfloat16, fp16=torch.float16)
# The layers of diffusers' SD3Transformer2DModel and ours; some of ours are several of theirs.
DIFFUSERS = {
    "pos_embed.pos_embed": "pos_embed",
    "pos_embed.proj": "x_embedder.proj",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
    # after transformer_blocks.0. and joint_blocks.0.
    "norm1.linear": "x_block.adaLN_modulation.1",
    "attn.to_q attn.to_k attn.to_v": "x_block.attn.qkv",
    "attn.norm_q": "x_block.attn.ln_q",
    "attn.norm_k": "x_block.attn.ln_k",
    "attn.to_out.0": "x_block.attn.proj",
    "attn2.to_q attn2.to_k attn2.to_v": "x_block.attn2.qkv",
    "attn2.norm_q": "x_block.attn2.ln_q",
    "attn2.norm_k": "x_block.attn2.ln_k",
    "attn2.to_out.0": "x_block.attn2.proj",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "attn.add_q_proj attn.add_k_proj attn.add_v_proj": "context_block.attn.qkv",
    "attn.norm_added_q": "context_block.attn.ln_q",
    "attn.norm_added_k": "context_block.attn.ln_k",
    "attn.to_add_out": "context_block.attn.proj",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}


class Weights(UserDict):
    """The network's tensors in a file, {official name: tensor}; `ignored` others were beside them.

    Each is a view of the memory-mapped file, read where it is touched; what the file has in parts
    (diffusers' q, k, v) is joined at every access."""

    def __init__(self, parts, ignored=0):
        super().__init__(parts)
        self.ignored = ignored
        self.shapes = {
            name: (sum(map(len, p)), *p[0].shape[1:]) if len(p) > 1 else tuple(p[0].shape)
            for name, p in parts.items()
        }

    def __getitem__(self, name):
        parts = self.data[name]
        return torch.cat(parts) if len(parts) > 1 else parts[0]


def own_names(names):
    """The network's tensors among the names of a file: {name without the prefix: name}.

    The prefix is what stands before a layer that each SD3 network has once. Without one, all are
    the network's, but for those of other networks that are known."""
    first = ("x_embedder.proj.weight", "pos_embed.proj.weight")  # ours, diffusers'
    found = {re.sub(r"\w+\.proj\.weight$", "", name) for name in names if name.endswith(first)}
    prefixes = found & {PREFIX} or found & {""} or found
    if len(prefixes) > 1:
        raise ValueError(f"several networks: {', '.join(sorted(prefixes))}; give a file of one")
    prefix = min(prefixes, default="")
    own = {name.removeprefix(prefix): name for name in names if name.startswith(prefix)}
    return own if prefix else {k: v for k, v in own.items() if not k.startswith(OTHERS)}


def config_from_sd3(shapes, heads=None):
    """MMDiT's arguments, read off the names and shapes of an official state dict.

    Without QK-norm no shape tells the number of heads: it is `heads`, or one per 64 channels."""
    width, channels, patch, _ = shapes["x_embedder.proj.weight"]
    ln_k = shapes.get("joint_blocks.0.x_block.attn.ln_k.weight")
    return dict(
        depth=len({k.split(".")[1] for k in shapes if k.startswith("joint_blocks.")}),
        width=width,
        heads=width // ln_k[0] if ln_k else heads or width // 64,
        patch=patch,
        channels=channels,
        context_dim=shapes["context_embedder.weight"][1],
        pooled_dim=shapes["y_embedder.mlp.0.weight"][1],
        pos_size=math.isqrt(shapes["pos_embed"][1]),
        qk_norm=ln_k is not None,
        attn2_blocks=sum(".x_block.attn2.qkv.weight" in k for k in shapes),
    )


def meta_sd3(shapes, heads=None):
    """The network of these official names and shapes {name: (…)}, on the meta device.

    Raises CheckpointError that lists the tensors that are missing, surplus or misshapen."""
    try:
        config = config_from_sd3(shapes, heads)
        if config["depth"] > 100 or config["heads"] < 1:  # names alone could ask for a million
            raise ValueError(f"{config['depth']} blocks of {config['heads']} heads")
        with torch.device("meta"):
            model = MMDiT(**config)
    except KeyError as missing:
        if any(re.search("lora|lokr|hada_|dora_", name, re.IGNORECASE) for name in shapes):
            what = "a LoRA, which is no network; merge it into its SD3 network and give that"
            raise CheckpointError(what) from None
        what = f"not an SD3 checkpoint: it has no tensor {missing}; give SD3's network"
        raise CheckpointError(what) from None
    except Exception as error:  # no network has such sizes
        raise CheckpointError(f"not an SD3 checkpoint: {error}") from None
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    both = wanted.keys() & shapes.keys()
    wrong = dict(
        missing=[k for k in wanted if k not in both],
        surplus=[f"{k!r:.90}" for k in shapes if k not in both],
        misshapen=[f"{k} {shapes[k]} for {wanted[k]}" for k in both if wanted[k] != shapes[k]],
    )
    told = [f"{len(k)} {kind}: {some(sorted(k), 12)}" for kind, k in wrong.items() if k]
    if told:
        raise CheckpointError(f"not an SD3 checkpoint: {'; '.join(told)}")
    return model


def from_diffusers(tensors):
    """diffusers' or official {name: tensor} -> {official name: [parts to be joined]}, views."""
    places = {t: (o, i) for ts, o in DIFFUSERS.items() for i, t in enumerate(ts.split())}
    width, found = len(tensors.get("pos_embed.proj.bias", ())), {}
    for name, tensor in tensors.items():
        pattern = r"(transformer_blocks\.\d+\.)?(.*?)(\.weight|\.bias)?"
        block, layer, kind = re.fullmatch(pattern, name, re.DOTALL).groups("")
        official, place = places.get(layer, (layer, 0))
        official = block.replace("transformer", "joint") + official + kind
        parts = found.setdefault(official, {})
        if "adaLN" in official and len(tensor) == 2 * width:  # theirs is (scale, shift)
            parts.update(enumerate(tensor.chunk(2)[::-1]))
        else:
            parts[place] = tensor
    return {name: [parts[i] for i in sorted(parts)] for name, parts in found.items()}


def to_diffusers(adapter):
    """Our {name: tensor} of an adapter as diffusers' pipelines load it. Where one layer of ours is
    several of theirs (q, k, v), each of them has all of A and its own rows of B."""
    places, found = {ours: theirs.split() for theirs, ours in DIFFUSERS.items()}, {}
    for name, B in adapter.items():
        layer, kind = name.rsplit(".", 1)
        if kind != "lora_B":
            continue
        A = adapter[f"{layer}.lora_A"]
        _, block, layer = layer.split(".", 2)
        parts = B.chunk(len(places[layer]))
        if "adaLN" in layer and len(B) == 2 * A.shape[1]:  # theirs is (scale, shift)
            parts = [torch.cat(B.chunk(2)[::-1])]
        for theirs, part in zip(places[layer], parts, strict=True):
            full = f"transformer.transformer_blocks.{block}.{theirs}"
            found |= {f"{full}.lora_A.weight": A.clone(), f"{full}.lora_B.weight": part.clone()}
    return found


def folder_within(path):
    """Where a folder's weights are: in a whole SD3 folder its transformer/, in one of the hub's
    cache its snapshot, else in itself."""
    inner = [p for p in (path / "transformer", *path.glob("snapshots/*")) if p.is_dir()]
    return folder_within(inner[0]) if len(inner) == 1 else path


def files_of(path):
    """The files of weights of a file or a folder, and the number of heads if the folder says it."""
    if not path.is_dir():
        return [path], None
    path = folder_within(path)
    config = path / "config.json"
    heads = read_object(config).get("num_attention_heads") if config.exists() else None
    for kind in (".safetensors", ".bin"):
        if names := [file.name for file in path.glob(f"diffusion_pytorch_model*{kind}")]:
            name = min(names, key=len)  # no variant like .fp16
            many = re.search(r"-of-(\d{5})\.", name)
            numbers = range(1, int(many[1]) + 1) if many else [1]
            return [path / re.sub(r"\d+-of-", f"{i:05d}-of-", name) for i in numbers], heads
    others = sorted(path.glob("*.safetensors"))
    if len(others) > 1:
        few = some([file.name for file in others])
        raise ValueError(f"several networks may be in it ({few}); give one of these files")
    if not others:
        raise ValueError("a folder with neither a run's teacher.pt nor SD3's weights")
    return others, heads


def read_tensors(file):
    """{name: tensor, a view} of one file, and its number of heads if it says that."""
    from safetensors import safe_open

    if kind_of(file) == "torch":
        content = read(file, check=False, mmap=True)
        if isinstance(content, dict):
            content = content.get("state_dict", content.get("model", content))
        if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
            raise ValueError(f"a {type(content).__name__} of torch.save, not weights by name")
        return content, None
    opened = safe_open(file, "pt")
    heads = (opened.metadata() or {}).get("heads")
    return {name: opened.get_tensor(name) for name in opened.keys()}, heads  # noqa: SIM118


def open_sd3(path):
    """SD3's network of a file of safetensors or of torch.save, or of a folder of diffusers.

    -> the network on the meta device, its Weights. `model.load_state_dict(weights, assign=True)`
    brings them together without a copy. CheckpointError names the path and what is wrong."""
    stored = {}
    try:
        files, heads = files_of(Path(path))
        for file in files:
            found, said = read_tensors(file)
            stored, heads = stored | found, heads or said
        tensors = {name: stored[full] for name, full in own_names(stored).items()}
        check_weights(tensors, sum(file.stat().st_size for file in files))
        weights = Weights(from_diffusers(tensors), len(stored) - len(tensors))
        return meta_sd3(weights.shapes, heads and int(heads)), weights
    except ImportError:
        raise CheckpointError(f"{path}: reading it needs: pip install safetensors") from None
    except Exception as error:  # a damaged file or folder raises nearly anything
        pass_on(error, path)
        why = reason(error, 4000)
        raise CheckpointError(f"{path}: can't be read as SD3 weights ({why}).") from None


def released_checkpoint(path, settings):
    """Released weights as a checkpoint of ours; says how many tensors of other networks it left."""
    model, weights = open_sd3(path)
    if weights.ignored:
        print(f"--teacher {path}: {weights.ignored} tensors of other networks are ignored")
    return dict(format="ladd-1", model=model.config, weights=weights, settings=settings, step=0)


def write_tensors(path, weights, dtype, **notes):
    """Writes {name: tensor} as safetensors, with notes, whole or not at all.

    `dtype` is a key of DTYPES. ValueError if a number is not finite in it."""
    try:
        from safetensors import SafetensorError
        from safetensors.torch import save_file
    except ImportError:
        raise CheckpointError(f"{path}: writing it needs: pip install safetensors") from None
    tensors = {}
    for name in sorted(weights):
        tensors[name] = weights[name].detach().cpu().to(DTYPES[dtype]).contiguous()
    if bad := not_finite(tensors):
        wider = weights[bad].isfinite().all()
        advice = f"that {dtype} can't; choose a wider type" if wider else "that are not finite"
        raise ValueError(f"{bad} holds numbers {advice}")
    with replacing(path) as file:
        try:
            save_file(tensors, file.name, metadata=notes | {"format": "pt"})
        except SafetensorError as error:  # a full disk
            raise OSError(f"{path}: {error}") from None


def export(checkpoint, out, dtype="bf16", merge=False):
    """Writes a checkpoint of ours for other programs, under the released files' names; an adapter,
    if not merged with its network's weights, under diffusers' names."""
    if Path(out).exists():
        raise UsageError(f"--export {out}: exists; choose another name")
    if Path(out).suffix != ".safetensors":
        raise UsageError(f"--export {out}: is written as .safetensors; let it end so")
    kind = checkpoint["kind"]
    if "condition_channels" in checkpoint["model"]:
        raise UsageError(f"--export {out}: this {kind} edits or fills pictures, as no SD3 does")
    if checkpoint.get("lora") and not merge:
        kind += "'s adapter"
        adapter = to_diffusers(adapter_of(checkpoint["weights"]))
        write_tensors(out, adapter, dtype)
    else:
        named = {PREFIX + name: w for name, w in merged(checkpoint)["weights"].items()}
        write_tensors(out, named, dtype, heads=str(checkpoint["model"]["heads"]))
    print(f"{kind}, {dtype}: {out}")
