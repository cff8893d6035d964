"""One update without a wait for the device: gradients of a batch, and what is known of it once its numbers arrive."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from spherelm.data.loader import Batches
from spherelm.layers.attention import separate_documents
from spherelm.layers.loss import IGNORED
from spherelm.train.diagnostics import Diagnosis
from spherelm.train.parallel import DistributedModel


class Arriving:
    """Copies of `tensors` on their way to the host: asked for at once, and waited for when they are read.

    The wait is for what the device had to do before, and for nothing that it was given since.
    """

    def __init__(self, *tensors: Tensor) -> None:
        self._copies = [tensor.detach().to("cpu", non_blocking=True, copy=True) for tensor in tensors]
        device = next((tensor.device for tensor in tensors if tensor.device.type != "cpu"), None)
        self._sent = None if device is None else torch.Event(device)
        if self._sent is not None:
            self._sent.record()

    def read(self) -> list[Tensor]:
        """The tensors, on the CPU."""
        if self._sent is not None:
            self._sent.synchronize()
        return self._copies


@dataclass
class Update:
    """The update after `step` others, at the rate `lr`;
    its `numbers`, the losses of micro-batches and the gradient's norm.

    loss, grad_norm: of all processes, once they are read; no norm if it was left out. loads: of routers.
    diagnosis: to measure.
    """

    step: int
    lr: float
    numbers: Arriving
    loads: Arriving = field(default_factory=Arriving)
    diagnosis: Diagnosis | None = None
    loss: float | None = None
    grad_norm: float | None = None


def sent(batch: Tensor, device: torch.device) -> Tensor:
    """`batch`, of the host, on `device`: to a GPU from pinned memory, which neither waits for the other."""
    if device.type != "cuda":
        return batch.to(device)
    return batch.pin_memory().to(device, non_blocking=True)


def gradients_of_batch(
    model: DistributedModel,
    loader: Batches,
    step: int,
    micro_batch_size: int | None = None,
    end_token: int | None = None,
) -> Tensor:
    """Add the gradients of batch number `step` to the parameters, in micro-batches,
    and return what each adds to the loss.

    Their sum is the batch's mean loss in nats. Of several processes each reads its own part of the batch; the gradients
    are the mean over all, the loss is its own, times the weight that makes the mean over processes one over targets.
    The result, [micro-batches], is on the model's device, and nothing here waits for it.
    end_token: where given, attention does not cross from one document into another, each ended by this token.
    """
    batch = loader.batch(step)
    size = micro_batch_size or len(batch[-1])
    # Pairs of texts have different numbers of targets, and the mean is over targets.
    counts = [int((wanted != IGNORED).sum()) for wanted in batch[-1].split(size)]
    parts = list(zip(*(sent(x, model.device).split(size) for x in batch), strict=True))
    weight, losses = loader.weight(step) / sum(counts), []

    def loss_of(part: tuple[Tensor, ...]) -> Tensor:
        return model.loss(*part, *separate_documents(part[0], end_token))

    with model.whole(len(parts), lambda: [loss_of(part) for part in parts]):
        for number, part in enumerate(parts, 1):
            with model.last(number == len(parts)):
                loss = loss_of(part) * (counts[number - 1] * weight)
                loss.backward()
            losses.append(loss.detach())
    return torch.stack(losses)
