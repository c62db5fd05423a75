"""All slots of a model: what they are fed of an adapter, and the way back.

``slot`` is one of them, ``slot_names`` what they are called.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from loraformat import canonical
from loraformat.errors import LoraFormatError, Problem, fault
from loraformat.likeness import unlike
from loraformat.names import nearest
from loraformat.parts import Magnitude
from loraformat.sketch import SIZE
from loraformat_converters.onnx.attaching.pairs import folded, laid
from loraformat_converters.onnx.attaching.slot import Gain, Slot
from loraformat_converters.onnx.tort import version_of

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat.adapter import Adapter
    from loraformat.updates import Update

    Array = npt.NDArray[Any]
    Norms = Callable[[Gain, Update], Array]

__all__ = ["OWN", "Fed", "Slots", "check_taken"]

OWN = "keep the adapter's own file"


@dataclass(frozen=True)
class Fed:
    """An adapter as slots take it: a plain pair of each target.

    Attributes:
        gains: m/‖V‖ − 1 [out] of the targets that were DoRAs; their B is multiplied by m/‖V‖.
    """

    pairs: Adapter
    gains: Mapping[str, Array] = field(default_factory=dict)


@dataclass(frozen=True)
class Slots:
    """The slots, and the SHA-256 of the model without them.

    Attributes:
        sketches: of the weights that the slots stand beside, as far as they are known: where a bound adapter was attached.
    """

    slots: Mapping[str, Slot]
    base: str
    required: bool = False
    sketches: Mapping[str, Array] = field(default_factory=dict)

    @property
    def version(self) -> int:
        """What ``model_version`` says in an adapter's file that is for these slots of this model."""
        return version_of(canonical.dumps([self.base, self.as_json()["slots"]]).encode())

    @property
    def inputs(self) -> list[str]:
        """The names of all inputs."""
        return [name for slot in self.slots.values() for name in slot.inputs]

    @property
    def dtypes(self) -> dict[str, str]:
        """Input → numpy's word for its type."""
        return {name: slot.dtype for slot in self.slots.values() for name in slot.inputs}

    def off(self) -> dict[str, Array]:
        """What changes nothing, by input."""
        return {name: none for slot in self.slots.values() for name, none in slot.off().items()}

    def as_json(self) -> dict[str, Any]:
        """For the model's metadata."""
        held = {key: slot.as_json() for key, slot in self.slots.items()}
        drawn = {key: base64.b64encode(values.tobytes()).decode() for key, values in self.sketches.items()}
        return {"slots": held, "required": self.required} | ({"sketches": drawn} if drawn else {})

    @classmethod
    def from_json(cls, value: Mapping[str, Any], base: str) -> Slots:
        """The way back; ValueError, KeyError or TypeError where it is no such object."""
        slots = {key: Slot.from_json(key, entry) for key, entry in value["slots"].items()}
        sketches = {k: np.frombuffer(base64.b64decode(v), np.float32) for k, v in value.get("sketches", {}).items()}
        if any(drawn.size != SIZE for drawn in sketches.values()):
            raise ValueError("no sketch")
        return cls(slots, base, bool(value["required"]), sketches)

    def check_base(self, adapter: Adapter) -> None:
        """LF-607, LF-616 where the adapter is bound to other weights than those of the slots, as far as both are known."""
        problems = []
        for key, update in adapter.items():
            drawn = self.sketches.get(key)
            if drawn is None or update.sketch is None or not update.sketch.any():
                continue
            if problem := unlike(key, update.sketch, drawn, "the model's weight"):
                problems.append(replace(problem, fix="is this the model that it is for? any_base=True takes it"))
        if problems:
            raise LoraFormatError(problems)

    def fed(self, adapter: Adapter, norms: Norms) -> Fed:
        """The adapter with its DoRAs as pairs and gains; what no slot takes stays, for ``feeds`` to refuse.

        Args:
            norms: ‖V‖ of an update of the weight beside a slot. Only DoRAs need it.

        Raises:
            LoraFormatError: LF-606 a magnitude of other sizes than its own pair; LF-608 V cannot be computed.
        """
        targets, gains = dict(adapter.items()), {}
        for key, update in adapter.items():
            slot = self.slots.get(key)
            if slot is None or slot.gain is None or not _is_dora(update):
                continue
            if update.matrix_shape() != slot.matrix_shape:
                targets[key] = replace(update, parts=(update["lora"],))  # the pair's sizes are told
            elif update["magnitude"].magnitude.size != slot.matrix_shape[0]:
                what = f"its magnitude is {list(update['magnitude'].magnitude.shape)}, and W has {slot.matrix_shape[0]} rows"
                raise fault("LF-606", what, where=key, fix="is this the base that the adapter was trained on?")
            else:
                with np.errstate(divide="ignore", invalid="ignore"):  # ``feeds`` refuses what is not finite
                    ratio = update["magnitude"].magnitude.astype(np.float64) / norms(slot.gain, update)
                    gains[key], targets[key] = ratio - 1, _rescaled(update, ratio)
        return Fed(replace(adapter, targets=targets), gains)

    def feeds(self, fed: Fed) -> dict[str, Array]:
        """Input → values: of the slots that the adapter has; of all where the model requires them.

        Raises:
            LoraFormatError: LF-602 a target without a slot; LF-508 a change that the slot does not take; LF-606, LF-612.
        """
        problems: list[Problem] = []
        found: dict[str, Array] = self.off() if self.required else {}
        for key, update in fed.pairs.items():
            try:
                slot = self.slots.get(key) or self._missing(key)
                if slot.gain is None and _is_dora(update):
                    fix = "attach again with this adapter among the others, or --to-lora R, whose residual is printed"
                    raise fault("LF-508", "the model's slot has no input for a magnitude", where=key, fix=fix)
                found |= slot.feeds(
                    *laid(key, folded(update, slot.scale), slot.form, slot.a_shape[2:]), fed.gains.get(key)
                )
            except LoraFormatError as error:
                problems += error.problems
        if problems:
            raise LoraFormatError(problems)
        return found

    def read(self, tensors: Mapping[str, Array]) -> Fed:
        """The way back, without what fills a rank up.

        Raises:
            LoraFormatError: LF-602 a tensor that no slot takes; LF-606 sizes that do not fit.
        """
        from loraformat.adapter import Adapter
        from loraformat.updates import Update

        names = set(self.inputs)
        if strange := [name for name in tensors if name not in names]:
            raise LoraFormatError([Problem("LF-602", "the model has no input of this name", name) for name in strange])
        targets, gains = {}, {}
        for key, slot in self.slots.items():
            pair, gain = slot.read(tensors)
            if pair.r or gain is not None:
                targets[key] = Update((pair,))
            if gain is not None:
                gains[key] = gain
        return Fed(Adapter(targets), gains)

    def trained(self, fed: Fed, norms: Norms) -> Adapter:
        """The adapter of which ``fed`` was made, within one rounding: with the magnitude m = (1 + gain)·‖V‖ where there is a gain.

        Raises:
            LoraFormatError: LF-506 a gain of −1, behind which nothing is left of B; LF-608 V cannot be computed.
        """
        targets = dict(fed.pairs.items())
        for key, gain in fed.gains.items():
            ratio, slot = 1 + gain.astype(np.float64), self.slots[key]
            if not ratio.all() or slot.gain is None:
                raise fault("LF-506", "m/‖V‖ is 0 in places: what B was there is lost", where=key, fix=OWN)
            update = _rescaled(targets[key], 1 / ratio)
            b = update["lora"].lora_B.astype(targets[key]["lora"].lora_B.dtype)
            update = replace(update, parts=(replace(update["lora"], lora_B=b), Magnitude(ratio)))
            length = Magnitude((ratio * norms(slot.gain, update)).astype(np.float32))
            targets[key] = replace(update, parts=(update["lora"], length))
        return replace(fed.pairs, targets=targets)

    def _missing(self, key: str) -> Slot:
        close = nearest(key, self.slots, 2)
        near = f"; nearest: {', '.join(close)}" if close else ""
        fix = "attach again with --targets, or with this adapter among the others"
        raise fault("LF-602", f"the model has no slot for it{near}", where=key, fix=fix)


