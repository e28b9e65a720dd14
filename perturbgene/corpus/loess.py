"""Local quadratic regression of one variable, as the `loess` of Cleveland's C library, R and scikit-misc fit it.

Owns the fit alone. Letters: n points, v vertices, q points near one vertex.
"""

import numpy as np

#: Share of the points within a neighbourhood that a cell of the tree may hold (default of the library).
_CELL = 0.2
#: By how much the outermost vertices stand beyond the points, as a share of their range (default of the library).
_MARGIN = 0.005


def _last_of_left(sorted_n: np.ndarray, first: int, last: int) -> int:
    """Return the place nearest to the middle after which points differ; the middle when an end is reached before."""
    middle, offset = (first + last) // 2, 0
    while first <= middle + offset < last:
        if sorted_n[middle + offset] != sorted_n[middle + offset + 1]:
            return middle + offset
        offset = -offset if offset > 0 else 1 - offset
    return middle


def _vertices(sorted_n: np.ndarray, *, most: int) -> np.ndarray:
    """Cut the range at middle points until no cell holds more than `most` points, shape (v,)."""
    low, high = sorted_n[0], sorted_n[-1]
    margin = _MARGIN * max(high - low, 1e-3 * max(abs(low), abs(high)) + 1e-30)
    cuts = [low - margin, high + margin]
    cells = [(0, len(sorted_n) - 1, cuts[0], cuts[1])]
    while cells:
        first, last, left, right = cells.pop()
        place = _last_of_left(sorted_n, first, last)
        # A cell is not cut at its own edge: its points are all alike there.
        if last - first + 1 > most and left < sorted_n[place] < right:
            cuts.append(sorted_n[place])
            cells += [(first, place, left, sorted_n[place]), (place + 1, last, sorted_n[place], right)]
    return np.unique(cuts)


def _value_and_slope(x_n: np.ndarray, y_n: np.ndarray, vertex: float, *, num_near: int) -> tuple[float, float]:
    """Fit a parabola around a vertex with tricube weights; x_n is sorted."""
    distance_n = np.abs(x_n - vertex)
    reach = np.partition(distance_n, num_near - 1)[num_near - 1]
    is_near = distance_n < reach
    if not is_near.any():
        return float(y_n[distance_n <= reach].mean()), 0.0
    root_q = np.sqrt((1 - (distance_n[is_near] / reach) ** 3) ** 3)
    scaled_q = (x_n[is_near] - vertex) / reach
    design = np.stack([np.ones_like(scaled_q), scaled_q, scaled_q**2], axis=1)
    value, slope, _ = np.linalg.lstsq(design * root_q[:, None], y_n[is_near] * root_q, rcond=1e-7)[0]
    return float(value), float(slope / reach)


def loess(x_n: np.ndarray, y_n: np.ndarray, *, span: float) -> np.ndarray:
    """Return the smooth curve at each point, float64 of shape (n,).

    Parabolas are fitted at the vertices of a k-d tree and joined by cubics that have their values and slopes
    (Cleveland and Grosse 1991, Stat Comput); the result equals scikit-misc's `loess(x, y, span=span, degree=2)`.

    Args:
        x_n, y_n: Points, float64 of shape (n,), finite.
        span: Share of the points in each neighbourhood, in (0, 1].
    """
    if len(x_n) < 2:
        return y_n.copy()
    order = np.argsort(x_n, kind="stable")
    sorted_n, values_n = x_n[order], y_n[order]
    num_near = min(len(x_n), max(1, int(len(x_n) * span + 1e-5)))
    vertices = _vertices(sorted_n, most=max(1, int(len(x_n) * span * _CELL)))
    fitted = [_value_and_slope(sorted_n, values_n, vertex, num_near=num_near) for vertex in vertices.tolist()]
    value_v, slope_v = np.array(fitted).T
    at_n = np.clip(np.searchsorted(vertices, x_n, side="right") - 1, 0, len(vertices) - 2)
    width_n = vertices[at_n + 1] - vertices[at_n]
    t = (x_n - vertices[at_n]) / width_n
    smooth_n = (1 + 2 * t) * (1 - t) ** 2 * value_v[at_n] + t**2 * (3 - 2 * t) * value_v[at_n + 1]
    return np.asarray(smooth_n + width_n * (t * (1 - t) ** 2 * slope_v[at_n] + t**2 * (t - 1) * slope_v[at_n + 1]))
