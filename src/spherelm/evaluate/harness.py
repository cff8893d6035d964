"""Downstream tasks, scored by EleutherAI's lm-evaluation-harness itself:
its task definitions, its requests, its metrics.

With a directory of local copies the harness's own definition of a task is loaded as it stands and only what says where
the data lies is replaced; nothing is downloaded then.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import NonNegativeInt, PositiveInt

from spherelm.data.hub import cache_alone_without_network
from spherelm.errors import UserError, nearest
from spherelm.evaluate.local_tasks import LOCAL_TASKS, Record, local_records
from spherelm.fields import check
from spherelm.progress import has_bars
from spherelm.third_parties import silenced

PAPER_TASKS = ("arc_easy", "hellaswag", "winogrande", "wsc273", "lambada_openai")
"""The five tasks whose average the nGPT paper shows."""

BOOTSTRAP = 1000
"""Bootstrap resamples for the standard error of a metric that has none in closed form (LAMBADA's perplexity)."""

FEW_SHOT_SEED = 1234
"""Of the choice of few-shot examples, as the harness has it."""

Definition = dict[str, Any]


@dataclass(frozen=True)
class TaskSettings:
    """How tasks are run.

    Attributes:
        data: Directory with local copies of the tasks' data; the harness downloads them if left out.
        limit: Score only the first N documents of each task; all if left out.
        few_shot: Solved examples shown before each question.
        batch_size: Sequences scored at once.
    """

    data: Path | None = None
    limit: PositiveInt | None = None
    few_shot: NonNegativeInt = 0
    batch_size: PositiveInt = 16

    def __post_init__(self) -> None:
        check(self)


@contextlib.contextmanager
def subdued(progress: bool) -> Iterator[None]:
    """The harness without worker processes and telemetry, `silenced`; what it prints, its bars, goes to stderr, or,
    unless `progress` and stderr is a terminal, nowhere. Import it before: a library's log keeps the stderr that
    it finds on import.
    """
    wanted = {"DISABLE_MULTIPROC": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(silenced())
            shown = (
                sys.stderr if progress and has_bars() else stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            )
            stack.enter_context(contextlib.redirect_stdout(shown))
            stack.enter_context(contextlib.redirect_stderr(shown))
            yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def check_harness() -> None:
    """Raise `ValueError`, naming the extra to install, where the harness is not there; it imports `silenced`."""
    try:
        with silenced():
            import lm_eval.evaluator
            import lm_eval.models.huggingface  # noqa: F401
    except ImportError as error:
        raise UserError(f"tasks need lm-eval ({error}): pip install '.[eval]' in a clone of spherelm") from error


def own_definition(name: str) -> Definition:
    """The harness's definition of a task in `LOCAL_TASKS`, read by its own loader."""
    import lm_eval.tasks
    from lm_eval.tasks._yaml_loader import load_yaml

    root = Path(lm_eval.tasks.__file__).parent
    definition: Definition = load_yaml(root / LOCAL_TASKS[name].definition)
    return definition


def local_definition(name: str, records: dict[str, list[Record]], place: Path) -> Definition:
    """The harness's definition of a task with its data replaced by `records`, by split,
    which are written below `place`.

    Only the keys that name data differ: the data set, and splits that are not there.
    """
    files = {}
    for split, rows in records.items():
        path = place / f"{name}.{split}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        files[split] = str(path)
    definition = own_definition(name)
    splits = {f"{kind}_split" for kind in ("training", "validation", "test", "fewshot")} & definition.keys()
    missing = {key: None for key in splits if definition[key] not in records}
    where = {"data_files": files, "cache_dir": str(place / "cache")}
    return {**definition, **missing, "dataset_path": "json", "dataset_name": None, "dataset_kwargs": where}


def load_tasks(names: Sequence[str], settings: TaskSettings, place: Path) -> dict[str, Any]:
    """The harness's tasks of these names as its `TaskManager.load` gives them. place: a directory for temporary files.

    Raises `ValueError` for an unknown name, and for data that cannot be had.
    """
    from lm_eval.tasks import TaskManager

    if settings.data is not None:
        local = {name: local_records(name, settings.data) for name in names}
        check_few_shot(local, settings.few_shot)
        definitions = [local_definition(name, records, place) for name, records in local.items()]
        loaded: dict[str, Any] = TaskManager(include_defaults=False).load(definitions)
        return loaded
    if set(names) <= LOCAL_TASKS.keys():  # the index of all the harness's tasks takes seconds
        manager = TaskManager(include_defaults=False)
        wanted: list[Any] = [own_definition(name) for name in names]
    else:
        manager, wanted = TaskManager(), list(names)
        unknown = [name for name in names if name not in manager.all_tasks]
        if unknown:
            near = nearest(unknown[0], manager.all_tasks)
            raise UserError(
                f"the evaluation harness knows no task {unknown[0]!r}{near}: spherelm list tasks names those that are read "
                "from local copies too, lm-eval ls tasks all"
            )
    try:
        with cache_alone_without_network():
            loaded = manager.load(wanted)
    except Exception as error:  # of the hub, of requests, of datasets: any library's own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"the data of {','.join(names)} cannot be downloaded ({reason}): check the network, or give --task-data DIR"
        ) from error
    return loaded


def check_few_shot(local: dict[str, dict[str, list[Record]]], few_shot: int) -> None:
    """Raise `ValueError` for few-shot examples that would come from the documents that are scored."""
    for name, records in local.items():
        if few_shot and len(records) == 1:
            (split,) = records
            raise UserError(
                f"the local copy of {name} has only the {split} split, which is scored: few-shot examples need another; "
                "give --few-shot 0, or leave --task-data out"
            )


def evaluate_tasks(
    model: Any, tokenizer: Any, names: Sequence[str], settings: TaskSettings, progress: bool = True
) -> dict[str, Any]:
    """Score `model` on tasks by the harness; neither the model nor torch's random state is changed.

    model, tokenizer: as transformers has them (`interop.huggingface.to_hf`). progress: show on stderr how far it is.
    Result, plain JSON values:
    `tasks`, one record each with `documents`, `few_shot`, `chance` (accuracy of guessing, where the answers are
    choices), `cut` (how many documents do not fit the model's max_seq_len, whose prompts the harness cuts at their
    beginning), `version` of the task and `metrics`, each a `value` and its `stderr`; and `average` where all of the
    paper's tasks are among them. Raises as `load_tasks`, and `ValueError` where the harness is not installed.
    """
    if not names or len(set(names)) < len(names):
        raise UserError(f"name each task once, got {','.join(names) or 'none'}")
    check_harness()
    with subdued(progress), tempfile.TemporaryDirectory() as place:
        loaded = load_tasks(names, settings, Path(place))
        found = run_harness(model, tokenizer, loaded, settings)
    length = model.config.max_seq_len
    records = {name: task_record(name, found) | cut_record(name, found, tokenizer, length) for name in found["results"]}
    average = paper_average(records)
    return {"tasks": records, **({"average": average} if average else {})}


@torch.no_grad()
def run_harness(model: Any, tokenizer: Any, loaded: dict[str, Any], settings: TaskSettings) -> dict[str, Any]:
    """The harness's results for `model` on the tasks that `load_tasks` gave."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(
        pretrained=model.eval(),
        tokenizer=tokenizer,
        backend="causal",
        batch_size=settings.batch_size,
        max_length=model.config.max_seq_len,
    )
    # As the harness's simple_evaluate does, which beside it sets all random states, those of a training run too.
    for task in loaded["tasks"].values():
        if settings.few_shot or task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=settings.few_shot)
        task.set_fewshot_seed(seed=FEW_SHOT_SEED)
    try:
        found: dict[str, Any] = evaluate(lm, task_dict=loaded, limit=settings.limit, bootstrap_iters=BOOTSTRAP)
    except AssertionError as error:  # the harness's own check, which has no message
        longest = model.config.max_seq_len
        raise UserError(
            f"an answer may be longer than the model's max_seq_len={longest}: choose other tasks"
        ) from error
    return found


def task_record(name: str, found: dict[str, Any]) -> dict[str, Any]:
    """One task's part of what the harness returned, as `evaluate_tasks` says."""
    metrics = {}
    for key, value in found["results"][name].items():
        metric, _, kept = key.partition(",")
        if kept and not metric.endswith("_stderr") and isinstance(value, int | float):
            error = found["results"][name].get(f"{metric}_stderr,{kept}")
            stderr = float(error) if isinstance(error, int | float) and math.isfinite(error) else None
            metrics[metric if kept == "none" else f"{metric} ({kept})"] = {"value": float(value), "stderr": stderr}
    samples = found["samples"][name]
    chosen = found["configs"][name].get("output_type") == "multiple_choice"
    return {
        "documents": len(samples),
        "few_shot": found["n-shot"][name],
        "chance": sum(1 / len(sample["arguments"]) for sample in samples) / len(samples) if chosen else None,
        "version": found["versions"].get(name),
        "metrics": metrics,
    }


def cut_record(name: str, found: dict[str, Any], tokenizer: Any, max_seq_len: int) -> dict[str, int]:
    """How many documents of a task have a request of more tokens than the model reads;
    the last one is only predicted.
    """
    cut = 0
    for sample in found["samples"][name]:
        texts = ["".join(part for part in request if isinstance(part, str)) for request in sample["arguments"]]
        cut += any(len(ids) > max_seq_len + 1 for ids in tokenizer(texts)["input_ids"])
    return {"cut": cut}


def paper_average(records: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]] | None:
    """The mean over the paper's five tasks, `None` unless all are there:
    of `acc`, and of `acc_norm` where a task has one.

    The paper does not say which accuracy it takes. `acc` is the one that all five have; the other is what many reports
    of HellaSwag and ARC give. The tasks' errors are independent.
    """
    if not set(PAPER_TASKS) <= records.keys():
        return None
    found = {}
    for metric in ("acc", "acc_norm"):
        rows = [records[name]["metrics"] for name in PAPER_TASKS]
        chosen = [row.get(metric, row["acc"]) for row in rows]
        errors = [row["stderr"] or 0.0 for row in chosen]
        found[metric] = {
            "value": sum(row["value"] for row in chosen) / len(chosen),
            "stderr": math.sqrt(sum(error**2 for error in errors)) / len(chosen),
        }
    return found
