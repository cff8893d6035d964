"""A decoder as an ONNX file for onnxruntime: learned scales folded into its matrices,
keys and values passed in and out.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from spherelm.errors import UserError
from spherelm.generation.folding import folded, obstacle
from spherelm.layers.cache import KVCache, LayerCache, Pair
from spherelm.layers.readout import read_logits
from spherelm.models.decoder import Decoder


class GivenCache(LayerCache):
    """The keys and values of a layer as they were given, each [batch, n_kv_heads, past, d_k],
    and then those with the new.
    """

    def __init__(self, pair: Pair) -> None:
        super().__init__()
        self.pair = pair

    def update(self, keys: Tensor, values: Tensor) -> Pair:
        """As `LayerCache.update`."""
        self.pair = torch.cat((self.pair[0], keys), dim=2), torch.cat((self.pair[1], values), dim=2)
        return self.pair


class WithCache(nn.Module):
    """`model`, folded, as a function of tensors alone."""

    def __init__(self, model: Decoder) -> None:
        super().__init__()
        self.model = folded(model)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: list[Pair]
    ) -> tuple[Tensor, list[Pair]]:
        """Logits [batch, seq, vocab], and keys and values of all positions, those of `past` first.

        input_ids, position_ids: int64 [batch, seq]. attention_mask: int64 [batch, past + seq], 0 where a text has not
        begun; such a position looks at itself, so that nothing is a mean over no values.
        """
        caches = [GivenCache(pair) for pair in past]
        seq, every = input_ids.shape[1], attention_mask.shape[1]
        query, key = torch.arange(seq).unsqueeze(1) + (every - seq), torch.arange(every)
        mask = (key == query) | ((key < query) & (attention_mask != 0)[:, None, None, :])
        h = self.model.trunk(self.model.embedded(input_ids), KVCache(caches), mask, position_ids)
        return read_logits(self.model.readout(h)), [cache.pair for cache in caches]


def write_onnx(model: Decoder, path: Path) -> None:
    """Write `model` to the new file `path`, in float32, with weights of a gigabyte or more beside it.

    Inputs and outputs are named as in optimum's decoders: input_ids, attention_mask, position_ids,
    past_key_values.0.key, ...; logits, present.0.key, ... Batch, sequence and past may be of any length.
    Raises `UserError` for a model that cannot be folded, and where the exporter is not installed.
    """
    try:
        import onnxscript  # noqa: F401, which the exporter is written with
    except ImportError as error:
        raise UserError("--onnx needs onnxscript: pip install '.[onnx]' in a clone of spherelm") from error
    if problem := obstacle(model):
        raise UserError(f"--onnx is for models that can be folded: {problem}; export it without --onnx")
    function, config = WithCache(model).eval(), model.config
    batch, seq, past = 2, 3, 4
    shape = (batch, config.n_kv_heads or config.n_heads, past, config.d_k)
    pairs = [(torch.zeros(shape), torch.zeros(shape)) for _ in range(config.n_layers)]
    # Each a tensor of its own: one that is given twice is taken for one input.
    ids, places, mask = (torch.ones(batch, n, dtype=torch.int64) for n in (seq, seq, past + seq))
    any_length = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    any_past = {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC}
    kinds = [f"{i}.{kind}" for i in range(config.n_layers) for kind in ("key", "value")]
    path.parent.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        torch.onnx.export(
            function,
            (ids, mask, places, pairs),
            path,
            dynamo=True,
            verbose=False,
            external_data=sum(p.numel() for p in function.parameters()) > 2**28,
            input_names=["input_ids", "attention_mask", "position_ids", *(f"past_key_values.{kind}" for kind in kinds)],
            output_names=["logits", *(f"present.{kind}" for kind in kinds)],
            dynamic_shapes=(*[any_length] * 3, [(any_past, any_past)] * config.n_layers),
        )
