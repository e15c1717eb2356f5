"""The command line of sample.py: pictures from a finished run, or its scores, or its weights.

python sample.py runs/nano --prompt "a large red circle on a dotted blue background" --out a.png
python sample.py runs/nano --evaluate                       tools/score.py
python sample.py runs/nano --export student.safetensors     under SD3's names
python sample.py RUN --decode SD3_DIR --prompt "a red fox" --size 832x1216 --out fox.png
python sample.py runs/nano-inpaint --init-image a.png --mask m.png --prompt "a red circle"
python sample.py runs/nano-edit --init-image a.png --prompt "make it blue"
"""

import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from tqdm import tqdm

import data
import sample
from lib.captions import strange_words
from lib.checkpoints import not_finite
from lib.conditions import hide
from lib.errors import ENDS, Parser, RunError, UsageError, exit_status, plural, reason
from lib.files import read_lines
from lib.images import decode, size_of
from lib.pictures import refuse_strangers, save_gif, save_pictures, square
from tools.score import READ, data_of, score

# What --export reads of the command line.
WRITTEN = ("run", "export", "dtype", "teacher", "merge", "adapter", "adapter_scale")
WRITTEN += ("device", "precision")  # which change nothing


def parse(argv):
    parser = Parser("sample.py", "Samples from a finished run.")
    add = parser.add_argument
    add("run", help="a run folder, or a checkpoint")
    add("--prompt", action="append", default=[], metavar="TEXT", help="may be repeated")
    add("--prompts", metavar="FILE", help="a file of one prompt a line, or @captions of the data")
    add("--num", type=int, help="images (default: one per prompt; @captions: 16); or per row")
    add("--steps", type=int, help="network steps (default: as the model was made for)")
    add("--teacher", action="store_true", help="sample from the teacher instead of the student")
    add("--cfg", type=float, help="guidance scale w (default: the teacher's own; students: 1)")
    add("--sampler", choices=sample.SAMPLERS, help="default: renoise, for a teacher euler")
    add("--eta", type=float, help="weight of fresh noise between the student's steps (0 to 1)")
    add("--seed", type=int, help="of the noise (default: 0; of scores the run's own)")
    add("--size", type=data.parse_size, metavar="HxW", help="pixels (default: as it was trained)")
    add("--out", default="samples.png", help="a grid as .png, or a folder for one PNG per image")
    add("--trajectory", metavar="FILE.gif", help="x̂_0 along the steps, as an animation")
    add("--init-image", metavar="FILE", help="start from this image instead of noise …")
    add("--strength", type=float, help="… noised to this level (0 to 1; default: 0.6)")
    add("--mask", metavar="FILE", help="of a run of methods.inpaint: white is to be filled")
    add("--decode", metavar="SD3_DIR", help="for latents: SD3's text encoders and VAE, diffusers'")
    add("--no-t5", action="store_true", help="--decode for a run on shards that have none of T5's")
    add("--export", metavar="FILE", help="write the weights as .safetensors, for other programs")
    add("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32", help="of the exported weights")
    add("--merge", action="store_true", help="--export of a run with --lora: whole weights instead")
    add("--adapter", metavar="FILE", help="add the adapter of another run's student.pt …")
    add("--adapter-scale", type=float, default=1.0, help="… times this; its --export is whole")
    add("--evaluate", action="store_true", help="the table of scores, with the teacher's --steps")
    add("--other-judge", action="store_true", help="--evaluate by a second classifier")
    add(
        "--to-samples",
        action="store_true",
        help="--evaluate by distance from the teacher's samples",
    )
    add("--data", help="take @captions of other data than the run's own, or score by it")
    add("--data-dir", default="data", help="where downloads and judges are kept")
    add("--device", default="auto")
    add("--precision", choices=("auto", "bf16", "fp32"), default="auto")
    add("--batch", type=int, default=256, help="images at a time")
    args = parser.parse_args(argv)
    given = [name for name, value in vars(args).items() if value != parser.get_default(name)]
    flags = {name: f"--{name.replace('_', '-')}" for name in given} | dict(run="the run")
    if empty := [name for name in given if getattr(args, name) == ""]:
        parser.error(f"{flags[empty[0]]}: is empty; give it a value, or leave it out")
    for mode, read in dict(evaluate=READ, export=WRITTEN).items():
        if getattr(args, mode) and (unread := [name for name in given if name not in read]):
            parser.error(f"{flags[unread[0]]}: no place beside --{mode}, which does not read it")
    needs = dict(mask="init_image", strength="init_image", merge="export", dtype="export")
    needs |= dict(adapter_scale="adapter", no_t5="decode")
    needs |= dict(other_judge="evaluate", to_samples="evaluate")
    limits = dict(num=(8 if args.evaluate else 1, 10**6), steps=(1, 10_000), batch=(1, 10**6))
    limits |= dict(eta=(0, 1), strength=(0.0001, 1), cfg=(-1000, 1000), adapter_scale=(-1000, 1000))
    for name, (low, high) in limits.items():
        if name in given and not low <= getattr(args, name) <= high:
            parser.error(f"{flags[name]} {getattr(args, name)}: must be from {low:,} to {high:,}")
    for name, other in needs.items():
        if name in given and not getattr(args, other):
            parser.error(f"{flags[name]}: is for --{other.replace('_', '-')}")
    if args.data and not args.evaluate and args.prompts != "@captions":
        parser.error(f"--data {args.data}: is for --prompts @captions and for --evaluate")
    if args.trajectory and not args.trajectory.lower().endswith(".gif"):
        parser.error(f"--trajectory {args.trajectory}: is written as .gif; let it end so")
    return args


