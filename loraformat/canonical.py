"""JSON with one spelling (RFC 8785), and a reader that takes I-JSON (RFC 7493) and nothing looser."""

from __future__ import annotations

import json
import math
from typing import Any

__all__ = ["dumps", "loads"]

_EXACT = 2**53 - 1  # RFC 7493 §2.2: integers beyond are not exact in every reader
_LEVELS = 32  # no field of ours needs 8; a limit that all readers share is one that no file surprises


def dumps(value: Any, levels: int = _LEVELS) -> str:
    """The canonical text of a JSON value: keys by UTF-16 code units, ECMAScript numbers, no spaces.

    Raises:
        ValueError: NaN, an infinity, an integer that a double would round, a lone surrogate, more than ``levels``
            levels of lists and objects, or no JSON value.

    >>> dumps({"b": 16.0, "a": [1e-7, "é"]})
    '{"a":[1e-7,"é"],"b":16}'
    """
    match value:
        case None | bool():
            return json.dumps(value)
        case str():
            value.encode()  # a lone surrogate has no canonical form
            return json.dumps(value, ensure_ascii=False)
        case int():
            return _integer(value)
        case float():
            return _number(value)
        case list() | tuple() | dict() if levels == 0:
            raise ValueError(f"more than {_LEVELS} levels of lists and objects")
        case list() | tuple():
            return f"[{','.join(dumps(item, levels - 1) for item in value)}]"
        case dict():
            members = sorted(value.items(), key=lambda item: item[0].encode("utf-16-be"))
            return "{" + ",".join(f"{dumps(k)}:{dumps(v, levels - 1)}" for k, v in members) + "}"
        case _:
            raise ValueError(f"a {type(value).__name__} is no JSON value: {value!r}")


def loads(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: also for duplicate keys, NaN, Infinity and lone surrogates, which ``json.loads`` lets pass.
    """
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=no_constant)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()  # UnicodeEncodeError, a ValueError, for half a pair
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return value


def _integer(value: int) -> str:
    """An integer beyond 2^53 − 1 is a double in full digits: only that double's own spelling is not rounded."""
    if abs(value) <= _EXACT:
        return str(value)
    if abs(value) >= 10**21 or _number(float(value)) != str(value):  # ECMAScript spells 1e21 with an exponent
        raise ValueError(f"the integer {str(value)[:40]} is beyond 2^53 and double precision rounds it")
    return str(value)


def _number(value: float) -> str:
    """RFC 8785 §3.2.2.3: ECMAScript's Number::toString, whose digits are Python's repr."""
    if not math.isfinite(value):
        raise ValueError(f"{value} is no JSON number")
    if value == 0:
        return "0"
    sign, text = ("-" if value < 0 else ""), repr(abs(value))
    mantissa, _, exponent = text.partition("e")
    whole, _, fraction = mantissa.partition(".")
    digits = (whole + fraction).lstrip("0")
    point = len(whole) + int(exponent or 0) - (len(whole + fraction) - len(digits))
    digits = digits.rstrip("0")
    if 0 < point <= 21:
        padded = digits.ljust(point, "0")
        return sign + padded[:point] + (f".{padded[point:]}" if len(padded) > point else "")
    if -6 < point <= 0:
        return f"{sign}0.{'0' * -point}{digits}"
    tail = f".{digits[1:]}" if len(digits) > 1 else ""
    return f"{sign}{digits[0]}{tail}e{point - 1:+d}"


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in pairs:
        if key in out:
            raise ValueError(f"duplicate key {key!r}")
        out[key] = value
    return out


def no_constant(word: str) -> Any:
    """For ``json.loads``, as its ``parse_constant``: it reads NaN and Infinity, which JSON has not."""
    raise ValueError(f"{word} is no JSON number")
