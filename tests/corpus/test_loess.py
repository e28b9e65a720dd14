"""The smooth curve is that of the C library: by scikit-misc where it is installed, and by known shapes without it."""

import numpy as np
import pytest

from perturbgene.corpus.loess import loess


def test_a_parabola_is_its_own_curve() -> None:
    x_n = np.linspace(-1, 2, 40)
    np.testing.assert_allclose(loess(x_n, 3 * x_n**2 - x_n, span=0.5), 3 * x_n**2 - x_n, atol=1e-10)


def test_a_single_point_is_its_own_curve() -> None:
    assert loess(np.array([1.0]), np.array([5.0]), span=0.3).tolist() == [5.0]


def test_the_order_of_the_points_does_not_matter() -> None:
    x_n = np.random.default_rng(0).normal(size=60)
    order = np.random.default_rng(1).permutation(60)
    np.testing.assert_allclose(loess(x_n, x_n**3, span=0.3)[order], loess(x_n[order], x_n[order] ** 3, span=0.3))


@pytest.mark.parametrize(("num_points", "digits"), [(50, 9), (2001, 9), (37, 1), (201, 1), (3000, 1)])
def test_the_curve_equals_that_of_scikit_misc(num_points: int, digits: int) -> None:
    skmisc = pytest.importorskip("skmisc.loess")
    generator = np.random.default_rng(num_points)
    x_n = np.round(generator.normal(size=num_points), digits)
    y_n = np.sin(x_n) + 0.1 * generator.normal(size=num_points)
    model = skmisc.loess(x_n, y_n, span=0.3, degree=2)
    model.fit()
    np.testing.assert_allclose(loess(x_n, y_n, span=0.3), model.outputs.fitted_values, atol=1e-9)
