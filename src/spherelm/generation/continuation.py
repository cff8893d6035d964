"""Rows of tokens that a model continues, one token per step, with cached keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import torch
from torch import Tensor

from spherelm.errors import UserError
from spherelm.generation.sampling import Sampling, draw, penalized
from spherelm.layers.readout import read_logits
from spherelm.models.decoder import LanguageModel


class Continuation:
    """Rows of any lengths, each continued as it would be alone.

    rows: token ids, at least one a row; `self.rows` are lists that grow. seeds: one a row, for draws of its own.
    window: what happens to a row that has become longer than the model's max_seq_len: with it, the row's last half
    (max_seq_len // 2 tokens) is read anew, from position 0, and the row goes on from there until it is full again;
    without it, `step` raises `ValueError`.

    Rows of different lengths are padded on the left; padding is seen by no token of the row, and positions count from
    the row's first token, so that each is computed as if the others were not there.
    """

    def __init__(
        self,
        model: LanguageModel,
        rows: Sequence[Sequence[int]],
        sampling: Sampling,
        seeds: Sequence[int],
        window: bool = False,
    ) -> None:
        self.model, self.sampling, self.window = model, sampling, window
        self.rows = [list(row) for row in rows]
        self.limit = model.config.max_seq_len
        self.device = model.embed.weight.device
        self._draws = [Random(seed) for seed in seeds]
        self._starts = [0] * len(self.rows)
        self._begin()

    @torch.no_grad()
    def step(self) -> Tensor:
        """Draw the next token of every row and append it: int64 [batch]."""
        logits = self._read()
        if self.sampling.repetition_penalty != 1:
            logits = penalized(logits, self._seen(logits.shape[-1]), self.sampling.repetition_penalty)
        new = draw(logits, self.sampling, [generator.random() for generator in self._draws])
        for row, token in zip(self.rows, new.tolist(), strict=True):
            row.append(token)
        return new

    def extend(self, tokens: Sequence[int]) -> None:
        """Append tokens of the caller's to the only row."""
        assert len(self.rows) == 1, "rows of a batch must have read equally much"
        self.rows[0].extend(tokens)

    def _begin(self) -> None:
        """Forget what was read: the rows, from where they start, are to be read from position 0."""
        self._cache, self._past = self.model.new_cache(), 0
        lengths = [len(row) - start for row, start in zip(self.rows, self._starts, strict=True)]
        self._pads = [max(lengths) - length for length in lengths]
        self._padding = torch.tensor(self._pads, device=self.device) if any(self._pads) else None

    def _read(self) -> Tensor:
        """Read every token that was not read yet: the logits [batch, vocab] of the next one."""
        self._slide()
        self._cache.crop(self._past)  # what a pass that was broken off has left
        places = zip(self.rows, self._starts, self._pads, strict=True)
        if self._past:
            pieces = [row[start + self._past - pad :] for row, start, pad in places]
        else:
            pieces = [[0] * pad + row[start:] for row, start, pad in places]
        tokens = torch.tensor(pieces, device=self.device)
        mask, positions = self._places(tokens.shape[1])
        h = self.model.trunk(self.model.embedded(tokens), self._cache, mask, positions)
        self._past += tokens.shape[1]
        return read_logits(self.model.readout(h[:, -1:]))[:, 0]

    def _slide(self) -> None:
        """Let rows that have become too long start later."""
        full = [i for i, row in enumerate(self.rows) if len(row) - self._starts[i] > self.limit]
        if full and not self.window:
            raise UserError(
                f"the model's max_seq_len={self.limit} is reached: shorten the text, or let the window slide"
            )
        for i in full:
            self._starts[i] = len(self.rows[i]) - max(1, self.limit // 2)
        if full:
            self._begin()

    def _places(self, count: int) -> tuple[Tensor | None, Tensor | None]:
        """Mask and positions for `Decoder.trunk` of the next `count` tokens; neither where no row is padded.

        A padded position sees itself, since attention to nothing is not a number.
        """
        if self._padding is None:
            return None, None
        keys = torch.arange(self._past + count, device=self.device)
        queries, padding = keys[self._past :].unsqueeze(-1), self._padding.unsqueeze(-1)
        seen = (keys <= queries) & (keys >= padding.unsqueeze(-1)) | (keys == queries)
        return seen.unsqueeze(1), (keys[self._past :] - padding).clamp_min(0)

    def _seen(self, vocab_size: int) -> Tensor:
        """Which tokens each row holds, as far as the model sees it: bool [batch, vocab]."""
        seen = torch.zeros(len(self.rows), vocab_size, dtype=torch.bool)
        for i, (row, start) in enumerate(zip(self.rows, self._starts, strict=True)):
            seen[i, row[start:]] = True
        return seen.to(self.device)
