"""Names of decoder models (language models of transformers) in another framework: templates, and the links they give.

The blocks of such a model are numbered, and the modules of each have the same names. Experts may lie one by one, as in
the checkpoints of transformers, or in one parameter, as in its models since version 5; elsewhere they are stacked.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from loraformat.errors import LoraFormatError, Problem, fault
from loraformat.naming.links import Link, Seat, Share
from loraformat.naming.templates import numbered

if TYPE_CHECKING:
    from loraformat.naming.spaces import Known

__all__ = ["FIX", "Decoder", "links", "model_type", "number", "text_config"]

FIX = "give the base or its config.json: --base config.json"

_MOST = 2**16  # heads or experts: a number beyond it is none of a model
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")


@dataclass(frozen=True)
class Decoder:
    """What one architecture is called in torch and there. Paths stand before ``.weight`` and ``.bias``.

    Attributes:
        evidence: what says so, as ``table: …``.
        blocks: the path of block n, in torch and there.
        modules: path within a block, in torch → there.
        ends: path of what stands in no block, in torch → there.
        experts: path of the projection of expert e within a block → there, of the stack [E, out, in].
        stacked: torch parameter of all experts within a block → the stacks there that its rows are shared among.
        transposed: modules whose torch weight is [in, out], and there [out, in].
    """

    evidence: str
    blocks: tuple[str, str]
    modules: Mapping[str, str]
    ends: Mapping[str, str]
    experts: Mapping[str, str] = field(default_factory=dict)
    stacked: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    transposed: frozenset[str] = frozenset()


def links(decoder: Decoder, known: Known) -> Iterator[Link]:
    """The links of the adapter's keys, from torch to there.

    Raises:
        LoraFormatError: LF-603 the experts of a stack can be one torch parameter or many; LF-604 how many is not known;
            LF-606 the model has not so many.
    """
    problems: list[Problem] = []
    for key in known.adapter:
        try:
            yield from _of(key, decoder, known)
        except LoraFormatError as error:
            problems += error.problems
    if problems:
        raise LoraFormatError(problems)


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a model's config.json that is of the language model."""
    inner = config.get("text_config")
    return inner if isinstance(inner, Mapping) else config


def model_type(config: Mapping[str, Any]) -> str | None:
    """``model_type`` of the language model, where the config.json names one."""
    found = text_config(config).get("model_type")
    return found if isinstance(found, str) and found else None


def number(config: Mapping[str, Any], names: tuple[str, ...], key: str) -> int:
    """A number of the model's config.json by the first of these names that it has; LF-604 where it has none."""
    own = text_config(config)
    found = next((own[name] for name in names if own.get(name) is not None), None)
    if type(found) is not int or not 0 < found <= _MOST:
        raise fault("LF-604", f"{' or '.join(names)} of the model is not known, which this needs", where=key, fix=FIX)
    return found


def _of(key: str, decoder: Decoder, known: Known) -> Iterator[Link]:
    torch = known.adapter.names == "torch"
    stem, _, leaf = key.rpartition(".")
    for here, there in decoder.ends.items():
        if leaf in ("weight", "bias") and stem == (here if torch else there):
            yield Link(Seat(f"{here}.{leaf}"), Seat(f"{there}.{leaf}"), decoder.evidence)
    match = numbered(decoder.blocks[0 if torch else 1]).match(key)
    if match is not None:
        inner, blocks = key[match.end() :], tuple(block.replace("{n}", match[1]) for block in decoder.blocks)
        modules = [*_modules(inner, torch, blocks, decoder)]
        yield from [link for link in modules if link.here.name in known.names] or modules
        yield from _experts(key, inner, torch, blocks, decoder, known)


def _modules(inner: str, torch: bool, blocks: tuple[str, ...], decoder: Decoder) -> Iterator[Link]:
    stem, _, leaf = inner.rpartition(".")
    for here, there in decoder.modules.items() if leaf in ("weight", "bias") else ():
        if stem == (here if torch else there):
            turned = here in decoder.transposed and leaf == "weight"
            seats = (
                Seat(f"{blocks[0]}{here}.{leaf}", axes="in,out" if turned else None),
                Seat(f"{blocks[1]}{there}.{leaf}", axes="out,in" if turned else None),
            )
            yield Link(*seats, decoder.evidence)


def _experts(
    key: str, inner: str, torch: bool, blocks: tuple[str, ...], decoder: Decoder, known: Known
) -> Iterator[Link]:
    ways = [
        [*_one_by_one(key, inner, torch, blocks, decoder, known)],
        [*_in_one(inner, torch, blocks, decoder)],
    ]
    ways = [[link for link in way if not known.names or link.here.name in known.names] for way in ways]
    if all(ways) and not torch:
        names = " or ".join(way[0].here.name for way in ways)
        what = f"its experts are {names} there"
        raise fault("LF-603", what, where=key, fix="give the base, whose names decide: --base CHECKPOINT")
    yield from (link for way in ways for link in way)


def _one_by_one(
    key: str, inner: str, torch: bool, blocks: tuple[str, ...], decoder: Decoder, known: Known
) -> Iterator[Link]:
    """Each expert's own projection against its place in the stack."""
    for here, there in decoder.experts.items():
        match = numbered(f"{here}.weight").fullmatch(inner) if torch else None
        if match is None and (torch or inner != f"{there}.weight"):
            continue
        count = number(known.config, _EXPERTS, key)
        if match and int(match[1]) >= count:
            raise fault("LF-606", f"expert {match[1]} of a model with {count}", where=key, fix=FIX)
        for e in [int(match[1])] if match else range(count):
            seat = Seat(f"{blocks[1]}{there}.weight", index=(e, count), axes="batch,out,in")
            yield Link(Seat(f"{blocks[0]}{here.replace('{e}', str(e))}.weight"), seat, decoder.evidence)


def _in_one(inner: str, torch: bool, blocks: tuple[str, ...], decoder: Decoder) -> Iterator[Link]:
    """A torch parameter of all experts against the stacks that its rows are shared among."""
    for here, shares in decoder.stacked.items():
        for i, there in enumerate(shares):
            if inner == (here if torch else f"{there}.weight"):
                rows = Share(i, i + 1, len(shares)) if len(shares) > 1 else None
                yield Link(Seat(f"{blocks[0]}{here}", rows=rows), Seat(f"{blocks[1]}{there}.weight"), decoder.evidence)
