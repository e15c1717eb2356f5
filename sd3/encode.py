"""The features and latents of SD3's frozen encoders, computed once, into shards.

python -m sd3.encode --model SD3_DIR --prompts prompts.txt --out shards/
python -m sd3.encode --model SD3_DIR --images PATH --out shards/        latents as well
"""

import hashlib
import re
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data import bucket_sizes
from lib.archive import Files
from lib.checkpoints import not_finite
from lib.checks import ASPECT
from lib.errors import DataError, Parser, RunError, UserError, exit_status, reason
from lib.files import read_lines, save
from lib.folders import decode_all, find_captions, in_threads
from lib.images import nearest, size_of
from lib.machine import device_of
from lib.parallel import check_rank, my_share
from lib.settings import open_folder
from lib.states import TEMPORARY
from sd3.encoders import Encoders
from sd3.shards import SHARDS


def by_bucket(files, sizes):
    """Images by the size of nearest aspect, from their headers: {(H, W): [(name, caption)]}."""
    caption_of, classes = find_captions(files)
    names = sorted(caption_of)

    def bucket_of(name):
        try:
            with files.open(name) as file:
                return nearest(sizes, *size_of(file))
        except Exception:  # said when the image itself is read
            return sizes[0]

    groups = {}
    for name, bucket in zip(names, in_threads(bucket_of, names), strict=True):
        caption = f"a photo of a {caption_of[name]}" if classes else caption_of[name]
        groups.setdefault(bucket, []).append((name, caption))
    return groups


def encode(encoders, args, sizes):
    """Writes this process's share of the shards of --prompts or of --images.

    sizes: the (H, W) in pixels of images; each is cropped to that of the nearest aspect ratio.
    NNNNNN.pt holds captions of samples of one size, and bf16 tensors: context, pooled, and of
    images latents. A shard that is there is finished, and not made again. Shard 0 is the empty
    caption alone. shards.json says of what the folder is made."""
    files = Files(args.images) if args.images else None
    if files:
        groups = by_bucket(files, sizes)
    else:
        groups = {(0, 0): [("", prompt) for prompt in read_lines(args.prompts, "--prompts")]}
    plan = [((0, 0), [("", "")])]
    for bucket, rows in sorted(groups.items()):
        plan += [(bucket, rows[i : i + args.shard]) for i in range(0, len(rows), args.shard)]
    marks = [files.mark(name) for _, rows in plan[1:] for name, _ in rows] if files else []
    source = hashlib.sha256(repr([plan, marks]).encode("utf-8", "surrogatepass")).hexdigest()
    made_of = dict(format=SHARDS, shards=len(plan), samples=sum(len(rows) for _, rows in plan))
    made_of |= dict(source=source, model=encoders.identity(), t5=encoders.t5)
    out = Path(args.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise DataError(f"--out {out}: is a file; choose another name.") from None
    if not any(out.iterdir()):
        encoders.text([""])  # a model that can't be used signs no folder
        if files:
            encoders.encode(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
    open_folder(out, made_of, {}, "shards.json")

    bad, mine = [], my_share(list(enumerate(plan)))
    own = {f"{i:06d}.pt" for i, _ in mine}
    for file in out.glob(TEMPORARY):  # what a killed process has left
        if file.name[1:10] in own:
            file.unlink()
    for i, (bucket, rows) in tqdm(mine, "shards", disable=None):
        path, pixels = out / f"{i:06d}.pt", None
        if path.exists():
            continue
        captions = [caption for _, caption in rows]
        if bucket != (0, 0):
            caption_of = dict(rows)
            pixels = decode_all(files, list(caption_of), [bucket], bad, made_of["samples"])
            captions = [caption_of[name] for name in pixels]
        tensors = features_of(encoders, captions, pixels) if captions else {}
        save(tensors | dict(captions=captions), path)
    encoders.tell_cut()
    print(f"{len(mine)} of {len(plan)} shards: {out}")


def features_of(encoders, captions, pixels):
    """The bf16 tensors of a shard: context, pooled, and latents of {name: (3, H, W) uint8}."""
    distinct = list(dict.fromkeys(captions))
    context, pooled = encoders.text(distinct)
    rows = [distinct.index(caption) for caption in captions]
    tensors = dict(context=context[rows], pooled=pooled[rows])
    if pixels is not None:
        tensors["latents"] = encoders.encode(torch.from_numpy(np.stack(list(pixels.values()))))
    tensors = {name: x.bfloat16() for name, x in tensors.items()}
    if bad := not_finite(tensors):
        raise DataError(f"{encoders.folder}: its {bad} of {captions[0]!r} … are not finite.")
    return tensors


def main(argv=None):
    parser = Parser("sd3/encode.py", "Computes text features, and latents of images.")
    add = parser.add_argument
    add("--model", required=True, metavar="SD3_DIR", help="a local SD3 folder, diffusers' layout")
    either = parser.add_mutually_exclusive_group(required=True).add_argument
    either("--prompts", default="", metavar="FILE", help="one prompt a line")
    either("--images", default="", metavar="PATH", help="a folder or zip with captions")
    add("--out", required=True, metavar="FOLDER", help="where shards are written, or gone on with")
    add("--size", type=int, default=1024, help="pixels; images get the area of such a square,")
    add("--multiple", type=int, default=64, help="sides that are multiples of this,")
    add("--aspects", default="1:1,5:4,4:5,3:2,2:3,16:9,9:16", help="and the nearest of these W:H")
    add("--no-t5", action="store_true", help="zeros for T5's tokens")
    add("--shard", type=int, default=256, help="samples of a file; 1.8 MB each at 1024²")
    add("--device", default="auto")
    args = parser.parse_args(argv)
    if args.shard < 1 or args.multiple < 8 or args.multiple % 8:
        parser.error("--shard: at least 1; --multiple: a multiple of 8")
    if args.size < 1 or args.size % args.multiple:
        parser.error(f"--size {args.size}: must be a multiple of --multiple {args.multiple}")
    if not all(re.fullmatch(ASPECT, aspect) for aspect in args.aspects.split(",")):
        parser.error(f"--aspects {args.aspects}: must look like 1:1,3:2,2:3")
    sizes = bucket_sizes((args.size, args.size), args.multiple, args.aspects.split(","))
    kept = f"what is finished in {args.out} is kept, the same command goes on"
    try:
        check_rank()
        device = device_of(args.device)
        encoders = Encoders(args.model, device, not args.no_t5, vae=bool(args.images))
        encode(encoders, args, sizes)
    except UserError as error:
        return exit_status("sd3/encode.py", error)
    except KeyboardInterrupt:
        return exit_status("sd3/encode.py", KeyboardInterrupt(f"; {kept}"))
    except (RunError, OSError, RuntimeError, MemoryError) as error:
        return exit_status("sd3/encode.py", RunError(f"{reason(error, 1000)}; {kept}"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
