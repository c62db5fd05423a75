"""An adapter of any layout as the slots of one model take it: read, compared with the model, and kept in memory."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraformat import registry
from loraformat.adapter import Adapter
from loraformat.errors import fault
from loraformat.source import open_source
from loraformat_converters.onnx import tort
from loraformat_converters.onnx.attaching.slots import Fed, Slots
from loraformat_converters.onnx.running.kept import kept

if TYPE_CHECKING:
    from loraformat.updates import Update
    from loraformat_converters.onnx.attaching.slot import Gain

__all__ = ["loaded"]


def loaded(given: Adapter | str | os.PathLike[str], slots: Slots, model: Path, any_base: bool) -> Fed:
    """What is fed of an adapter; of one that was written for a model, if it is this one.

    Raises:
        LoraFormatError: what reading says; LF-607 it was written for, or is bound to, another model; LF-606, LF-608 a
            DoRA whose norms cannot be computed.
    """
    found = _read(given, slots, model, any_base)
    return Fed(kept(found.pairs), {key: gain.copy() for key, gain in found.gains.items()})


def _read(given: Adapter | str | os.PathLike[str], slots: Slots, model: Path, any_base: bool) -> Fed:
    if not isinstance(given, Adapter):
        source = open_source(path := Path(given))
        if source.head[4:8] == tort.MAGIC:
            assert source.file is not None
            contents = tort.read(source.file)
            if contents.model_version != slots.version and not any_base:
                what = f"{path} was not written for the slots of {model}"
                raise fault("LF-607", what, fix=f"loraformat convert ADAPTER {path} --for {model}; or any_base=True")
            return slots.read(contents.tensors)
        given = registry.read_source(source)[0].adapter
    if not any_base:
        slots.check_base(given)
    opened: Any = cache(lambda: registry.open_base(model))  # for the norms of DoRAs, by onnx, and for nothing else

    def norms(gain: Gain, update: Update) -> Any:
        return opened().norms(gain, update)

    return slots.fed(given, norms)
