"""kohya's names and torch's: module paths with every dot an underscore, which only the list of the modules inverts.

The list comes from the base that the user gave, else from the tables of the models that have every key of the adapter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from loraformat.naming.links import Link, Seat
from loraformat.naming.spaces import TORCH, Known
from loraformat_converters.spaces.families import FAMILIES, HOMES, Family, kohya_name
from loraformat_converters.spaces.forms import COMPONENTS, canonical, forms, split_key

__all__ = ["Kohya"]

# sd-scripts 0.9 networks/lora.py, lora_flux.py, lora_sd3.py; ComfyUI comfy/lora.py, lycoris-lora 4.1.3 for the last two.
_PREFIXES: Mapping[str, tuple[str, ...]] = {
    "unet": ("lora_unet",),
    "transformer": ("lora_unet", "lora_transformer"),
    "text_encoder": ("lora_te", "lora_te1"),
    "text_encoder_2": ("lora_te2",),
    "text_encoder_3": ("lora_te3",),
}
_TEXT = "text_model."
_BASE = "base: its names"


class Kohya:
    """The names in files of kohya's sd-scripts, and of the tools that follow it."""

    name = "kohya"
    describes = "kohya: module paths with underscores (lora_unet_…, lora_te_…)"

    def links(self, known: Known) -> Iterator[Link]:
        """See ``loraformat.spaces.Space``."""
        if known.adapter.names == TORCH:
            yield from _to_kohya(known)
        elif known.names:
            yield from _by_base(known)
        else:
            yield from _by_tables(known)


def _by_tables(known: Known) -> Iterator[Link]:
    """The models that have every key; where none has, the one that has the most, so that the rest can be named."""
    whole = [family for family in FAMILIES if all(key in family.kohya for key in known.adapter)]
    if not whole:
        whole = [max(FAMILIES, key=lambda family: sum(key in family.kohya for key in known.adapter))]
    for family in whole:
        for key in known.adapter:
            yield from family.kohya.get(key, ())


def _by_base(known: Known) -> Iterator[Link]:
    """Every name of the base as kohya spells it; and, of a model that is known, under its other names."""
    wanted = set(known.adapter)
    three = any(split_key(key)[0] == "text_encoder_3" for key in known.names)
    for key in known.names:
        component, name = split_key(key)
        for prefix, parameter in _spellings(component, name, three):
            if (own := kohya_name(prefix, parameter)) in wanted:
                yield Link(Seat(key), Seat(own), _BASE)
    for family in FAMILIES:
        for own in wanted & family.kohya.keys():
            for link in family.kohya[own]:
                for there in _in_base(family, link):
                    if there.here.name in known.names:
                        yield there


def _in_base(family: Family, link: Link) -> Iterator[Link]:
    """A table's link for the forms in which a base may have the parameter, as published too."""
    for key in forms(link.here.name):
        yield Link(Seat(key, link.here.rows), link.there, f"{link.evidence} · {_BASE}")
    if link.there.rows is None and link.here.rows is None:  # of the whole parameter, so the published rows are its own
        for home in family.published.get(link.here.name, ()):
            yield Link(home.there, Seat(link.there.name, home.here.rows), f"{link.evidence} · {_BASE}")


def _to_kohya(known: Known) -> Iterator[Link]:
    """By the models that have every key, as their tools write it; else the base's own names."""
    keys = {key: [key, *canonical(key)] for key in known.adapter}
    whole = [family for family in FAMILIES if all(any(c in family.written for c in cs) for cs in keys.values())]
    for family in _of_base(whole, known):
        for key, candidates in keys.items():
            for candidate in candidates:
                for link in family.written.get(candidate, ()):
                    yield Link(Seat(key, link.here.rows), link.there, link.evidence)
    if whole:
        return
    components = {split_key(key)[0] for key in known.names}
    for key in known.adapter:
        component, name = split_key(key)
        if key in known.names and component is not None:
            first = "lora_te1" if component == "text_encoder" and "text_encoder_2" in components else None
            yield Link(Seat(key), Seat(kohya_name(first or _PREFIXES[component][0], name)), _BASE)


def _of_base(families: list[Family], known: Known) -> list[Family]:
    """Of several models that have the adapter's keys, those that have the most of the base's."""
    if len(families) < 2 or not known.names:
        return families
    counts = [sum(any(c in f.written for c in (key, *canonical(key))) for key in known.names) for f in families]
    return [family for family, count in zip(families, counts, strict=True) if count == max(counts)]


def _spellings(component: str | None, name: str, three: bool) -> Iterator[tuple[str, str]]:
    """(prefix, parameter) under which a kohya file may have it."""
    for home, of in HOMES if component is None else ():
        if name.startswith(home):
            yield from _spellings(of, name.removeprefix(home), three)
    for of in COMPONENTS if component is None else (component,):
        prefixes = _PREFIXES[of]
        if of == "text_encoder_2" and not three:
            prefixes = (*prefixes, "lora_te3")  # the T5 of Flux
        for prefix in (*prefixes, "lycoris"):
            yield prefix, name
            if of.startswith("text_encoder") and not name.startswith(_TEXT):
                yield prefix, f"{_TEXT}{name}"  # transformers 5 has CLIP's text model without this module
