"""Text from models: sampling, beams, long contexts, folded and quantized weights."""

from typing import Any

DRAW: dict[str, Any] = {"temperature": 0.8, "top_k": 50}
"""How texts for people are drawn, unless they say otherwise: some fields of `Sampling`."""
