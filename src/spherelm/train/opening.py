"""What a run says before its first update: how long it is, how often it reads its text, what its speed is a part of."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from spherelm.runs.config import TrainConfig

REPEATS = 4.0
"""So often the same text can be read at little loss (Muennighoff et al. 2023, arXiv 2305.16264)."""


def say_first(train: TrainConfig, tokens_per_step: int, epochs: Mapping[str, float], peak: str, way: str = "") -> None:
    """Say on stderr what the run is about to do, and warn where it repeats its text often. epochs: by the name of the text.

    way: in which number format it computes, and on how many threads.
    """
    about = (
        f"{train.steps:,} updates of {tokens_per_step:,} tokens, {epochs_in_words(epochs)}; MFU is the part of {peak}"
    )
    for line in (about + (way and f"; {way}"), *repetition(epochs)):
        print(f"spherelm: {line}", file=sys.stderr)


def epochs_in_words(epochs: Mapping[str, float]) -> str:
    """ "0.05 epochs of data/mine", of each text."""
    told = [f"{number(count)} epochs of {name}" for name, count in epochs.items()]
    return " and ".join(told) or "from a stream"


def repetition(epochs: Mapping[str, float]) -> list[str]:
    """A warning where a text is read more than `REPEATS` times, else nothing."""
    if not epochs or max(epochs.values()) <= REPEATS:
        return []
    name = max(epochs, key=epochs.__getitem__)
    return [
        f"warning: {name} is read {number(epochs[name])} times, and more than {REPEATS:g} times teach a model little: prepare "
        "more text and name it with --data, or lower --steps"
    ]


def number(count: float) -> str:
    """Three digits, more before the point."""
    return f"{count:,.0f}" if count >= 1000 else f"{count:.3g}"
