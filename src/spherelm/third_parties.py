"""Silence the output of other libraries during a command; their errors are raised all the same.

`python -W default -m spherelm ...` shows all of it, as does the variable TORCH_LOGS.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

BARS = ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS")
"""The variables that transformers, the hub's library and datasets look at when they are imported."""


def silence() -> None:
    """Drop log records below ERROR, warnings that are not about our own lines, and the progress bars of Hugging Face.

    For good, in a process that is ours. What spherelm prints, warns of and raises is left alone.
    """
    if sys.warnoptions or "TORCH_LOGS" in os.environ:
        return
    logging.disable(max(logging.root.manager.disable, logging.WARNING))
    warnings.filterwarnings("ignore", module=r"(?!spherelm\b)")
    for bars in BARS:
        os.environ.setdefault(bars, "1")


@contextmanager
def silenced() -> Iterator[None]:
    """As `silence`, until the context ends."""
    disabled, unset = logging.root.manager.disable, [bars for bars in BARS if bars not in os.environ]
    with warnings.catch_warnings():
        try:
            silence()
            yield
        finally:
            logging.disable(disabled)
            for bars in unset:
                os.environ.pop(bars, None)
