"""One call of a model, whatever language makes it: what is fed, the sizes that are free, what comes out."""

from __future__ import annotations

import json
import keyword
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraformat.errors import fault
from loraformat_converters.onnx.attaching.choice import INDEX, WEIGHTS
from loraformat_converters.onnx.attaching.slot_names import file_of, key_of

__all__ = ["Call", "Feed", "quoted"]

_WORD = re.compile(r"[A-Za-z_]\w*")
# torch.onnx and optimum name a size that depends on others by a sum: "past_sequence_length + 1".
_SUM = re.compile(r"[A-Za-z_]\w*(\s*[+*-]\s*\w+)+")
# What a name cannot be: a word of Python, C++, C# or JavaScript, or a name that their programs use themselves.
_RESERVED = frozenset(keyword.kwlist) | frozenset(
    """abstract alignas alignof and_eq arguments asm auto base bitand bitor bool byte case catch char char16_t char32_t
    char8_t checked co_await co_return co_yield compl concept const const_cast consteval constexpr constinit debugger
    decimal decltype default delegate delete do double dynamic_cast enum eval event explicit export extends extern false
    fixed float foreach friend function goto implements implicit inline instanceof int interface internal let lock long
    mutable namespace new noexcept not_eq null nullptr object operator or_eq out override package params private
    protected public readonly ref register reinterpret_cast requires sbyte sealed short signed sizeof stackalloc static
    static_assert static_cast string struct super switch template this thread_local throw true typedef typeid typename
    typeof uint ulong unchecked union unsafe unsigned ushort using var virtual void volatile wchar_t xor xor_eq
    adapter args console env feed feeds i input_names inputs main memory name names np options ort outputNames
    output_names outputs print readAdapter readFileSync require results session size std value zip""".split()  # noqa: SIM905 - a list would be a page
)


@dataclass(frozen=True, slots=True)
class Feed:
    """One input: ``sizes`` are expressions of numbers and free sizes, valid in every language here.

    ``variable`` is a legal name for it. ``fill`` is the value that it is filled with: 0 for a factor of an adapter
    that is fed at run time, which is then off; else 1.
    """

    name: str
    variable: str
    dtype: str
    sizes: tuple[str, ...]
    fill: int = 1

    @property
    def count(self) -> str:
        """The number of values, as an expression."""
        factors = [size if size.isdigit() or _WORD.fullmatch(size) else f"({size})" for size in self.sizes]
        return " * ".join(factors) or "1"


@dataclass(frozen=True, slots=True)
class Call:
    """Everything that a language needs.

    ``adapter``: the file of one that a run is made with; None where the model has no slots that attach made.
    ``slots``: the inputs that it must fill in every run; none where they are optional.
    """

    path: Path
    feeds: tuple[Feed, ...]
    sizes: Mapping[str, int]
    outputs: tuple[str, ...]
    notes: tuple[str, ...]
    adapter: Path | None = None
    slots: tuple[Feed, ...] = ()

    @classmethod
    def of(cls, description: Mapping[str, Any], path: Path) -> Call:
        """From the description of an ONNX model; LF-705 where an input is no tensor."""
        names = _Names()
        adapter, inputs = (
            _adapter(description, path),
            [entry for entry in description["inputs"] if not entry["optional"]],
        )
        filled = [entry for entry in inputs if adapter and _is_slot(entry["name"])]
        feeds = tuple(_feed(entry, names) for entry in inputs if entry not in filled)
        slots = tuple(_feed(entry, _Names()) for entry in filled)
        outputs = tuple(entry["name"] for entry in description["outputs"])
        return cls(path, feeds, names.sizes, outputs, tuple(_notes(description, path)), adapter, slots)

    @property
    def without(self) -> str:
        """What a run computes without the adapter, as a comment says it."""
        return "every run needs one; zeros in all its tensors: the base" if self.slots else "without it: the base"

    def types(self, language: str, known: Mapping[str, Any]) -> None:
        """LF-705 where an input has a dtype that the language has no plain word for."""
        strange = [f"{feed.name} ({feed.dtype})" for feed in (*self.feeds, *self.slots) if feed.dtype not in known]
        if strange:
            raise fault("LF-705", f"no plain {language} code feeds {', '.join(strange)}", where=str(self.path))

    def declared(self, form: str) -> str:
        """The free sizes as declarations ``form`` of ``{name}`` and ``{value}``, joined by commas."""
        return ", ".join(form.format(name=name, value=value) for name, value in self.sizes.items())


