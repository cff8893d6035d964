"""Types of flags that several commands share."""

from __future__ import annotations

from typing import Annotated, Literal

from tyro.conf import FlagCreatePairsOff

Flag = Annotated[bool, FlagCreatePairsOff]
"""A switch: absent or `--name`, without a `--no-name` beside it."""

Dtype = Literal["auto", "float32", "bfloat16"]
