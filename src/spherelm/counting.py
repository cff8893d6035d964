"""Numbers of things in words."""


def counted(number: int, thing: str, things: str | None = None) -> str:
    """`1 document`, `1,200 documents`. `things`: the plural, where it is not `thing` and an s."""
    return f"{number:,} {thing if number == 1 else things or thing + 's'}"


def rounded(number: float) -> str:
    """Three digits, more before the point."""
    return f"{number:,.0f}" if number >= 1000 else f"{number:.3g}"
