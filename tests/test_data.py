"""data.py: what it promises about pixels, text features, shapes, image sets and buckets."""

import itertools
import re
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import TINY
from PIL import Image, ImageColor

import data
import ladd
import sample

# ---------------------------------------------------------------------------------------------
# Pixels and sizes
# ---------------------------------------------------------------------------------------------


def test_pixels_become_minus_one_to_one_and_come_back_unchanged():
    pixels = torch.arange(256, dtype=torch.uint8)
    floats = data.to_float(pixels)
    assert floats.dtype == torch.float32 and floats[0] == -1 and floats[255] == 1
    assert torch.equal(data.to_uint8(floats), pixels)


def test_values_outside_the_range_are_clipped_and_inner_ones_rounded():
    x0 = torch.tensor([-3.0, -1.0, -1 + 0.4 / 127.5, -1 + 0.6 / 127.5, 1.0, 7.0])
    assert data.to_uint8(x0).tolist() == [0, 0, 0, 1, 255, 255]


@pytest.mark.parametrize(
    ("text", "size"),
    [("16", (16, 16)), ("24x40", (24, 40)), ("24,40", (24, 40)), ("8X16", (8, 16))],
)
def test_a_size_is_one_side_or_height_times_width(text, size):
    assert data.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "x", "16x", "a", "1x2x3", "1.5"])
