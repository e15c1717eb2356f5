"""Shapes and patterns, drawn exactly: how much of every pixel they cover."""

import numpy as np


def object_cover(height, width, size, shape, u, half):
    """Share of every pixel that each of B objects covers. -> (B, H, W, 1)

    size (B,): 0 small, 1 large. shape (B,): circle, square, triangle, cross. u (B, 3) in [0, 1)
    places it: exact size, x, y. half (B,): 0 to 3 keep it in the left, right, upper or lower half
    of the image and make it smaller; -1 leaves it the whole image."""
    side = min(height, width)
    low, high = np.where(size, 0.40, 0.30), np.where(size, 0.44, 0.33)  # half of its extent
    r = (low + (high - low) * u[:, 0]) * side * np.where(half < 0, 1.0, 0.55)
    left, right = np.where(half == 1, width / 2, 0), np.where(half == 0, width / 2, width)
    top, bottom = np.where(half == 3, height / 2, 0), np.where(half == 2, height / 2, height)
    cx = left + r + (right - left - 2 * r) * u[:, 1]
    cy = top + r + (bottom - top - 2 * r) * u[:, 2]
    r, cx, cy = (a.astype(np.float32)[:, None, None] for a in (r, cx, cy))
    dx = np.arange(width, dtype=np.float32)[None, None, :] + 0.5 - cx
    dy = np.arange(height, dtype=np.float32)[None, :, None] + 0.5 - cy
    distance = signed_distance(dx, dy, r, shape[:, None, None])
    return np.clip(0.5 - distance, 0, 1)[..., None]


def signed_distance(dx, dy, r, shape):
    """Pixels to the edge of the shape around (0, 0) that reaches to r; negative inside."""
    ax, ay = np.abs(dx), np.abs(dy)
    circle = np.sqrt(dx * dx + dy * dy) - r
    square = np.maximum(ax, ay) - 0.87 * r
    triangle = np.maximum((ax - 0.5 * (dy + 0.95 * r)) / 1.25**0.5, dy - 0.9 * r)  # apex up
    cross = np.minimum(np.maximum(ax - r, ay - 0.34 * r), np.maximum(ay - r, ax - 0.34 * r))
    return np.select([shape == 0, shape == 1, shape == 2], [circle, square, triangle], cross)


def pattern_cover(height, width, pattern, u):
    """Share of every pixel that the second tone of each of B backgrounds covers. -> (B, H, W, 1)

    pattern (B,): plain, striped, checked, dotted; it repeats after a quarter of the shorter side.
    u (B, 3) in [0, 1): its direction, and where along it and across it the pattern begins."""
    period = min(height, width) / 4
    angle = (2 * np.pi * u[:, 0])[:, None, None]
    x = np.arange(width)[None, None, :] + 0.5
    y = np.arange(height)[None, :, None] + 0.5
    along = np.cos(angle) * x + np.sin(angle) * y + period * u[:, 1, None, None]
    across = np.cos(angle) * y - np.sin(angle) * x + period * u[:, 2, None, None]
    striped, other = stripes_cover(along, period), stripes_cover(across, period)
    checked = striped + other - 2 * striped * other  # one of the two, not both
    dotted = striped * other
    pattern = pattern[:, None, None]
    cover = np.select([pattern == 1, pattern == 2, pattern == 3], [striped, checked, dotted], 0)
    return cover.astype(np.float32)[..., None]


def stripes_cover(x, period):
    """Share of a pixel at x, in pixels, that stripes of half a period cover."""
    distance = np.abs(x % period - period / 2) - period / 4  # to the edge; negative inside
    return np.clip(0.5 - distance, 0, 1)