def check_taken(wanted: Mapping[str, str], taken: Mapping[str, str], path: str) -> None:
    """LF-613 where another tool has taken inputs away that attach made, or has given them another type.

    Args:
        wanted: input → type, as attach made it.
        taken: the same of the model as it is.
    """
    if gone := [name for name in wanted if name not in taken]:
        what = f"{path} has no input {gone[0]} any more: another tool made a constant of its default"
        fix = (
            "run onnxslim, onnxsim and quantisers first, then attach; or attach --slots required, which have no default"
        )
        raise fault("LF-613", what, fix=fix)
    if other := [name for name in wanted if taken[name] != wanted[name]]:
        what = f"{path} takes {other[0]} as {taken[other[0]]}, and was attached to with {wanted[other[0]]}"
        raise fault("LF-613", what, fix="convert the model to another type first, then attach")


def _is_dora(update: Update) -> bool:
    """A pair and a magnitude of its out axes."""
    return update.kind == "dora" and update["magnitude"].magnitude_axes is None and update["lora"].mid is None


def _rescaled(update: Update, ratio: Array) -> Update:
    """The pair alone, its B times the ratio and the scale: in float64, so that the slot's dtype rounds once."""
    part = update["lora"]
    b = part.lora_B.astype(np.float64) * (ratio.reshape(-1, 1) * part.scale)
    return replace(update, parts=(replace(part, lora_B=b, alpha=1.0, scale_rule="factor"),))
