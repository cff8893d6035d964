"""Where the records of a run go besides `metrics.jsonl`: TensorBoard, Weights & Biases, trackio.
All optional, all local.

One module per library. A sink gets every record once: records from before an interruption are not
sent again, and a sink that joins a run later first gets all that `metrics.jsonl` holds.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from spherelm.errors import UserError

SINKS = ("tensorboard", "wandb", "trackio")


class Sink(Protocol):
    """Takes records. new: whether nothing of this run had been written there before."""

    new: bool

    def write(self, step: int, values: dict[str, float]) -> None:
        """Take the numbers of the update `step` by name."""

    def close(self) -> None:
        """Have everything on the disk and let go of it."""


def numbers(record: dict[str, Any]) -> dict[str, float]:
    """The numbers of a record by name: `train/loss`, `train/lr_by_role/matrix`, `train/alpha_A/3`; no step, no text."""
    rest = {key: value for key, value in record.items() if key not in ("kind", "step")}
    return dict(_flat(record["kind"], rest))


def _flat(name: str, value: Any) -> Iterator[tuple[str, float]]:
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _flat(f"{name}/{key}", item)
    elif isinstance(value, int | float):
        yield name, float(value)


def check_names(log_to: str) -> list[str]:
    """The sinks that `log_to` names, by commas.

    Raises `ValueError` for one that there is not, and for one whose library is not there, naming the extra to install.
    """
    names = [name.strip() for name in log_to.split(",") if name.strip()]
    for name in names:
        if name not in SINKS:
            raise UserError(f"--log-to {name} is unknown: choose among {','.join(SINKS)}")
        if find_spec(name) is None:
            raise UserError(f"--log-to {name} needs {name}: pip install '.[logs]' in a clone of spherelm")
    return list(dict.fromkeys(names))


def open_sinks(log_to: str, run: Path, config: dict[str, Any]) -> list[Sink]:
    """The sinks that `log_to` names, for the run directory `run` with its plain configuration.

    Raises `ValueError` as `check_names` does.
    """
    return [_open(name, run, config) for name in check_names(log_to)]


def _open(name: str, run: Path, config: dict[str, Any]) -> Sink:
    if name == "tensorboard":
        from spherelm.train.sinks.tensorboard import TensorBoardSink

        return TensorBoardSink(run, config)
    if name == "wandb":
        from spherelm.train.sinks.wandb import WandbSink

        return WandbSink(run, config)
    from spherelm.train.sinks.trackio import TrackioSink

    return TrackioSink(run, config)
