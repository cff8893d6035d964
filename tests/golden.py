"""Reader of the golden files: two small models trained by NVIDIA's own code, and what an independent oracle says.

``ckpt.pt`` is a pickle. It is opened with ``weights_only=True``, the few classes that it names replaced by stand-ins
that hold nothing, so that no code in it can run.

NVIDIA's layout against ours: ``c_fc`` stacks the rows of ``W_u`` over those of ``W_v``, and ``suv`` the scales alike;
``sqk`` is flat over heads and channels. Scales are stored as in the paper (used as ``stored * init / base_scale``).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import paper
import torch
from safetensors.torch import load_file
from torch import Tensor

ARMS = ("gpt", "ngpt")
FOREIGN = ("model.GPTConfig", "numpy.dtype", "numpy._core.multiarray._reconstruct", "numpy.ndarray")

TOP = {
    "transformer.wte.weight": "embed.weight",
    "lm_head.weight": "head.weight",
    "rmsnorm_f.weight": "norm.weight",
    "sz": "s_z.value",
}
BLOCK = {
    "query.weight": "attention.q.weight",
    "key.weight": "attention.k.weight",
    "value.weight": "attention.v.weight",
    "att_c_proj.weight": "attention.o.weight",
    "mlp_c_proj.weight": "mlp.o.weight",
    "rmsnorm_att.weight": "norm_a.weight",
    "rmsnorm_mlp.weight": "norm_m.weight",
    "attn_alpha": "alpha_a.value",
    "mlp_alpha": "alpha_m.value",
    "sqk": "attention.s_qk.value",
}
STACKED = {
    "c_fc.weight": ("mlp.u.weight", "mlp.v.weight"),
    "suv": ("mlp.s_u.value", "mlp.s_v.value"),
}


class Inert:
    """Takes the place of a class named in a pickle: swallows its arguments and its state."""

    def __init__(self, *arguments: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


@dataclass(frozen=True)
class Golden:
    """One arm's files. ``weights``, ``gradients``: float64, by our names; ``losses [20]``; ``logits [B, T, V]``."""

    arm: str
    shape: paper.Shape
    vocab_size: int
    weights: paper.Params
    tokens: Tensor
    targets: Tensor
    loss: float
    logits: Tensor
    gradients: paper.Params
    losses: list[float]

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of the stored losses: in batch i every sequence is rolled by i positions.

        (Rolling along the batch axis instead would leave every mean loss as it is: it is not what the files hold.)
        """
        for i in range(len(self.losses)):
            yield self.tokens.roll(i, 1), self.targets.roll(i, 1)


def load_weights(path: Path) -> dict[str, Tensor]:
    """The ``model`` of a NVIDIA/ngpt checkpoint, under its own names, without running anything in the file."""
    with torch.serialization.safe_globals([(Inert, name) for name in FOREIGN]):
        return dict(torch.load(path, weights_only=True, map_location="cpu")["model"])


def from_nvidia(tensors: dict[str, Tensor], n_heads: int) -> paper.Params:
    """NVIDIA's names and layout to ours; values untouched."""
    ours: paper.Params = {}
    for name, tensor in tensors.items():
        prefix, rest = _split(name)
        if rest in STACKED:
            for part, half in zip(STACKED[rest], tensor.chunk(2), strict=True):
                ours[prefix + part] = half
        elif rest == "sqk":
            ours[prefix + BLOCK[rest]] = tensor.view(n_heads, -1)
        else:
            ours[prefix + BLOCK[rest] if prefix else TOP[name]] = tensor
    return ours


def to_nvidia(ours: paper.Params) -> dict[str, Tensor]:
    """The inverse of ``from_nvidia``."""
    top = {v: k for k, v in TOP.items()}
    block = {v: k for k, v in BLOCK.items()}
    theirs: dict[str, Tensor] = {}
    for name, tensor in ours.items():
        if name in top:
            theirs[top[name]] = tensor
            continue
        _, index, rest = name.split(".", 2)
        prefix = f"transformer.h.{index}."
        for stacked, (first, second) in STACKED.items():
            if rest == first:
                theirs[prefix + stacked] = torch.cat([tensor, ours[f"blocks.{index}.{second}"]])
        if rest in block:
            theirs[prefix + block[rest]] = tensor.reshape(-1) if rest.endswith("s_qk.value") else tensor
    return theirs


def _split(name: str) -> tuple[str, str]:
    """``transformer.h.3.sqk`` to ``("blocks.3.", "sqk")``; names outside a block keep an empty prefix."""
    if not name.startswith("transformer.h."):
        return "", name
    _, _, index, rest = name.split(".", 3)
    return f"blocks.{index}.", rest


def load(shared: Path, arm: str) -> Golden:
    """Everything about one arm, from ``shared/golden/nvidia-{arm}``."""
    directory = shared / "golden" / f"nvidia-{arm}"
    arguments = json.loads((directory / "model_args.json").read_text())
    oracle = load_file(directory / "oracle.safetensors")
    batch = load_file(directory / "expected.safetensors")
    n_heads = arguments["n_head"]
    shape = paper.Shape(arguments["n_layer"], arguments["n_embd"], n_heads, n_heads)
    gradients = {name.removeprefix("grad."): g for name, g in oracle.items() if name.startswith("grad.")}
    return Golden(
        arm=arm,
        shape=shape,
        vocab_size=arguments["vocab_size"],
        weights=_double(from_nvidia(load_weights(directory / "ckpt.pt"), n_heads)),
        tokens=batch["tokens"],
        targets=batch["targets"],
        loss=float(oracle["loss"]),
        logits=oracle["logits"],
        gradients=from_nvidia(gradients, n_heads),
        losses=oracle["losses"].tolist(),
    )


def _double(p: paper.Params) -> paper.Params:
    return {name: w.double() for name, w in p.items()}