class _Names:
    """Legal, distinct names for what the model calls as it likes, and a first value for every free size."""

    def __init__(self) -> None:
        self.sizes: dict[str, int] = {}
        self._given: dict[tuple[str, str], str] = {}
        self._taken = set(_RESERVED)

    def of(self, kind: str, name: str) -> str:
        """The variable for the size or input ``name``: always the same for the same one."""
        if (kind, name) not in self._given:
            word = re.sub(r"\W+", "_", name, flags=re.ASCII).strip("_") or "x"
            word = f"n_{word}" if word[0].isdigit() else word
            candidate, n = word, 1
            while candidate in self._taken:
                n += 1
                candidate = f"{word}_{n}"
            self._taken |= {candidate, f"{candidate}_shape"}
            self._given[kind, name] = candidate
        return self._given[kind, name]

    def size(self, dimension: int | str | None, label: str, axis: int) -> str:
        """An expression for a size: a number, a variable, or a sum of both."""
        if isinstance(dimension, int):
            return str(dimension)
        text = dimension or f"{label}_size{axis}"
        if _SUM.fullmatch(text):
            return _WORD.sub(lambda match: self._free(match[0], axis), text)
        return self._free(text, axis)

    def _free(self, name: str, axis: int) -> str:
        variable = self.of("size", name)
        first = 0 if "past" in name else 1 if axis == 0 or "batch" in name else 8
        self.sizes.setdefault(variable, first)
        return variable


def quoted(text: str) -> str:
    """A string literal that every language here reads alike."""
    return json.dumps(text, ensure_ascii=False)


def _feed(entry: Mapping[str, Any], names: _Names) -> Feed:
    name, shape = entry["name"], entry["shape"]
    if shape is None:
        what = f"the input {name} is a {entry['dtype']} of no stated shape" if entry["dtype"] else name
        raise fault("LF-705", f"{what}: there is no ready code for it", where=name)
    sizes = tuple(names.size(d, name, axis) for axis, d in enumerate(shape))
    off = name.startswith("lora.") or _is_slot(name)
    return Feed(name, names.of("input", name), entry["dtype"], sizes, 0 if off else 1)


def _is_slot(name: str) -> bool:
    return key_of(name) is not None


def _adapter(description: Mapping[str, Any], path: Path) -> Path | None:
    """What ``attach --mode swap`` wrote beside the model for the first of its adapters."""
    swapped = [entry["name"] for entry in description["attached"] if entry["mode"] == "swap" and entry["name"]]
    return path.with_name(file_of(path.name, swapped[0])) if swapped else None


def _notes(description: Mapping[str, Any], path: Path) -> Sequence[str]:
    """Lines that belong above the code: what is attached and how it is chosen, which inputs need not be fed."""
    notes = []
    optional = [entry["name"] for entry in description["inputs"] if entry["optional"]]
    by_index = any(entry["name"] == INDEX for entry in description["inputs"])
    for number, entry in enumerate(description["attached"], 1):
        state = {
            "branch": "always on",
            "stack": (f"{number} in {INDEX}" if by_index else f"column {number - 1} of {WEIGHTS}") + "; 0 is the base",
            "swap": f"in {file_of(path.name, str(entry['name']))}, " + (
                "active where a run says so" if optional else "which every run is fed"
            ),
        }.get(str(entry["mode"]), "in a way that is not known")  # fmt: skip
        count = len(entry["targets"])
        notes.append(f"Attached: {entry['name']} ({entry['mode']}, {count} target{'s' * (count != 1)}), {state}.")
    if optional and not any(entry["mode"] == "swap" for entry in description["attached"]):
        notes.append(
            f"Not fed, since the model holds values for them: {', '.join(optional[:4])}" + (", …" * (len(optional) > 4))
        )
    return ["".join(c if c.isprintable() else "?" for c in note) for note in notes]
