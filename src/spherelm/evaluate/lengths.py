"""Perplexity over the length of the window, also beyond the length trained on (nGPT paper, Fig. 13),
on the same tokens.

A window lies within one document. Every length is scored on exactly the same tokens, so that the numbers compare:

- disjoint windows: a document is cut into spans of the longest length; each shorter length cuts every
span into windows of
  its own, all of whose targets count. So a target has between 0 and length - 1 tokens before its input.
- sliding windows: a target counts when it is among the last `stride` of its window, and windows
advance by `stride`. The
  first windows of all lengths end at the same place, where the longest fits in.

The rest of a document's end (less than a span, or than a stride), and documents shorter than one longest window, are
left out at every length.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, PositiveInt
from torch import Tensor

from spherelm.counting import counted
from spherelm.data.cutting import Cutter
from spherelm.data.documents import input_files, read_blocks
from spherelm.data.rows import RowSettings
from spherelm.data.tokenizer import Tokenizer
from spherelm.errors import UserError
from spherelm.evaluate.perplexity import token_losses
from spherelm.fields import check
from spherelm.models import Decoder

TOKENS_AT_ONCE = 8192
"""How many tokens a forward pass reads, if a single window has not more."""

CHARACTERS_A_TOKEN = 8
"""More than a token has on average: so much text is encoded for a token that is needed."""

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Document:
    """Token ids int64 [n], and how many UTF-8 bytes of text they are."""

    tokens: Tensor
    bytes: int


@dataclass(frozen=True)
class LengthPlan:
    """Which windows are read.

    Attributes:
        lengths: Tokens of a window, ascending; each divides the longest.
        stride: Move windows by this many tokens, at most the shortest length, and score only the new ones;
            windows do not overlap if left out.
        document_tokens: Score at most this many tokens of each document, rounded down to whole windows or strides; all
            if left out.
        bins: Parts of a window; --json has the loss of each.
    """

    lengths: Annotated[tuple[PositiveInt, ...], Field(min_length=1)]
    stride: PositiveInt | None = None
    document_tokens: PositiveInt | None = None
    bins: PositiveInt = 16

    def __post_init__(self) -> None:
        check(self)
        if list(self.lengths) != sorted(set(self.lengths)):
            raise UserError(f"lengths must be ascending, got {self.lengths}")
        for length in self.lengths:
            if self.stride is None and self.longest % length:
                raise UserError(
                    f"lengths {length} does not divide {self.longest}: each length must divide the longest, so that all are "
                    "scored on the same tokens; or give a stride"
                )
        if self.stride is not None and self.stride > self.lengths[0]:
            raise UserError(f"stride must be at most the shortest length {self.lengths[0]}, got {self.stride}")
        if self.document_tokens is not None and self.document_tokens < self.step:
            raise UserError(
                f"document_tokens={self.document_tokens} is less than one window: give at least {self.step}"
            )

    @property
    def longest(self) -> int:
        """The longest length."""
        return self.lengths[-1]

    @property
    def needed(self) -> int | None:
        """How many tokens of a document are enough; `None` for all."""
        return None if self.document_tokens is None else self.document_tokens + self.longest + 1

    @property
    def step(self) -> int:
        """How many targets a window of the longest length scores."""
        return self.stride or self.longest

    def steps(self, count: int) -> int:
        """How many windows of the longest length a document of `count` tokens has."""
        room = (count - 1 - (self.longest - self.step)) // self.step
        most = room if self.document_tokens is None else self.document_tokens // self.step
        return max(0, min(room, most))

    def starts(self, length: int, steps: int) -> range:
        """Where the windows of `length` begin that score the same targets as the first `steps` of
        the longest length.
        """
        if self.stride is None:
            return range(0, steps * self.longest, length)
        first = self.longest - length
        return range(first, first + steps * self.stride, self.stride)

    def scored(self, length: int) -> int:
        """How many targets at the end of a window of `length` count."""
        return self.stride or length


@dataclass(frozen=True)
class Scores:
    """Sums of losses (nats) and counts of tokens in each cluster, by bins of positions: [clusters, bins] both.

    A cluster is a document, or, if there is only one, a window of the longest length.
    """

    losses: Array
    counts: Array


def read_documents(
    paths: Sequence[Path],
    tokenizer: Tokenizer,
    needed: int | None = None,
    rows: RowSettings = RowSettings(skip_bad=None),
) -> Iterator[Document]:
    """The documents of text files (.txt, .jsonl, .parquet, also compressed), in order, one at a time.

    needed: tokens of a document that are enough; of one with more, only about so much of its beginning is encoded.
    rows: how rows are read. Raises as `data.documents` does for what cannot be read.
    """
    files, cutter = [file for path in paths for file in input_files(path)], Cutter(tokenizer)
    for path in files:
        for block in read_blocks(path, rows=rows):
            yield from (encode_document(text, cutter, needed) for text in block.texts)


def encode_document(text: str, cutter: Cutter, needed: int | None) -> Document:
    """The tokens of `text`, or of a beginning of it that ends at a safe place and has at least `needed` tokens."""
    cut = None if needed is None else cutter.place(text, CHARACTERS_A_TOKEN * needed)
    for part in (text[: cut.place] if cut is not None and cut.safe else text, text):
        ids = [i for piece in cutter.pieces(part) for i in cutter.encode([piece])[0]]
        if needed is not None and len(ids) >= needed:
            break
    return Document(torch.tensor(ids, dtype=torch.int64), len(part.encode("utf-8")))


@torch.no_grad()
def window_losses(model: Decoder, tokens: Tensor, length: int, plan: LengthPlan) -> Tensor:
    """Losses in nats of the targets that count of a document's windows of `length`: [windows, scored], on the CPU."""
    starts, device = plan.starts(length, plan.steps(len(tokens))), model.embed.weight.device
    at_once, found = max(1, TOKENS_AT_ONCE // length), []
    for i in range(0, len(starts), at_once):
        rows = torch.stack([tokens[start : start + length + 1] for start in starts[i : i + at_once]]).to(device)
        losses = token_losses(model, rows[:, :-1], rows[:, 1:])
        found.append(losses[:, -plan.scored(length) :].double().cpu())
    return torch.cat(found)


def bin_edges(length: int, plan: LengthPlan) -> list[int]:
    """Where the bins of positions begin among the positions that count, and the length."""
    first = length - plan.scored(length)
    bins = min(plan.bins, plan.scored(length))
    return [first + plan.scored(length) * i // bins for i in range(bins)] + [length]


def in_bins(losses: Tensor, length: int, plan: LengthPlan) -> Scores:
    """Losses [windows, scored] of one document, summed by windows of the longest length and by bins: [steps, bins]."""
    edges = bin_edges(length, plan)
    widths = np.diff(edges)
    pieces = losses.split(widths.tolist(), dim=1)
    sums = torch.stack([piece.sum(1) for piece in pieces], dim=1)
    per_step = plan.step // plan.scored(length)
    folded: Array = sums.view(-1, per_step, len(pieces)).sum(1).numpy()
    return Scores(folded, np.broadcast_to(widths * float(per_step), folded.shape).copy())


def gather(parts: Sequence[Scores]) -> Scores:
    """Scores of all documents with a document a cluster; of only one, with its windows of the longest length."""
    if len(parts) == 1:
        return parts[0]
    return Scores(np.stack([p.losses.sum(0) for p in parts]), np.stack([p.counts.sum(0) for p in parts]))


def ratio(sums: Array, counts: Array) -> tuple[float, float | None]:
    """Mean `sum(sums) / sum(counts)` over clusters, and its standard error; none from one cluster.

    The error is the ratio estimator's: clusters are drawn, tokens within them may depend on each other as they like.
    """
    mean, clusters = float(sums.sum() / counts.sum()), len(sums)
    if clusters < 2:
        return mean, None
    spread = float(((sums - mean * counts) ** 2).sum()) * clusters / (clusters - 1)
    return mean, math.sqrt(spread) / float(counts.sum())


def perplexity_by_length(model: Decoder, documents: Iterable[Document], plan: LengthPlan) -> dict[str, Any]:
    """Loss, perplexity and bits per byte of `model` at each length, over the same tokens, and the loss by position.

    Result, plain JSON values: `documents`, `documents_left_out` (too short), `tokens`, `bytes` (of the scored tokens:
    each document's share by its mean), and `lengths`, one record a length, with standard errors over `clusters`. Its
    `change` is the loss less that at the shortest length, whose error is that of paired differences. Raises
    `ValueError` if no document is long enough.
    """
    was_training = model.training
    model.eval()
    scores: dict[int, list[Scores]] = {length: [] for length in plan.lengths}
    left_out, scored_bytes = 0, list[float]()
    for document in documents:
        count = len(document.tokens)
        steps = plan.steps(count)
        if not steps:
            left_out += 1
            continue
        scored_bytes.append(document.bytes * steps * plan.step / count)
        for length in plan.lengths:
            scores[length].append(in_bins(window_losses(model, document.tokens, length, plan), length, plan))
    model.train(was_training)
    if not scored_bytes:
        raise UserError(
            f"no document has the {plan.longest + 1} tokens that a window of {plan.longest} needs "
            f"({counted(left_out, 'document')} too short): "
            "give longer texts or shorter lengths"
        )
    gathered = {length: gather(parts) for length, parts in scores.items()}
    tokens, size = float(gathered[plan.longest].counts.sum()), sum(scored_bytes)
    return {
        "documents": len(scored_bytes),
        "documents_left_out": left_out,
        "tokens": int(tokens),
        "bytes": round(size),
        "stride": plan.stride,
        "clusters": "documents" if len(scored_bytes) > 1 else f"windows of {plan.longest}",
        "lengths": [
            summary(length, gathered[length], gathered[plan.lengths[0]], tokens / size, plan) for length in plan.lengths
        ],
    }


def summary(length: int, scores: Scores, shortest: Scores, tokens_per_byte: float, plan: LengthPlan) -> dict[str, Any]:
    """The record of one length, as `perplexity_by_length` says."""
    counts = scores.counts.sum(1)
    loss, error = ratio(scores.losses.sum(1), counts)
    change, change_error = ratio(scores.losses.sum(1) - shortest.losses.sum(1), counts)
    to_bits, edges = tokens_per_byte / math.log(2), bin_edges(length, plan)
    by_position = [ratio(scores.losses[:, i], scores.counts[:, i]) for i in range(len(edges) - 1)]
    return {
        "length": length,
        "loss": loss,
        "loss_se": error,
        "change": change,
        "change_se": change_error,
        "perplexity": math.exp(loss),
        "perplexity_se": None if error is None else math.exp(loss) * error,
        "bits_per_byte": loss * to_bits,
        "bits_per_byte_se": None if error is None else error * to_bits,
        "by_position": [
            {"from": edges[i], "to": edges[i + 1] - 1, "loss": mean, "se": se}
            for i, (mean, se) in enumerate(by_position)
        ],
    }