def read_prompts(args, generator):
    """The prompt of every image."""
    prompts = list(args.prompt)
    if args.prompts == "@captions":
        for captions, _ in data.held_out_captions(data_of(generator, args), args.num or 16):
            prompts += captions
    elif args.prompts:
        prompts += read_lines(args.prompts, "--prompts", repeated=True)
    if not prompts:
        raise UsageError("no prompt: give --prompt TEXT, --prompts FILE, or --prompts @captions")
    images = [prompts[i % len(prompts)] for i in range(args.num or len(prompts))]
    if args.decode:  # SD3's encoders read any words
        return images
    length, run = generator.settings.text_length, Path(args.run)
    for prompt in dict.fromkeys(prompts):
        words = len(data.split_words(prompt))
        if words > length:
            print(f"only the first {length} words are read of: {prompt[:200]}", file=sys.stderr)
        if not words:
            print(f"no word that can be read is in: {prompt[:200]!r}", file=sys.stderr)
    known = (run if run.is_dir() else run.parent) / "words.txt"
    if told := strange_words(prompts, known, length):
        print(told, file=sys.stderr)
    return images


def latent_size(pixels, s, unit):
    """--size as the (H, W) of x_0, whose positions are `unit` pixels a side."""
    side = s.patch * unit  # of a patch
    if any(value < side or value % side or value > side * s.pos_size for value in pixels):
        raise UsageError(
            f"--size {pixels[0]}x{pixels[1]}: both must be multiples of the patch, {side} pixels, "
            f"and at most {side * s.pos_size}"
        )
    return pixels[0] // unit, pixels[1] // unit


# The way from pictures to x_0 and back of models on pixels, of which a position is one pixel. SD3's
# has the same names: the VAE and the text encoders of sd3/encoders.py.
PIXELS = SimpleNamespace(unit=1, encode=data.to_float, decode=data.to_picture)


def read_picture(flag, path, height, width):
    """A picture in the size of the samples -> (1, 3, H, W) uint8, the file's own (H, W)"""
    try:
        own = size_of(path)  # of a device that never ends there is none
        pixels = decode(Path(path).read_bytes(), [(height, width)])
        return torch.from_numpy(pixels.copy())[None], own
    except Exception as why:  # Pillow raises nearly anything on damaged files
        raise UsageError(f"{flag} {path}: can't be read ({reason(why)})") from None


def what_it_does(generator, args):
    """Whether the network edits a given picture, fills one, or makes pictures of text alone."""
    config, run = generator.model.config, args.run
    told, channels = config.get("condition_channels", 0), config["channels"]
    work = {0: "makes", channels: "edits", channels + 1: "fills"}.get(told)
    if not work or (told and generator.settings.downscale > 1):
        raise UsageError(f"{run}: is told of pictures what this program can't give")
    if args.mask and work != "fills":
        raise UsageError(f"--mask {args.mask}: {run} fills no pictures; runs of methods.inpaint do")
    if work == "edits" and not args.init_image:
        raise UsageError(f"{run} edits pictures: give one with --init-image")
    if work == "fills" and not (args.init_image and args.mask):
        raise UsageError(f"{run} fills pictures: give one with --init-image, and --mask")
    if work != "makes" and args.strength is not None:
        raise UsageError(f"--strength {args.strength:g}: {run} starts from noise; leave it out")
    return work


