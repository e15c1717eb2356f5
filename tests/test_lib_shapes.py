"""lib/shapes.py: what objects and patterns cover."""

import numpy as np
import pytest

from lib.shapes import object_cover, pattern_cover, signed_distance


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
        cover = np.clip(0.5 - signed_distance(x - 29.1, y - 28.3, r, np.array(shape)), 0, 1)
        assert cover.sum() == pytest.approx(area * r * r, rel=0.01)


@pytest.mark.parametrize("half", [-1, 0, 1, 2, 3])
@pytest.mark.parametrize("shape", range(4))
def test_an_object_is_never_cut_by_the_border_and_stays_in_its_half(shape, half):
    """Its area is the same in the middle and pushed into any corner."""
    places = np.array([[0.5, 0.5], [0, 0], [0, 1], [1, 0], [1, 1]])
    n = np.ones(len(places), np.int64)
    for size in (0, 1):
        for extent in (0.0, 1.0):
            u = np.concatenate([np.full((5, 1), extent), places], axis=1)
            cover = object_cover(64, 70, size * n, shape * n, u, half * n)
            assert cover.shape == (5, 64, 70, 1)
            area = cover.sum(axis=(1, 2, 3))
            assert np.abs(area / area[0] - 1).max() < 0.02
            if half >= 0:  # left, right, above, below
                axis, far = [(2, 1), (2, 0), (1, 1), (1, 0)][half]
                other = np.array_split(cover, 2, axis)[far]
                assert other.sum(axis=(1, 2, 3)).max() < 1


def test_a_pattern_covers_its_share_in_the_mean_of_all_places_and_directions():
    """Stripes and checks a half, dots a quarter."""
    u = np.random.default_rng(0).random((2000, 3))
    for pattern, share in enumerate((0, 0.5, 0.5, 0.25)):
        cover = pattern_cover(16, 24, np.full(2000, pattern), u)
        assert cover.shape == (2000, 16, 24, 1)
        assert cover.mean() == pytest.approx(share, abs=0.003)


@pytest.mark.parametrize("turn, bound", [(0, 1e-6), (1 / 8, 0.25), (0.07, 0.25)])
def test_a_pattern_is_drawn_as_a_finer_one_averaged(turn, bound):
    """Every pixel is the mean of the 8 × 8 that an image of 8 times the size has in its place:
    exactly so where edges lie along pixels, and nearly where they cut through them."""
    u = np.random.default_rng(1).random((50, 3))
    u[:, 0] = turn
    for pattern in range(4):
        kind = np.full(50, pattern)
        coarse, fine = pattern_cover(16, 20, kind, u), pattern_cover(128, 160, kind, u)
        error = np.abs(coarse - fine.reshape(50, 16, 8, 20, 8, 1).mean(axis=(2, 4)))
        assert error.max() < bound and error.mean() < 0.05


@pytest.mark.parametrize("pattern", [1, 2, 3])
def test_a_pattern_repeats_after_a_quarter_of_the_shorter_side(pattern):
    """And not sooner; along its direction, here x."""
    u = np.random.default_rng(2).random((20, 3))
    u[:, 0] = 0
    cover = pattern_cover(16, 24, np.full(20, pattern), u)
    np.testing.assert_allclose(cover, np.roll(cover, 4, 2), atol=1e-6)
    for less in (1, 2, 3):
        assert np.abs(cover - np.roll(cover, less, 2)).max() > 0.3


def test_stripes_turn_with_their_direction():
    """A quarter of a turn makes standing stripes lie."""
    u = np.array([[0, 0.3, 0.7], [0.25, 0.3, 0.7]])
    standing, lying = pattern_cover(16, 16, np.ones(2, int), u)[..., 0]
    np.testing.assert_allclose(standing, lying.T, atol=1e-6)
    assert np.ptp(standing, axis=0).max() < 1e-6 and np.ptp(standing, axis=1).min() > 0.9
