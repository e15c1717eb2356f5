"""Draws teacher and student on their way from the same noise and captions, as an animated GIF.

python docs/trajectories.py RUN --out docs/trajectories.gif

RUN is a finished run on pixels. Every frame is one step of each: the teacher takes 32 Euler steps
with guidance, the student 4 steps of predicting and re-noising, and waits. Shown is x̂_0, what the
network believes the image to be; the first frame is the noise.
"""

import argparse
import sys
from pathlib import Path

from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
import sample  # noqa: E402

COLUMNS, MARGIN, TITLE = 4, 24, 44


def ways(run, count, seed, data_dir):
    """[(name, [images after 0, 1, … steps])] of teacher and student; images (n, 3, H, W) uint8."""
    found = []
    for kind, name in ((True, "teacher"), (False, "student")):
        generator = sample.load_generator(run, teacher=kind)
        s = generator.settings
        if generator.model.config["channels"] != 3:
            raise data.DataError(f"{run} makes latents, not pixels.")
        sizes = dict(seed=s["seed"], sizes=sample.latent_sizes(s)[:1], data_dir=data_dir)
        dataset = data.load(s["data"], s["size"], s["size"], **sizes)
        ((captions, size),) = sample.held_out_captions(dataset, count)
        noise = sample.noise_of(seed, range(count), (3, *size))
        steps = generator.trajectory(captions, range(count), seed=seed, size=size)
        found.append((name, [data.to_uint8(x) for x in (noise, *steps)]))
    return found


def frame(found, step, scale):
    """Both grids side by side under their titles."""
    parts = []
    for name, images in found:
        last = len(images) - 1
        parts.append((f"{name}: step {min(step, last)} of {last}", images[min(step, last)]))
    grids = [(title, sample.grid(images, COLUMNS, scale)) for title, images in parts]
    width = sum(g.width for _, g in grids) + MARGIN
    sheet = Image.new("RGB", (width, TITLE + grids[0][1].height), "white")
    draw, x = ImageDraw.Draw(sheet), 0
    for (title, picture), (_, images) in zip(grids, found, strict=True):
        done = step >= len(images) - 1
        draw.text((x + 2, 8), title, "#1a7f37" if done else "black", font_size=24)
        sheet.paste(picture, (x, TITLE))
        x += picture.width + MARGIN
    return sheet


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="a run folder with teacher.pt and student.pt")
    parser.add_argument("--out", default="trajectories.gif")
    parser.add_argument("--num", type=int, default=16, help="images of each")
    parser.add_argument("--seed", type=int, default=3, help="of the noise")
    parser.add_argument("--scale", type=int, default=6, help="pixels of the GIF per pixel")
    parser.add_argument("--data-dir", default="data")
    args = parser.parse_args()
    try:
        sample.refuse_strangers(args.out)
        found = ways(args.run, args.num, args.seed, args.data_dir)
    except (sample.CheckpointError, data.DataError, FileExistsError) as reason:
        print(f"trajectories.py: {reason}", file=sys.stderr)
        return 2
    last = max(len(images) for _, images in found) - 1
    frames = [frame(found, step, args.scale) for step in range(last + 1)]
    palette = frames[-1].quantize(160, Image.Quantize.MEDIANCUT)
    frames = [f.quantize(palette=palette, dither=Image.Dither.NONE) for f in frames]
    pause = [900, *(450 if i < 5 else 110 for i in range(1, last)), 3000]  # the student's: slowly
    moving = dict(save_all=True, append_images=frames[1:], duration=pause, loop=0, optimize=True)
    with data.replacing(args.out) as file:
        frames[0].save(file, "GIF", comment=b"LADD", **moving)
    print(f"{len(frames)} frames, {Path(args.out).stat().st_size:,} bytes: {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
