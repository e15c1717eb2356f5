"""data.py: what it promises about images, captions, text features and files."""

import http.server
import io
import json
import os
import pickle
import re
import socket
import tarfile
import threading
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor, ImageOps

import data
import sample
from data import DataError

# ---------------------------------------------------------------------------------------------
# Numbers and pixels
# ---------------------------------------------------------------------------------------------


def test_pixels_become_minus_one_to_one_and_come_back_unchanged():
    pixels = torch.arange(256, dtype=torch.uint8)
    floats = data.to_float(pixels)
    assert floats.dtype == torch.float32 and floats[0] == -1 and floats[255] == 1
    assert torch.equal(data.to_uint8(floats), pixels)


def test_values_outside_the_range_are_clipped_and_inner_ones_rounded():
    x0 = torch.tensor([-3.0, -1.0, -1 + 0.4 / 127.5, -1 + 0.6 / 127.5, 1.0, 7.0])
    assert data.to_uint8(x0).tolist() == [0, 0, 0, 1, 255, 255]


def test_hash_uniform_is_the_splitmix64_finaliser_of_a_linear_form():
    def reference(seed, index, slot):
        x = index * 0x9E3779B97F4A7C15 + seed * 0xD1B54A32D192ED03 + slot * 0x8CB92BA72F3D8DD7
        x %= 1 << 64
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % (1 << 64)
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % (1 << 64)
        return ((x ^ (x >> 31)) >> 11) / (1 << 53)

    index = [0, 1, 77, 10**6, (1 << 40) + 3]
    for seed in (0, 1, 12345):
        expected = [[reference(seed, i, s) for s in (1, 2, 3)] for i in index]
        assert data.hash_uniform(seed, index, 3).tolist() == expected


def test_hash_uniform_is_uniform():
    u = data.hash_uniform(7, np.arange(40_000), 3)
    n = len(u)
    assert u.min() >= 0 and u.max() < 1
    for column in u.T:
        assert abs(column.mean() - 1 / 2) < 4 / (12 * n) ** 0.5
        assert abs(column.var() - 1 / 12) < 4 / (180 * n) ** 0.5
        counts = np.histogram(column, 50, (0, 1))[0]
        chi2 = ((counts - n / 50) ** 2 / (n / 50)).sum()  # mean 49, standard deviation 9.9
        assert 15 < chi2 < 95


def test_hash_uniform_of_other_seeds_slots_and_indices_is_uncorrelated():
    index = np.arange(20_000)
    columns = [data.hash_uniform(seed, index, 4) for seed in (0, 1, 2, 1000)]
    columns.append(data.hash_uniform(0, index + 1, 4))
    columns.append(data.hash_uniform(0, index + data.HELD_OUT, 4))
    correlation = np.corrcoef(np.concatenate(columns, axis=1).T)
    off_diagonal = correlation[~np.eye(len(correlation), dtype=bool)]
    assert np.abs(off_diagonal).max() < 5 / len(index) ** 0.5


# ---------------------------------------------------------------------------------------------
# Text features
# ---------------------------------------------------------------------------------------------


def test_word_vectors_are_the_same_in_every_process_and_version():
    text = data.HashedText(6, 4)
    text(["other words came first"])
    pinned = [0.3023224, 0.2729778, -0.5900249, -0.6768356, -2.0081906, 1.1837727]
    row = text.ids(["red"])[0, 0]
    assert text.table[row].tolist() == pytest.approx(pinned, abs=1e-6)


def test_features_do_not_depend_on_which_words_came_first():
    one, two = data.HashedText(10, 5), data.HashedText(10, 5)
    captions = ["a red cat", "the dog", "cat the blue"]
    forward = [one([c]) for c in captions]
    backward = [two([c]) for c in captions[::-1]][::-1]
    for (context, pooled), (context2, pooled2) in zip(forward, backward, strict=True):
        assert torch.equal(context, context2) and torch.equal(pooled, pooled2)


def test_words_of_any_language_work_and_differ():
    context, pooled = data.HashedText(8, 3)(["zxqv", "café", "猫", "Ünïcödé", "42"])
    assert context.isfinite().all()
    assert (torch.pdist(pooled) > 0.5).all()


@pytest.mark.parametrize("caption", ["", "  ", "?! …"])
def test_a_caption_without_words_is_all_zeros(caption):
    context, pooled = data.HashedText(8, 3)(["a cat", caption])
    assert context.shape == (2, 3, 8) and pooled.shape == (2, 8)
    assert context[0, :2].abs().min() > 0
    assert not context[1].any() and not pooled[1].any()


def test_context_is_zero_beyond_the_words():
    context, _ = data.HashedText(8, 5)(["one two", "one two three four"])
    assert context.abs().sum(dim=2).bool().tolist() == [[1, 1, 0, 0, 0], [1, 1, 1, 1, 0]]


def test_context_is_the_word_vector_plus_sinusoids_of_its_place():
    """c_j = v(word_j) + [sin(j ω_k), cos(j ω_k)],  ω_k = 1000^(-k / (D/2))"""
    text = data.HashedText(6, 3)
    context, _ = text(["cat dog bird"])
    for j, word in enumerate(["cat", "dog", "bird"]):
        angles = [j * 1000 ** (-k / 3) for k in range(3)]
        place = torch.tensor([*np.sin(angles), *np.cos(angles)], dtype=torch.float32)
        assert torch.allclose(context[0, j], text.word_vector(word) + place, atol=1e-5)


def test_word_order_changes_the_context_but_not_the_pooled_vector():
    context, pooled = data.HashedText(12, 6)(["red left of blue", "blue left of red"])
    assert (context[0, 0] - context[1, 0]).norm() > 0.5
    assert torch.allclose(context[0, 1:3], context[1, 1:3])
    assert torch.allclose(pooled[0], pooled[1], atol=1e-6)


def test_captions_are_cut_after_the_last_word_that_fits():
    text = data.HashedText(8, 3)
    assert torch.equal(text.ids(["one two three"]), text.ids(["one two three four five"]))


def test_case_and_punctuation_do_not_matter():
    text = data.HashedText(8, 5)
    ids = text.ids(["a red cat on top", "A Red, cat -- on\nTOP!"])
    assert torch.equal(ids[0], ids[1])


