"""Sizes of memory as people write them."""

from __future__ import annotations

import re
from typing import Any

from hypernodes.errors import DefinitionError

_UNITS = {"M": 2**20, "G": 2**30, "MB": 10**6, "GB": 10**9, "TB": 10**12, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_MOST_MIB = 64 << 20
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*")


def mebibytes(value: Any, option: str) -> int:
    """Return a size in MiB: a number is MiB already, a text has a unit, such as ``"32GB"`` or ``"512 MiB"``.

    Raises:
        DefinitionError: it is neither.

    >>> mebibytes("32GB", "memory"), mebibytes("512 MiB", "memory"), mebibytes(1024, "memory")
    (30518, 512, 1024)
    """
    size = 0.0
    if isinstance(value, int) and not isinstance(value, bool):
        size = value
    elif isinstance(value, str) and (match := _SIZE.fullmatch(value)):
        size = float(match[1]) * _UNITS.get(match[2].upper(), 0) / 2**20
    if size <= 0:
        raise DefinitionError(f'{option} is a number of MiB or a size such as "32GB" or "512 MiB", not {value!r}')
    if size > _MOST_MIB:
        raise DefinitionError(f"{option} is more than any machine has: {value!r}; a number is in MiB")
    return max(1, round(size))
