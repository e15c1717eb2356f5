"""SD3's frozen text encoders and VAE, from a local folder in diffusers' layout; no network."""

import contextlib
import hashlib
import importlib
import sys
from pathlib import Path

import torch

from data import Text, to_float, to_uint8
from lib.errors import DataError, RunError, clean, pass_on, plural, reason
from lib.files import read_object

TOKENS = 77  # of CLIP, and as many of T5 after them
SD3_PARTS = dict(
    tokenizer="CLIPTokenizer",
    tokenizer_2="CLIPTokenizer",
    tokenizer_3="T5TokenizerFast",
    text_encoder="CLIPTextModelWithProjection",
    text_encoder_2="CLIPTextModelWithProjection",
    text_encoder_3="T5EncoderModel",
    vae="AutoencoderKL",
)
NEEDS = "SD3's encoders need: pip install diffusers transformers safetensors"


def refuse_whole_numbers(folder):
    """Raises where weights are quantised: they would be read as if they were the weights."""
    from safetensors import safe_open

    kinds = {}
    for path in folder.glob("*.safetensors"):
        file = safe_open(path, "pt")
        kinds |= {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    for path in folder.glob("*.bin"):
        tensors = torch.load(path, map_location="meta", weights_only=True)
        tensors = {name: x for name, x in tensors.items() if isinstance(x, torch.Tensor)}
        kinds |= {name: f"{x.dtype}".removeprefix("torch.") for name, x in tensors.items()}
    for name, kind in sorted(kinds.items()):
        if kind[0] in "IUiuq" and not name.endswith("position_ids"):
            raise ValueError(f"{name} has whole numbers ({kind}); give weights of 16 bits")


class Encoders:
    """Each is loaded when first asked for and on the device only while it works. In float32; T5,
    with 4.7 G parameters, in bf16 on a GPU. Without T5 its tokens are zeros, as SD3 allows."""

    def __init__(self, folder, device="cpu", t5=True, vae=False):
        self.folder, self.device, self.t5 = Path(folder), torch.device(device), t5
        self.loaded, self.known = {}, {}
        self.cut = set()  # captions that are longer than what is read
        wanted = dict(tokenizer_3=t5, text_encoder_3=t5, vae=vae)
        self.parts = [part for part in SD3_PARTS if wanted.get(part, True)]
        missing = [part for part in self.parts if not (self.folder / part).is_dir()]
        if missing:
            raise DataError(f"{folder}: of diffusers' SD3 folders it lacks {'/, '.join(missing)}/.")
        if vae:
            self.scale()  # raises where it can't be used

    def identity(self):
        """A hash of the encoders' files: names, sizes, and the first and last MB of each."""
        files = [f for part in self.parts for f in (self.folder / part).iterdir() if f.is_file()]
        content, most = hashlib.sha256(), 1 << 20
        for path in sorted(files):
            name, size = path.relative_to(self.folder).as_posix(), path.stat().st_size
            content.update(repr((name, size)).encode())
            with path.open("rb") as file:
                content.update(file.read(most))
                file.seek(max(most, size - most))
                content.update(file.read(most))
        return content.hexdigest()

    def part(self, name):
        """A tokenizer, an encoder or the VAE, on the CPU."""
        if name not in self.loaded:
            try:
                self.loaded[name] = self.load(name)
            except ImportError:
                raise DataError(NEEDS) from None
            except Exception as error:  # these libraries raise nearly anything on damaged folders
                why = reason(error, 1000)
                raise DataError(f"{self.folder / name} can't be loaded: {why}") from None
        return self.loaded[name]

    def load(self, name):
        library = importlib.import_module("diffusers" if name == "vae" else "transformers")
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity_error()
        kind, folder = getattr(library, SD3_PARTS[name]), self.folder / name
        options = dict(local_files_only=True)
        if name.startswith("tokenizer"):
            tokenizer = kind.from_pretrained(folder, **options)
            if tokenizer("a").input_ids == tokenizer("b").input_ids:
                raise ValueError("it has no vocabulary")
            return tokenizer
        read_object(folder / "config.json")  # without it transformers takes a default
        refuse_whole_numbers(folder)
        if name == "vae":
            options["low_cpu_mem_usage"] = False
        options |= dict(output_loading_info=True, ignore_mismatched_sizes=True)  # told by `info`
        model, info = kind.from_pretrained(folder, **options)
        wrong = sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])})
        if wrong:
            raise ValueError(f"{len(wrong)} tensors are missing or misshapen: {wrong[0]} …")
        half = name == "text_encoder_3" and self.device.type == "cuda"
        return model.to(torch.bfloat16 if half else torch.float32).eval()

    @contextlib.contextmanager
    def at_work(self, name):
        model, folder = self.part(name), self.folder / name
        try:
            yield model.to(self.device)
        except Exception as error:  # of a config that its tokenizer or weights don't fit
            pass_on(error, folder)
            raise DataError(f"{folder} can't be used: {reason(error, 300)}") from None
        model.to("cpu")

    @torch.no_grad()
    def read(self, n, captions):
        """Text encoder n, 32 captions at a time -> its states of the tokens (n, 77, D), and of a
        CLIP the pooled ones (n, D_p), float32 on the CPU."""
        tokenizer = self.part("tokenizer" + n)
        whole = tokenizer(captions, verbose=False).input_ids
        self.cut.update(c for c, ids in zip(captions, whole, strict=True) if len(ids) > TOKENS)
        tokens = tokenizer(
            captions, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt"
        ).input_ids
        rows = []
        with self.at_work("text_encoder" + n) as model:
            for part in tokens.split(32):
                answer = model(part.to(self.device), output_hidden_states=True)
                if n == "_3":
                    outputs = [answer.last_hidden_state]
                else:
                    outputs = [answer.hidden_states[-2], answer.text_embeds]
                rows.append([x.float().cpu() for x in outputs])
        return [torch.cat(column) for column in zip(*rows, strict=True)]

    def text(self, captions):
        """captions -> context (n, 77 + 77, 4096), pooled (n, 768 + 1280), float32 on the CPU.

        As SD3 has it (arXiv 2403.03206, appendix B): the last hidden states but one of both CLIPs
        side by side, padded with zeros to T5's width, then T5's tokens; both CLIPs' pooled ones."""
        l_states, l_pooled = self.read("", captions)
        g_states, g_pooled = self.read("_2", captions)
        clip = torch.cat([l_states, g_states], dim=2)  # (n, 77, 768 + 1280)
        path, least = self.folder / "text_encoder_3" / "config.json", clip.shape[2]
        width = read_object(path).get("d_model") if path.exists() else 4096
        if type(width) is not int or not least <= width < 1 << 16:
            raise DataError(f"{path}: d_model is {width!r:.50}; {least}, the CLIPs', is the least.")
        if self.t5:
            (t5,) = self.read("_3", captions)
        else:
            t5 = torch.zeros(len(captions), TOKENS, width)
        clip = torch.nn.functional.pad(clip, (0, width - least))
        return torch.cat([clip, t5], dim=1), torch.cat([l_pooled, g_pooled], dim=1)

    def tell_cut(self):
        """Says which captions were not read to their end."""
        if self.cut:
            number, some = plural(len(self.cut), "caption"), clean(min(self.cut))[:200]
            print(f"of {number} only the first {TOKENS} tokens are read: {some} …", file=sys.stderr)

    def learn(self, captions):
        """Encodes those captions that are new, and keeps their features on the CPU."""
        new = [caption for caption in dict.fromkeys(captions) if caption not in self.known]
        if new:
            for caption, *text in zip(new, *self.text(new), strict=True):
                self.known[caption] = text
            self.tell_cut()

    def __call__(self, captions):
        """captions -> context (B, M, D_c), pooled (B, D_p), float32 on the device."""
        self.learn(captions)
        context, pooled = zip(*(self.known[caption] for caption in captions), strict=True)
        return Text(torch.stack(context).to(self.device), torch.stack(pooled).to(self.device))

    def scale(self):
        """Scale and shift of latents, as the VAE's config.json has them; SD3's own pair where it
        has neither. DataError names what is no such number."""
        path = self.folder / "vae" / "config.json"
        config = read_object(path)
        if not {"scaling_factor", "shift_factor"} & config.keys():
            return 1.5305, 0.0609
        scale, shift = config.get("scaling_factor"), config.get("shift_factor")
        shift = 0 if shift is None else shift
        for name, value, least in ("scaling_factor", scale, 1e-6), ("shift_factor", shift, -1e6):
            if type(value) not in (int, float) or not least < value < 1e6:
                raise DataError(f"{path}: {name} is {value!r:.50}, no number to use.")
        return scale, shift

    @property
    def unit(self):
        """Pixels per position of latents, along a side."""
        return 2 ** (len(self.part("vae").config.block_out_channels) - 1)

    @torch.no_grad()
    def encode(self, images):
        """images (n, 3, H, W) uint8 -> x_0 = (mean - shift)·scale (n, 16, H/8, W/8), on the CPU."""
        scale, shift = self.scale()
        with self.at_work("vae") as vae:
            parts = (to_float(part.to(self.device)) for part in images.split(4))
            means = [vae.encode(part).latent_dist.mean.cpu() for part in parts]
        return (torch.cat(means) - shift) * scale

    @torch.no_grad()
    def decode(self, x0):
        """x_0 (n, 16, h, w) -> images (n, 3, 8·h, 8·w) uint8 on the CPU."""
        scale, shift = self.scale()
        with self.at_work("vae") as vae:
            parts = (part.to(self.device) / scale + shift for part in x0.split(4))
            images = torch.cat([vae.decode(part).sample.cpu() for part in parts])
        if not images.isfinite().all():
            raise RunError(f"{self.folder / 'vae'}: what it decodes is not finite; give another")
        return to_uint8(images)


def codec_of(folder, generator, t5=True):
    """SD3's encoders and VAE, which also replace the text features that a model is sampled with.
    t5: whether the model has learned from features with T5's."""
    encoders, config = Encoders(folder, generator.device, t5, vae=True), generator.model.config
    context, pooled = encoders([""])
    channels = encoders.part("vae").config.latent_channels
    mine = context.shape[2], pooled.shape[1], channels, encoders.unit
    wanted = config["context_dim"], config["pooled_dim"], config["channels"]
    wanted += (generator.settings.downscale,)
    if mine != wanted:
        names = "widths of text and pooled text, channels of latents and pixels to one of them"
        raise DataError(f"--decode {folder}: {names} are {mine}, but the model has {wanted}")
    generator.text_encoder = encoders
    return encoders
