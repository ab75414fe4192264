"""Numbers as people read them."""

from __future__ import annotations

_BINARY_STEPS = ("KiB", "MiB", "GiB", "TiB", "PiB")


def format_bytes(count: int) -> str:
    """Bytes in the largest binary unit that leaves at least 1: `0 B`, `640 B`, `1.5 KiB`, `13.2 GiB`."""
    if abs(count) < 1024:
        return f"{count} B"
    step = 1
    # 1023.95 and more would be shown as 1024.0 of this unit.
    while step < len(_BINARY_STEPS) and abs(count) / 1024**step >= 1023.95:
        step += 1
    return f"{count / 1024**step:.1f} {_BINARY_STEPS[step - 1]}"
