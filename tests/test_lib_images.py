"""lib/images.py: true colours of every kind of picture; pictures that are odd, broken or harm."""

import io

import numpy as np
import pytest
import torch
from conftest import CPU, encode, folder, plain, png, press, run_folder, run_on, swapped, zipped
from PIL import Image

import data
import ladd
import sample
from lib.images import decode, size_of, to_rgb


def test_pictures_are_cropped_at_the_centre(tmp_path):
    stripes = Image.new("RGB", (30, 10), "red")
    stripes.paste("lime", (10, 0, 20, 10))
    stripes.paste("blue", (20, 0, 30, 10))
    assert (decode(encode(stripes), [(10, 10)]) == np.array([0, 255, 0])[:, None, None]).all()
    tall = encode(stripes.transpose(Image.Transpose.ROTATE_270))  # red on top
    assert (decode(tall, [(10, 10)]) == np.array([0, 255, 0])[:, None, None]).all()
    wide = decode(encode(stripes), [(4, 12)])  # nothing to crop
    assert wide.shape == (3, 4, 12)
    assert wide[:, 2, [0, 6, 11]].T.tolist() == [[255, 0, 0], [0, 255, 0], [0, 0, 255]]


def test_resizing_averages_instead_of_picking_pixels():
    board = Image.fromarray((np.indices((64, 48)).sum(axis=0) % 2 * 255).astype(np.uint8))
    small = decode(encode(board), [(8, 6)]).astype(int)
    assert np.abs(small - 127.5).max() < 8


def palette(**options):
    image = Image.new("P", (4, 4), 1)
    image.putpalette([10, 20, 30, 200, 100, 50])
    return encode(image, **options)


def rotated():
    """Stored with red on the left; orientation 6, "turn clockwise", puts it on top."""
    image = Image.new("RGB", (32, 16), "red")
    image.paste("blue", (16, 0, 32, 16))
    exif = Image.Exif()
    exif[0x0112] = 6
    return encode(image, "JPEG", quality=95, exif=exif)


RGBA = Image.new("RGBA", (4, 4), (255, 0, 0, 51))


GREY16 = Image.fromarray(np.full((4, 4), 128 * 257, np.uint16))
PICTURES = {
    "RGBA: a fifth of red on white": (encode(RGBA), (255, 204, 204), 0),
    "RGBA, all transparent": (encode(Image.new("RGBA", (4, 4), (9, 9, 9, 0))), (255,) * 3, 0),
    "palette": (palette(), (200, 100, 50), 0),
    "palette, the colour transparent": (palette(transparency=1), (255, 255, 255), 0),
    "palette, another colour transparent": (palette(transparency=0), (200, 100, 50), 0),
    "palette with alphas": (palette(transparency=bytes([255, 51])), (244, 224, 214), 0),
    "RGB with one transparent colour": (
        encode(Image.new("RGB", (4, 4), (1, 2, 3)), transparency=(1, 2, 3)),
        (255, 255, 255),
        0,
    ),
    "grey": (encode(Image.new("L", (4, 4), 77)), (77, 77, 77), 0),
    "grey, 16 bits": (encode(GREY16), (128, 128, 128), 0),
    "grey with alpha": (encode(Image.new("LA", (4, 4), (0, 51))), (204, 204, 204), 0),
    "one bit": (encode(Image.new("1", (4, 4), 1)), (255, 255, 255), 0),
    "CMYK JPEG: magenta and yellow": (
        encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=95),
        (255, 0, 0),
        12,
    ),
    "grey JPEG": (encode(Image.new("L", (8, 8), 60), "JPEG", quality=95), (60, 60, 60), 3),
    "WebP": (encode(Image.new("RGB", (4, 4), (5, 66, 7)), "WEBP", lossless=True), (5, 66, 7), 0),
    "WebP with alpha": (encode(RGBA, "WEBP", lossless=True), (255, 204, 204), 0),
}


@pytest.mark.parametrize("kind", PICTURES)
def test_every_kind_of_picture_gets_its_true_colours(kind):
    content, colour, tolerance = PICTURES[kind]
    pixels = decode(content, [(4, 4)]).astype(int)
    assert pixels.shape == (3, 4, 4)
    assert np.abs(pixels - np.array(colour)[:, None, None]).max() <= tolerance


def test_pictures_are_turned_as_their_exif_says():
    pixels = decode(rotated(), [(16, 8)]).astype(int)
    red, blue = np.array([254, 0, 0]), np.array([0, 0, 254])
    assert np.abs(pixels[:, :6] - red[:, None, None]).max() < 12
    assert np.abs(pixels[:, 10:] - blue[:, None, None]).max() < 12


# ---------------------------------------------------------------------------------------------
# Pictures that are broken, odd, or meant to harm
# ---------------------------------------------------------------------------------------------

PETS = {f"cat/{k}.png": plain(k) for k in range(12)}


def test_a_picture_whose_exif_makes_no_sense_has_the_size_that_it_is_read_in():
    exif = Image.Exif()
    exif[0x0112] = 9
    content = encode(Image.new("RGB", (3, 2)), "JPEG", exif=exif)
    assert size_of(io.BytesIO(content)) == to_rgb(Image.open(io.BytesIO(content))).size[::-1]