def read_condition(args, size):
    """What the network is told of --init-image, and of --mask: (1, C', H, W)."""
    picture, shape = read_picture("--init-image", args.init_image, *size)
    if not args.mask:
        return data.to_float(picture)
    mask, own = read_picture("--mask", args.mask, *size)
    if own != shape:
        sizes = "{} × {} pixels, and that of --init-image is {} × {}".format(*own, *shape)
        raise UsageError(f"--mask {args.mask}: its size is {sizes}; let them be the same")
    mask = mask.float().mean(dim=1, keepdim=True) > 127
    if mask.all() or not mask.any():
        share = "all" if mask.all() else "none"
        raise UsageError(f"--mask {args.mask}: {share} of it is white, which is what is filled")
    return hide(data.to_float(picture), mask)


def make_pictures(args):
    """Samples as asked for, and writes them."""
    how = dict(device=args.device, precision=args.precision)
    how |= dict(adapter=args.adapter, scale=args.adapter_scale)
    generator = sample.load_generator(args.run, args.teacher, **how)
    codec = PIXELS
    if args.decode:
        from sd3.encoders import codec_of

        codec = codec_of(args.decode, generator, not args.no_t5)
    elif generator.settings.downscale > 1:
        raise UsageError(f"{args.run} makes latents: add --decode SD3_DIR")
    prompts = read_prompts(args, generator)
    if args.decode:
        codec.learn([*prompts, ""])  # all at once: every encoder moves to the device one time
    steps, cfg, sampler = generator.way(args.steps, args.cfg, args.sampler)
    options = dict(seed=args.seed or 0, steps=steps, cfg=cfg, sampler=sampler, eta=args.eta)
    if args.eta is not None and sampler != "renoise":
        raise UsageError(f"--eta {args.eta:g}: {sampler} steps draw no noise; leave it out")
    if args.size:
        options["size"] = latent_size(args.size, generator.settings, codec.unit)
    size = options.get("size", generator.size)
    if what_it_does(generator, args) != "makes":
        told = read_condition(args, size)
        generator.condition = lambda index: told.expand(len(index), -1, -1, -1)
    elif args.init_image:
        sides = (side * codec.unit for side in size)
        picture, _ = read_picture("--init-image", args.init_image, *sides)
        options["start"] = (codec.encode(picture), args.strength or 0.6)
    if args.trajectory:
        refuse_strangers(args.trajectory)
    notes = dict(seed=args.seed or 0, steps=steps, cfg=cfg, model=f"{generator.kind} of {args.run}")

    def images():
        with tqdm(total=len(prompts), desc="sampling", disable=None) as bar:
            for x0 in generator.batches(prompts, batch=args.batch, progress=bar, **options):
                if not x0.isfinite().all():
                    bad = not_finite(generator.model.state_dict())
                    why = f"nor is its {bad}; give another" if bad else "try --precision fp32"
                    raise RunError(f"{args.run}: its samples are not finite; {why}")
                yield from codec.decode(x0)

    save_pictures(images(), args.out, prompts, notes)
    print(f"{plural(len(prompts), 'image')}, {plural(steps, 'step')}: {args.out}")
    if args.trajectory:
        first = prompts[:64]
        path = generator.trajectory(first, range(len(first)), **options)
        frames = [square(codec.decode(x)) for x in path]
        save_gif(frames, args.trajectory)
        shown = f" of the first {len(first)} images" if len(first) < len(prompts) else ""
        print(f"{plural(len(frames), 'frame')}{shown}: {args.trajectory}")


def main(argv):
    try:
        args = parse(argv)
        if args.evaluate:
            score(args)
        elif args.export:
            from sd3.weights import export

            given = sample.read_network(args.run, args.teacher, args.adapter, args.adapter_scale)
            if args.merge and not given.get("lora"):
                raise UsageError(f"--merge: {args.run} has no adapter of its own; leave it out")
            export(given, args.export, args.dtype, merge=args.merge or bool(args.adapter))
        else:
            make_pictures(args)
    except (FileExistsError, ValueError) as error:
        return exit_status("sample.py", UsageError(error))
    except (*ENDS, KeyboardInterrupt) as error:
        return exit_status("sample.py", error)
    return 0
