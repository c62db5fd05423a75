"""How GGUF's names stand to torch's: by the architecture, whose rows of q and k may lie in another order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from loraformat.errors import LoraFormatError, Problem, fault
from loraformat.naming import decoders
from loraformat.naming.links import Link
from loraformat_converters.gguf import architectures, keys
from loraformat_converters.gguf.architectures import Architecture
from loraformat_converters.gguf.rotary import interleaved

if TYPE_CHECKING:
    from loraformat.naming.spaces import Known

__all__ = ["links"]

_HEADS = {"q_proj": ("num_attention_heads",), "k_proj": ("num_key_value_heads", "num_attention_heads")}


def links(known: Known) -> Iterator[Link]:
    """The links of the adapter's keys.

    Raises:
        LoraFormatError: LF-604 the architecture is not known, or the number of heads or experts that a key needs.
    """
    architecture = _architecture(known)
    problems: list[Problem] = []
    for link in decoders.links(architecture.decoder, known):
        try:
            yield _reordered(link, known) if architecture.permuted else link
        except LoraFormatError as error:
            problems += error.problems
    if problems:
        raise LoraFormatError(problems)


def _architecture(known: Known) -> Architecture:
    """By the model's config.json, else by the metadata of a model in GGUF, or of what the adapter was in GGUF."""
    if (found := architectures.by_config(known.config)) is not None:
        return found
    told = decoders.model_type(known.config)
    if told is None and (told := _stated(known)) is not None:
        experts = any("_exps." in key or ".experts" in key for key in known.adapter)
        if (found := architectures.by_gguf(told, experts=experts)) is not None:
            return found
    if told is None:
        what = "the architecture is not known, which tells the names and the order of rows in GGUF"
        raise fault("LF-604", what, fix=decoders.FIX)
    raise fault("LF-604", f"no table has the tensors of {told} in GGUF", fix="--names MAP for every target")


def _stated(known: Known) -> str | None:
    """The architecture that a model in GGUF states, or the source of a GGUF adapter."""
    if isinstance(name := known.config.get(keys.ARCHITECTURE), str) and name:
        return name
    text = known.adapter.extensions.get("gguf")
    kept = keys.restored(text).get(keys.ARCHITECTURE) if text is not None else None
    return kept.value if kept is not None and kept.type == "str" else None


def _reordered(link: Link, known: Known) -> Link:
    """The link of a query or a key with the order of its rows; any other as it is."""
    module = link.here.name.rpartition(".")[0].rpartition(".")[2]
    if module not in _HEADS:
        return link
    own = link.here.name if known.adapter.names == "torch" else link.there.name
    shape = known.adapter[own].matrix_shape()
    if shape is None:
        what = "of a query or a key whose rows lie in another order there, only factors are reordered"
        raise fault("LF-612", what, where=own, fix="--drop replace")
    heads = decoders.number(known.config, _HEADS[module], own)
    try:
        rows = interleaved(shape[-2], heads)
    except ValueError as error:
        raise fault("LF-606", str(error), where=own, fix="is this the config.json of the base?") from None
    return Link(replace(link.here, rows=rows), link.there, f"{link.evidence}, {heads} heads by config.json")
