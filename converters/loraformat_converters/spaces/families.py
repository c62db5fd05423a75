"""The image models whose parameters are known by name: their components, and what three worlds call them.

A parameter has up to three names: in a pipeline of diffusers (``unet:conv_in.weight``), in the checkpoint as published
(``model.diffusion_model.input_blocks.0.0.weight``), in a LoRA of kohya's (``lora_unet_input_blocks_0_0.weight``).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from loraformat.naming.links import Link, Seat
from loraformat_converters.spaces import encoders, mmdit
from loraformat_converters.spaces.rows import Row
from loraformat_converters.spaces.unet import unet

__all__ = ["FAMILIES", "HOMES", "Component", "Family", "kohya_name"]

_UNET = "model.diffusion_model."


@dataclass(frozen=True, slots=True)
class Component:
    """One model of a pipeline.

    Attributes:
        name: in the pipeline of diffusers.
        prefixes: what its modules begin with in kohya's files, the one that is written first.
        homes: what its parameters begin with in a published checkpoint; empty text: nothing.
        rows: its parameters.
        published: whether kohya's own files have the published names; both are read.
    """

    name: str
    prefixes: tuple[str, ...]
    homes: tuple[str, ...]
    rows: Callable[[], Iterator[Row]]
    published: bool = False


@dataclass(frozen=True)
class Family:
    """A model as its pipeline is made up."""

    name: str
    components: tuple[Component, ...]

    @functools.cached_property
    def kohya(self) -> dict[str, list[Link]]:
        """Key of a kohya file → its links, from torch (diffusers)."""
        found: dict[str, list[Link]] = {}
        for component, row in self._rows():
            key = f"{component.name}:{row.torch}"
            for prefix in component.prefixes:
                for there in (
                    Link(Seat(key), Seat(kohya_name(prefix, row.torch)), self._told),
                    Link(Seat(key, row.own), Seat(kohya_name(prefix, row.published), row.rows), self._told),
                ):
                    _add(found, there.there.name, there)
        return found

    @functools.cached_property
    def written(self) -> dict[str, list[Link]]:
        """Key of a torch model, of diffusers or as published → the links to the names that kohya's own tools write."""
        found: dict[str, list[Link]] = {}
        for component, row in self._rows():
            kohya = kohya_name(component.prefixes[0], row.published if component.published else row.torch)
            for key, here, there in (
                (f"{component.name}:{row.torch}", row.own, row.rows if component.published else None),
                *((f"{home}{row.published}", row.rows, row.own) for home in component.homes),
            ):
                if component.published and not key.startswith(f"{component.name}:"):
                    here = there = None  # both have the published tensor
                elif not component.published and key.startswith(f"{component.name}:"):
                    here = there = None
                _add(found, key, Link(Seat(key, here), Seat(kohya, there), self._told))
        return found

    @functools.cached_property
    def published(self) -> dict[str, list[Link]]:
        """Key of a torch model (diffusers) → the links to its names in a published checkpoint, one for each home."""
        found: dict[str, list[Link]] = {}
        for component, row in self._rows():
            key = f"{component.name}:{row.torch}"
            for home in component.homes:
                link = Link(Seat(key, row.own), Seat(f"{home}{row.published}", row.rows), self._told)
                found.setdefault(key, []).append(link)
        return found

    def _rows(self) -> Iterable[tuple[Component, Row]]:
        return ((component, row) for component in self.components for row in component.rows())

    @property
    def _told(self) -> str:
        return f"table: {self.name}"


def _add(found: dict[str, list[Link]], key: str, link: Link) -> None:
    """Each link once: two rows of a table may say the same of a whole parameter."""
    links = found.setdefault(key, [])
    if not any((link.here, link.there) == (other.here, other.there) for other in links):
        links.append(link)


def kohya_name(prefix: str, parameter: str) -> str:
    """What kohya calls a parameter: the module's path with every dot an underscore (sd-scripts networks/lora.py)."""
    module, _, leaf = parameter.rpartition(".")
    return f"{prefix}_{module.replace('.', '_')}.{leaf}"


def _transformer(rows: Callable[[], Iterator[Row]]) -> Component:
    """OneTrainer writes lora_transformer, with diffusers' names; diffusion_model is what ComfyUI calls it."""
    homes = (_UNET, "", "diffusion_model.")
    return Component("transformer", ("lora_unet", "lora_transformer"), homes, rows, published=True)


_SD_UNET = functools.partial(unet, (320, 640, 1280, 1280), (1, 1, 1, 0), 1)
_XL_UNET = functools.partial(unet, (320, 640, 1280), (0, 2, 10), 10, added=True)
_CLIP_L = functools.partial(encoders.clip, 12)
_CLIP_G = functools.partial(encoders.clip, 32, projection=True)
_UNET_HOMES = (_UNET, "diffusion_model.")


def _family(name: str, *components: Component) -> Family:
    return Family(name, components)


FAMILIES = (
    _family(
        "sd1",
        Component("unet", ("lora_unet",), _UNET_HOMES, _SD_UNET),
        Component("text_encoder", ("lora_te",), ("cond_stage_model.transformer.",), _CLIP_L),
    ),
    _family(
        "sd2",
        Component("unet", ("lora_unet",), _UNET_HOMES, _SD_UNET),
        Component("text_encoder", ("lora_te",), (), functools.partial(encoders.clip, 23)),
    ),
    _family(
        "sdxl",
        Component("unet", ("lora_unet",), _UNET_HOMES, _XL_UNET, published=True),
        Component("text_encoder", ("lora_te1",), ("conditioner.embedders.0.transformer.",), _CLIP_L),
        Component("text_encoder_2", ("lora_te2",), (), _CLIP_G),
    ),
    _family(
        "flux",
        _transformer(mmdit.flux),
        Component("text_encoder", ("lora_te1",), ("text_encoders.clip_l.transformer.",), _CLIP_L),
        # sd-scripts' third encoder is T5 wherever it is; OneTrainer counts those that there are (ComfyUI comfy/lora.py)
        Component("text_encoder_2", ("lora_te3", "lora_te2"), ("text_encoders.t5xxl.transformer.",), encoders.t5),
    ),
    *(
        _family(
            name,
            _transformer(rows),
            Component("text_encoder", ("lora_te1",), ("text_encoders.clip_l.transformer.",), _CLIP_L),
            Component(
                "text_encoder_2",
                ("lora_te2",),
                ("text_encoders.clip_g.transformer.",),
                _CLIP_G,
            ),
            Component("text_encoder_3", ("lora_te3",), ("text_encoders.t5xxl.transformer.",), encoders.t5),
        )
        for name, rows in (
            ("sd3-medium", functools.partial(mmdit.sd3, 24)),
            ("sd3.5-medium", functools.partial(mmdit.sd3, 24, 13, normed=True)),
            ("sd3.5-large", functools.partial(mmdit.sd3, 38, normed=True)),
        )
    ),
)

HOMES = sorted({(home, part.name) for family in FAMILIES for part in family.components for home in part.homes if home})
"""(What the parameters of a component begin with in a published checkpoint, the component)."""
