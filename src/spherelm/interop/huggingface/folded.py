"""A model for servers: learned scales and gains are inside its matrices, whose names and products vLLM understands.

It is a model of the code that rides along (`standalone`), folded as `generation.folding` folds ours,
with matrices apart.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from spherelm.errors import UserError
from spherelm.generation.folding import obstacle
from spherelm.interop.huggingface.configuration import SphereLMConfig
from spherelm.interop.huggingface.standalone import auto_map
from spherelm.interop.huggingface.standalone.configuration_spherelm import FoldedConfig
from spherelm.models import Decoder, gpt, ngpt


def to_folded_hf(model: Decoder) -> PreTrainedModel:
    """A copy of `model`, a decoder of attention and MLPs, as a `PreTrainedModel` for inference, in float32.

    Raises `UserError` for other models.
    """
    problem = obstacle(model)
    if problem is not None:
        raise UserError(
            f"this model cannot be folded: {problem}; export it without --folded, in float32, bfloat16 or float16"
        )
    module, name = auto_map(model.config, FoldedConfig.model_type)["AutoModelForCausalLM"].split(".")
    code = import_module(f"spherelm.interop.huggingface.standalone.{module}")
    described = SphereLMConfig.of(model.config).to_diff_dict()
    config = FoldedConfig(**{**described, "model_type": FoldedConfig.model_type, "tie_word_embeddings": False})
    with torch.device("meta"):
        made = getattr(code, name)(config)
    made.load_state_dict(folded_state(model), assign=True)
    return made.eval()


@torch.no_grad()
def folded_state(model: Any) -> dict[str, Tensor]:
    """The weights of the folded copy of `model`, by their names there."""
    state = {f"model.{name}": tensor.clone() for name, tensor in model.state_dict().items() if name.startswith("embed")}
    for index, block in enumerate(model.blocks):
        for name, sublayer in block.sublayers.items():
            fold = fold_step if isinstance(sublayer, ngpt.Step) else fold_residual
            state |= {f"model.blocks.{index}.{name}.{key}": tensor for key, tensor in fold(sublayer).items()}
    head = model.head
    factor = head.norm.weight if isinstance(head, gpt.Head) else head.s_z().unsqueeze(-1)
    return state | {"lm_head.weight": head.linear.weight * factor}


def fold_step(sublayer: Any) -> dict[str, Tensor]:
    """The weights of an nGPT's sublayer: `s_u` and `s_v` go into rows of the matrices that they scale the products of.

    The inner norms are not there (`generation.folding`).
    """
    state = {name: tensor.clone() for name, tensor in sublayer.state_dict().items()}
    part = sublayer.part
    for matrix, scale, gain in (
        ("u", "s_u", getattr(part, "input_gain", 1.0)),
        ("v", "s_v", getattr(part, "gate_gain", 1.0)),
    ):
        if hasattr(part, scale):
            state[f"part.{matrix}.weight"] *= getattr(part, scale)().unsqueeze(-1) * gain
            del state[f"part.{scale}.value"]
    return state


RENAMED = {f"part.{x}_norm.weight": f"part.norm_{x}.weight" for x in "qk"}
"""Names of a folded GPT that differ from ours."""


def fold_residual(sublayer: Any) -> dict[str, Tensor]:
    """The weights of a GPT's sublayer: the gains of its norm go into columns of the matrices
    that read the hidden state.
    """
    state = {name: tensor.clone() for name, tensor in sublayer.state_dict().items()}
    gain = state.pop("norm.weight")
    for name, tensor in state.items():
        if tensor.ndim == 2 and name != "part.o.weight":
            tensor *= gain
    return {RENAMED.get(name, name): tensor for name, tensor in state.items()}
