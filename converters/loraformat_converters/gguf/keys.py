"""The metadata of an adapter in GGUF: what llama.cpp asks for, and the rest as the text that is kept of a source.

Keys as in gguf 0.19.0 constants.py (Keys.General, Keys.Adapter), read by llama.cpp's llama-adapter.cpp.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loraformat.errors import LoraFormatError, Problem, fault
from loraformat_converters.gguf.cursor import SCALARS, Value
from loraformat_converters.gguf.file import GgufFile

__all__ = ["ALPHA", "ARCHITECTURE", "kept", "metadata", "problems", "restored", "stated_type"]

ARCHITECTURE = "general.architecture"
TYPE = "general.type"
ADAPTER = "adapter.type"
ALPHA = "adapter.lora.alpha"
TOKENS = "adapter.alora.invocation_tokens"

_TYPES = {ARCHITECTURE: "str", TYPE: "str", ADAPTER: "str", ALPHA: "f32", TOKENS: "[u32]"}
_KINDS = frozenset({"str", *(name for name, _ in SCALARS.values())})


def stated_type(path: Path) -> str | None:
    """``general.type``, which models of some age lack; ``unknown`` of a file that is not sound."""
    try:
        found = GgufFile(path).metadata.get(TYPE)
    except LoraFormatError:
        return "unknown"
    return str(found.value) if found is not None else None


def problems(values: Mapping[str, Value]) -> list[Problem]:
    """Why these are not the values of a LoRA adapter: LF-503 a wrong type, LF-504 something else than a LoRA."""
    wrong = [key for key, kind in _TYPES.items() if key in values and values[key].type != kind]
    if wrong:
        return [Problem("LF-503", f"a value of type {values[key].type}; it is {_TYPES[key]}", key) for key in wrong]
    found = []
    told = {key: values[key].value if key in values else None for key in (TYPE, ADAPTER)}
    if told[TYPE] != "adapter":
        fix = "" if told[TYPE] not in (None, "model") else "it is a base: name the adapter's file"
        found.append(Problem("LF-504", f"the file is of type {told[TYPE]!r}, not 'adapter'", TYPE, fix))
    elif told[ADAPTER] != "lora":
        found.append(Problem("LF-504", f"the adapter is of type {told[ADAPTER]!r}; only 'lora' is known", ADAPTER))
    elif ARCHITECTURE not in values or not values[ARCHITECTURE].value:
        found.append(
            Problem("LF-503", "the architecture is not stated, by which llama.cpp tells the base", ARCHITECTURE)
        )
    if TOKENS in values and values[TOKENS].value != []:
        what = "aLoRA acts only after certain tokens: no change of a weight says that"
        found.append(Problem("LF-504", what, TOKENS))
    if ALPHA in values and not math.isfinite(values[ALPHA].value):
        found.append(Problem("LF-503", f"{values[ALPHA].value} is no finite number", ALPHA))
    return found


def metadata(architecture: str, alpha: float, source: Mapping[str, Value]) -> dict[str, Value]:
    """The values of an adapter's file: those that llama.cpp asks for, then what else the source said."""
    own = {
        ARCHITECTURE: Value("str", architecture),
        TYPE: Value("str", "adapter"),
        ADAPTER: Value("str", "lora"),
        ALPHA: Value("f32", alpha),
    }
    # An alignment is of the file that had it, not of the adapter.
    return own | {key: value for key, value in source.items() if key not in own and key != "general.alignment"}


def kept(values: Mapping[str, Value]) -> str:
    """The metadata as JSON text, for ``extensions``; without arrays that are too long and numbers that are not finite."""
    whole = {key: [v.type, v.value] for key, v in values.items() if v.value is not None and _finite(v.value)}
    return json.dumps(whole, ensure_ascii=False)


def _finite(value: Any) -> bool:
    items = value if isinstance(value, list) else [value]
    return all(math.isfinite(item) for item in items if isinstance(item, float))


def restored(text: str) -> dict[str, Value]:
    """The metadata of that text. LF-508 where it is damaged."""
    try:
        found = json.loads(text)
        values = {key: Value(kind, value) for key, (kind, value) in found.items()}
        if all(_encodable(key) and _is(value.type.strip("[]"), value) for key, value in values.items()):
            return values
    except (ValueError, TypeError, AttributeError, RecursionError):
        pass
    raise fault("LF-508", "the kept GGUF metadata is damaged", where="extensions: gguf")


def _is(kind: str, value: Value) -> bool:
    """Whether a value has its type and fits into it."""
    items = value.value if value.type == f"[{kind}]" else [value.value]
    return kind in _KINDS and isinstance(items, list) and all(_fits(kind, item) for item in items)


def _encodable(text: str) -> bool:
    """JSON can spell half a character, which no UTF-8 can."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _fits(kind: str, item: Any) -> bool:
    if kind == "str":
        return isinstance(item, str) and _encodable(item)
    if kind == "bool":
        return isinstance(item, bool)
    if kind.startswith("f"):
        return (
            isinstance(item, (int, float))
            and not isinstance(item, bool)
            and abs(item) <= (3.4e38 if kind == "f32" else 1.7e308)
        )
    bits = int(kind[1:])
    low, high = (0, 2**bits) if kind[0] == "u" else (-(2 ** (bits - 1)), 2 ** (bits - 1))
    return isinstance(item, int) and not isinstance(item, bool) and low <= item < high