def test_ids_and_features_give_what_the_call_gives_and_later_words_change_nothing():
    text = data.HashedText(8, 4)
    captions = ["a red cat", "", "a dog"]
    ids = text.ids(captions)
    before = text.features(ids)
    text.ids(["quite new words"])
    for a, b, c in zip(before, text.features(ids), text(captions), strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)
    assert ids.dtype == torch.int64 and ids.shape == (3, 4)


def test_the_pooled_norm_does_not_grow_with_the_number_of_words():
    """Σ v_j / √n has norm √D for independent v_j."""
    captions = [" ".join(f"word{k}" for k in range(n)) for n in range(1, 13)]
    _, pooled = data.HashedText(1024, 12)(captions)
    assert (pooled.norm(dim=1) / 32 - 1).abs().max() < 0.12


# ---------------------------------------------------------------------------------------------
# Shapes
# ---------------------------------------------------------------------------------------------

NAMES = ["size", "colour", "shape", "relation"]
NAMES += ["second size", "second colour", "second shape", "background"]
OBJECT = r"a (\w+) (\w+) (\w+)"
SENTENCE = re.compile(
    rf"{OBJECT}(?: (left of|right of|above|below) {OBJECT})? on a (\w+) background"
)


def parse(caption):
    """A caption of the shapes -> {attribute: word}; "none" for what it does not say."""
    words = SENTENCE.fullmatch(caption).groups("none")
    return dict(zip(NAMES, words, strict=True))


def draw(dataset, n, first=0):
    """-> images (n, H, W, 3) of int, and what their captions say"""
    images, caption = dataset.batch(np.arange(first, first + n))
    pixels = images.permute(0, 2, 3, 1).numpy().astype(int)
    return pixels, [parse(dataset.captions[i]) for i in caption]


def mask(image, colour):
    """Where an image (H, W, 3) has exactly this colour."""
    return (image == data.COLOURS[colour]).all(axis=-1)


@pytest.fixture(scope="module")
def pairs():
    """A set with two objects, neither square nor a power of two."""
    return data.Shapes(40, 52, seed=3)


def test_the_same_seed_and_index_give_the_same_captions_everywhere():
    dataset = data.Shapes(16, 20, seed=3)
    _, caption = dataset.batch([0, 1, 2])
    assert [dataset.captions[i] for i in caption] == [
        "a small purple square on a green background",
        "a small orange cross on a green background",
        "a large purple cross on a yellow background",
    ]


@pytest.mark.parametrize("size", [(9, 14), (35, 32)])
def test_a_shapes_image_depends_on_seed_and_index_alone(size):
    dataset = data.Shapes(*size, seed=4)
    index = np.array([5, 0, 123_456_789_012, 17, 5, 2])
    images, caption = dataset.batch(index)
    assert images.dtype == torch.uint8 and images.shape == (6, 3, *size)
    again = data.Shapes(*size, seed=4)
    again.batch(range(50))
    for i, k in enumerate(index):
        image, row = again.batch([int(k)])
        assert torch.equal(image[0], images[i]) and row[0] == caption[i]
    for kind in (np.int32, np.uint8, torch.tensor):
        small = kind([5, 17]) if kind is torch.tensor else np.array([5, 17], kind)
        assert torch.equal(again.batch(small)[0], images[[0, 3]])
        held = again.batch(small, held_out=True)[0]
        assert torch.equal(held, again.batch(np.array([5, 17]), held_out=True)[0])
    other, _ = data.Shapes(*size, seed=5).batch(index)
    assert (other != images).flatten(1).any(dim=1).all()


def test_shapes_never_end_never_repeat_and_hold_out_images_of_their_own():
    dataset = data.Shapes(12, 14)
    far = [np.arange(500) + start for start in (0, 1 << 20, 1 << 35, 1 << 39)]
    seen = [dataset.batch(index)[0] for index in far]
    seen += [dataset.batch(index, held_out=True)[0] for index in far[:2]]
    images = [image.numpy().tobytes() for image in torch.cat(seen)]
    assert len(set(images)) == len(images) == 3000


def test_every_seed_of_the_shapes_is_scored_on_the_same_held_out_images():
    one, two = (data.Shapes(12, 14, seed).batch(range(5), held_out=True) for seed in (3, 8))
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])


def test_colour_words_mean_what_they_say():
    """Every colour is nearest to the CSS colour of its own name."""
    css = {name: np.array(ImageColor.getrgb(name)) for name in data.COLOURS}
    for name, rgb in data.COLOURS.items():
        assert min(css, key=lambda other: np.linalg.norm(css[other] - rgb)) == name


def test_captions_say_the_colours_shape_and_size_that_are_drawn():
    """Shapes by share of their bounding box: square 1, circle 0.79, cross 0.66, triangle 1/2."""
    images, said = draw(data.Shapes(90, 80, seed=5), 400)
    areas, seen = {}, 0
    for image, words in zip(images, said, strict=True):
        if words["relation"] != "none":
            continue
        seen += 1
        corners = image[[0, 0, -1, -1], [0, -1, 0, -1]].tolist()
        assert corners.count(list(data.COLOURS[words["background"]])) >= 2
        # Share of the object in every pixel, read off the channel that changes most.
        ground, colour = (np.array(data.COLOURS[words[k]]) for k in ("background", "colour"))
        channel = np.abs(colour - ground).argmax()
        cover = (image[..., channel] - ground[channel]) / (colour - ground)[channel]
        assert cover.min() >= -0.01 and cover.max() <= 1.01
        y, x = (int((np.indices(cover.shape)[k] * cover).sum() / cover.sum() + 0.5) for k in (0, 1))
        assert tuple(image[y, x]) == data.COLOURS[words["colour"]]

        rows = cover.sum(axis=1)
        height, width = (line.sum() / line.max() for line in (cover.max(1), cover.max(0)))
        fill = cover.sum() / (height * width)
        if fill > 0.93:
            shape = "square"
        elif fill > 0.73:
            shape = "circle"
        else:  # a triangle is widest at its foot, a cross in the middle
            foot = np.flatnonzero(rows > 0.5).max()
            shape = "triangle" if foot - rows.argmax() < 0.15 * height else "cross"
        assert shape == words["shape"]
        areas.setdefault((words["shape"], words["size"]), []).append(cover.sum())
    assert seen > 150 and len(areas) == 8
    for shape in data.SHAPES:
        assert max(areas[shape, "small"]) < 0.75 * min(areas[shape, "large"])


