"""Draws teacher and student on their way from the same noise and captions, as an animated GIF.

python -m tools.trajectory RUN --out docs/trajectories.gif

The first frame is the noise, the others x̂_0 after every step. The student, soon there, waits.
"""

import sys

from PIL import Image

import data
from lib.errors import DataError, Parser, UsageError, UserError, exit_status
from lib.files import replacing
from lib.pictures import panels, refuse_strangers
from sample import latent_sizes, load_generator, noise_of


def way(args, teacher):
    """The images after 0, 1, … steps of the teacher or the student, each (n, 3, H, W) uint8."""
    generator = load_generator(args.run, teacher)
    s = generator.settings
    if s.downscale > 1:
        raise DataError(f"{args.run} makes latents, not pixels.")
    dataset = data.load(s.data, latent_sizes(s)[:1], data_dir=args.data_dir, seed=s.seed)
    ((captions, size),) = data.held_out_captions(dataset, args.num)
    noise = noise_of(args.seed, "sampling", range(args.num), (3, *size))
    steps = generator.trajectory(captions, range(args.num), seed=args.seed, size=size)
    return [data.to_picture(x0) for x0 in (noise, *steps)]


def main(argv=None):
    parser = Parser("tools/trajectory.py", "The way from noise to images, as an animated GIF.")
    parser.add_argument("run", help="a finished run on pixels")
    parser.add_argument("--out", default="trajectories.gif")
    parser.add_argument("--num", type=int, default=16, help="images of each")
    parser.add_argument("--seed", type=int, default=3, help="of the noise")
    parser.add_argument("--data-dir", default="data")
    args = parser.parse_args(argv)
    if not 1 <= args.num <= 1000:
        parser.error("--num: must be from 1 to 1,000")
    try:
        refuse_strangers(args.out)
        ways = {name: way(args, name == "teacher") for name in ("teacher", "student")}
    except UserError as error:
        return exit_status("tools/trajectory.py", UsageError(error))
    frames = []
    for step in range(max(map(len, ways.values()))):
        now = [(name, min(step, len(images) - 1)) for name, images in ways.items()]
        titled = [(f"{k}: step {i} of {len(ways[k]) - 1}", ways[k][i]) for k, i in now]
        frames.append(panels(titled, 4))
    palette = frames[-1].quantize(160, Image.Quantize.MEDIANCUT)
    frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    between = [450 if step < 5 else 110 for step in range(1, len(frames) - 1)]  # milliseconds
    moving = dict(save_all=True, duration=[900, *between, 3000], loop=0, optimize=True)
    with replacing(args.out) as file:
        frames[0].save(file, "GIF", comment=b"LADD", append_images=frames[1:], **moving)
    return 0


if __name__ == "__main__":
    sys.exit(main())
