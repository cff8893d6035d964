"""The code that goes with an exported model, made from a model of ours and sharing none of its code."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from spherelm.interop.huggingface import standalone, to_hf
from spherelm.models import Decoder

PACKAGE = "spherelm.interop.huggingface.standalone"


def classes_of(model: Decoder, model_type: str) -> dict[str, Any]:
    """The classes that the Auto classes would load for `model`, by the names of these."""
    wanted = standalone.auto_map(model.config, model_type)
    return {auto: getattr(import_module(f"{PACKAGE}.{m}"), c) for auto, (m, c) in split(wanted).items()}


def split(auto_map: dict[str, str]) -> dict[str, list[str]]:
    """Module and class of each entry."""
    return {auto: path.split(".") for auto, path in auto_map.items()}


def twin(model: Decoder) -> Any:
    """The same model as that code has it, with weights of its own, in eval mode."""
    wrapped = to_hf(model)
    classes = classes_of(model, wrapped.config.model_type)
    described = {name: value for name, value in wrapped.config.to_diff_dict().items() if name != "model_type"}
    made = next(c for auto, c in classes.items() if auto not in ("AutoConfig", "AutoModel"))
    theirs = made(classes["AutoConfig"](**described)).to(model.embed.weight.dtype)
    theirs.load_state_dict(wrapped.state_dict())
    return theirs.eval()
