"""A pickle machine that can only put plain values together.

``pickletools.genops`` takes the program apart. It has no loops, so its cost is that of its length; nothing is
imported, no object has a method of its own, and a memo is a dict, so an index of 2^31 costs nothing.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

from loraformat.errors import fault

__all__ = ["Function", "Kind", "Record", "run"]

_MOST_STEPS = 2_000_000
"""A tensor takes some forty instructions: room for 50,000 tensors."""

_MARK = object()
_CONSTANTS: Mapping[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_VALUES = frozenset(
    {
        *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
        *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINSTRING", "SHORT_BINSTRING"),
    }
)
_EMPTY: Mapping[str, Callable[[], Any]] = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}


class Function:
    """What a global name stands for: a note of its arguments, never the function of that name."""

    def __init__(self, name: str, note: Callable[..., Any]) -> None:
        self.name, self.note = name, note


class Kind(Function):
    """A function whose value may also be asked for as a new object, as of a class."""


class Record:
    """What an object of some class held: the name of the class, and the state that the pickle gives it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.state: Any = None


def run(program: BinaryIO, known: Callable[[str], Any], persistent: Callable[[Any], Any]) -> Any:
    """The value of the pickle that starts at the position of ``program``, which is left behind its end.

    Args:
        known: global name (``torch._utils._rebuild_tensor_v2``) → what stands for it; raises for any other.
        persistent: a persistent id → what stands for it.

    Raises:
        LoraFormatError: LF-510 an instruction that a state dict does not need, or a damaged pickle.
    """
    machine = _Machine(known, persistent)
    try:
        for step, (opcode, argument, _) in enumerate(pickletools.genops(program)):
            if step == _MOST_STEPS:
                raise fault("LF-510", f"the pickle has more than {_MOST_STEPS:,} instructions")
            if opcode.name == "STOP":
                return machine.stack.pop()
            machine.step(opcode.name, argument)
    except (ValueError, IndexError, KeyError, TypeError) as error:
        raise fault("LF-510", f"the pickle is damaged: {error}") from None
    raise fault("LF-510", "the pickle has no end")


class _Machine:
    def __init__(self, known: Callable[[str], Any], persistent: Callable[[Any], Any]) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.known, self.persistent = known, persistent

    def step(self, name: str, argument: Any) -> None:
        """Carry out one instruction."""
        if name in _VALUES:
            self.stack.append(argument)
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            self.stack.append(_EMPTY[name]())
        elif name in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = self.stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            self.stack.append(self.memo[argument])
        elif (action := getattr(self, f"_{name.lower()}", None)) is not None:
            action(argument)
        else:
            raise fault("LF-510", f"the pickle has the instruction {name}, which no state dict needs")

    def _proto(self, version: int) -> None:
        if version > 5:
            raise ValueError(f"protocol {version}")

    def _frame(self, length: int) -> None:
        """A hint for readers that buffer."""

    def _mark(self, _: None) -> None:
        self.stack.append(_MARK)

    def _memoize(self, _: None) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def _global(self, names: str) -> None:
        self.stack.append(self.known(names.replace(" ", ".")))

    def _stack_global(self, _: None) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self.stack.append(self.known(f"{module}.{name}"))

    def _binpersid(self, _: None) -> None:
        self.stack.append(self.persistent(self.stack.pop()))

    def _reduce(self, _: None) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if not isinstance(function, Function) or not isinstance(arguments, tuple):
            raise fault("LF-510", f"the pickle calls {type(function).__name__}, which is no function")
        self.stack.append(function.note(*arguments))

    def _newobj(self, _: None) -> None:
        if len(self.stack) < 2 or not isinstance(self.stack[-2], Kind):
            raise fault("LF-510", "the pickle has the instruction NEWOBJ, which no state dict needs")
        self._reduce(None)

    def _build(self, _: None) -> None:
        """A state dict is an OrderedDict whose attribute ``_metadata`` tells versions of modules: not needed."""
        state = self.stack.pop()
        if isinstance(self.stack[-1], Record):
            self.stack[-1].state = state
        elif not isinstance(self.stack[-1], dict):
            raise fault("LF-510", f"the pickle sets attributes of {type(self.stack[-1]).__name__}")

    def _tuple(self, _: None) -> None:
        self.stack.append(tuple(self._marked()))

    def _tuple1(self, _: None) -> None:
        self.stack[-1:] = [(self.stack[-1],)]

    def _tuple2(self, _: None) -> None:
        self.stack[-2:] = [(self.stack[-2], self.stack[-1])]

    def _tuple3(self, _: None) -> None:
        self.stack[-3:] = [(self.stack[-3], self.stack[-2], self.stack[-1])]

    def _append(self, _: None) -> None:
        value = self.stack.pop()
        self._container(list).append(value)

    def _appends(self, _: None) -> None:
        values = self._marked()
        self._container(list).extend(values)

    def _setitem(self, _: None) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set(key, value)

    def _setitems(self, _: None) -> None:
        items = self._marked()
        for key, value in zip(items[::2], items[1::2], strict=True):
            self._set(key, value)

    def _set(self, key: Any, value: Any) -> None:
        # The hash of a tuple is that of its members, again and again: sixty nested pairs would take for ever.
        if not isinstance(key, (str, int, float, type(None), Record)):
            raise fault("LF-510", f"the pickle has a dict whose key is a {type(key).__name__}")
        self._container(dict)[key] = value

    def _container(self, kind: type) -> Any:
        if not isinstance(self.stack[-1], kind):
            raise ValueError(f"a {kind.__name__} is meant, not a {type(self.stack[-1]).__name__}")
        return self.stack[-1]

    def _marked(self) -> list[Any]:
        start = len(self.stack) - 1
        while self.stack[start] is not _MARK:
            start -= 1
            if start < 0:
                raise ValueError("no mark")
        values = self.stack[start + 1 :]
        del self.stack[start:]
        return values
