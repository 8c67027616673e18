"""Numbers as people read them."""

from __future__ import annotations


def size(nbytes: float) -> str:
    """Bytes in powers of 1024: "16.47 GiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(nbytes) < 1024:
            return f"{nbytes:,.0f} {unit}" if unit == "B" else f"{nbytes:,.2f} {unit}"
        nbytes /= 1024
    return f"{nbytes:,.2f} TiB"


def percent(before: int, after: int) -> str:
    """The change from `before` to `after`: "-42.1%"."""
    return f"{100 * (after - before) / before:+.1f}%" if before else "0%"
