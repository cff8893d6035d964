"""A trained run as a folder that Hugging Face transformers loads."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch

from spherelm.data.output import check_free, whole_directory, write_json
from spherelm.data.tokenizer import ByteTokenizer, JsonTokenizer, load_tokenizer
from spherelm.errors import UserError
from spherelm.interop.onnx import write_onnx
from spherelm.runs.checkpoint import STATE
from spherelm.runs.config import read_config, read_record, to_dict
from spherelm.runs.loading import checkpoint_of, load_model
from spherelm.runs.metrics import read_evaluations, read_metrics

if TYPE_CHECKING:
    from spherelm.interop.huggingface.folder import TokenizerDefinition

ONNX = "onnx/model.onnx"
"""The file for onnxruntime, where optimum and transformers.js look for it."""


def export(
    run: Path,
    out: Path,
    dtype: str = "float32",
    standalone: bool = False,
    with_tokenizer: bool = True,
    folded: bool = False,
    license: str | None = None,
    address: str = "PATH",
    onnx: bool = False,
) -> None:
    """Write the model of `run` (a run directory or one of its checkpoints) into the new directory `out`.

    dtype: "float32", "bfloat16" or "float16", of the weights; "fp8" or "nvfp4", of the matrices of a folded model,
    whose other weights are float32. standalone: put the modeling code beside them, for loading with
    `trust_remote_code=True` where spherelm is not installed. folded: the same, with learned scales inside the matrices,
    for servers such as vLLM. license: of the weights, as the hub names it. address: by which the card loads the model.
    onnx: put `ONNX` into it too. The directory appears whole or not at all.
    Raises `FileExistsError` if `out` holds something, `FileNotFoundError` if `run` has no checkpoint, `ValueError` if
    transformers is missing or knows no such model, the run's tokenizer cannot be had as a tokenizer.json, or the model
    cannot be had in `dtype`.
    """
    check_free(out, "directory for the export")
    try:
        from spherelm.interop.huggingface import classes_of
        from spherelm.interop.huggingface.card import FEW_BITS, Facts, model_card
        from spherelm.interop.huggingface.folder import RUN_FILE, save_folder
    except ImportError as error:
        raise UserError(f"cannot export: {error}") from error
    few_bits = dtype if dtype in FEW_BITS else None
    if few_bits and onnx:
        raise UserError(f"--onnx writes float32, not {dtype}: leave out --onnx, or --dtype")
    folded = folded or few_bits is not None
    model, checkpoint = load_model(run), checkpoint_of(run)
    classes_of(model)
    directory = checkpoint.parent.parent
    tokenizer = tokenizer_definition(directory) if with_tokenizer else None
    step = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))["step"]
    config = {**read_record(directory / "config.json"), **to_dict(read_config(directory / "config.json"))}
    facts = Facts(
        name=out.resolve().name,
        config=config,
        step=step,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        validation=last_validation(directory, step),
        tasks=task_scores(directory, step),
        datasets=hub_datasets(config.get("data")),
        dtype=dtype,
        standalone=standalone or folded,
        folded=folded,
        has_tokenizer=tokenizer is not None,
        license=license,
        address=address,
    )
    with whole_directory(out, "directory for the export") as part:
        if onnx:
            write_onnx(model, part / ONNX)
        of_weights = torch.float32 if few_bits else getattr(torch, dtype)
        save_folder(model, part, tokenizer, model_card(facts), of_weights, standalone, folded, few_bits)
        write_json(part / RUN_FILE, {**config, "step": step})


def push(run: Path, repo: str, private: bool = False, **settings: Any) -> str:
    """Put the model of `run` on the hub as `repo`, "user/name"; its address. settings: of `export`. Raises as it, and
    `UserError` for what the hub refuses.
    """
    try:
        from spherelm.interop.huggingface.hub import upload
    except ImportError as error:
        raise UserError(f"cannot push: {error}") from error
    with TemporaryDirectory() as directory:
        folder = Path(directory) / repo.rpartition("/")[2]
        export(run, folder, address=repo, **settings)
        return upload(folder, repo, private)


def task_scores(run: Path, step: int) -> dict[str, dict[str, float]]:
    """Scores by task and metric, of the update `step`:
    from training, and from what `eval --json` wrote into the run.
    """
    path = run / "metrics.jsonl"
    found: dict[str, dict[str, float]] = {}
    for record in read_metrics(path) if path.exists() else []:
        if record["kind"] == "eval" and record["step"] == step:
            found |= record.get("tasks", {})
    for record in read_evaluations(run):
        if record.get("step") == step:
            tasks = record.get("tasks", {})
            found |= {name: {m: s["value"] for m, s in task["metrics"].items()} for name, task in tasks.items()}
    return found


def hub_datasets(data: str | None) -> list[str]:
    """Names on the hub of the datasets that the data directory `data` was made of,
    as far as its manifest is at hand and whole.
    """
    manifest = Path(data or "") / "manifest.json"
    if data is None or not manifest.is_file():
        return []
    try:
        inputs = json.loads(manifest.read_text(encoding="utf-8")).get("inputs", [])
        return sorted({str(name) for entry in inputs if (name := (entry.get("dataset") or {}).get("name"))})
    except (ValueError, TypeError, AttributeError):
        return []


def last_validation(run: Path, step: int) -> dict[str, Any] | None:
    """The run's last validation record up to the update `step`; `None` if none was written."""
    path = run / "metrics.jsonl"
    records = read_metrics(path) if path.exists() else []
    return next((r for r in reversed(records) if r["kind"] == "val" and r["step"] <= step), None)


def tokenizer_definition(run: Path) -> TokenizerDefinition:
    """The run's tokenizer as a `tokenizer.json`; raises `ValueError` where there is none that gives the same ids."""
    from spherelm.data.bpe import END
    from spherelm.interop.huggingface.folder import TokenizerDefinition
    from spherelm.interop.huggingface.tokenization import byte_definition

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
