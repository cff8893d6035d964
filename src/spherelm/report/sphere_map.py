"""A map of points on a sphere of many dimensions onto one that can be drawn,
which keeps angles as well as that is possible.

Spherical multidimensional scaling: places on S^2 such that the angles between them are near the true ones, in least
squares. The places start where the first three principal directions (of the vectors as they are, not centred) put them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spherelm.sphere import angle, norm

Array = NDArray[np.float64]

ITERATIONS = 400


@dataclass(frozen=True)
class SphereMap:
    """Where the points are drawn, and what was lost.

    `points`: unit vectors [n, 3]. `error`: mean absolute difference in degrees between drawn and true
    angle, over all pairs;
    `step_error`: over the steps only. `correlation`: of drawn and true angles over all pairs (Pearson).
    """

    points: Array
    error: float
    step_error: float
    correlation: float


def sphere_map(vectors: Array, steps: NDArray[np.int64], weight: float = 1.0) -> SphereMap:
    """Places on S^2 for unit vectors [n, d], n at least 2.

    steps: pairs of indices [m, 2] whose angles count, all together, `weight` times as much as all pairs together: the
    moves that a path is made of are what a reader compares. The same vectors give the same map.
    """
    points, ends = torch.from_numpy(vectors), torch.from_numpy(steps)
    others = ~torch.eye(len(points), dtype=torch.bool)
    true, true_steps = _angles(points), angle(points[ends[:, 0]], points[ends[:, 1]])
    places = principal_places(points).requires_grad_()
    optimizer = torch.optim.Adam([places], lr=0.1)
    for i in range(ITERATIONS):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - i / ITERATIONS)
        optimizer.zero_grad()
        drawn = norm(places)
        loss = (_angles(drawn) - true)[others].square().mean()
        loss = loss + weight * (_arc(drawn, ends[:, 0], ends[:, 1]) - true_steps).square().mean()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        drawn = norm(places)
        found, wanted, found_steps = _angles(drawn)[others], true[others], _arc(drawn, ends[:, 0], ends[:, 1])
    return SphereMap(
        points=drawn.numpy(),
        error=(found - wanted).abs().mean().rad2deg().item(),
        step_error=(found_steps - true_steps).abs().mean().rad2deg().item(),
        correlation=_correlation(found.numpy(), wanted.numpy()),
    )


def principal_places(vectors: Tensor) -> Tensor:
    """The vectors [n, d] in their first three principal directions, made unit: [n, 3].

    A direction's sign is such that its largest entry is positive; points that would fall together are
    moved apart a little.
    """
    _, _, directions = torch.linalg.svd(vectors, full_matrices=False)
    directions = directions[:3]
    largest = directions.abs().argmax(dim=1, keepdim=True)
    projected = vectors @ (directions * directions.gather(1, largest).sign()).T
    wide = torch.zeros(len(vectors), 3, dtype=vectors.dtype)
    wide[:, : projected.shape[1]] = projected
    noise = torch.randn(wide.shape, generator=torch.Generator().manual_seed(0), dtype=wide.dtype)
    return norm(wide + 1e-3 * noise)


def _correlation(drawn: Array, true: Array) -> float:
    """Pearson's; 1 where all true angles, or all drawn, are the same, so that there is no order to lose."""
    if len(drawn) < 3 or np.ptp(drawn) < 1e-9 or np.ptp(true) < 1e-9:
        return 1.0
    return float(np.corrcoef(drawn, true)[0, 1])


def _angles(points: Tensor) -> Tensor:
    """All angles in radians between unit vectors [n, d]: [n, n];
    those of equal vectors are 0.001, where `acos` has a slope.
    """
    return (points @ points.T).clamp(-1 + 5e-7, 1 - 5e-7).acos()


def _arc(points: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Angles in radians between unit vectors, with a gradient everywhere: `atan2` of sine and cosine."""
    a, b = points[first], points[second]
    sine = torch.linalg.cross(a, b).square().sum(-1).add(1e-12).sqrt()
    return torch.atan2(sine, (a * b).sum(-1))
