"""Where one weight of a checkpoint lies, and how: by its name, a tie, the form in which it is stored, the configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loraformat import huggingface
from loraformat.axes import Placement
from loraformat.checkpoint.four_bits import state_name
from loraformat.checkpoint.grids import carrier, grid_of, laid, packed
from loraformat.errors import LoraFormatError, fault
from loraformat.names import nearest
from loraformat.parts import Replace
from loraformat.placing import place
from loraformat.resolve import Hints, Match
from loraformat.shapes import FLOATS

if TYPE_CHECKING:
    from loraformat.checkpoint.folder import Files
    from loraformat.updates import Update

__all__ = ["Places"]


@dataclass(frozen=True, slots=True)
class Places:
    """What is known of a checkpoint's weights.

    Attributes:
        name: of the checkpoint, for a tensor that no file of it holds.
        tied: a name that is not stored → the stored tensor that is meant.
    """

    name: str
    files: Files
    tied: Mapping[str, str]
    config: Mapping[str, Any]

    def match(self, key: str, update: Update, weight: str, rung: str, hints: Hints) -> Match:
        """The place of ``weight``, which the update's key means.

        Raises:
            LoraFormatError: LF-602 there is no such tensor; LF-604 … LF-606 how it lies; LF-608 it is packed in a form that
                is not known; LF-610 what describes such a form is damaged.
        """
        stored = self.tied.get(weight, weight)
        held = carrier(stored, self.files.homes)
        home = self.files.homes.get(held)
        grid = grid_of(held, self.files, self.config) if not update.replaces else None
        if held != stored and grid is None:
            raise packed(key, stored, self.files, self.config) or self._missing(key, weight, update)
        name, tie = (held if held != stored else weight), (f"tied: {weight} is {stored}",) if stored != weight else ()
        parameter = None
        if grid is not None and update.op is None and (own := laid(held, self.files)):
            placement, parameter, evidence = self._turned(key, update, weight, grid.shape, own, hints)
        else:
            placement, evidence = self._placed(key, update, weight, grid.shape if grid else None, hints)
        return Match(home or self.name, None, name, placement, (rung, *tie, *evidence), parameter=parameter)

    def _turned(
        self, key: str, update: Update, weight: str, shape: tuple[int, ...], own: tuple[str, str], hints: Hints
    ) -> tuple[Placement, Placement | None, tuple[str, ...]]:
        """How a matrix lies in a form that says so itself, and in the parameter, where that is the other way round."""
        said = huggingface.linear_spec(self.config, weight)
        spec = hints.spec(key) or (said[0] if said else update.placement.spec if update.placement else own[0])
        turned = spec != own[0]
        claims = [said] if said else [] if update.placement else [own]
        named, evidence = place(key, update, shape[::-1] if turned else shape, hints.spec(key), claims)
        return Placement.of(shape, own[0]), named if turned else None, tuple(dict.fromkeys((*evidence, own[1])))

    def _placed(
        self, key: str, update: Update, weight: str, shape: tuple[int, ...] | None, hints: Hints
    ) -> tuple[Placement, tuple[str, ...]]:
        """Of a weight of ``shape`` where it is stored in few bits, else of that of its tensor."""
        stored = self.tied.get(weight, weight)
        home = self.files.homes.get(stored)
        new = next((part for part in update.parts if isinstance(part, Replace)), None)
        if home is None:
            if new is not None and "add" in new.allows:
                added = new.replace.shape
                return Placement(added, (0,), tuple(range(1, len(added)))), ("the adapter adds it",)
            raise packed(key, weight, self.files, self.config) or self._missing(key, weight, update)
        info = self.files.shards[home].infos[stored]
        other = info.dtype not in (*FLOATS, "I8") or state_name(stored, self.files.homes) is not None
        if shape is None and other and not update.replaces and (error := packed(key, stored, self.files, self.config)):
            raise error  # its axes are not those of the weight
        shape = shape or info.shape
        if new is not None and "resize" in new.allows:
            shape = new.replace.shape
        linear = len(shape) == 2 and update.op is None and update.additive
        spec = huggingface.linear_spec(self.config, weight) if linear else None
        return place(key, update, shape, hints.spec(key), [*([spec] if spec else []), *hints.claims(key, update)])

    def _missing(self, key: str, weight: str, update: Update) -> LoraFormatError:
        names = (*self.files.homes, *self.tied)
        close = nearest(weight, names)
        stack, _, _ = weight.rpartition(".")
        if stack.endswith("experts") and any(".experts.0." in name for name in names):
            # transformers 5.23 conversion_mapping.py: MergeModulelist stacks the experts of a checkpoint on loading.
            what = (
                f"the base has no tensor {weight}: it stores each expert by itself, and the adapter changes their stack"
            )
            return fault(
                "LF-602",
                what,
                where=key,
                fix="loraformat retarget ADAPTER --base BASE -o OUT takes the stack apart: merge OUT",
            )
        why = " (the name was assumed from the module's path)" if "name" in update.assumed else ""
        stub = f'--names map.json with {{"{key}": "{close[0] if close else "NAME"}"}}'
        return fault(
            "LF-602",
            f"the base has no tensor {weight}{why}; nearest: {', '.join(close) or 'none'}",
            where=key,
            fix=f"if it goes by another name there: {stub}",
        )
