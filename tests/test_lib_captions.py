"""lib/captions.py: captions as questions with few answers."""

import unicodedata

import torch

from lib.captions import (
    class_attributes,
    split_words,
    strange_words,
    unread_words,
    word_attributes,
)


def test_marks_belong_to_their_word_and_composition_makes_no_other_word():
    """Hindi's vowel signs and Thai's tones are marks; macOS writes é as two characters."""
    assert split_words("हिन्दी की किताब") == ["हिन्दी", "की", "किताब"]
    assert split_words("ไก่, ที่") == ["ไก่", "ที่"]
    assert split_words(unicodedata.normalize("NFD", "Café ÉTÉ!")) == ["café", "été"]
    assert split_words("a RED_2 fox-tail") == ["a", "red_2", "fox", "tail"]


def test_what_is_not_seen_and_other_widths_make_no_other_word():
    """A soft hyphen, a joiner, the sign for a coloured picture; wide and narrow letters."""
    assert split_words("straw\u00adberry क\u094d\u200dष ❤\ufe0f") == ["strawberry", "क्ष"]
    assert split_words("ＲＥＤ ｶﾞ ﬁsh") == ["red", "ガ", "fish"]
    assert split_words("葛\U000e0100城 re\u2066d") == ["葛城", "red"]


def test_captions_that_are_not_read_to_their_end_or_read_alike_are_told():
    assert unread_words(["a red fox", "a cat"], 3) is None
    assert unread_words(["a red fox", "a cat"], 2) == (
        "1 of 2 captions have more than 2 words; --text-length 3 reads all."
    )
    assert unread_words(["a cat", "A cat!", "🐈", "🐕"], 2) == (
        "2 of 4 captions have no word. 2 of 4 captions have the same words as another one."
    )
    assert unread_words(["a " * 5000], 2) == (
        "1 of 1 captions have more than 2 words; shorten them."
    )


def test_strange_words_are_told_and_a_file_that_tells_nothing_is_no_error(tmp_path):
    """words.txt is for a hint alone: missing, empty, not UTF-8, a folder."""
    file = tmp_path / "words.txt"
    assert strange_words(["a red fox"], file, 4) is None
    for content in (b"", b"caf\xe9\n"):
        file.write_bytes(content)
        assert strange_words(["a red fox"], file, 4) is None
    assert strange_words(["a red fox"], tmp_path, 4) is None
    file.write_text("a\nred\n")
    assert "never seen: fox; " in strange_words(["a red fox"], file, 4)


def test_class_names_become_captions_and_labels():
    captions, attributes, labels = class_attributes(["cat", "polar bear"])
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
    attributes, labels = word_attributes(captions, [20, 41, 35, 4])
    assert list(attributes) == ["runs", "sleeps", "cat", "the", "fox"]
    assert set(attributes.values()) == {("no", "yes")}
    assert labels.tolist() == [[1, 0, 1, 0, 0], [0, 1, 1, 0, 0], [1, 0, 0, 1, 1], [0, 0, 0, 1, 0]]


def test_a_single_sign_of_a_script_whose_words_are_short_becomes_an_attribute():
    attributes, _ = word_attributes(["红色 猫", "蓝色 狗", "à la fox"], [1, 1, 1])
    assert attributes.keys() == {"红色", "猫", "蓝色", "狗", "fox"}


def test_no_more_words_than_asked_for_become_attributes_the_most_even_first():
    captions = ["red one", "red two", "blue three", "blue four", "blue five"]
    attributes, labels = word_attributes(captions, [1] * 5, most=2)
    assert list(attributes) == ["blue", "red"] and labels[:, 0].tolist() == [0, 0, 1, 1, 1]


def test_captions_that_all_say_the_same_have_no_attributes():
    attributes, labels = word_attributes(["a photo", "photo!"], [3, 4])
    assert attributes == {} and labels.shape == (2, 0) and labels.dtype == torch.int64
