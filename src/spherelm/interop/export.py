"""A trained run as a folder that Hugging Face transformers loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from spherelm.data.output import check_free, whole_directory
from spherelm.data.tokenizer import ByteTokenizer, JsonTokenizer, load_tokenizer
from spherelm.errors import UserError
from spherelm.runs.checkpoint import STATE, checkpoint_of, load_model
from spherelm.runs.config import read_config, read_record, to_dict
from spherelm.runs.metrics import read_metrics

if TYPE_CHECKING:
    from spherelm.interop.huggingface.folder import TokenizerDefinition


def export(run: Path, out: Path, dtype: str = "float32", standalone: bool = False, with_tokenizer: bool = True) -> None:
    """Write the model of `run` (a run directory or one of its checkpoints) into the new directory `out`.

    dtype: "float32", "bfloat16" or "float16", of the weights. standalone: put the modeling code beside them, for loading
    with `trust_remote_code=True` where spherelm is not installed. The directory appears whole or not at all.
    Raises `FileExistsError` if `out` holds something, `FileNotFoundError` if `run` has no checkpoint, `ValueError` if
    transformers is missing or knows no such model, or the run's tokenizer cannot be had as a tokenizer.json.
    """
    check_free(out, "directory for the export")
    try:
        from spherelm.interop.huggingface import classes_of
        from spherelm.interop.huggingface.card import Facts, model_card
        from spherelm.interop.huggingface.folder import save_folder
    except ImportError as error:
        raise UserError(f"cannot export: {error}") from error
    model, checkpoint = load_model(run), checkpoint_of(run)
    classes_of(model)
    directory = checkpoint.parent.parent
    tokenizer = tokenizer_definition(directory) if with_tokenizer else None
    step = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))["step"]
    facts = Facts(
        name=out.resolve().name,
        config={**read_record(directory / "config.json"), **to_dict(read_config(directory / "config.json"))},
        step=step,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        validation=last_validation(directory, step),
        dtype=dtype,
        standalone=standalone,
        has_tokenizer=tokenizer is not None,
    )
    with whole_directory(out, "directory for the export") as part:
        save_folder(model, part, tokenizer, model_card(facts), getattr(torch, dtype), standalone)


def last_validation(run: Path, step: int) -> dict[str, Any] | None:
    """The run's last validation record up to the update `step`; `None` if none was written."""
    path = run / "metrics.jsonl"
    records = read_metrics(path) if path.exists() else []
    return next((r for r in reversed(records) if r["kind"] == "val" and r["step"] <= step), None)


def tokenizer_definition(run: Path) -> TokenizerDefinition:
    """The run's tokenizer as a `tokenizer.json`; raises `ValueError` where there is none that gives the same ids."""
    from spherelm.interop.huggingface.folder import TokenizerDefinition
    from spherelm.interop.huggingface.tokenization import END, byte_definition

    try:
        tokenizer = load_tokenizer(run)
    except ValueError as error:
        raise UserError(f"{error}; or export with --no-tokenizer") from error
    if isinstance(tokenizer, ByteTokenizer):
        return TokenizerDefinition(byte_definition(), END)
    if isinstance(tokenizer, JsonTokenizer):
        return TokenizerDefinition((run / "tokenizer.json").read_text(encoding="utf-8"), tokenizer.eos_token)
    raise UserError(
        f"the tokenizer {tokenizer.name} is a SentencePiece model, which has no tokenizer.json that is sure to give the same "
        "ids: export with --no-tokenizer, and encode with SentencePiece"
    )
