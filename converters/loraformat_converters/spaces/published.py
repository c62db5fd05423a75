"""Other torch names of one model: diffusers' and transformers', and those of the checkpoint as it was published."""

from __future__ import annotations

from collections.abc import Iterator

from loraformat.naming.links import Link, Seat
from loraformat.naming.spaces import TORCH, Known
from loraformat_converters.spaces.families import FAMILIES
from loraformat_converters.spaces.forms import canonical, forms

__all__ = ["Published"]


class Published:
    """Stable Diffusion 1, XL, 3 and Flux in one published file, and as a pipeline of diffusers."""

    name = TORCH
    describes = "torch: image models as they were published, and as diffusers has them"

    def links(self, known: Known) -> Iterator[Link]:
        """See ``loraformat.spaces.Space``: ``here`` is diffusers' name, in any of its forms."""
        wanted = set(known.adapter)
        for family in FAMILIES:
            for key, links in family.published.items():
                there = [link for link in links if link.there.name in known.names or link.there.name in wanted]
                for form in forms(key):
                    if form in known.names or form in wanted:
                        for link in there:
                            yield Link(Seat(form, link.here.rows), link.there, link.evidence)
        for key in wanted:  # a component named or not, CLIP's text model in it or not
            others = {form for full in canonical(key) for form in forms(full)} - {key}
            for other in sorted(others & known.names.keys()):
                yield Link(Seat(key), Seat(other), "rule: component and text_model. named or not")