def broken_pictures():
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    jpeg = encode(Image.fromarray(noise), "JPEG")
    webp = encode(Image.fromarray(noise), "WEBP")
    frame = jpeg.index(b"\xff\xc0")  # then length, precision, height, width
    return {
        "400 million pixels": png(20_000, 20_000),
        "4 · 10^18 pixels": png(2**31 - 1, 2**31 - 1),
        "70 million pixels": png(7000, 10_000),
        "no width": png(0, 5),
        "no height": png(5, 0),
        "JPEG, 65,535 squared": jpeg[: frame + 5] + b"\xff" * 4 + jpeg[frame + 9 :],
        "JPEG without size": jpeg[: frame + 5] + b"\0" * 4 + jpeg[frame + 9 :],
        "JPEG cut": jpeg[: len(jpeg) // 2],
        "WebP cut": webp[: len(webp) // 2],
        "a program for Ghostscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n",
        "TIFF": encode(Image.new("L", (4, 4)), "TIFF"),
        "SVG": b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>',
        "HTML": b"<!DOCTYPE html><title>404</title>",
    }


@pytest.mark.parametrize("case", broken_pictures())
def test_a_broken_picture_stops_a_small_set_and_an_init_image_by_name(tmp_path, refused, case):
    """1 of 13 is more than 1 %. The picture is named with its reason."""
    content = broken_pictures()[case]
    path = folder(tmp_path / "set", PETS | {"cat/broken.png": content})
    said = refused(ladd, run_on(path), 2, path, "1 of 13 images", "cat/broken.png")
    assert f"skipped {path}: cat/broken.png: " in said
    words = [run_folder(tmp_path / "made"), "--prompt", "x", "--out", "a.png", *CPU]
    words += ["--init-image", path / "cat/broken.png"]
    refused(sample, words, 2, "broken.png", "can't be read")


def frames(kind):
    """An animation that begins red."""
    pictures = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    options = dict(lossless=True) if kind == "WEBP" else {}
    return encode(pictures[0], kind, save_all=True, append_images=pictures[1:], **options)


def turned():
    """Stored lying; its EXIF says that it was taken upright, red on top."""
    image, exif = Image.new("RGB", (32, 16), "red"), Image.Exif()
    image.paste("blue", (16, 0, 32, 16))
    exif[0x0112] = 6
    return encode(image, "PNG", exif=exif)


def blue(mode, **options):
    return encode(Image.new(mode, (16, 16), "blue"), **options)


RED = Image.new("RGB", (16, 16), "red")
CMYK = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
YELLOW = Image.new("CMYK", (16, 16), (0, 0, 255, 0))
NOISE = np.random.default_rng(0).bytes(5 << 20)  # which no zip makes smaller
ODD = {
    "PNG by another name": encode(RED),
    "JPEG by another name": encode(RED, "JPEG", quality=95),
    "WebP by another name": encode(RED, "WEBP", lossless=True),
    "animated GIF": frames("GIF"),
    "animated PNG": frames("PNG"),
    "animated WebP": frames("WEBP"),
    "turned by its EXIF": turned(),
    "16 bits": encode(Image.fromarray(np.full((8, 8), 65535, np.uint16))),
    "CMYK": encode(CMYK, "JPEG", quality=95),
    "CMYK with a profile": encode(YELLOW, "JPEG", quality=95, icc_profile=press()),
    "CMYK with a broken profile": encode(CMYK, "JPEG", quality=95, icc_profile=b"no profile" * 40),
    "CMYK with a profile of RGB": encode(CMYK, "JPEG", quality=95, icc_profile=swapped()),
    "RGB with a profile": blue("RGB", icc_profile=swapped()),
    "RGBA with a profile": blue("RGBA", icc_profile=swapped()),
    "a palette with a profile": blue("P", icc_profile=swapped()),
    "RGB with a profile of CMYK": encode(RED, icc_profile=press()),
    "RGB with a broken profile": encode(RED, icc_profile=b"\xff" * 500),
    "RGB with a profile cut short": encode(RED, icc_profile=swapped(whole=False)),
    "RGB with a profile of 5 MB": encode(RED, "JPEG", quality=95, icc_profile=swapped() + NOISE),
    "one pixel": encode(RED.resize((1, 1))),
    "a strip": encode(RED.resize((5000, 1))),
    "bytes behind its end": encode(RED) + b"PK\3\4" * 100,
    "a broken EXIF block": encode(RED, "JPEG", quality=95, exif=b"Exif\0\0II*\0\xff\xff\xff\x7f"),
}


@pytest.mark.parametrize("case", ODD)
@pytest.mark.parametrize("name", ["1.jpg", "1.webp"])
def test_an_odd_picture_is_read_all_the_same(tmp_path, capsys, case, name):
    """Content decides, not the name; of animations the first frame; turned as EXIF says."""
    dataset = data.load(str(zipped(tmp_path / "set.zip", {f"cat/{name}": ODD[case]})), [(8, 4)])
    pixels = dataset.images[0, :, 1, 1].int()
    want = torch.tensor([255] * 3 if case == "16 bits" else [255, 0, 0])
    assert (pixels - want).abs().max() < 12
    assert capsys.readouterr().err.count("\n") == 1  # what is read, and no complaint
