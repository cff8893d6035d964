"""The text of a run: which data it names, opened as batches and fixed validation windows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor

from spherelm.counting import rounded
from spherelm.data.masking import MaskedBatches, hidden
from spherelm.data.sources import Pairs, Reading, RunData, parse_data
from spherelm.errors import UserError
from spherelm.evaluate.perplexity import summed_loss
from spherelm.layers.loss import IGNORED
from spherelm.models import Decoder, EncDecArch, EncoderArch
from spherelm.runs.config import RunConfig
from spherelm.runs.group import Group


def validation_losses(
    model: Decoder,
    data: RunData,
    batch_size: int,
    group: Group | None = None,
    before_each: Callable[[], object] = lambda: None,
) -> dict[str, float]:
    """The mean loss on each source's validation windows, in nats per token, `batch_size` windows at a time.

    The processes of `group` share the windows, and must all call. before_each: called before each batch, by all
    processes equally often; what it raises breaks off.
    """
    group = group or Group()
    losses: dict[str, float] = {}
    for part in data.held_out:
        *read, targets = part.batch
        own = (*(share(windows, 0, group) for windows in read), share(targets, IGNORED, group))
        sums = group.gather([float(x) for x in summed_loss(model, own, batch_size, data.end_token, before_each)])
        losses[part.name] = sum(total for total, _ in sums) / sum(count for _, count in sums)
    return losses


def share(windows: Tensor, filling: int, group: Group) -> Tensor:
    """This process's part of int64 `windows` [n, seq], as many for each process,
    with windows of `filling` where n runs out.
    """
    each = -(-len(windows) // group.world_size)
    padded = F.pad(windows, (0, 0, 0, each * group.world_size - len(windows)), value=filling)
    return padded[group.rank :: group.world_size]


def total_loss(data: RunData, losses: dict[str, float]) -> float:
    """One number for the losses of all sources: their mean by weight."""
    return sum(part.weight * losses[part.name] for part in data.held_out)


def epochs(config: RunConfig, steps: int) -> dict[str, float]:
    """How often `steps` updates of the run read each of its training texts, by name;
    empty where a text's end is not known.
    """
    data = parse_data(config.data)
    if isinstance(config.model.architecture, EncDecArch) != isinstance(data, Pairs):
        return {}
    return data.epochs(steps * config.train.batch_size, config.train.seq_len)


REPEATS = 4.0
"""So often the same text can be read at little loss (Muennighoff et al. 2023, arXiv 2305.16264)."""


def repetition(epochs: Mapping[str, float]) -> list[str]:
    """A warning where a text is read more than once, by how often each is read; else nothing."""
    name = max(epochs, key=epochs.__getitem__, default="")
    if not epochs or epochs[name] <= 1:
        return []
    advice = f"up to {REPEATS:g} times is nearly as good as new text"
    if epochs[name] > REPEATS:
        advice = (
            f"more than {REPEATS:g} teach a model little: prepare more text and name it with --data, or lower --steps"
        )
    return [f"warning: {name} is read {rounded(epochs[name])} times; {advice}"]


def check_text(config: RunConfig) -> None:
    """Raise `ValueError` for a kind of text that the architecture does not learn from; nothing is opened."""
    architecture, masked = config.model.architecture, config.train.mask_documents
    has_pairs = isinstance(parse_data(config.data), Pairs)
    if isinstance(architecture, EncDecArch) and not has_pairs:
        raise UserError(
            f"an encoder-decoder learns from pairs and {config.data or 'the shipped text'} holds none: make them with "
            "spherelm data pairs and pass them as --data"
        )
    if has_pairs and not isinstance(architecture, EncDecArch):
        raise UserError(
            f"{config.data} holds pairs of texts, which are for encoder-decoders: train with --preset pairs"
        )
    if masked and isinstance(architecture, EncDecArch):
        raise UserError("--mask-documents is for running text: pairs are always separate")
    if masked and isinstance(architecture, EncoderArch):
        raise UserError(
            "--mask-documents is for models that predict the next token: an encoder reads a window as one text"
        )


def open_data(config: RunConfig, rank: int = 0, world_size: int = 1) -> RunData:
    """Open the text that `config` names for one process of `world_size`.

    Raises `ValueError` or `FileNotFoundError` if it cannot be read or does not fit the model or the lengths asked for.
    """
    check_text(config)
    source, architecture, train = parse_data(config.data), config.model.architecture, config.train
    how = Reading(
        train.seq_len, train.batch_size, train.seed, train.eval_windows, train.mask_documents, rank, world_size
    )
    data = source.open(how)
    if isinstance(architecture, EncoderArch):
        data = _masked(data, config, rank)
    size = data.tokenizer.vocab_size
    if size > config.model.vocab_size:
        raise UserError(f"{config.data or 'the text'} has {size} token ids, the model only {config.model.vocab_size}")
    return data


def _masked(data: RunData, config: RunConfig, rank: int) -> RunData:
    """The same text with tokens hidden in it, in the validation windows always the same ones."""
    assert isinstance(config.model.architecture, EncoderArch)
    size, part, seed = config.model.vocab_size, config.model.architecture.hidden_part, config.train.seed
    held_out = tuple(replace(one, batch=hidden(one.batch[0], size, part, 0)) for one in data.held_out)
    return replace(data, loader=MaskedBatches(data.loader, size, part, seed, rank), held_out=held_out)
