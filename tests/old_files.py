"""Files as version 0.1.0 wrote them, made of files of today:
its configs were flat, its names of parameters the oracle's.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from oracle_names import oracle_names
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from spherelm.optim import RULES

SHARDING = "DCP_SHARDING_INFO"
"""Where a file of `torch.distributed.checkpoint` says which part of each tensor it holds."""


def rename_checkpoint(checkpoint: Path) -> None:
    """Give everything in a checkpoint its older name, in all of its files, and note their new sha256."""
    state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    rename_files([checkpoint / name for name in state["sha256"]])
    state["sha256"] = {name: hashlib.sha256((checkpoint / name).read_bytes()).hexdigest() for name in state["sha256"]}
    (checkpoint / "state.json").write_text(json.dumps(state), encoding="utf-8")


NEWER = ("inner_norm", "activation", "decay_shape")
"""Fields of models and schedules that there were none of."""


def flatten_config(run: Path) -> None:
    """Write the config.json of a run anew: an arm for each architecture, and fields that stand beside each other."""
    record = json.loads((run / "config.json").read_text(encoding="utf-8"))
    arch, optim, rule = record["model"].pop("architecture"), record["optim"], record["optim"].pop("optimizer")
    kind, pattern = arch.pop("kind"), arch.get("pattern")
    if kind != "decoder" or pattern is not None:
        record["arm"] = record["arm"].removesuffix("gpt") + ("hybrid" if pattern is not None else kind)
    else:
        del arch["pattern"]
    model: dict[str, Any] = {}
    for name, value in (record["model"] | arch).items():
        group = value if isinstance(value, dict) else {name: value}
        is_scale = isinstance(value, dict) and name not in ("variant", "mixer", "experts")
        model |= {f"{name}_{field}" if is_scale else field: each for field, each in group.items()}
    for name in NEWER:
        model.pop(name, None)
        record["schedule"].pop(name, None)
    others = {name: value for kind in RULES.values() for name, value in asdict(kind()).items()}
    record |= {"model": model, "optim": {**optim, **others, **rule, "optimizer": rule["kind"]}}
    del record["optim"]["kind"], record["optim"]["hyperball"]
    (run / "config.json").write_text(json.dumps(record), encoding="utf-8")


def rename_export(folder: Path) -> None:
    """The same for the weights of a Hugging Face folder, and for the index of their files where there is one."""
    older = rename_files(sorted(folder.glob("*.safetensors")), "model.")
    index = folder / "model.safetensors.index.json"
    if index.exists():
        text = json.loads(index.read_text(encoding="utf-8"))
        text["weight_map"] = {older[name]: file for name, file in text["weight_map"].items()}
        index.write_text(json.dumps(text), encoding="utf-8")


def rename_adapters(file: Path, prefix: str) -> None:
    """The same for what peft saved of a model whose names follow `prefix`."""
    tensors = load_file(file)
    adapted = {name: name.removeprefix(prefix).partition(".lora_")[0] + ".weight" for name in tensors}
    names = oracle_names(adapted.values())
    renamed = {
        prefix + names[w].removesuffix("weight") + f"lora_{n.partition('.lora_')[2]}": n for n, w in adapted.items()
    }
    save_file({new: tensors[name] for new, name in renamed.items()}, file, {"format": "pt"})


def rename_files(files: list[Path], prefix: str = "") -> dict[str, str]:
    """Give everything in these safetensors its older name behind `prefix`: new -> old. Optimizers have `weight/key`."""
    held = {}
    for file in files:
        with safe_open(file, "pt") as opened:
            held[file] = opened.metadata(), {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    weights = {name.partition("/")[0].removeprefix(prefix) for _, tensors in held.values() for name in tensors}
    names = oracle_names(sorted(weights))

    older = {}
    for name in (name for _, tensors in held.values() for name in tensors):
        weight, slash, key = name.partition("/")
        older[name] = prefix + names[weight.removeprefix(prefix)] + slash + key
    for file, (metadata, tensors) in held.items():
        if SHARDING in metadata:
            parts = json.loads(metadata[SHARDING])
            metadata |= {SHARDING: json.dumps({older[name]: part for name, part in parts.items()})}
        save_file({older[name]: tensor for name, tensor in tensors.items()}, file, metadata)
    return older