def test_a_size_that_is_none_is_refused(text):
    with pytest.raises(ValueError):
        data.parse_size(text)


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
NAMES += ["second size", "second colour", "second shape", "pattern", "background"]
OBJECT = r"a (\w+) (\w+) (\w+)"
SENTENCE = re.compile(
    rf"{OBJECT}(?: (left of|right of|above|below) {OBJECT})? on a (\w+) (\w+) background"
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
def least():
    """A set with two objects, as small as there is; its 400,000 captions take a second."""
    return data.Shapes(60, 32, seed=3)


@pytest.fixture(scope="module")
def pairs(least):
    """The same, neither square nor a power of two."""
    return least.of_size((40, 52))


def test_the_same_seed_and_index_give_the_same_captions_everywhere():
    dataset = data.Shapes(16, 20, seed=3)
    _, caption = dataset.batch([0, 1, 2])
    assert [dataset.captions[i] for i in caption] == [
        "a small yellow cross on a checked blue background",
        "a large orange cross on a dotted yellow background",
        "a large yellow circle on a checked green background",
    ]


@pytest.mark.parametrize("size", [(9, 14), (35, 32)])
def test_a_shapes_image_depends_on_seed_and_index_alone(size, pairs):
    def fresh(seed):
        made = pairs.of_size(size) if min(size) >= data.PAIR_SIDE else data.Shapes(*size)
        made.seed = seed
        return made

    dataset = fresh(4)
    index = np.array([5, 0, 123_456_789_012, 17, 5, 2])
    images, caption = dataset.batch(index)
    assert images.dtype == torch.uint8 and images.shape == (6, 3, *size)
    again = fresh(4)
    again.batch(range(50))
    for i, k in enumerate(index):
        image, row = again.batch([int(k)])
        assert torch.equal(image[0], images[i]) and row[0] == caption[i]
    for kind in (np.int32, np.uint8, torch.tensor):
        small = kind([5, 17]) if kind is torch.tensor else np.array([5, 17], kind)
        assert torch.equal(again.batch(small)[0], images[[0, 3]])
        held = again.batch(small, held_out=True)[0]
        assert torch.equal(held, again.batch(np.array([5, 17]), held_out=True)[0])
    other, _ = fresh(5).batch(index)
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


def test_captions_say_the_colours_shape_and_size_that_are_drawn(pairs):
    """Shapes by share of their bounding box: square 1, circle 0.79, cross 0.66, triangle 1/2."""
    images, said = draw(pairs.of_size((90, 80)), 1400)
    areas, seen = {}, 0
    for image, words in zip(images, said, strict=True):
        if words["relation"] != "none" or words["pattern"] != "plain":
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


def test_edges_are_smooth_and_nothing_else_is():
    """A mixed pixel has pure object and, or the border, pure background within three pixels."""
    images, said = draw(data.Shapes(30, 26, seed=1), 240)
    for image, words in zip(images, said, strict=True):
        if words["pattern"] != "plain":
            continue
        ground, thing = mask(image, words["background"]), mask(image, words["colour"])
        mixed = ~(ground | thing)
        assert 4 <= mixed.sum() < 0.3 * mixed.size
        for pure, beyond in ((ground, True), (thing, False)):
            padded = np.pad(pure, 3, constant_values=beyond)
            near = np.lib.stride_tricks.sliding_window_view(padded, (7, 7)).any(axis=(2, 3))
            assert near[mixed].all()


def test_a_background_has_the_pattern_that_its_caption_says():
    """Where the object is not: stripes change in one direction alone, checks and dots in all;
    stripes and checks are half, dots a quarter in the second tone: half as bright, or grey on
    black."""
    images, said = draw(data.Shapes(64, 64, seed=2, pairs=False), 400)
    seen = dict.fromkeys(data.PATTERNS, 0)
    for image, words in zip(images, said, strict=True):
        if words["size"] == "large":
            continue
        ground = np.array(data.COLOURS[words["background"]])
        tone = np.full(3, 120) if words["background"] == "black" else ground / 2
        cover = (image - ground) @ (tone - ground) / np.square(tone - ground).sum()
        mixed = ground + cover[..., None] * (tone - ground)
        strange = (np.abs(image - mixed).max(axis=-1) > 2) | (cover < -0.02) | (cover > 1.02)
        places = [(y, x) for y in range(0, 42, 2) for x in range(0, 42, 2)]
        free = ((y, x) for y, x in places if not strange[y : y + 22, x : x + 22].any())
        y, x = next(free, (None, None))
        if y is None:
            continue
        tile = cover[y : y + 22, x : x + 22]  # without the object
        pattern = words["pattern"]
        slopes = np.stack(np.gradient(tile)).reshape(2, -1)
        least, most = np.linalg.eigvalsh(slopes @ slopes.T)
        if pattern == "plain":
            assert most < 1e-3
        else:
            assert (least < 0.05 * most) == (pattern == "striped")
            assert abs(cover[~strange].mean() - (0.25 if pattern == "dotted" else 0.5)) < 0.1
        seen[pattern] += 1
    assert min(seen.values()) > 20, seen


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


def test_second_objects_come_from_32_pixels_on(least):
    assert least.size == (60, 32) and "relation" in least.attributes
    assert "relation" not in data.Shapes(31, 60).attributes


def test_the_first_bucket_of_the_shapes_is_the_set_of_its_size():
    wide, _ = data.load("shapes", [(12, 14), (16, 10)], seed=3).sets
    assert torch.equal(wide.batch(range(5))[0], data.Shapes(12, 14, seed=3).batch(range(5))[0])


@pytest.mark.parametrize("held_out", [False, True])
def test_buckets_of_the_shapes_have_the_same_captions_and_draws_of_their_own(held_out):
    """So scores over seven sizes rest on seven times as many captions and places."""
    sets = data.load("shapes", [(12, 14), (16, 10), (14, 12)], seed=3).sets
    assert all(each.captions == sets[0].captions for each in sets)
    drawn = [each.batch(range(200), held_out)[1] for each in sets]
    for a, b in itertools.combinations(drawn, 2):
        assert (a == b).double().mean() < 0.05


def test_a_set_without_attributes_asks_a_judge_nothing():
    """What `DataSet` says of itself is enough for every stage, the report's judge included."""

    class Grey(data.DataSet):
        captions, size, seed = ("dark", "light"), (8, 8), 0

        def batch(self, index, held_out=False):
            index = np.asarray(index)
            shade = torch.from_numpy(255 * (index % 2)).to(torch.uint8)
            return shade.view(-1, 1, 1, 1).expand(-1, 3, 8, 8), torch.from_numpy(index % 2)

    _, labels = data.judge_batches(Grey())(0, 6)
    assert labels.shape == (6, 0) and labels.dtype == torch.int64


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


# ---------------------------------------------------------------------------------------------
# Buckets
# ---------------------------------------------------------------------------------------------

ASPECTS = ("1:1", "3:2", "2:3", "16:9", "9:16")


@pytest.mark.parametrize(("side", "multiple"), [(128, 8), (64, 4), (16, 2)])
def test_buckets_have_equal_areas_and_sides_that_are_multiples(side, multiple):
    """Rounding one side to the unit u changes an area by u/2 of that side at the most."""
    sizes = data.bucket_sizes((side, side), multiple, ASPECTS)
    assert sizes[0] == (side, side) and len(sizes) == len(ASPECTS)
    for (height, width), aspect in zip(sizes, ASPECTS, strict=True):
        assert height % multiple == 0 and width % multiple == 0
        assert abs(height * width / side**2 - 1) <= multiple / 2 / min(height, width)
        w, h = map(int, aspect.split(":"))
        assert (w > h) == (width > height) and (w < h) == (width < height)
    assert {(w, h) for h, w in sizes} == set(sizes)  # on end as on its side


def test_ratios_that_come_out_the_same_are_one_bucket():
    """At 64 pixels and a unit of 8, 4:3 and 5:4 are both 56 × 72; 2:2 is 1:1."""
    assert data.bucket_sizes((64, 64), 8, ("4:3", "5:4", "1:1", "2:2")) == [(56, 72), (64, 64)]


def test_a_ratio_of_the_size_itself_is_the_size_itself():
    """2:3 of 24 × 36 is what --size says, though its area is no square; 3:2 is it on its side."""
    assert data.bucket_sizes((36, 24), 2, ("2:3", "3:2", "1:1")) == [(36, 24), (24, 36), (30, 28)]


def striped(height, width):
    """A picture whose pixels tell how wide it was; its middle is green."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[height // 3 : -(height // 3), width // 3 : -(width // 3)] = (0, 255, 0)
    return Image.fromarray(pixels)


def test_every_image_goes_to_the_bucket_of_the_nearest_aspect_ratio(tmp_path):
    """Nothing is lost or doubled, and each bucket holds out a tenth of its own."""
    shapes = {"square": (40, 42, 30), "wide": (40, 63, 50), "tall": (60, 38, 20)}
    for name, (height, width, n) in shapes.items():
        (tmp_path / name).mkdir()
        for i in range(n):
            striped(height, width).save(tmp_path / name / f"{i}.png")
    sizes = data.bucket_sizes((12, 12), 2, ("1:1", "3:2", "2:3"))
    dataset = data.load(str(tmp_path), sizes)
    found = {bucket.size: bucket for bucket in dataset.sets}
    assert set(found) == set(sizes)
    for (_, _, n), size, word in zip(shapes.values(), sizes, shapes, strict=True):
        bucket = found[size]
        assert (bucket.train_size, len(bucket.held_out_images)) == (n - n // 10, n // 10)
        images, caption = bucket.batch(np.arange(n))
        assert images.shape == (n, 3, *size)
        assert {bucket.captions[i] for i in caption} == {f"a photo of a {word}"}
        assert (images[:, 1, size[0] // 2, size[1] // 2] == 255).all()
    assert dataset.captions == dataset.sets[0].captions == dataset.sets[2].captions


class Counted:
    def __init__(self, n):
        self.train_size = n


def test_a_batch_comes_from_a_bucket_in_proportion_to_its_images():
    """The draw is a function of (seed, stage, step): asked again, in any order, it is the same."""
    buckets = data.Buckets.__new__(data.Buckets)
    buckets.sets = sets = [Counted(600), Counted(300), Counted(100)]
    draw = lambda seed, stage, n=4000: [  # noqa: E731
        sets.index(data.draw_bucket(buckets, seed, stage, step)) for step in range(n)
    ]
    first = draw(3, 0)
    shares = [first.count(k) / len(first) for k in range(3)]
    assert shares == pytest.approx([0.6, 0.3, 0.1], abs=0.03)  # four standard errors
    assert sets.index(data.draw_bucket(buckets, 3, 0, 1234)) == first[1234]
    assert draw(3, 1, 100) != first[:100] != draw(4, 0, 100)
    for bucket in sets:
        bucket.train_size = None  # endless
    assert max(Counter(draw(3, 0)).values()) < 4000 / 3 + 120


@pytest.mark.parametrize("count", [1, 2, 7, 1000])
def test_shares_add_up(count):
    buckets = data.Buckets.__new__(data.Buckets)
    buckets.sets = [Counted(600), Counted(300), Counted(100)]
    given = {bucket.train_size: n for bucket, n in data.shares(buckets, count)}
    assert sum(given.values()) == count and min(given.values()) > 0
    assert all(abs(n - count * size / 1000) <= 1 for size, n in given.items())


# ---------------------------------------------------------------------------------------------
# A data set of one's own
# ---------------------------------------------------------------------------------------------


class Stripes(data.DataSet):
    """Stripes that lie or stand, of a brightness that is the image's own: all that it takes."""

    name, size = "stripes", (8, 8)
    captions, labels = ("lying stripes", "standing stripes"), torch.tensor([[0], [1]])
    attributes, train_size = {"way": ("lying", "standing")}, None  # None: endless

    def batch(self, index, held_out=False):
        index = torch.as_tensor(index)
        caption = index % 2
        lying = (torch.arange(8)[:, None] % 2).expand(8, 8)
        images = torch.where(caption[:, None, None] == 0, lying, lying.T)
        images = images * (100 + index * 7 % 100)[:, None, None] + 50 * held_out
        return images[:, None].expand(-1, 3, -1, -1).to(torch.uint8), caption


def test_a_new_data_set_is_one_class(tmp_path, monkeypatch, capsys):
    """It is learned from in every stage, scored and sampled from."""
    monkeypatch.setattr(data, "load", lambda name, sizes, **options: Stripes())
    words = [*TINY.split(), "--data", "stripes", "--data-dir", f"{tmp_path}", "--out"]
    assert ladd.main([*words, f"{tmp_path}/run"]) == 0, capsys.readouterr().err
    assert "student, 1 step" in (tmp_path / "run" / "report.md").read_text()
    made = torch.load(tmp_path / "run" / "synthetic" / "00000.pt", weights_only=True)
    assert made["captions"] == ["lying stripes", "standing stripes"] * 16
    own = ["--prompts", "@captions", "--num", "3", "--out", f"{tmp_path}/own", "--device", "cpu"]
    assert sample.main([f"{tmp_path}/run", *own]) == 0, capsys.readouterr().err
    with Image.open(tmp_path / "own" / "00001.png") as picture:
        assert picture.size == (8, 8) and picture.info["prompt"] == "standing stripes"
