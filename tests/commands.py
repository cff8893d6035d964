"""The command line called in this process."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest

from spherelm import cli


@dataclass(frozen=True)
class Answer:
    """How a command ended and what it printed."""

    code: int
    out: str
    err: str

    @property
    def shown(self) -> list[str]:
        """The lines that are left on a terminal: a progress bar writes over itself,
        and is wiped out where it says so.
        """
        lines = [line.rpartition("\r")[2].rstrip() for line in self.err.split("\n")]
        return [line for line in lines if line]


Command = Callable[..., Answer]


def replaced(words: Sequence[object], more: Sequence[object]) -> list[object]:
    """`words` and `more`, without the flags of `words`, and the values behind them, that `more` has too."""
    left: list[object] = []
    drops = False
    for word in words:
        if str(word).startswith("--"):
            drops = word in more
        if not drops:
            left.append(word)
    return [*left, *more]


def make_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """`command("train", "--steps", 3, ...)` does what a shell's `spherelm train --steps 3 ...` does."""

    def command(*words: object) -> Answer:
        monkeypatch.setattr(sys, "argv", ["spherelm", *map(str, words)])
        capsys.readouterr()
        code: str | int | None = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code or 0
        assert isinstance(code, int), "a message here would be an exit of code 1"
        return Answer(code, *capsys.readouterr())

    return command
