"""A model with adapters, run by ONNX Runtime: which adapter acts is chosen for each call, from any thread.

    session = Session("model.onnx")                      # written by attach, in any mode
    session.load("style", "style.lora.safetensors")      # swap: any layout; once
    session.use("style").run(feeds)                      # output name → array
    session.use({"style": 0.7, "tone": 0.3}).run(feeds)  # a blend
    session.use(["style", None, "tone"]).run(feeds)      # stack: one for each row; None is the base
    session.run(feeds)                                   # as the model is when nothing is chosen

What is chosen is held in no state: two threads that use two adapters do not meet. Needs onnxruntime, not onnx, but for
DoRAs of other layouts than ``.onnx_adapter``, whose norms are of the model's weights, and for slots that others made.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loraformat import registry
from loraformat.adapter import Adapter
from loraformat.errors import fault
from loraformat.source import existing
from loraformat_converters.onnx.attaching.slots import Fed, Slots, check_taken
from loraformat_converters.onnx.running.blend import blend
from loraformat_converters.onnx.running.captured import Captured
from loraformat_converters.onnx.running.loaded import loaded
from loraformat_converters.onnx.running.opened import device_of, opened, runtime, taken
from loraformat_converters.onnx.running.pooled import Bound, Pooled
from loraformat_converters.onnx.running.ways import Choice, Ways, known, weights_of

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[Any]

__all__ = ["Chosen", "Session"]


@dataclass(frozen=True)
class Chosen:
    """A choice, ready to run any number of times."""

    session: Session
    held: Any
    made: Callable[[Mapping[str, Array]], Mapping[str, Array]]

    @property
    def values(self) -> Mapping[str, Any]:
        """Of a swap: input → ``OrtValue`` on the device, for runs of ``session.inference`` by bindings of your own.

        Raises:
            LoraFormatError: LF-705 of a captured session, in which one buffer feeds whatever is chosen.
        """
        if not isinstance(self.held, Bound):
            raise fault("LF-705", "a captured session is run by its own bindings alone")
        return dict(self.held.held)

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        """Output name → values.

        Raises:
            LoraFormatError: LF-705 the feeds lack an input, name one that the choice feeds, or have not as many rows.
        """
        return self.session._run(self, feeds, outputs)


class Session:
    """An opened model.

    Args:
        path: of the model.
        providers: onnxruntime's; the CPU's alone, if not given. Adapters lie in the memory of the first one's device.
        options: onnxruntime's ``SessionOptions``.
        resident: how many choices are kept there, the latest used; an older one is made anew when it is used again.
        captured: run by CUDA graphs, one for each set of input shapes, in buffers that stay where they are; runs then
            follow each other. Of a swap: with slots of one rank (--pad-rank). Other providers take it, and capture nothing.

    Raises:
        LoraFormatError: LF-701 no such file; LF-613 a record of attach that cannot be read, or inputs of it that another
            tool took away; LF-704 no onnxruntime; LF-705 ONNX Runtime cannot open the model, or ``captured`` for slots of
            any rank.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        providers: Sequence[Any] = ("CPUExecutionProvider",),
        options: Any = None,
        *,
        resident: int = 16,
        captured: bool = False,
    ) -> None:
        onnxruntime, self.path = runtime(), existing(path)
        self.inference = opened(self.path, self.path.parent, providers, options, captured)
        self.device = device_of(self.inference, providers)
        self._ways = Ways.of(self.inference.get_modelmeta().custom_metadata_map, str(self.path))
        check_taken(self._ways.dtypes, taken(self.inference), str(self.path))
        self.slots = self._checked(self._ways.slots, captured)
        self._runs = (
            Captured(onnxruntime, self.inference, self.device, self.slots)
            if captured
            else Pooled(onnxruntime, self.inference, self.device)
        )
        self.resident = resident
        self._adapters: dict[str, Fed] = {}
        self._held: OrderedDict[tuple[tuple[str, float], ...], Any] = OrderedDict()
        self._nothing = self._runs.hold({})
        self._inputs = frozenset(self.slots.inputs if self.slots else ())
        self._asked = frozenset(value.name for value in self.inference.get_inputs()) - self._ways.dtypes.keys()
        self._lock = threading.Lock()

    @property
    def names(self) -> list[str]:
        """The adapters that can be used: those that were loaded; of a stack or a branch, those in the model."""
        return list(self._adapters) if self.slots else list(self._ways.attached)

    @property
    def rows(self) -> Mapping[str, int]:
        """Of a stack: input → the axis that counts the rows; else nothing."""
        return self._ways.rows

    def load(self, name: str, adapter: Adapter | str | os.PathLike[str], *, any_base: bool = False) -> None:
        """Have an adapter ready under a name, in the place of an older one of that name. Its file is not needed any more.

        Args:
            adapter: one in memory, or the path of one in any layout.
            any_base: take one that was written for, or bound to, another model.

        Raises:
            LoraFormatError: what reading says; LF-705 a model without slots; LF-607 an ``.onnx_adapter`` for another
                model, or one that does not say for which, or an adapter that is bound to other weights;
                LF-508, LF-602, LF-606, LF-612 one that does not fit the slots.
        """
        if not isinstance(name, str):
            raise fault("LF-705", f"an adapter is called by a string, not by {name!r}")
        slots = self._slots()
        fed = loaded(adapter, slots, self.path, any_base)
        made = self._runs.hold(slots.feeds(fed))  # or its faults, now
        with self._lock:
            self._adapters = {**self._adapters, name: fed}
            self._drop(name)
            self._keep(((name, 1.0),), made)

    def unload(self, name: str) -> None:
        """Forget an adapter; runs that use it go on."""
        known(name, self.names)
        with self._lock:
            self._adapters = {other: one for other, one in self._adapters.items() if other != name}
            self._drop(name)

    def use(self, choice: Choice | Sequence[Choice]) -> Chosen:
        """An adapter by its name, several by their weights, None for the base; of a stack, one of these for each row.

        Raises:
            LoraFormatError: LF-705 a name that is not loaded, or a choice that the model has no way to make.
        """
        if self._ways.stacked:
            one = choice is None or isinstance(choice, (str, Mapping)) or not isinstance(choice, Iterable)
            rows = None if one else [weights_of(c, self.names) for c in choice]  # type: ignore[union-attr]
            every = weights_of(choice, self.names) if rows is None else {}  # type: ignore[arg-type]
            self._ways.check_rows(rows if rows is not None else [every])
            return Chosen(self, self._nothing, lambda feeds: self._ways.by_row(feeds, rows, every))
        if not (choice is None or isinstance(choice, (str, Mapping))):
            raise fault("LF-705", "only a stack has an adapter for each row", fix="loraformat attach … --mode stack")
        weights = weights_of(choice, self.names)
        if self.slots is None:
            strengths = self._ways.by_strength(weights)
            return Chosen(self, self._nothing, lambda feeds: strengths)
        return Chosen(self, self._prepared(tuple(weights.items())), lambda feeds: {})

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        """Output name → values, of the model as it is when nothing is chosen: a swap and a stack are the bare base."""
        none = self.use(None) if self.slots or self._ways.stacked else Chosen(self, self._nothing, lambda feeds: {})
        return none.run(feeds, outputs)

    # What is fed.

    def _prepared(self, choice: tuple[tuple[str, float], ...]) -> Any:
        """The slots' values on the device, kept for the next time."""
        with self._lock:
            if choice in self._held:
                self._held.move_to_end(choice)
                return self._held[choice]
            adapters = self._adapters
        slots = self._slots()
        for name, _ in choice:
            if name not in adapters:  # unloaded since it was asked for
                known(name, list(adapters))
        blended = blend([(adapters[name], weight) for name, weight in choice])
        made = self._runs.hold(slots.feeds(blended))
        with self._lock:
            if all(self._adapters.get(name) is adapters[name] for name, _ in choice):  # none was loaded anew meanwhile
                self._keep(choice, made)
        return made

    def _keep(self, choice: tuple[tuple[str, float], ...], made: Any) -> None:
        """Held from now on, and the one that was used longest ago no more. With the lock."""
        self._held[choice] = made
        while len(self._held) > max(self.resident, 0):
            self._held.popitem(last=False)

    def _drop(self, name: str) -> None:
        """Nothing is held of an adapter. With the lock."""
        for choice in [choice for choice in self._held if name in dict(choice)]:
            del self._held[choice]

    # The run.

    def _run(self, chosen: Chosen, feeds: Mapping[str, Array], outputs: Sequence[str] | None) -> dict[str, Array]:
        more = chosen.made(feeds)
        if both := feeds.keys() & (more.keys() | self._inputs):
            raise fault("LF-705", "what is chosen feeds it already", where=", ".join(sorted(both)))
        if lacking := self._asked - feeds.keys():
            raise fault("LF-705", "the feeds lack inputs of the model", where=", ".join(sorted(lacking)))
        names = list(outputs) if outputs is not None else [output.name for output in self.inference.get_outputs()]
        return dict(zip(names, self._runs.run(chosen.held, {**feeds, **more}, names), strict=True))

    def _checked(self, slots: Slots | None, captured: bool) -> Slots | None:
        """LF-705 where slots have no rank, and buffers that stay need one."""
        if captured and slots and any(slot.rank is None for slot in slots.slots.values()):
            what = f"the slots of {self.path} take any rank, and a buffer that stays has one"
            raise fault("LF-705", what, fix="attach with --pad-rank R")
        return slots

    def _slots(self) -> Slots:
        """Those that attach made; else somebody else's, for which the model is read, by onnx, when an adapter comes."""
        if self.slots is None and not self._ways.attached and self.inference.get_overridable_initializers():
            found = registry.open_base(self.path).slots  # type: ignore[attr-defined]
            self.slots = self._checked(found, isinstance(self._runs, Captured))
            self._inputs = frozenset(self.slots.inputs if self.slots else ())
        if self.slots is None:
            fix = "loraformat attach … --mode swap"
            raise fault("LF-705", f"{self.path} has no inputs for adapters that are loaded", fix=fix)
        return self.slots
