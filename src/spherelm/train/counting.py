"""Operations and memory of a training step, counted op by op on tensors that have shapes and no data.

Torch runs the model's own code, forward and backward, on fake tensors: what comes out is counted and not a rule of
thumb. Of blocks that are alike, one is counted; the read-out works in chunks that are alike, so a few are counted. That
takes a second for a model of any size.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from spherelm.layers.linear import ExpertLinear
from spherelm.layers.loss import chunk_rows, linear_cross_entropy
from spherelm.layers.moe import idle_weights
from spherelm.models import Config, Decoder, build, model_class
from spherelm.models.decoder import table_of

aten: Any = torch.ops.aten


@dataclass(frozen=True)
class Cost:
    """The cost of a part of the model per micro-batch.

    flops: forward and backward, a multiplication and an addition each counted, of matrix products and attention;
    attention is counted over all pairs of positions, and its scores once forward and not again backward, as
    in "6N + 12 L d T".
    saved: bytes that stay from the forward pass until the backward pass, the result among them. forward_peak,
    backward_peak: the most bytes beyond the weights, their gradients and the input that are held during each pass.
    """

    flops: float
    saved: float
    forward_peak: float
    backward_peak: float


class LiveBytes(TorchDispatchMode):
    """How many bytes the tensors hold that were made under this mode and are still alive, and the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = {_key(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and _key(tensor) not in inputs | self._seen:
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._seen.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _attention_forward(query: Any, key: Any, value: Any, *rest: Any, **more: Any) -> int:
    """Two products, scores and their mean of the values: [batch, heads, length, d_k] each."""
    batch, heads, length, d_k = query
    return 4 * batch * heads * length * key[2] * d_k


def _attention_backward(grad: Any, query: Any, key: Any, value: Any, *rest: Any, **more: Any) -> int:
    """Twice the forward pass; that the kernel computes scores again is its business, not the model's."""
    return 2 * _attention_forward(query, key, value)


def _grouped_forward(rows: Any, weight: Any, *rest: Any, **more: Any) -> int:
    """Each of the rows [rows, in] meets one matrix of [groups, out, in]."""
    return 2 * rows[0] * weight[1] * weight[2]


def _grouped_backward(grad: Any, rows: Any, weight: Any, *rest: Any, **more: Any) -> int:
    """Twice the forward pass."""
    return 2 * _grouped_forward(rows, weight)


UNCOUNTED = {
    aten._scaled_dot_product_flash_attention_for_cpu: _attention_forward,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    torch.ops.spherelm.grouped_product: _grouped_forward,
    torch.ops.spherelm.grouped_product_backward: _grouped_backward,
}
"""Operations that torch does not count: attention except on CUDA (the CPU has the same algorithm and
tensors), and ours.
"""


@contextmanager
def counted_flops() -> Iterator[FlopCounterMode]:
    """Count the operations of what runs inside, as `Cost.flops` says."""
    with FlopCounterMode(display=False, custom_mapping=UNCOUNTED) as counter:
        yield counter


def _cost(forward: Callable[[], Tensor], parameters: Iterator[nn.Parameter]) -> Cost:
    """The cost of one pass of `forward` and back, with gradients to add to, as in all micro-batches but the first."""
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    # Counting operations takes some of them apart; entered last, the count of bytes sees them whole, as they are
    # executed.
    with counted_flops() as counter, LiveBytes() as memory:
        out = forward()
        saved, forward_peak = memory.live, memory.peak
        memory.peak = memory.live
        out.backward(torch.empty_like(out))
        return Cost(counter.get_total_flops(), saved, forward_peak, memory.peak)


def _fake_model(config: Config, dtype: torch.dtype) -> Decoder:
    """A model of one block, without data; call it under `FakeTensorMode`."""
    model = build(next(iter(single_layers(config))))
    model.runtime.compute_dtype = dtype
    return model


def single_layers(config: Config) -> dict[Config, int]:
    """`Decoder.single_layers` of the config's model."""
    return model_class(config).single_layers(config)


def block_costs(config: Config, batch_size: int, seq_len: int, dtype: torch.dtype) -> list[tuple[int, Cost]]:
    """How many blocks there are of each kind, and what one costs:
    `batch_size` sequences of `seq_len` tokens at once.
    """
    return [(count, _block_cost(one, batch_size, seq_len, dtype)) for one, count in single_layers(config).items()]


@lru_cache
def _block_cost(config: Config, batch_size: int, seq_len: int, dtype: torch.dtype) -> Cost:
    """The cost of the block of a config of one layer."""
    with FakeTensorMode():
        model = _fake_model(config, dtype)
        h = torch.empty(batch_size, seq_len, config.d_model, dtype=dtype, requires_grad=True)
        h.grad = torch.zeros_like(h)
        table = table_of(model.runtime, config.d_k, torch.arange(seq_len), h)
        layers = (parameter for name, parameter in model.named_parameters() if "blocks." in name)
        return _cost(lambda: model.layer(h, table), layers)


@lru_cache
def readout_cost(config: Config, tokens: int, dtype: torch.dtype) -> Cost:
    """The cost of the read-out and the loss for a micro-batch of `tokens` tokens.

    Beyond four chunks everything grows in a straight line with the number of tokens, of which two points are counted.
    """
    chunk = chunk_rows(10**9, config.vocab_size)
    if tokens <= 4 * chunk:
        return _readout_cost(config, tokens, dtype)
    near, far = (_readout_cost(config, n * chunk, dtype) for n in (2, 4))
    part = (tokens - 2 * chunk) / (2 * chunk)
    names = ("flops", "saved", "forward_peak", "backward_peak")
    return Cost(*(getattr(near, n) + part * (getattr(far, n) - getattr(near, n)) for n in names))


def _readout_cost(config: Config, tokens: int, dtype: torch.dtype) -> Cost:
    with FakeTensorMode():
        model = _fake_model(config, dtype)
        h = torch.empty(1, tokens, config.d_model, dtype=dtype, requires_grad=True)
        h.grad, targets = torch.zeros_like(h), torch.zeros(tokens, dtype=torch.int64)

        def loss() -> Tensor:
            features, weight, pullback = model.readout(h)
            return linear_cross_entropy(features.flatten(0, 1), weight, targets, pullback)

        owners = (part for name, part in model.named_parameters() if not name.startswith(("blocks.", "embed.")))
        return _cost(loss, owners)


def training_flops(config: Config, batch_size: int, seq_len: int) -> float:
    """Floating point operations of the forward and backward pass of `batch_size` sequences, as in `Cost.flops`."""
    blocks = sum(count * block.flops for count, block in block_costs(config, 1, seq_len, torch.float32))
    return batch_size * (blocks + readout_cost(config, seq_len, torch.float32).flops)


def flops_per_token(model: Decoder, seq_len: int) -> int:
    """The same by rule, at once: 6 for each weight of a matrix product, and 12 L d T for attention (PaLM, appendix B).

    Of experts, those count that a token meets; of a hybrid's layers, L are those with attention.
    """
    matrices = [module for module in model.modules() if isinstance(module, nn.Linear | ExpertLinear)]
    weights = sum(module.weight.numel() for module in matrices) - idle_weights(model, ExpertLinear)
    attentions = sum("A" in block.letters for block in model.blocks)  # type: ignore[operator]
    return 6 * weights + 12 * attentions * model.config.d_model * seq_len
