"""A trained run, evaluated: its model and tokenizer handed to what measures them, and the record of it."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from spherelm.data.documents import read_lines
from spherelm.data.output import check_new_file
from spherelm.data.rows import RowSettings
from spherelm.data.tokenizer import SentencePieceTokenizer, Tokenizer, load_tokenizer
from spherelm.errors import UserError
from spherelm.evaluate.harness import TaskSettings, check_harness, evaluate_tasks, load_tasks, subdued
from spherelm.evaluate.lengths import LengthPlan, perplexity_by_length, read_documents
from spherelm.evaluate.positions import Positions, place
from spherelm.evaluate.translation import check_references, translation_scores
from spherelm.generation.beam import BeamSettings
from spherelm.generation.samples import load_for_inference, searched
from spherelm.generation.text_stream import encode_prompt
from spherelm.interop.export import tokenizer_definition
from spherelm.models import Decoder, EncoderDecoder, MaskedModel
from spherelm.runs.checkpoint import STATE
from spherelm.runs.config import TrainConfig, read_config
from spherelm.runs.loading import checkpoint_of, load_model, run_directory
from spherelm.runs.record import command_line, versions
from spherelm.train.precision import best_device

AS_TRAINED, NO_LIMIT = Positions(), 10**9


def transformers_tokenizer(directory: Path) -> Any:
    """The tokenizer saved in a run directory as transformers knows it, which the evaluation harness needs.

    It knows no longest text: the harness cuts what does not fit the model, and gets the length. Raises `ValueError` for
    SentencePiece, which has no tokenizer.json that is sure to give the same ids, and where transformers is missing.
    """
    tokenizer = load_tokenizer(directory)
    if isinstance(tokenizer, SentencePieceTokenizer):
        raise UserError(
            f"tasks need a tokenizer.json, and the run's tokenizer {tokenizer.name} is a SentencePiece model: for this run "
            "only --perplexity works"
        )
    try:
        from spherelm.interop.huggingface.tokenization import fast_tokenizer

        definition = tokenizer_definition(directory)
    except ImportError as error:
        raise UserError("tasks need transformers and lm-eval: pip install '.[eval]' in a clone of spherelm") from error
    return fast_tokenizer(definition.json, definition.eos_token, NO_LIMIT)


def trained_length(run: Path) -> int:
    """Tokens a sequence in the training of a run directory or of the run of a checkpoint."""
    return read_config(run_directory(run) / "config.json").train.seq_len


def origin_of(run: Path) -> dict[str, Any]:
    """The origin of an evaluation: the run, its arm, the update of its checkpoint, versions and the command."""
    checkpoint = checkpoint_of(run)
    step = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))["step"]
    arm = read_config(run_directory(run) / "config.json").arm
    return {"run": str(run), "arm": arm, "step": step, "versions": versions(), "command": command_line()}


def load_decoder(run: Path) -> Decoder:
    """The model of a run or a checkpoint on the best device.
    Raises as `load_model`, `ValueError` for what has an encoder.
    """
    model = load_model(run).to(best_device())
    if isinstance(model, EncoderDecoder):
        raise UserError(
            f"{run} is an encoder-decoder: use --translate and --reference, or pass a run of a language model"
        )
    if isinstance(model, MaskedModel):
        raise UserError(f"{run} is an encoder, which predicts no next token: pass a run of a language model")
    return model


def tasks_of_run(run: Path, names: Sequence[str], settings: TaskSettings) -> dict[str, Any]:
    """The result of `evaluate_tasks` for a run directory or one of its checkpoints.
    Raises as that and `load_model` do.
    """
    check_harness()  # first, since it imports with less noise than the tokenizer would
    from spherelm.interop.huggingface import to_hf

    model = load_decoder(run)
    tokenizer = transformers_tokenizer(run_directory(run))
    return evaluate_tasks(to_hf(model), tokenizer, names, settings)


def perplexity_of_run(
    run: Path,
    files: Sequence[Path],
    plan: LengthPlan,
    positions: Positions = AS_TRAINED,
    rows: RowSettings = RowSettings(skip_bad=None),
) -> dict[str, Any]:
    """The result of `perplexity_by_length` for a run directory or one of its checkpoints, with what it was measured on.

    Raises as that, `load_model` and `place` do.
    """
    model, trained = load_decoder(run), trained_length(run)
    place(model, positions, trained)
    documents = read_documents(files, load_tokenizer(run_directory(run)), plan.needed, rows)
    found = perplexity_by_length(model, documents, plan)
    return {"files": [str(file) for file in files], "trained_length": trained, "positions": str(positions), **found}


def translation_of_run(
    run: Path, source: Path, references: Sequence[Path], beams: BeamSettings, written: Path | None = None
) -> dict[str, Any]:
    """The result of `translation_scores` for what a run writes, by beam search, for every line of `source`.

    references: files of as many lines. written: a file to be made, of the texts written, one a line. Each may be as
    long as the model allows. Raises as `continuations` and `translation_scores` do, the latter before
    anything is written.
    """
    if written is not None:
        check_new_file(written, "--write")
    texts, wanted = read_lines(source), [read_lines(path) for path in references]
    check_references(texts, wanted)
    model, tokenizer = load_for_inference(run)
    model.to(best_device())
    prompts = [encode_prompt(tokenizer, text, f"line {i} of {source}") for i, text in enumerate(texts, 1)]
    room = model.config.max_seq_len - max(model.places(prompt) for prompt in prompts)
    found = [clean(text) for text in searched(model, tokenizer, prompts, 1, room, beams)]
    if written is not None:
        written.write_text("".join(f"{text}\n" for text in found), encoding="utf-8")
    about_search = {"source": str(source), "references": [str(path) for path in references], **vars(beams)}
    return {**about_search, **translation_scores(found, wanted)}


def clean(text: str) -> str:
    """A text on one line, without white space around it."""
    return " ".join(text.split())


def task_scorer(train: TrainConfig, tokenizer: Tokenizer) -> Callable[[Decoder], dict[str, Any]] | None:
    """A function that scores a model in training on the tasks of `train`, as one record's values; `None` without tasks.

    Whatever would fail later fails now: the harness, the tokenizer and the tasks' data are tried. A record has `tasks`
    with each task's metrics and their errors (`acc`, `acc_stderr`, ...), and `average` where the paper's
    five are among them.
    """
    names = split_names(train.eval_tasks)
    if not names:
        if train.eval_tasks_every:
            raise UserError(f"eval_tasks_every={train.eval_tasks_every} needs tasks: name them with --eval-tasks")
        return None
    settings = TaskSettings(None if train.task_data is None else Path(train.task_data), train.eval_limit)
    check_harness()
    with tempfile.TemporaryDirectory() as directory, subdued(progress=False):
        tokenizer.save(Path(directory))
        converted = transformers_tokenizer(Path(directory))
        load_tasks(names, settings, Path(directory))

    from spherelm.interop.huggingface import to_hf

    def score(model: Decoder) -> dict[str, Any]:
        found = evaluate_tasks(to_hf(model), converted, names, settings, progress=False)
        tasks = {name: flat_scores(record["metrics"]) for name, record in found["tasks"].items()}
        return {"tasks": tasks, **({"average": flat_scores(found["average"])} if "average" in found else {})}

    return score


def split_names(tasks: str) -> list[str]:
    """The names in a list by commas."""
    return [name.strip() for name in tasks.split(",") if name.strip()]


def flat_scores(metrics: dict[str, dict[str, float]]) -> dict[str, float]:
    """Each metric's value under its name, and its error under that and "_stderr", where it has one."""
    values = {name: score["value"] for name, score in metrics.items()}
    return values | {f"{name}_stderr": s["stderr"] for name, s in metrics.items() if s["stderr"] is not None}