@pytest.mark.parametrize(
    "shape, area",
    [
        (0, np.pi),  # circle
        (1, (2 * 0.87) ** 2),  # square
        (2, 1.85 * 1.85 / 2),  # triangle: foot and height of 1.85 r
        (3, 2 * 2 * 0.68 - 0.68**2),  # cross: two bars of 2 r by 0.68 r
    ],
)
def test_an_object_has_the_area_of_its_formula(shape, area):
    y, x = np.indices((57, 59)) + 0.5
    for r in (12.0, 17.3, 25.0):
        cover = np.clip(0.5 - data.signed_distance(x - 29.1, y - 28.3, r, np.array(shape)), 0, 1)
        assert cover.sum() == pytest.approx(area * r * r, rel=0.01)


@pytest.mark.parametrize("half", [None, 0, 1, 2, 3])
@pytest.mark.parametrize("shape", range(4))
def test_an_object_is_never_cut_by_the_border_and_stays_in_its_half(shape, half):
    """Its area is the same in the middle and pushed into any corner."""
    dataset = data.Shapes(64, 70)
    places = np.array([[0.5, 0.5], [0, 0], [0, 1], [1, 0], [1, 1]])
    n = np.ones(len(places), np.int64)
    for size in (0, 1):
        for extent in (0.0, 1.0):
            u = np.concatenate([np.full((5, 1), extent), places], axis=1)
            cover = dataset.object_cover(size * n, shape * n, u, None if half is None else half * n)
            assert cover.shape == (5, 64, 70, 1)
            area = cover.sum(axis=(1, 2, 3))
            assert np.abs(area / area[0] - 1).max() < 0.02
            if half is not None:  # left, right, above, below
                axis, far = [(2, 1), (2, 0), (1, 1), (1, 0)][half]
                other = np.array_split(cover, 2, axis)[far]
                assert other.sum(axis=(1, 2, 3)).max() < 1


def test_edges_are_smooth_and_nothing_else_is():
    """A mixed pixel has pure object and, or the border, pure background within three pixels."""
    images, said = draw(data.Shapes(30, 26, seed=1), 60)
    for image, words in zip(images, said, strict=True):
        ground, thing = mask(image, words["background"]), mask(image, words["colour"])
        mixed = ~(ground | thing)
        assert 4 <= mixed.sum() < 0.3 * mixed.size
        for pure, beyond in ((ground, True), (thing, False)):
            padded = np.pad(pure, 3, constant_values=beyond)
            near = np.lib.stride_tricks.sliding_window_view(padded, (7, 7)).any(axis=(2, 3))
            assert near[mixed].all()


def test_the_background_is_never_the_colour_of_an_object(pairs):
    for words in map(parse, pairs.captions):
        assert words["background"] not in (words["colour"], words["second colour"])


