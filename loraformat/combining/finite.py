"""Numbers that are none are told before they spread, and what goes beyond float32 as an error of its target."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from loraformat.errors import LoraFormatError, fault
from loraformat.parts import Part, roles_of
from loraformat.values import finite_and_zero, value_problems

if TYPE_CHECKING:
    from loraformat.adapter import Adapter

__all__ = ["check_values", "finite"]


def check_values(adapters: Iterable[Adapter]) -> None:
    """LF-312 for every tensor that holds NaN, infinity, or what float32 cannot hold."""
    problems = [p for adapter in adapters for p in value_problems(adapter) if p.severity == "error"]
    if problems:
        raise LoraFormatError(problems)


@contextmanager
def finite(key: str) -> Iterator[Callable[[Iterable[Part]], None]]:
    """Computing inside says nothing of an overflow; the check that is given finds it in what is to be stored.

    Raises:
        LoraFormatError: LF-612 where a value of the target went beyond float32.
    """

    def check(parts: Iterable[Part]) -> None:
        for part in parts:
            for role, tensor in roles_of(part):
                if role != "indices" and not finite_and_zero(tensor)[0]:
                    raise _beyond(f"{key}.{role}")

    try:
        with np.errstate(all="ignore"):
            yield check
    except np.linalg.LinAlgError:  # what a decomposition makes of infinity
        raise _beyond(key) from None


def _beyond(where: str) -> LoraFormatError:
    return fault("LF-612", "a value of the result is beyond float32", where=where, fix="smaller weights")
