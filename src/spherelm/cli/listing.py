"""Commands that say what there is to choose from: `presets`, `recipes`."""

from __future__ import annotations

from collections.abc import Sequence


def presets() -> None:
    """List the presets: the size and the length of each."""
    from spherelm.recipes import PRESETS

    header = ("preset", "layers", "d_model", "heads", "context", "batch", "updates", "")
    rows = [
        (
            name,
            *(str(n) for n in (size.n_layers, size.d_model, size.n_heads, size.seq_len, size.batch_size, size.steps)),
            size.about,
        )
        for name, size in PRESETS.items()
    ]
    print(columns([header, *rows]))


def recipes() -> None:
    """List the recipes, and what each is."""
    from spherelm.recipes import RECIPES

    print(columns([(name, (make.__doc__ or "").splitlines()[0]) for name, make in RECIPES.items()]))


def columns(rows: Sequence[Sequence[str]]) -> str:
    """`rows` of equally many texts, one below the other."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
