"""Text with tokens hidden in it, for models that fill them in (Devlin et al., arXiv 1810.04805, section 3.1)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from spherelm.data.loader import Batch, Batches
from spherelm.layers.loss import IGNORED

UNCHANGED, EXCHANGED = 0.1, 0.1
"""Of the tokens to be predicted, the parts that are left as they are and exchanged for any other:
the rest are hidden.
"""


def hidden(tokens: torch.Tensor, mask_token: int, part: float, *seed: int) -> Batch:
    """int64 tokens [rows, seq] -> (tokens with `part` of each row hidden, targets that are -100 elsewhere).

    As many in every row, at least one. A row's choice hangs on `seed` and on its number alone; the last
    number of `seed` is that of the first row. `mask_token`: what stands for a hidden token; those below it are the
    vocabulary.
    """
    *rest, first = seed
    seen, targets = tokens.clone(), torch.full_like(tokens, IGNORED)
    seq = tokens.shape[1]
    count = max(1, round(part * seq))
    exchanged, shown = round(EXCHANGED * count), round(UNCHANGED * count)
    for row in range(len(tokens)):
        draw = np.random.default_rng((*rest, first + row))
        places = torch.from_numpy(draw.permutation(seq)[:count])
        targets[row, places] = tokens[row, places]
        seen[row, places[shown:]] = mask_token
        seen[row, places[shown : shown + exchanged]] = torch.from_numpy(draw.integers(mask_token, size=exchanged))
    return seen, targets


class MaskedBatches:
    """The batches of `text`, in whose rows `part` of the tokens are hidden, others at every update.

    What is hidden is a function of (seed, step, row of the whole batch), so that it does not hang on how many processes
    share a batch; `rank` is this process's.
    """

    def __init__(self, text: Batches, mask_token: int, part: float, seed: int, rank: int = 0) -> None:
        self.text, self.mask_token, self.part, self.seed, self.rank = text, mask_token, part, seed, rank

    def batch(self, step: int) -> Batch:
        """(tokens, targets) of `step` (from 0) for this rank: int64 [batch_size / world_size, seq_len] each."""
        tokens, _ = self.text.batch(step)
        return hidden(tokens, self.mask_token, self.part, self.seed, step, self.rank * len(tokens))

    def weight(self, step: int) -> float:
        """As the text's: every row has as many hidden tokens."""
        return self.text.weight(step)

    def state(self, step: int) -> dict[str, Any]:
        """As the text's."""
        return self.text.state(step)

    def restore(self, state: dict[str, Any]) -> None:
        """As the text's."""
        self.text.restore(state)
