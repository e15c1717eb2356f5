"""Pictures from strangers: any readable file becomes 8-bit sRGB pixels of the size asked for."""

import contextlib
import functools
import io
import math
import threading
import warnings

import numpy as np
from PIL import Image, ImageOps

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")  # what a picture may be, whatever its name says
MOST_PIXELS = 1 << 26  # of one picture: 8192 × 8192
warnings.filterwarnings("ignore", module="PIL")  # odd metadata; what can't be read raises
MOST_PROFILE = 1 << 22  # bytes of a colour profile; those of printing presses have 2 MB
PROFILED = {"L": "RGB", "RGB": "RGB", "RGBA": "RGBA", "CMYK": "RGB"}  # mode -> what it becomes


@functools.lru_cache(8)  # the pictures of a set have few profiles, and this takes up to 0.1 s
def srgb_transform(profile, mode):
    from PIL import ImageCms  # only now: most pictures have no profile

    own, srgb = ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB")
    flags = ImageCms.Flags.NOCACHE  # several threads use it
    return ImageCms.buildTransform(own, srgb, mode, PROFILED[mode], flags=flags)


def to_srgb(image):
    """A picture that brings a colour profile, in sRGB; as it is where that can't be applied."""
    profile = image.info.get("icc_profile") or b""
    if not 0 < len(profile) <= MOST_PROFILE:
        return image
    if image.mode == "P":
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    try:
        return srgb_transform(profile, image.mode).apply(image)
    except Exception:  # damaged, for another mode than the picture's, or Pillow is without
        return image


def to_rgb(image):
    """Any picture as 8-bit sRGB: rotated as its EXIF says, its colour profile applied,
    transparency on white."""
    image = to_srgb(ImageOps.exif_transpose(image))
    if image.mode.startswith(("I", "F")):  # 16-bit grey; Pillow's own conversion would clip it
        grey = np.asarray(image, np.float64)
        scale = 1 if grey.max(initial=0) <= 255 and not image.mode.startswith("I;16") else 257
        return Image.fromarray((grey / scale).clip(0, 255).round().astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def nearest(sizes, height, width):
    """The one of `sizes` [(H, W)] whose aspect ratio is nearest to that of height × width."""
    aspect = math.log(width / height)
    return min(sizes, key=lambda size: abs(math.log(size[1] / size[0]) - aspect))


def fit(image, height, width):
    """A picture cropped at the centre and resized -> (3, H, W) uint8"""
    image = ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)
    return np.asarray(image).transpose(2, 0, 1)


def size_of(file):
    """The (H, W) in which an image file is shown, by its header alone."""
    with Image.open(file, formats=FORMATS) as image:
        lies = image.getexif().get(0x0112) in (5, 6, 7, 8)  # its orientation, by EXIF
        return image.size if lies else image.size[::-1]


one_large = threading.Lock()  # pictures above 4 million pixels are decoded one after another


def decode(data, sizes):
    """The bytes of an image file -> (3, H, W) uint8, that of `sizes` whose aspect is nearest.

    Raises ValueError where it has too many pixels; Pillow raises nearly anything on damaged files.
    """
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        pixels = image.width * image.height
        if pixels > MOST_PIXELS:
            raise ValueError(f"{image.width} × {image.height} pixels, more than {MOST_PIXELS:,}")
        with one_large if pixels > 1 << 22 else contextlib.nullcontext():
            image = to_rgb(image)
            return fit(image, *nearest(sizes, image.height, image.width))
