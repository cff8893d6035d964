"""Reader of the golden files: two small models trained by NVIDIA's own code, and what an independent oracle says.

``ckpt.pt`` is read by the package's importer, whose own tests compare it with what NVIDIA's code computed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import paper
from oracle_names import by_oracle_names, oracle_names
from safetensors.torch import load_file
from torch import Tensor

from spherelm.interop.nvidia import read_checkpoint, to_ours
from spherelm.models import CONFIGS, Decoder, build

ARMS = ("gpt", "ngpt")


@dataclass(frozen=True)
class Golden:
    """One arm's files. ``weights``, ``gradients``: float64, by the oracle's names; ``losses [20]``;
    ``logits [B, T, V]``.
    """

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

    @property
    def model(self) -> Decoder:
        """Ours, with the weights as they are stored, in float64."""
        shape, length = self.shape, self.tokens.shape[1]
        sizes = {"n_layers": shape.n_layers, "d_model": shape.d_model, "n_heads": shape.n_heads, "max_seq_len": length}
        model = build(CONFIGS[self.arm](vocab_size=self.vocab_size, **sizes)).double()
        model.load_state_dict({name: self.weights[theirs] for name, theirs in oracle_names(model.state_dict()).items()})
        return model

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of the stored losses: in batch i every sequence is rolled by i positions.

        (Rolling along the batch axis instead would leave every mean loss as it is: it is not what the files hold.)
        """
        for i in range(len(self.losses)):
            yield self.tokens.roll(i, 1), self.targets.roll(i, 1)


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
        weights={
            name: w.double() for name, w in by_oracle_names(read_checkpoint(directory / "ckpt.pt").weights).items()
        },
        tokens=batch["tokens"],
        targets=batch["targets"],
        loss=float(oracle["loss"]),
        logits=oracle["logits"],
        gradients=by_oracle_names(to_ours(gradients, n_heads)),
        losses=oracle["losses"].tolist(),
    )
