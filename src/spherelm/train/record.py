"""The run directory: what it must look like before a run starts, and what it says about how the run came about."""

from __future__ import annotations

import json
import math
import os
import platform
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from spherelm.train.checkpoint import latest_checkpoint
from spherelm.train.config import RunConfig, to_dict

FREE_TO_CHANGE = (
    *(
        f"train.{name}"
        for name in (
            *("save_every", "save_minutes", "keep", "keep_every", "compile", "log_to", "diagnose_every"),
            *("strategy", "shard_size", "recompute", "timeout", "on_bad_step", "skip_budget", "spike_factor"),
            *("eval_tasks", "eval_tasks_every", "task_data", "eval_limit"),
        )
    ),
    *("base", "base.d_model", "base.n_layers", "base.steps"),
)
"""What may differ when a run is resumed, since it does not change what is learned."""


def versions() -> dict[str, str]:
    """The versions of what the numbers of a run depend on."""
    names = ("spherelm", "torch", "numpy", "tokenizers")
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in names},
        "platform": platform.platform(),
    }


def git_commit() -> str | None:
    """The commit of the checkout that this code runs from, with "+changes" if it was edited; `None` outside of one."""
    git = ("git", "-C", str(Path(__file__).parent))
    try:
        commit = subprocess.run((*git, "rev-parse", "HEAD"), capture_output=True, text=True, check=True).stdout.strip()
        edited = subprocess.run(
            (*git, "status", "--porcelain", "-uno"), capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+changes" if edited.strip() else "")


def command_line() -> str:
    """The command that started this process, as one would type it."""
    program = Path(sys.argv[0]).name
    return shlex.join(["spherelm" if program in ("__main__.py", "spherelm") else program, *sys.argv[1:]])


def _flat(record: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in record.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _finite(value: Any) -> Any:
    """`value` with every number that JSON cannot write (NaN, infinities) as `None`."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, value: Any) -> None:
    """Write `value` to `path` so that the file is never seen half written; NaN and infinities become null."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(_finite(value), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(part, path)


def or_nan(value: float | None) -> float:
    """A number as `write_json` wrote it: what became null is NaN again."""
    return math.nan if value is None else float(value)


def claim_directory(out: Path, wanted: dict[str, Any], resume: bool) -> bool:
    """Make `out` the directory of what `wanted` describes, stored with its provenance in `config.json`.

    Returns whether it was that already. Raises `FileExistsError` if it holds something and `resume` is not asked for, and
    `ValueError`, naming the field, if it holds something of another configuration. Nothing that is there is changed then.
    """
    path = out / "config.json"
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} is a file: choose another --out")
    if not out.exists() or not any(out.iterdir()):
        out.mkdir(parents=True, exist_ok=True)
        about = {"versions": versions(), "git_commit": git_commit(), "command": command_line()}
        write_json(path, {**wanted, **about})
        return False
    if not resume:
        raise FileExistsError(
            f"{out} already holds something: choose another --out, or --resume to go on with what is there"
        )
    if not path.exists():
        raise FileExistsError(f"{out} holds nothing to resume (no config.json): choose another --out")
    try:
        before, now = _flat(dict(json.loads(path.read_text(encoding="utf-8")))), _flat(json.loads(json.dumps(wanted)))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}): choose another --out") from error
    differing = [field for field in now if field not in FREE_TO_CHANGE and before.get(field) != now[field]]
    if differing:
        # What is asked for comes before what a recipe makes of it: the length of a run before where s_z starts in it.
        field = min(differing, key=lambda name: ("." in name, not name.startswith("train.")))
        raise ValueError(
            f"{out} was made with another config: {field} is {before.get(field)!r} there and {now[field]!r} now; "
            "give the same value, or another --out"
        )
    return True


def open_run(out: Path, config: RunConfig, data: dict[str, Any], resume: bool) -> Path | None:
    """Make `out` the directory of this run and return the checkpoint to go on from, if there is one.

    data: what identifies the text, stored under "data_identity". Raises as `claim_directory` does.
    """
    resumed = claim_directory(out, {**to_dict(config), "data_identity": data}, resume)
    return latest_checkpoint(out) if resumed else None
