"""lib/shapes.py: what an object covers."""

import numpy as np
import pytest

from lib.shapes import object_cover, signed_distance


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


@pytest.mark.parametrize("half", [None, 0, 1, 2, 3])
@pytest.mark.parametrize("shape", range(4))
def test_an_object_is_never_cut_by_the_border_and_stays_in_its_half(shape, half):
    """Its area is the same in the middle and pushed into any corner."""
    places = np.array([[0.5, 0.5], [0, 0], [0, 1], [1, 0], [1, 1]])
    n = np.ones(len(places), np.int64)
    side = None if half is None else half * n
    for size in (0, 1):
        for extent in (0.0, 1.0):
            u = np.concatenate([np.full((5, 1), extent), places], axis=1)
            cover = object_cover(64, 70, size * n, shape * n, u, side)
            assert cover.shape == (5, 64, 70, 1)
            area = cover.sum(axis=(1, 2, 3))
            assert np.abs(area / area[0] - 1).max() < 0.02
            if half is not None:  # left, right, above, below
                axis, far = [(2, 1), (2, 0), (1, 1), (1, 0)][half]
                other = np.array_split(cover, 2, axis)[far]
                assert other.sum(axis=(1, 2, 3)).max() < 1
