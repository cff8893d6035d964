"""The run directory: what it must look like before a run starts, and what it says about how the run came about."""

from __future__ import annotations

import dataclasses
import json
import math
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from spherelm.data.output import check_place, locked, write_json
from spherelm.data.sources import parse_data
from spherelm.errors import OutputExistsError, UserError, nearest
from spherelm.runs.checkpoint import latest_checkpoint
from spherelm.runs.config import Record, RunConfig, record_today, to_dict

FREE_TO_CHANGE = (
    *(
        f"train.{name}"
        for name in (
            *(
                "save_every",
                "save_minutes",
                "keep",
                "keep_every",
                "compile",
                "threads",
                "log_to",
                "diagnose_every",
                "micro_batch_size",
                "eval_every",
            ),
            *(
                "strategy",
                "shard_size",
                "recompute",
                "timeout",
                "on_bad_step",
                "skip_budget",
                "spike_factor",
                "stop_above",
            ),
            *("eval_tasks", "eval_tasks_every", "task_data", "eval_limit", "quiet", "log_every", "device"),
        )
    ),
    *("init_from", "base", "base.d_model", "base.n_layers", "base.steps", "model.architecture.mixer.mamba_chunk"),
)
"""Fields that may differ when a run is resumed: they do not change the result, except for the rounding of sums."""


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


def flat(record: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of `record` by path, such as "model.alpha.init"."""
    found: dict[str, Any] = {}
    for key, value in record.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def or_nan(value: float | None) -> float:
    """A number as `write_json` wrote it: what became null is NaN again."""
    return math.nan if value is None else float(value)


LOCK = ".lock"
"""The file in a directory that is there while a process works in the directory."""


def alone_in(out: Path) -> AbstractContextManager[None]:
    """No other process works in the directory `out` as long as the context lasts; `FileExistsError` while one does."""
    return locked(out / LOCK, f"{out} is in use by another process: wait until that ends, or choose another --out")


@contextmanager
def claimed(out: Path, wanted: dict[str, Any], resume: bool, may_grow: str = "") -> Iterator[bool]:
    """`claim_directory`, and be `alone_in` the directory as long as the context lasts. Raises what both raise."""
    if not is_taken(out, resume):
        out.mkdir(parents=True, exist_ok=True)
    with alone_in(out):
        yield claim_directory(out, wanted, resume, may_grow)


def is_taken(out: Path, resume: bool) -> bool:
    """Whether `out` holds something that may be resumed; raises as `check_place` does,
    and `FileExistsError` for what may not, or if `resume` is False.
    """
    check_place(out)
    if not out.exists() or all(path.name == LOCK for path in out.iterdir()):
        return False
    if not resume:
        raise OutputExistsError(
            f"{out} already holds something: choose another --out, or --resume to continue the run there"
        )
    if not (out / "config.json").exists():
        raise OutputExistsError(f"{out} holds nothing to resume (no config.json): choose another --out")
    return True


def claim_directory(out: Path, wanted: dict[str, Any], resume: bool, may_grow: str = "") -> bool:
    """Make `out` the directory of what `wanted` describes, stored with its provenance in `config.json`.

    Returns whether it was that already. Raises as `check_directory` does; nothing that is there is changed then.
    may_grow: as there; that the number is larger is noted in `config.json`.
    """
    path = out / "config.json"
    before = check_directory(out, wanted, resume, may_grow)
    if before is None:
        out.mkdir(parents=True, exist_ok=True)
        about = {"versions": versions(), "git_commit": git_commit(), "command": command_line()}
        write_json(path, {**wanted, **about})
        return False
    now = flat(wanted)
    if may_grow in before and now[may_grow] > before[may_grow]:
        grow(path, may_grow, before[may_grow], now[may_grow])
    return True


def check_directory(out: Path, wanted: dict[str, Any], resume: bool, may_grow: str = "") -> dict[str, Any] | None:
    """What `config.json` in `out` says, by path; `None` where nothing is there yet. Nothing is written.

    Raises as `is_taken` does, and `UserError`, naming the field, if `out` holds something of another configuration than
    `wanted`. Where "data_identity" says what the text is, the text may lie elsewhere than it did. may_grow: the path of
    a number that may be larger now.
    """
    path = out / "config.json"
    if not is_taken(out, resume):
        return None
    try:
        before = flat(record_today(dict(json.loads(path.read_text(encoding="utf-8")))))
        now = flat(json.loads(json.dumps(wanted)))
        texts = (
            [parse_data(values.get("data")).proportions for values in (before, now)]
            if "data_identity" in wanted
            else []
        )
        moved = bool(texts) and texts[0] == texts[1]
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}): choose another --out") from error
    free = (
        *FREE_TO_CHANGE,
        *(["data"] if moved else []),
        *(["train.dtype"] if now.get("train.dtype") == "auto" else []),
    )
    free = (*free, *([may_grow] if may_grow in before and now[may_grow] > before[may_grow] else []))
    differing = [field for field in now if field not in free and before.get(field) != now[field]]
    if differing:
        # What is asked for comes before what a recipe makes of it: the length of a run before where s_z starts in it.
        field = min(differing, key=lambda name: ("." in name, not name.startswith("train.")))
        raise UserError(
            f"{out} was made with another config: {field} is {before.get(field)!r} there and {now[field]!r} now; "
            "give the same value, or another --out"
        )
    return before


def grow(path: Path, field: str, before: int, now: int) -> None:
    """Write in the `config.json` at `path` that a number is larger from now on, and what it was."""
    record = json.loads(path.read_text(encoding="utf-8"))
    *outer, last = field.split(".")
    place = record
    for name in outer:
        place = place[name]
    place[last] = now
    note = {"field": field, "before": before, "now": now, "command": command_line()}
    write_json(path, {**record, "grown": [*record.get("grown", []), note]})


ABOUT = frozenset({"versions", "git_commit", "command", "data_identity", "imported", "grown"})
"""The entries of a run's `config.json` beside its configuration."""


def refuse_unknown_entries(path: Path, record: Mapping[str, Any]) -> None:
    """Raise `UserError` for what stands in the file of a whole run and is neither configuration nor
    said about the run.
    """
    known = {*(field.name for field in dataclasses.fields(Record)), *ABOUT}
    strange = sorted(record.keys() - known)
    if strange:
        raise UserError(
            f"{path} cannot be used: it has no field {strange[0]!r}{nearest(strange[0], known)}: leave it out"
        )


def recorded_dtype(out: Path) -> str:
    """The number format that the run in the directory `out` computes in;
    "auto" where there is none or it does not say.
    """
    try:
        return str(json.loads((out / "config.json").read_text(encoding="utf-8"))["train"]["dtype"])
    except (OSError, ValueError, TypeError, KeyError):
        return "auto"


def described(config: RunConfig, data: dict[str, Any]) -> dict[str, Any]:
    """What is stored about the run of `config`; data: what identifies its text."""
    return {**to_dict(config), "data_identity": data}


@contextmanager
def open_run(out: Path, config: RunConfig, data: dict[str, Any], resume: bool) -> Iterator[Path | None]:
    """Have `out` as the directory of this run as long as the context lasts,
    and give the checkpoint to resume from, if any.

    data: what identifies the text, stored under "data_identity". Raises as `claimed` does.
    """
    with claimed(out, described(config, data), resume, "train.steps") as resumed:
        yield latest_checkpoint(out) if resumed else None