def test_every_attribute_value_is_drawn_with_its_frequency(pairs):
    """Half of the images hold two objects; apart from that all values are equally likely."""
    n = 6000
    caption = torch.cat([pairs.batch(np.arange(500) + 500 * k)[1] for k in range(n // 500)])
    labels = pairs.labels[caption]
    for column, (name, values) in enumerate(pairs.attributes.items()):
        optional = values[0] == "none"
        k = len(values) - optional
        p = np.array([0.5] * optional + [(0.5 if optional else 1) / k] * k)
        counts = np.bincount(labels[:, column], minlength=len(values))
        assert len(counts) == len(values), name
        assert (np.abs(counts - n * p) < 4.5 * (n * p * (1 - p)) ** 0.5).all(), name


def test_two_objects_stand_as_the_caption_says(pairs):
    images, said = draw(pairs, 600)
    checked = dict.fromkeys(data.RELATIONS, 0)
    for image, words in zip(images, said, strict=True):
        if words["relation"] == "none" or words["colour"] == words["second colour"]:
            continue
        (y, x), (y2, x2) = (
            np.argwhere(mask(image, words[k])).mean(axis=0) for k in ("colour", "second colour")
        )
        gap = {"left of": x2 - x, "right of": x - x2, "above": y2 - y, "below": y - y2}
        assert gap[words["relation"]] > 0.2 * min(image.shape[:2])
        checked[words["relation"]] += 1
    assert min(checked.values()) > 30


def test_pairs_have_the_sizes_their_caption_says(pairs):
    images, said = draw(pairs, 600, first=10_000)
    areas = {}
    for image, words in zip(images, said, strict=True):
        if words["relation"] == "none" or words["colour"] == words["second colour"]:
            continue
        for k in ("", "second "):
            area = mask(image, words[f"{k}colour"]).sum()
            areas.setdefault((words[f"{k}shape"], words[f"{k}size"]), []).append(area)
    for shape in data.SHAPES:
        assert max(areas[shape, "small"]) < min(areas[shape, "large"])


def test_second_objects_come_from_32_pixels_on():
    assert "relation" not in data.Shapes(31, 60).attributes
    assert "relation" in data.Shapes(60, 32).attributes


@pytest.mark.parametrize("size", [(16, 20), (40, 52)])
def test_captions_are_distinct_and_labels_say_the_same(size, pairs):
    dataset = pairs if size == (40, 52) else data.Shapes(*size)
    assert len(set(dataset.captions)) == len(dataset.captions) == len(dataset.labels)
    values = list(dataset.attributes.items())
    for caption, row in zip(dataset.captions[::5], dataset.labels[::5].tolist(), strict=True):
        words = parse(caption)
        assert all(words[k] == list(v)[i] for (k, v), i in zip(values, row, strict=True))


# ---------------------------------------------------------------------------------------------
# Images in memory
# ---------------------------------------------------------------------------------------------


def numbered(n, seed=0, flip=True):
    """A set whose image i is 2 x 3 pixels with values i on the left, i + 100 on the right."""
    images = torch.arange(n, dtype=torch.uint8)[:, None, None, None].repeat(1, 3, 2, 3)
    images[..., 2] += 100
    held = images[:4] + 50
    return data.ImageSet(
        "numbered", (images, torch.arange(n)), (held, torch.arange(4)), seed=seed, flip=flip
    )


def number(images):
    return images.amin(dim=(1, 2, 3)).tolist()


def test_every_epoch_shows_every_image_once_with_its_caption_in_a_new_order():
    dataset, epochs = numbered(37), []
    for epoch in range(5):
        images, caption = dataset.batch(np.arange(37) + 37 * epoch)
        assert sorted(number(images)) == list(range(37)) and number(images) == caption.tolist()
        epochs.append(tuple(caption.tolist()))
    assert len(set(epochs)) == 5 and tuple(range(37)) not in epochs


def test_batch_i_depends_on_seed_and_i_alone_in_whatever_order_it_is_asked_for():
    """The judge trains far along the indices, then the next stage starts from 0 again."""
    jumps = [1 << 36, (1 << 36) + 7, (1 << 36) + 14, (1 << 36) + 21, 0, 7, 1 << 36, 14, 2]
    dataset = numbered(7, seed=2)
    for start in jumps:
        index = np.arange(start, start + 5)
        fresh = numbered(7, seed=2).batch(index)
        for a, b in zip(dataset.batch(index), fresh, strict=True):
            assert torch.equal(a, b)


def test_a_batch_may_be_larger_than_several_epochs():
    images, caption = numbered(3).batch(np.arange(3 * 9))
    singles = [numbered(3).batch([i]) for i in range(27)]
    assert torch.equal(images, torch.cat([s[0] for s in singles]))
    assert caption.bincount().tolist() == [9, 9, 9]


@pytest.mark.parametrize("seed", [1, -1, 1 << 31])
def test_other_seeds_give_other_orders(seed):
    index = np.arange(37)
    assert not torch.equal(numbered(37).batch(index)[1], numbered(37, seed).batch(index)[1])


def test_half_of_the_training_images_are_mirrored_and_no_held_out_ones():
    mirrored = numbered(50).batch(np.arange(2000))[0]
    left, right = mirrored[:, 0, 0, 0].int(), mirrored[:, 0, 0, 2].int()
    assert set((right - left).tolist()) == {100, -100}
    assert abs((right < left).float().mean() - 0.5) < 0.05
    images, caption = numbered(50).batch(np.arange(9), held_out=True)
    assert caption.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0]
    assert images[:, 0, 1].tolist() == [[c + 50, c + 50, c + 150] for c in caption]


def test_an_image_is_mirrored_in_some_epochs_and_not_in_others():
    images, _ = numbered(5).batch(np.arange(5 * 40))
    flipped = images[:, 0, 0, 0] > images[:, 0, 0, 2]
    for k in range(5):
        own = flipped[torch.tensor(number(images)) == k]
        assert own.any() and not own.all()


def test_flip_false_mirrors_nothing():
    images, _ = numbered(20, flip=False).batch(np.arange(60))
    assert (images[:, 0, 0, 0] < images[:, 0, 0, 2]).all()


def test_class_names_become_captions_and_labels():
    captions, attributes, labels = data.class_attributes(["cat", "polar bear"])
    assert captions == ["a photo of a cat", "a photo of a polar bear"]
    assert attributes == {"class": ("cat", "polar bear")} and labels.tolist() == [[0], [1]]


def test_words_that_divide_free_captions_become_attributes():
    """Of 100: runs 55, sleeps 41, cat 61, the 39, fox 35; not everywhere 100, rare 4, short a."""
    captions = [
        "A cat runs everywhere",
        "a cat, sleeps everywhere",
        "the fox runs everywhere",
        "the rare everywhere",
    ]
    attributes, labels = data.word_attributes(captions, [20, 41, 35, 4])
    assert list(attributes) == ["runs", "sleeps", "cat", "the", "fox"]
    assert set(attributes.values()) == {("no", "yes")}
    assert labels.tolist() == [[1, 0, 1, 0, 0], [0, 1, 1, 0, 0], [1, 0, 0, 1, 1], [0, 0, 0, 1, 0]]


def test_no_more_words_than_asked_for_become_attributes_the_most_even_first():
    captions = ["red one", "red two", "blue three", "blue four", "blue five"]
    attributes, labels = data.word_attributes(captions, [1] * 5, most=2)
    assert list(attributes) == ["blue", "red"] and labels[:, 0].tolist() == [0, 0, 1, 1, 1]


def test_captions_that_all_say_the_same_have_no_attributes():
    attributes, labels = data.word_attributes(["a photo", "photo!"], [3, 4])
    assert attributes == {} and labels.shape == (2, 0) and labels.dtype == torch.int64


# ---------------------------------------------------------------------------------------------
# Folders and zips of images
# ---------------------------------------------------------------------------------------------


def encode(image, kind="PNG", **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def plain(k, size=(3, 2)):
    """An image of one colour that belongs to the number k."""
    return encode(Image.new("RGB", size, (k, 255 - k, 7 * k % 256)))


def keys(images):
    return images[:, 0, 0, 0].tolist()


def caption_lines(captions):
    return "\n".join(json.dumps({"file": k, "caption": v}) for k, v in captions.items()).encode()


def folder(path, files):
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def zipped(path, files):
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as out:
        for name, content in files.items():
            out.writestr(name, content)
    return path


PETS = {f"{'cat' if k % 3 else 'polar_bear'}/{k:02}.png": plain(k) for k in range(31)}
SENTENCES = {n: f"a photo of a {n.split('/')[0].replace('_', ' ')}" for n in PETS}
WAYS = {
    "classes": PETS,
    "jsonl": PETS | {"captions.jsonl": caption_lines(SENTENCES)},
    "txt": PETS | {n.replace(".png", ".txt"): f" {t}\n".encode() for n, t in SENTENCES.items()},
}


@pytest.mark.parametrize("pack", [folder, zipped])
@pytest.mark.parametrize("way", WAYS)
def test_class_folders_caption_lists_and_text_files_in_folders_and_zips_give_the_same(
    tmp_path, way, pack
):
    dataset = data.load(str(pack(tmp_path / "pets.x", WAYS[way])), 4, 6, seed=5)
    reference = data.load_files(folder(tmp_path / "reference", PETS), 4, 6, seed=5)
    assert dataset.captions == ["a photo of a cat", "a photo of a polar bear"]
    assert (dataset.train_size, len(dataset.held_out_images)) == (28, 3)
    for held_out in (False, True):
        index = np.arange(40)
        pairs = zip(dataset.batch(index, held_out), reference.batch(index, held_out), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    images, caption = dataset.batch(np.arange(28))
    assert images.shape == (28, 3, 4, 6) and images.dtype == torch.uint8
    assert [int(k % 3 > 0) for k in keys(images)] == (1 - caption).tolist()
    if way == "classes":
        assert dataset.attributes == {"class": ("cat", "polar bear")}
    else:
        assert "cat" in dataset.attributes


def test_an_image_keeps_the_caption_that_was_written_for_it(tmp_path):
    texts = {f"{k}.png": f"caption of number {k}" for k in range(20)}
    files = {n: plain(k) for k, n in enumerate(texts)} | {"captions.jsonl": caption_lines(texts)}
    dataset = data.load_files(folder(tmp_path, files), 2, 3)
    for held_out, n in ((False, 18), (True, 2)):
        images, caption = dataset.batch(np.arange(n), held_out)
        said = [dataset.captions[i] for i in caption]
        assert said == [f"caption of number {k}" for k in keys(images)]


def test_every_caption_list_counts_and_names_files_from_its_own_folder(tmp_path):
    files = {"a/0.png": plain(0), "b/deep/1.png": plain(1), "b/2.png": plain(2)}
    files["a/captions.jsonl"] = caption_lines({"0.png": "zero"})
    files["b/captions.jsonl"] = caption_lines({"deep/1.png": "one", "./2.png": "two"})
    assert data.load_files(folder(tmp_path, files), 2, 2).captions == ["one", "two", "zero"]


def test_caption_lists_may_hold_blank_lines_windows_line_ends_and_odd_characters(tmp_path):
    rows = [{"file": "0.png", "caption": "ein\u2028Bär "}, {"file": "1.png", "caption": "x"}]
    lines = "\ufeff" + "\r\n\r\n".join(json.dumps(r, ensure_ascii=False) for r in rows) + "\r\n"
    files = {"0.png": plain(0), "1.png": plain(1), "captions.jsonl": lines.encode()}
    assert data.load_files(folder(tmp_path, files), 2, 2).captions == ["ein\u2028Bär", "x"]


def test_images_without_a_caption_are_left_out_and_counted(tmp_path, capsys):
    files = {f"{k}.png": plain(k) for k in range(5)} | {"3.txt": b"three", "1.txt": b"one"}
    dataset = data.load_files(folder(tmp_path, files), 2, 2)
    assert dataset.captions == ["one", "three"]
    assert "left out 3 of 5 images" in capsys.readouterr().err


def test_hidden_files_are_ignored(tmp_path):
    files = PETS | {".thumbs/x.png": b"no", "cat/._01.png": b"no", "__MACOSX/cat/01.png": b"no"}
    for path in (folder(tmp_path / "f", files), zipped(tmp_path / "f.zip", files)):
        dataset = data.load_files(path, 2, 2)
        assert dataset.train_size + len(dataset.held_out_images) == len(PETS)


def test_a_tenth_is_held_out_by_name_for_every_seed_and_is_never_trained_on(tmp_path):
    path = folder(tmp_path, PETS)
    one, two = (data.load_files(path, 2, 2, seed=seed) for seed in (0, 1))
    assert torch.equal(one.held_out_images, two.held_out_images)
    held, train = keys(one.held_out_images), keys(one.batch(np.arange(28 * 3))[0])
    assert {*held, *train} == set(range(31)) and not set(held) & set(train)
    assert len(held) == 3


def test_every_class_is_held_out_in_proportion(tmp_path):
    files = {f"{'ab'[k % 2]}/{k}.png": plain(k) for k in range(200)}
    dataset = data.load_files(zipped(tmp_path / "set.zip", files), 2, 2)
    assert len(dataset.held_out_images) == 20
    assert 5 <= sum(k % 2 for k in keys(dataset.held_out_images)) <= 15


def test_pictures_are_cropped_at_the_centre(tmp_path):
    stripes = Image.new("RGB", (30, 10), "red")
    stripes.paste("lime", (10, 0, 20, 10))
    stripes.paste("blue", (20, 0, 30, 10))
    assert (data.decode(encode(stripes), 10, 10) == np.array([0, 255, 0])[:, None, None]).all()
    tall = encode(stripes.transpose(Image.Transpose.ROTATE_270))  # red on top
    assert (data.decode(tall, 10, 10) == np.array([0, 255, 0])[:, None, None]).all()
    wide = data.decode(encode(stripes), 4, 12)  # nothing to crop
    assert wide.shape == (3, 4, 12)
    assert wide[:, 2, [0, 6, 11]].T.tolist() == [[255, 0, 0], [0, 255, 0], [0, 0, 255]]


def test_resizing_averages_instead_of_picking_pixels():
    board = Image.fromarray((np.indices((64, 48)).sum(axis=0) % 2 * 255).astype(np.uint8))
    small = data.decode(encode(board), 8, 6).astype(int)
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
    pixels = data.decode(content, 4, 4).astype(int)
    assert pixels.shape == (3, 4, 4)
    assert np.abs(pixels - np.array(colour)[:, None, None]).max() <= tolerance


def test_pictures_are_turned_as_their_exif_says():
    pixels = data.decode(rotated(), 16, 8).astype(int)
    red, blue = np.array([254, 0, 0]), np.array([0, 0, 254])
    assert np.abs(pixels[:, :6] - red[:, None, None]).max() < 12
    assert np.abs(pixels[:, 10:] - blue[:, None, None]).max() < 12


@pytest.mark.parametrize("suffix", ["jpg", "JPEG", "png", "webp"])
def test_suffixes_count_in_any_case_and_the_content_decides(tmp_path, suffix):
    dataset = data.load_files(folder(tmp_path, {f"cat/1.{suffix}": plain(9)}), 2, 2)
    assert keys(dataset.images) == [9]


def with_bad(bad):
    """150 images, of which some are damaged; the others differ in colour."""
    return {f"cat/{k:03}.png": plain(k) for k in range(150)} | bad


@pytest.mark.parametrize(
    "content",
    [b"", b"no image at all", plain(1, (64, 64))[:60], b"\x89PNG\r\n\x1a\n" + b"\xff" * 50],
    ids=["empty", "text", "cut", "noise"],
)
def test_a_damaged_image_is_left_out_counted_and_named(tmp_path, capsys, content):
    path = folder(tmp_path, with_bad({"cat/077.png": content}))
    dataset = data.load_files(path, 2, 2)
    assert sorted(keys(dataset.images) + keys(dataset.held_out_images)) == [
        *range(77),
        *range(78, 150),
    ]
    said = capsys.readouterr().err
    assert "cat/077.png" in said and "1 of 150" in said and str(path) in said


def test_images_behind_a_damaged_one_keep_their_own_captions(tmp_path):
    files = with_bad({"cat/020.png": b""})
    texts = {name: f"number {k}" for k, name in enumerate(sorted(files))}
    files["captions.jsonl"] = caption_lines(texts)
    dataset = data.load_files(folder(tmp_path, files), 2, 2)
    assert len(dataset.captions) == 149
    said = [dataset.captions[i] for i in dataset.caption]
    assert said == [f"number {k}" for k in keys(dataset.images)]


@pytest.mark.parametrize("harm", ["data", "encrypted", "method"])
def test_a_damaged_member_of_a_zip_is_left_out_counted_and_named(tmp_path, capsys, harm):
    path = zipped(tmp_path / "set.zip", with_bad({}))
    with zipfile.ZipFile(path) as archive:
        member = archive.getinfo("cat/077.png")
    content = bytearray(path.read_bytes())
    directory = content.rindex(b"cat/077.png") - 46  # its entry in the central directory
    if harm == "data":
        start = member.header_offset + 30 + len("cat/077.png")
        content[start : start + 8] = b"\xff" * 8
    elif harm == "encrypted":
        content[directory + 8] |= 1
        content[member.header_offset + 6] |= 1
    else:
        content[directory + 10] = content[member.header_offset + 8] = 99
    path.write_bytes(content)
    dataset = data.load_files(path, 2, 2)
    assert dataset.train_size + len(dataset.held_out_images) == 149
    said = capsys.readouterr().err
    assert "cat/077.png" in said and "1 of 150" in said


def test_more_than_one_percent_of_damaged_images_stops_with_the_first_named(tmp_path):
    path = folder(tmp_path, with_bad({"cat/077.png": b"", "cat/078.png": b"x"}))
    with pytest.raises(DataError, match=r"2 of 150 .* 1 %.*cat/077\.png") as error:
        data.load_files(path, 2, 2)
    assert str(path) in str(error.value)


ONE = {"0.png": plain(0)}
BROKEN = {
    "no images": ({"notes.md": b"hello"}, ["no images", ".jpg", ".webp"]),
    "nothing at all": ({}, ["no images"]),
    "no captions": (ONE, ["without captions", "captions.jsonl", ".txt", "folder per class"]),
    "empty list": (ONE | {"captions.jsonl": b"\n"}, ["none of its images has a caption"]),
    "not JSON": (
        ONE | {"captions.jsonl": caption_lines({"0.png": "x"}) + b"\n\n{oops\n"},
        ["captions.jsonl line 3", '"file"', '"caption"'],
    ),
    "no caption in it": (ONE | {"captions.jsonl": b'{"file": "0.png"}'}, ["line 1"]),
    "a caption that is no text": (
        ONE | {"captions.jsonl": b'{"file": "0.png", "caption": null}'},
        ["line 1"],
    ),
    "a file that is no text": (
        ONE | {"captions.jsonl": b'{"file": [1], "caption": "x"}'},
        ["line 1"],
    ),
    "a list": (ONE | {"captions.jsonl": b'["0.png", "x"]'}, ["line 1"]),
    "missing files": (
        ONE | {"captions.jsonl": caption_lines({"7.png": "x", "0.png": "y", "8.png": "z"})},
        ["names 2 missing files", "7.png"],
    ),
}


@pytest.mark.parametrize("pack", [folder, zipped])
@pytest.mark.parametrize("case", BROKEN)
def test_a_set_that_cannot_be_used_says_where_and_why(tmp_path, case, pack):
    files, words = BROKEN[case]
    (tmp_path / "set").mkdir()
    path = pack(tmp_path / ("set" if pack is folder else "set.zip"), files)
    with pytest.raises(DataError) as error:
        data.load(str(path), 2, 2)
    for word in [str(path), *words]:
        assert word in str(error.value)


@pytest.mark.parametrize("content", [b"hello", b"", None], ids=["text", "empty", "cut"])
def test_a_file_that_is_no_whole_zip_is_refused_by_name(tmp_path, content):
    whole = zipped(tmp_path / "set.zip", PETS).read_bytes()
    path = tmp_path / "bad.zip"
    path.write_bytes(whole[: len(whole) // 2] if content is None else content)
    with pytest.raises(DataError, match=r"not a readable zip.*cut short") as error:
        data.load(str(path), 2, 2)
    assert str(path) in str(error.value)


def test_a_damaged_caption_list_in_a_zip_is_refused_by_name(tmp_path):
    path = zipped(tmp_path / "set.zip", {"captions.jsonl": caption_lines({"0.png": "x"}), **ONE})
    content = bytearray(path.read_bytes())
    content[44:52] = b"\xff" * 8  # the data of the first member, after its header and name
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"captions\.jsonl can't be read") as error:
        data.load_files(path, 2, 2)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("name", ["nowhere", "no/where.zip", "cifar", "bad\0name"])
def test_a_path_that_does_not_exist_is_named_with_the_choices(name):
    with pytest.raises(DataError, match=r"no such folder or file.*shapes, cifar10") as error:
        data.load(name, 2, 2)
    assert name in str(error.value)


def test_file_names_that_are_not_utf8_work(tmp_path):
    try:
        path = folder(tmp_path, PETS | {"cat/caf\udce9.png": plain(200)})
    except OSError:
        pytest.skip("this file system has UTF-8 names only")
    dataset = data.load_files(path, 2, 2)
    assert 200 in keys(dataset.images) + keys(dataset.held_out_images)


@pytest.mark.parametrize("pack", [folder, zipped])
def test_nothing_is_extracted_or_written_beside_the_images(tmp_path, pack):
    path = pack(tmp_path / "pets", WAYS["txt"])
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    data.load_files(path, 2, 2).batch(np.arange(40))
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before


def test_progress_is_silent_where_stderr_is_not_a_terminal(tmp_path, capsys):
    content = plain(3, (1, 1))
    path = zipped(tmp_path / "many.zip", {f"cat/{k}.png": content for k in range(2001)})
    data.load_files(path, 1, 1)
    assert capsys.readouterr() == ("", "")


# ---------------------------------------------------------------------------------------------
# CIFAR-10
# ---------------------------------------------------------------------------------------------

BATCHES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]


def closed_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture
def cifar(monkeypatch):
    """A small archive in the form of the official one, as bytes; nothing serves it yet."""
    rng = np.random.default_rng(0)
    files, rows = {}, []
    for n, name in enumerate(BATCHES, 2):
        pixels = rng.integers(0, 256, (n, 3072), dtype=np.uint8)
        labels = [int(k) for k in rng.integers(0, 10, n)]
        files[name] = pickle.dumps({b"data": pixels, b"labels": labels, b"x": "é"}, protocol=2)
        rows.append((pixels, labels))
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    archive = out.getvalue()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(data, "CIFAR_URL", f"http://127.0.0.1:{closed_port()}/cifar.tar.gz")
    monkeypatch.setattr(data, "CIFAR_SIZE", len(archive))
    monkeypatch.setattr(data, "CIFAR_SHA256", data.hashlib.sha256(archive).hexdigest())
    return {"archive": archive, "files": files, "rows": rows}


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        site = self.server
        wanted = self.headers["Range"]
        site.asked.append(wanted)
        start = int(wanted[len("bytes=") : -1]) if wanted and site.ranges else 0
        if start and start >= len(site.content):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(site.content) - start))
        self.end_headers()
        self.wfile.write(site.content[start:][: site.cut])

    def log_message(self, *_):
        pass


@pytest.fixture
def site(cifar, monkeypatch):
    """A server of the archive on this machine. asked: the Range headers it saw; ranges: whether it
    heeds them; cut: after how many bytes the connection breaks."""
    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    server.content, server.asked, server.ranges, server.cut = cifar["archive"], [], True, None
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setattr(data, "CIFAR_URL", f"http://127.0.0.1:{server.server_port}/cifar.tar.gz")
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


ARCHIVE = "cifar-10-python.tar.gz"
PART = ARCHIVE + ".part"


def check_cifar(dataset, cifar):
    """All images and labels, in the archive's order: rows of red, then of green, then of blue."""
    classes = ["airplane", "automobile", "bird", "cat", "deer"]  # as batches.meta numbers them
    classes += ["dog", "frog", "horse", "ship", "truck"]
    assert dataset.attributes == {"class": tuple(classes)}
    assert dataset.captions == [f"a photo of a {name}" for name in classes]
    assert dataset.labels.tolist() == [[k] for k in range(10)]
    *train, test = cifar["rows"]
    pixels = np.concatenate([p for p, _ in train])
    assert dataset.train_size == len(pixels) == 20
    assert dataset.images[4, 1, 5, 7] == pixels[4, 1024 + 5 * 32 + 7]
    assert np.array_equal(dataset.images.flatten(1), pixels)
    assert dataset.caption.tolist() == [label for _, labels in train for label in labels]
    held, caption = dataset.batch(np.arange(7), held_out=True)
    assert np.array_equal(held.flatten(1), test[0]) and caption.tolist() == test[1]


def test_a_cifar_archive_placed_by_hand_is_used(tmp_path, cifar):
    folder(tmp_path, {ARCHIVE: cifar["archive"]})
    check_cifar(data.load("cifar10", 32, 32, data_dir=str(tmp_path)), cifar)
    assert os.listdir(tmp_path) == [ARCHIVE]  # nothing extracted


def test_a_cifar_folder_placed_by_hand_is_used(tmp_path, cifar):
    folder(tmp_path / "cifar-10-batches-py", cifar["files"])
    check_cifar(data.load("cifar10", 32, 32, data_dir=tmp_path), cifar)


def test_cifar_batches_as_python_2_wrote_them_are_read(tmp_path, cifar):
    """The official files: strings are SHORT_BINSTRINGs, and NumPy's old module names."""

    def text(s):
        return b"U" + bytes([len(s)]) + s

    def batch(pixels, labels):
        dtype = b"cnumpy\ndtype\n" + text(b"u1") + b"K\x00K\x01\x87R(K\x03" + text(b"|")
        dtype += b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        shape = b"K" + bytes([len(pixels)]) + b"M\x00\x0c\x86"
        content = b"T" + pixels.nbytes.to_bytes(4, "little") + pixels.tobytes()
        array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + text(b"b")
        array += b"\x87R(K\x01" + shape + dtype + b"\x89" + content + b"tb"
        numbers = b"](" + b"".join(b"K" + bytes([k]) for k in labels) + b"e"
        return b"\x80\x02}(" + text(b"data") + array + text(b"labels") + numbers + b"u."

    files = {n: batch(*row) for n, row in zip(BATCHES, cifar["rows"], strict=True)}
    folder(tmp_path / "cifar-10-batches-py", files)
    check_cifar(data.load("cifar10", 32, 32, data_dir=tmp_path), cifar)


def test_cifar_is_cropped_and_resized_as_other_pictures_are(tmp_path, cifar):
    folder(tmp_path, {ARCHIVE: cifar["archive"]})
    dataset = data.load_cifar10(tmp_path, 16, 24)
    pixels = cifar["rows"][0][0][1].reshape(3, 32, 32).transpose(1, 2, 0)
    expected = ImageOps.fit(Image.fromarray(pixels), (24, 16), Image.Resampling.BICUBIC)
    assert dataset.images.shape == (20, 3, 16, 24)
    assert dataset.held_out_images.shape == (7, 3, 16, 24)
    assert np.array_equal(dataset.images[1].permute(1, 2, 0), np.asarray(expected))


def test_an_archive_with_a_wrong_hash_is_refused_before_it_is_opened(tmp_path, cifar, monkeypatch):
    harmed = bytearray(cifar["archive"])
    harmed[100] ^= 1
    folder(tmp_path, {ARCHIVE: bytes(harmed)})

    def opened(*_, **__):
        pytest.fail("opened before it was verified")

    monkeypatch.setattr(tarfile, "open", opened)
    monkeypatch.setattr(data, "ArrayUnpickler", opened)
    with pytest.raises(DataError, match=r"not the official.*SHA-256.*Delete it") as error:
        data.load("cifar10", 32, 32, data_dir=tmp_path)
    assert str(tmp_path / ARCHIVE) in str(error.value)
    assert (tmp_path / ARCHIVE).exists()  # it is the user's file


class Attack:
    def __init__(self, call, *arguments):
        self.reduced = call, arguments

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize("call", ["system", "eval", "numpy"])
def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(tmp_path, cifar, call):
    trace = tmp_path / "trace"
    attack = {
        "system": Attack(os.system, f"touch {trace}"),
        "eval": Attack(eval, f"open({str(trace)!r}, 'w')"),
        "numpy": Attack(np.save, str(trace), 1),
    }[call]
    files = cifar["files"] | {"data_batch_3": pickle.dumps({b"data": attack}, protocol=2)}
    folder(tmp_path / "cifar-10-batches-py", files)
    with pytest.raises(DataError, match="data_batch_3 is not a batch of CIFAR-10") as error:
        data.load("cifar10", 32, 32, data_dir=tmp_path)
    assert str(tmp_path) in str(error.value)
    assert not list(tmp_path.glob("trace*"))


@pytest.mark.parametrize("harm", ["cut", "other", "labels"])
def test_a_damaged_cifar_batch_is_refused_by_name(tmp_path, cifar, harm):
    good = cifar["files"]["test_batch"]
    content = {"cut": good[:900], "other": pickle.dumps([1, 2]), "labels": b"no pickle"}[harm]
    folder(tmp_path / "cifar-10-batches-py", cifar["files"] | {"test_batch": content})
    with pytest.raises(DataError, match="test_batch is not a batch of CIFAR-10"):
        data.load("cifar10", 32, 32, data_dir=tmp_path)


def test_a_cifar_folder_without_all_its_files_names_the_missing_one(tmp_path, cifar):
    del cifar["files"]["data_batch_4"]
    folder(tmp_path / "cifar-10-batches-py", cifar["files"])
    with pytest.raises(DataError, match="data_batch_4"):
        data.load("cifar10", 32, 32, data_dir=tmp_path)


def test_cifar_is_fetched_once_and_quietly_into_a_new_folder(tmp_path, cifar, site, capsys):
    place = tmp_path / "new" / "folder"
    for _ in range(2):
        check_cifar(data.load("cifar10", 32, 32, data_dir=place), cifar)
    assert site.asked == [None] and os.listdir(place) == [ARCHIVE]
    assert (place / ARCHIVE).read_bytes() == cifar["archive"]
    assert capsys.readouterr() == ("", "")


def test_a_cut_download_is_continued_from_its_part(tmp_path, cifar, site):
    folder(tmp_path, {PART: cifar["archive"][:1000]})
    site.content = b"?" * 1000 + cifar["archive"][1000:]  # what is there must not be asked for
    check_cifar(data.load("cifar10", 32, 32, data_dir=tmp_path), cifar)
    assert site.asked == ["bytes=1000-"] and os.listdir(tmp_path) == [ARCHIVE]


def test_a_download_starts_afresh_where_the_server_cannot_continue(tmp_path, cifar, site):
    folder(tmp_path, {PART: b"?" * 1000})
    site.ranges = False
    check_cifar(data.load("cifar10", 32, 32, data_dir=tmp_path), cifar)
    assert site.asked == ["bytes=1000-"] and os.listdir(tmp_path) == [ARCHIVE]


def test_a_connection_that_breaks_leaves_a_part_that_the_next_try_continues(tmp_path, cifar, site):
    site.cut = 5000
    with pytest.raises(DataError, match="CIFAR-10 can't be had"):
        data.load("cifar10", 32, 32, data_dir=tmp_path)
    assert os.listdir(tmp_path) == [PART]
    site.cut = None
    check_cifar(data.load("cifar10", 32, 32, data_dir=tmp_path), cifar)
    assert site.asked == [None, "bytes=5000-"] and os.listdir(tmp_path) == [ARCHIVE]


@pytest.mark.parametrize("more", [0, 10])
def test_a_part_as_long_as_the_archive_or_longer_does_not_block_the_next_try(
    tmp_path, cifar, site, more
):
    folder(tmp_path, {PART: b"?" * (len(cifar["archive"]) + more)})
    check_cifar(data.load("cifar10", 32, 32, data_dir=tmp_path), cifar)


def test_a_wrong_download_is_refused_and_does_not_block_the_next_try(tmp_path, cifar, site):
    site.content = b"?" * len(cifar["archive"])
    with pytest.raises(DataError, match=r"not the official CIFAR-10 archive.*try again"):
        data.load("cifar10", 32, 32, data_dir=tmp_path)
    site.content = b"<html>Please log in</html>"
    with pytest.raises(DataError, match="CIFAR-10 can't be had"):
        data.load("cifar10", 32, 32, data_dir=tmp_path)
    assert not (tmp_path / ARCHIVE).exists()
    (tmp_path / PART).unlink()
    site.content = cifar["archive"]
    check_cifar(data.load("cifar10", 32, 32, data_dir=tmp_path), cifar)


def ways_out(error, data_dir):
    words = [ARCHIVE, data.CIFAR_URL, str(data_dir), "--data-dir", "--data PATH", "--data shapes"]
    return all(word in str(error.value) for word in words)


def test_without_a_network_the_ways_out_are_named(tmp_path, cifar):
    with pytest.raises(DataError, match=r"can't be had.*refused") as error:
        data.load("cifar10", 32, 32, data_dir=tmp_path)
    assert ways_out(error, tmp_path)


def test_a_server_that_answers_nonsense_is_a_data_error(tmp_path, cifar, site, monkeypatch):
    monkeypatch.setattr(Handler, "do_GET", lambda self: self.wfile.write(b"nonsense\r\n\r\n"))
    with pytest.raises(DataError) as error:
        data.load("cifar10", 32, 32, data_dir=tmp_path)
    assert ways_out(error, tmp_path)


def test_a_data_folder_that_cannot_be_made_is_a_data_error(tmp_path, cifar, site):
    (tmp_path / "file").write_text("in the way")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(DataError) as error:
            data.load("cifar10", 32, 32, data_dir=place)
        assert ways_out(error, place)


def test_a_data_folder_that_cannot_be_written_is_a_data_error(tmp_path, cifar, site, monkeypatch):
    def refuse(path, mode="r"):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(data, "open", refuse, raising=False)  # root may write anywhere
    with pytest.raises(DataError, match="Permission denied") as error:
        data.load("cifar10", 32, 32, data_dir=tmp_path)
    assert ways_out(error, tmp_path)


def test_joined_tensors_are_read_as_one_and_not_before(tmp_path):
    """Rows in any order are those of the tensors end to end; of mapped files no more memory is
    taken than the rows asked for (anonymous memory: what is not the files' own)."""

    def anonymous():
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) << 10 for line in file if "RssAnon" in line)

    parts = [torch.randn(n, 3, 64, 64).half() for n in (300, 1, 500)]
    whole = torch.cat(parts)
    for i, part in enumerate(parts):
        sample.save(dict(x0=part), tmp_path / f"{i}.pt")
    before = anonymous()
    joined = data.Joined([sample.mapped(tmp_path / f"{i}.pt")["x0"] for i in range(3)])
    rows = np.array([800, 0, 299, 300, 301, 5, 800])
    assert torch.equal(joined[rows], whole[rows])
    assert len(joined) == 801 and joined.shape == whole.shape
    assert anonymous() - before < whole.nbytes / 4
