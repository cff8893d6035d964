"""What `spherelm inspect` found, as tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from spherelm.analysis.geometry import LEVELS
from spherelm.analysis.inside import Inside
from spherelm.report.tables import long_table, write_table

Found = Sequence[tuple[str, str, Inside, Sequence[tuple[int, Mapping[str, float]]]]]
"""(name of the run, arm, what was found, (update, largest departures) of its checkpoints)."""

Named = Mapping[str, Any]
"""Arrays by name."""

MATRICES: dict[str, tuple[Callable[[Inside], Named], tuple[str, ...]]] = {
    "scales": (lambda inside: _placed(inside, inside.weights.scales), ("layer",)),
    "embedding_norms": (lambda inside: inside.weights.embedding_norms, ("rank",)),
    "embedding_eigenvalues": (lambda inside: inside.eigenvalues, ("rank",)),
    "condition_numbers": (lambda inside: _placed(inside, inside.weights.condition_numbers), ("layer",)),
    "condition_numbers_unit": (lambda inside: _placed(inside, inside.unit_conditions), ("layer",)),
    "effective_ranks": (lambda inside: _placed(inside, inside.ranks), ("layer",)),
    "vector_lengths": (lambda inside: inside.vector_lengths, ("rank",)),
    "embedding_products": (lambda inside: inside.products, ("level",)),
    "embedding_cosines": (lambda inside: inside.cosines, ("level",)),
    "singular_values": (lambda inside: _placed(inside, inside.singular), ("layer", "head", "rank")),
    "steps": (
        lambda inside: {name: getattr(inside.motion, name) for name in ("to_state", "to_prediction")},
        ("step",),
    ),
    "stops": (lambda inside: _stops(inside), ("stop",)),
    "angles": (lambda inside: {"degrees": inside.motion.angles}, ("step", "position")),
    "attention_entropy": (
        lambda inside: {
            name: _at(values, inside.motion.of_part("attention")[0])
            for name, values in (("nats", inside.motion.entropies), ("over_largest", inside.motion.spread))
        },
        ("layer", "head"),
    ),
    "expert_load": (
        lambda inside: _of_experts(inside, {"part_of_choices": "load", "bias": "biases"}),
        ("layer", "expert"),
    ),
    "expert_angles": (
        lambda inside: _of_experts(inside, {"between_proposals": "proposals", "between_router_rows": "router"}),
        ("layer", "expert", "other"),
    ),
}
"""Name of the file -> what is in it, by the column "name", and the columns that count from 0. A level is one of 401 quantiles.

Steps are the parts of each layer in turn (attention and MLP; in a hybrid there is one a layer); stops are the states before,
between and after them. Layers that do not have what a table is about are not in it, nor are models that have none such.
"""


def _at(values: Any, places: Any) -> Any:
    """Values [layers that have it, ...] in their places, numbers from 1, in an array of all layers up to the last of them."""
    array = np.asarray(values)
    spread = np.full((int(max(places, default=0)), *array.shape[1:]), np.nan)
    spread[np.asarray(places, dtype=int) - 1] = array
    return spread


def _placed(inside: Inside, named: Named) -> Named:
    return {name: _at(values, inside.weights.places[name]) for name, values in named.items()}


def _of_experts(inside: Inside, fields: Mapping[str, str]) -> Named:
    if inside.experts is None:
        return {}
    return {name: _at(getattr(inside.experts, field), inside.experts.layers) for name, field in fields.items()}


def _stops(inside: Inside) -> Named:
    motion = inside.motion
    return {
        "length": motion.lengths,
        "effective_rank": motion.rank,
        "anisotropy": motion.anisotropy,
        "lens_loss": motion.lens.loss,
        "lens_entropy": motion.lens.entropy,
        "lens_agreement": motion.lens.agreement,
        "lens_divergence": motion.lens.divergence,
    }


def write_tables(found: Found, directory: Path) -> list[Path]:
    """Write a table for every quantity into `directory`; returns the files."""
    written = []
    for file, (read, axes) in MATRICES.items():
        arrays = [
            ({"run": run, "arm": arm, "name": name}, values)
            for run, arm, inside, _ in found
            for name, values in read(inside).items()
        ]
        if arrays:
            table = long_table(arrays, axes)
            if "layer" in table:
                table = {name: column[~np.isnan(table["value"])] for name, column in table.items()}
            if "level" in table:
                table["level"] = LEVELS[table["level"]]
            written.append(write_table(table, directory / file))
    return [*written, *_logit_scales(found, directory), _distances(found, directory)]


def _logit_scales(found: Found, directory: Path) -> list[Path]:
    arrays = [
        ({"run": run, "arm": arm}, inside.weights.s_z)
        for run, arm, inside, _ in found
        if inside.weights.s_z is not None
    ]
    return [write_table(long_table(arrays, ("rank",)), directory / "s_z")] if arrays else []


def _distances(found: Found, directory: Path) -> Path:
    rows = [
        (run, arm, update, name, value)
        for run, arm, _, checkpoints in found
        for update, departures in checkpoints
        for name, value in departures.items()
    ]
    columns = zip(*rows, strict=True)
    names = ("run", "arm", "update", "name", "largest_departure")
    return write_table(
        {name: np.array(column) for name, column in zip(names, columns, strict=True)}, directory / "off_sphere"
    )
