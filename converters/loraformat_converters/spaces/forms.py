"""The forms in which a parameter of a pipeline is a key of torch: with its component or, in that model alone, without."""

from __future__ import annotations

from collections.abc import Iterator

__all__ = ["COMPONENTS", "canonical", "forms", "split_key"]

COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
"""What the pipelines of diffusers call the models that LoRAs are trained for."""

_TEXT = "text_model."
"""A module of transformers' CLIP text model that version 5 no longer has, and the files of its weights still name."""


def split_key(key: str) -> tuple[str | None, str]:
    """A key's component, if it is one of an image model's, and the rest.

    >>> split_key("unet:conv_in.weight"), split_key("conv_in.weight")
    (('unet', 'conv_in.weight'), (None, 'conv_in.weight'))
    """
    component, colon, name = key.partition(":")
    return (component, name) if colon and component in COMPONENTS and name else (None, key)


def forms(key: str) -> Iterator[str]:
    """The keys by which a model may have the parameter that a table calls ``key``.

    >>> list(forms("text_encoder:text_model.final_layer_norm.bias"))[1:3]
    ['text_model.final_layer_norm.bias', 'text_encoder:final_layer_norm.bias']
    """
    component, name = split_key(key)
    names = [name, name.removeprefix(_TEXT)] if name.startswith(_TEXT) else [name]
    for spelt in names:
        yield f"{component}:{spelt}"
        yield spelt


def canonical(key: str) -> Iterator[str]:
    """The keys of a table that ``key`` may be a form of; several components have the same names."""
    component, name = split_key(key)
    for of in COMPONENTS if component is None else (component,):
        yield f"{of}:{name}"
        if of.startswith("text_encoder") and not name.startswith(_TEXT):
            yield f"{of}:{_TEXT}{name}"
