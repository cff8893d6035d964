"""The runs of `spherelm evidence`: contenders at points of size, context and budget."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

from pydantic import Field, NonNegativeInt, PositiveInt

from spherelm.errors import UserError, unknown
from spherelm.experiments.cost import COMPILE_FROM
from spherelm.fields import check
from spherelm.models import DecoderArch
from spherelm.recipes.presets import PRESETS, Preset


class Contender(NamedTuple):
    """A way of training: an arm, a recipe, and fields that differ from the recipe's."""

    arm: str
    recipe: str
    fields: Mapping[str, Any] = {}


CONTENDERS = {
    "gpt-law": Contender("gpt", "law"),
    "gpt-no-qk-norm": Contender("gpt", "law", {"qk_norm": False}),
    "gpt-paper": Contender("gpt", "paper"),
    "gpt-hyperball": Contender("gpt", "hyperball"),
    "ngpt-law": Contender("ngpt", "law"),
    "ngpt-paper": Contender("ngpt", "paper"),
    "nugpt": Contender("ngpt", "nugpt"),
    "training-ngpt": Contender("ngpt", "training-ngpt"),
}

SMALLEST_UPDATE = 1024
"""Tokens of an update in runs of about a million tokens and less. It doubles with every fourfold length: the critical
batch goes with the root of a run's tokens (Zhang et al., arXiv 2410.21676: to the power of 0.47)."""


@dataclass(frozen=True)
class Grid:
    """The points, contenders and texts of a measurement.

    Attributes:
        data: Data directory made by `spherelm data prepare`; its validation text is used to choose learning rates.
        test: Data directory made with the same tokenizer, whose validation text is used only at the end,
        as held-out text.
        sizes: Presets: 0.3m, 1m, 4m, 12m are counted in block parameters.
        contexts: Tokens a sequence, powers of two.
        budgets: Tokens for each block parameter. An update has 1024 tokens, and more in runs of over two million.
        contenders: Among gpt-law, gpt-no-qk-norm, gpt-paper, gpt-hyperball, ngpt-law, ngpt-paper, nugpt,
        training-ngpt.
        seeds: Runs at the learning rate that was found.
        confirm: Search the learning rate in runs of at most so many tokens; longer runs take the recipe's.
        test_windows: Sequences of the text of `test` that are read.
    """

    data: str
    test: str
    sizes: tuple[str, ...] = ("0.3m",)
    contexts: tuple[PositiveInt, ...] = (256,)
    budgets: tuple[Annotated[float, Field(gt=0, le=1e6)], ...] = (5.0, 10.0)
    contenders: tuple[str, ...] = ("gpt-law", "gpt-paper", "ngpt-law", "ngpt-paper")
    seeds: PositiveInt = 3
    confirm: NonNegativeInt = 2_000_000
    test_windows: PositiveInt = 256

    def __post_init__(self) -> None:
        check(self)
        for name, known in (("sizes", PRESETS), ("contenders", CONTENDERS)):
            strange = [value for value in getattr(self, name) if value not in known]
            if strange:
                raise unknown(name[:-1], strange[0], known)
        for size in self.sizes:
            if PRESETS[size].architecture != DecoderArch():
                raise UserError(
                    f"{size!r} has another architecture than the contenders, attention and MLP in every layer: "
                    "take another size"
                )
        odd = [context for context in self.contexts if context & (context - 1)]
        if odd:
            raise UserError(f"context {odd[0]} is no power of two, as the tokens of an update are")
        for name in ("sizes", "contexts", "budgets", "contenders"):
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise UserError(f"{name} has a value twice, {values}: give each once")
        tokens: dict[tuple[str, int, int], float] = {}
        for point in self.points():
            other = tokens.setdefault((point.size, point.context, point.tokens), point.budget)
            if other != point.budget:
                raise UserError(
                    f"budgets {other:g} and {point.budget:g} are both {point.steps} updates of {point.size}: leave one out"
                )

    @property
    def compares(self) -> bool:
        """Whether there is a baseline and a normalized contender among the contenders."""
        return len({CONTENDERS[name].arm == "ngpt" for name in self.contenders}) == 2

    def points(self) -> list[GridPoint]:
        """Cheapest budgets first, so that what a short time allows is whole."""
        found = [GridPoint(*what) for what in itertools.product(self.sizes, self.contexts, sorted(self.budgets))]
        return sorted(found, key=lambda point: point.cost)


@dataclass(frozen=True)
class GridPoint:
    """One size, context and budget (tokens for each block parameter)."""

    size: str
    context: int
    budget: float

    @property
    def preset(self) -> Preset:
        """The size's layers, width and heads."""
        return PRESETS[self.size]

    @property
    def block_parameters(self) -> int:
        """Of attention and MLP matrices, embeddings and scales not counted."""
        return 16 * self.preset.n_layers * self.preset.d_model**2

    @property
    def tokens_an_update(self) -> int:
        """The power of two next to the root of the run's tokens, at least `SMALLEST_UPDATE` and one sequence."""
        doublings = round(math.log2(self.budget * self.block_parameters / 2**20) / 2)
        return max(SMALLEST_UPDATE * 2 ** max(0, doublings), self.context)

    @property
    def batch_size(self) -> int:
        """Sequences of an update."""
        return self.tokens_an_update // self.context

    @property
    def steps(self) -> int:
        """Updates of a whole run."""
        return max(1, round(self.budget * self.block_parameters / self.tokens_an_update))

    @property
    def tokens(self) -> int:
        """Tokens of a whole run."""
        return self.steps * self.tokens_an_update

    @property
    def compiled(self) -> bool:
        """Whether a run is long enough to earn back its compilation."""
        return self.steps >= COMPILE_FROM

    @property
    def cost(self) -> float:
        """Roughly the operations of a run, to order points by."""
        return float(self.tokens * self.block_parameters)
