"""The map onto a sphere that can be drawn: exact where it can be, and honest about what it loses."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from spherelm.report import sphere_map as module
from spherelm.report.sphere_map import principal_places, sphere_map


@pytest.fixture(autouse=True)
def _as_users_get_it(monkeypatch: pytest.MonkeyPatch, map_iterations: int) -> None:
    monkeypatch.setattr(module, "ITERATIONS", map_iterations)


def unit(n: int, d: int, seed: int = 0) -> np.ndarray:
    points = np.random.default_rng(seed).normal(size=(n, d))
    return points / np.linalg.norm(points, axis=1, keepdims=True)


def chain(n: int) -> np.ndarray:
    return np.stack((np.arange(n - 1), np.arange(1, n)), axis=1)


def angles(points: np.ndarray) -> np.ndarray:
    return np.degrees(np.arccos(np.clip(points @ points.T, -1, 1)))


def test_points_of_three_dimensions_among_many_are_mapped_as_they_are() -> None:
    basis = np.linalg.qr(np.random.default_rng(1).normal(size=(20, 3)))[0]
    flat = unit(30, 3)
    found = sphere_map(flat @ basis.T, chain(30))
    assert found.error < 0.5
    assert found.step_error < 0.5
    assert found.correlation > 0.999
    np.testing.assert_allclose(np.linalg.norm(found.points, axis=1), 1, rtol=1e-9)
    np.testing.assert_allclose(angles(found.points), angles(flat), atol=3)


def test_what_is_lost_is_what_it_says() -> None:
    points, steps = unit(40, 30), chain(40)
    found = sphere_map(points, steps)
    pairs = np.triu_indices(40, 1)
    drawn, true = angles(found.points)[pairs], angles(points)[pairs]
    assert found.error == pytest.approx(np.abs(drawn - true).mean(), abs=0.05)
    assert found.correlation == pytest.approx(np.corrcoef(drawn, true)[0, 1], abs=1e-3)
    moved = np.abs(angles(found.points) - angles(points))[steps[:, 0], steps[:, 1]]
    assert found.step_error == pytest.approx(moved.mean(), abs=0.05)
    assert found.step_error < found.error, "steps count as much as all pairs together"


def test_it_is_better_than_where_it_starts_and_the_same_every_time() -> None:
    points, steps, pairs = unit(40, 30), chain(40), np.triu_indices(40, 1)
    found = sphere_map(points, steps, weight=0.0)
    start = principal_places(torch.from_numpy(points)).numpy()
    after, before = ((angles(drawn) - angles(points))[pairs] for drawn in (found.points, start))
    assert np.square(after).mean() < 0.97 * np.square(before).mean()
    np.testing.assert_array_equal(sphere_map(points, steps, weight=0.0).points, found.points)


@pytest.mark.parametrize("points", [np.ones((3, 4)) / 2, unit(2, 2), np.eye(4)[[0, 0, 1]]])
def test_points_that_coincide_or_are_few_are_mapped_too(points: np.ndarray) -> None:
    found = sphere_map(points, chain(len(points)))
    assert np.isfinite(found.points).all()
    assert found.error < 2
