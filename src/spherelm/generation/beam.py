"""Beam search: the most probable texts that a model would write, as far as a few at a time can find them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from spherelm.fields import check
from spherelm.layers.readout import read_logits
from spherelm.models.decoder import GenerativeModel, LanguageModel, Rows

PROMPTS_AT_ONCE = 32
"""How many prompts are searched together; how many does not change what is found."""


@dataclass(frozen=True)
class BeamSettings:
    """How many texts are pursued for each prompt, and what their length counts.

    A text y of |y| new tokens, its end token included, is worth `log p(y | prompt) / |y|^length_penalty`:
    0 prefers short texts, which are more probable as a whole, 1 takes the mean over tokens, more prefers long ones.

    Attributes:
        beams: Beam search: keep this many of the most probable texts at each step.
        length_penalty: Beam search compares log probability / length ** this; larger values prefer longer texts.
    """

    beams: PositiveInt = 5
    length_penalty: Annotated[float, Field(ge=0, le=10)] = 1.0

    def __post_init__(self) -> None:
        check(self)

    def worth(self, log_probability: float, length: int) -> float:
        """The score of a text of `length` tokens."""
        return log_probability / float(length) ** self.length_penalty


@dataclass(order=True, frozen=True)
class Hypothesis:
    """A finished text: what it is worth, its new tokens (the end token among them, if it ended),
    and their log probability.
    """

    worth: float
    tokens: list[int] = field(compare=False)
    log_probability: float = field(compare=False)


def beam_search(
    model: GenerativeModel, prompts: Rows, max_new_tokens: int, eos_id: int, settings: BeamSettings | None = None
) -> list[list[Hypothesis]]:
    """For each prompt up to `beams` texts that end within `max_new_tokens`, the best first;
    some that do not, if too few do.

    prompts: token ids, prompts of a language model, or an encoder-decoder's sources. Of the 2 * beams best
    continuations of a step, ends count among the first `beams`, and the first `beams` that are not ends continue. A
    prompt is done when it has `beams` finished texts and no running one scores more than the worst of them. Keys and
    values are cached.
    """
    settings = settings or BeamSettings()
    was_training = model.training
    model.eval()
    found: dict[int, list[Hypothesis]] = {}
    for group in _alike(prompts):
        ready, rows = model.conditioned([prompts[i] for i in group], eos_id)
        search = _Search(ready, rows, max_new_tokens, eos_id, settings)
        found |= dict(zip(group, search.run(), strict=True))
    model.train(was_training)
    return [found[i] for i in range(len(prompts))]


def _alike(prompts: Rows) -> Iterator[list[int]]:
    """The numbers of prompts of one length, a few at a time: nothing needs padding."""
    lengths = [len(prompt) for prompt in prompts]
    for length in sorted(set(lengths)):
        numbers = [i for i, other in enumerate(lengths) if other == length]
        yield from (numbers[i : i + PROMPTS_AT_ONCE] for i in range(0, len(numbers), PROMPTS_AT_ONCE))


class _Search:
    """The search for prompts of one length. Row `p * beams + b` of a batch is the running text b of prompt p."""

    def __init__(
        self, model: LanguageModel, prompts: Rows, max_new_tokens: int, eos_id: int, settings: BeamSettings
    ) -> None:
        beams, self.device = settings.beams, model.embed.weight.device
        self.model, self.settings, self.eos_id, self.limit = model.repeated(beams), settings, eos_id, max_new_tokens
        self.cache = model.new_cache()
        self.read = torch.tensor([list(row) for row in prompts for _ in range(beams)], device=self.device)
        self.texts = torch.empty(len(self.read), 0, dtype=torch.int64, device=self.device)
        # At first the texts of a prompt are the same: one of them runs.
        self.scores = torch.full((len(prompts), beams), -torch.inf, device=self.device)
        self.scores[:, 0] = 0
        self.finished: list[list[Hypothesis]] = [[] for _ in prompts]
        self.done = [max_new_tokens < 1] * len(prompts)

    @torch.no_grad()
    def run(self) -> list[list[Hypothesis]]:
        while not all(self.done):
            self._step()
        return [sorted(hypotheses, reverse=True)[: self.settings.beams] for hypotheses in self.finished]

    def _step(self) -> None:
        h = self.model.trunk(self.model.embedded(self.read), self.cache)
        log_p = read_logits(self.model.readout(h[:, -1:]))[:, 0].float().log_softmax(-1)
        count, beams, vocab_size = len(self.finished), self.settings.beams, log_p.shape[-1]
        total = (self.scores.unsqueeze(-1) + log_p.view(count, beams, vocab_size)).flatten(1)
        scores, places = total.topk(min(2 * beams, total.shape[1]))
        parents = places // vocab_size + beams * torch.arange(count, device=self.device).unsqueeze(-1)
        tokens = places % vocab_size
        ends = tokens == self.eos_id
        self._finish(scores[:, :beams], parents, tokens, ends)
        scores, chosen = scores.masked_fill(ends, -torch.inf).topk(beams)
        rows, new = parents.gather(1, chosen).flatten(), tokens.gather(1, chosen).flatten().unsqueeze(-1)
        self.scores, self.read = scores, new
        self.texts = torch.cat((self.texts[rows], new), 1)
        self.cache.select(rows)
        self._close()

    def _finish(self, scores: Tensor, parents: Tensor, tokens: Tensor, ends: Tensor) -> None:
        """Take the texts that end in this step, of prompts that are still searched."""
        length = self.texts.shape[1] + 1
        for prompt, place in (ends[:, : scores.shape[1]] & scores.isfinite()).nonzero().tolist():
            if not self.done[prompt]:
                text = [*self.texts[parents[prompt, place]].tolist(), self.eos_id]
                self._add(prompt, text, scores[prompt, place].item(), length)

    def _add(self, prompt: int, text: list[int], score: float, length: int) -> None:
        self.finished[prompt].append(Hypothesis(self.settings.worth(score, length), text, score))

    def _close(self) -> None:
        """Note which prompts are done; at the last step, running texts fill the places that are left."""
        length, beams = self.texts.shape[1], self.settings.beams
        for prompt, running in enumerate(self.scores.tolist()):
            best = sorted(self.finished[prompt], reverse=True)[:beams]
            if self.done[prompt]:
                continue
            if length == self.limit:
                for b, score in enumerate(running[: beams - len(best)]):
                    if score > -torch.inf:
                        self._add(prompt, self.texts[prompt * beams + b].tolist(), score, length)
                self.done[prompt] = True
            elif len(best) == beams:
                self.done[prompt] = best[-1].worth >= self.settings.worth(running[0], length)
