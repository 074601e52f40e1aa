# SPDX-License-Identifier: Apache-2.0
"""What arguments must be that no operator's schema has by their names."""

from __future__ import annotations

import operator


def whole(name: str, value: object) -> int:
    """A whole number, of whichever library."""
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name}: expected a whole number, got {value!r}") from None


def of_type(name: str, value: object, kind: type | tuple[type, ...], expected: str) -> None:
    """Refuses what is of another type."""
    if not isinstance(value, kind):
        raise TypeError(f"{name}: expected {expected}, got {value!r}")
