"""The numbers that `spherelm inspect` draws, as CSV files: one row a number."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from spherelm.analysis.geometry import LEVELS
from spherelm.analysis.inside import Inside

Inspected = tuple[str, str, Inside, Sequence[tuple[int, Mapping[str, float]]]]
"""(name of the run, arm, what was found, (update, largest departures) of its checkpoints)."""

Arrays = Mapping[str, tuple[Any, Any]]
"""By name, an array and the labels along its first axis; `None` counts from 0."""


def _counted(named: Mapping[str, Any]) -> Arrays:
    return {name: (array, None) for name, array in named.items()}


def _levels(named: Mapping[str, Any]) -> Arrays:
    return {name: (array, LEVELS) for name, array in named.items()}


def _layers(inside: Inside, named: Mapping[str, Any]) -> Arrays:
    return {name: (array, inside.weights.places[name].astype(int)) for name, array in named.items()}


def _steps(inside: Inside) -> Arrays:
    return _counted({name: getattr(inside.motion, name) for name in ("to_state", "to_prediction")})


def _stops(inside: Inside) -> Arrays:
    motion, lens = inside.motion, inside.motion.lens
    states = {"length": motion.lengths, "effective_rank": motion.rank, "anisotropy": motion.anisotropy}
    return _counted(states | {f"lens_{name}": array for name, array in vars(lens).items()})


def _entropies(inside: Inside) -> Arrays:
    motion = inside.motion
    layers = motion.of_part("attention")[0].astype(int)
    return {"nats": (motion.entropies, layers), "over_largest": (motion.spread, layers)}


def _rounding(inside: Inside) -> Arrays:
    places = inside.weights.places
    return {
        f"{what} of {name}": (array, places[name].astype(int))
        for what, by_matrix in vars(inside.rounding).items()
        for name, array in by_matrix.items()
    }


def _sharpness(inside: Inside) -> Arrays:
    return {"rise": (inside.sharpness.rise.T, inside.sharpness.sizes)}


def _experts(inside: Inside, **fields: str) -> Arrays:
    experts = inside.experts
    return {} if experts is None else {n: (getattr(experts, field), experts.layers) for n, field in fields.items()}


TABLES: dict[str, tuple[Callable[[Inside], Arrays], tuple[str, ...]]] = {
    "scales": (lambda i: _layers(i, i.weights.scales), ("layer",)),
    "s_z": (lambda i: {} if i.weights.s_z is None else _counted({"s_z": i.weights.s_z}), ("rank",)),
    "embedding_norms": (lambda i: _counted(i.weights.embedding_norms), ("rank",)),
    "embedding_eigenvalues": (lambda i: _counted(i.eigenvalues), ("rank",)),
    "embedding_products": (lambda i: _levels(i.products), ("level",)),
    "embedding_cosines": (lambda i: _levels(i.cosines), ("level",)),
    "condition_numbers": (lambda i: _layers(i, i.weights.condition_numbers), ("layer",)),
    "condition_numbers_unit": (lambda i: _layers(i, i.unit_conditions), ("layer",)),
    "effective_ranks": (lambda i: _layers(i, i.ranks), ("layer",)),
    "vector_lengths": (lambda i: _counted(i.vector_lengths), ("rank",)),
    "singular_values": (lambda i: _layers(i, i.singular), ("layer", "head", "rank")),
    "steps": (_steps, ("step",)),
    "stops": (_stops, ("stop",)),
    "angles": (lambda i: _counted({"degrees": i.motion.angles}), ("step", "position")),
    "attention_entropy": (_entropies, ("layer", "head")),
    "rounding": (_rounding, ("layer",)),
    "sharpness": (_sharpness, ("size", "direction")),
    "expert_load": (lambda i: _experts(i, part_of_choices="load", bias="biases"), ("layer", "expert")),
    "expert_angles": (
        lambda i: _experts(i, between_proposals="proposals", between_router_rows="router"),
        ("layer", "expert", "other"),
    ),
}
"""Name of the file -> its arrays, by the column "name", and the columns that say where in an array a number is.

Layers are numbered from 1, as on the page; the rest counts from 0. A level is one of 401 quantiles. Steps are the parts
of each layer in turn (attention and MLP; in a hybrid there is one a layer); stops are the states before,
between and after them.
"""


def write_tables(found: Sequence[Inspected], directory: Path) -> list[Path]:
    """Write a table for every quantity into `directory`; returns the files."""
    written = []
    for file, (read, axes) in TABLES.items():
        rows = [(run, arm, *row) for run, arm, inside, _ in found for row in _rows(read(inside))]
        if rows:
            written.append(_write(directory / f"{file}.csv", ("run", "arm", "name", *axes, "value"), rows))
    departures = [
        (run, arm, update, name, value)
        for run, arm, _, checkpoints in found
        for update, by_name in checkpoints
        for name, value in by_name.items()
    ]
    header = ("run", "arm", "update", "name", "largest_departure")
    return [*written, _write(directory / "off_sphere.csv", header, departures)]


def _rows(arrays: Arrays) -> Iterator[tuple[Any, ...]]:
    """Name, place and value of every number."""
    for name, (values, labels) in arrays.items():
        array = np.asarray(values)
        firsts = range(len(array)) if labels is None else labels.tolist()
        for (first, *rest), value in zip(np.ndindex(array.shape), array.ravel().tolist(), strict=True):
            yield name, firsts[first], *rest, value


def _write(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)
    return path
