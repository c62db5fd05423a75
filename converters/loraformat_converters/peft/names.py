"""The grammar of PEFT's tensor names: ``base_model.model.<module>.<role>``.

``save_pretrained`` drops the adapter's name from the key (peft 0.21.2 utils/save_and_load.py). Between the module's
path and the role may stand the wrappers that PEFT puts around a module: ``base_layer`` for a layer that an adapter
wraps (twice and more where the parameters of one module are adapted), ``token_adapter`` for trained rows. A name that
ends with no role is that of a parameter which was trained as a whole.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from loraformat.errors import Problem

__all__ = ["PREFIX", "PROJECTIONS", "Name", "parse", "prefix_of", "unwrapped"]

PREFIX = "base_model.model."
"""PeftModel's own wrapping; a model that adapters were injected into has none."""

PROJECTIONS = ("base_model.vera_A", "base_model.vera_B")
"""VeRA's shared projection belongs to no module."""

_ROLES = frozenset(
    {
        *("lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_embedding_A", "lora_embedding_B"),
        *("lora_magnitude_vector", "lora_magnitude_vector.weight"),
        *("lora_A", "lora_B", "lora_E"),  # AdaLoRA's parameters lie on the layer itself
        *(f"hada_{role}" for role in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")),
        *(f"lokr_{role}" for role in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")),
        *("vera_lambda_b", "vera_lambda_d", "trainable_tokens_delta"),
    }
)
_WRAPPERS = ("base_layer", "token_adapter")
# What else a file of a method that is read can hold, by the end of the name; the first that fits.
_REFUSED = (
    (r"\.lora_diag", "KaSA's diagonal, which also changes the base"),
    (r"\.lora_(embedding_)?[ABE]\.[^.]+(\.weight|\.bias)?", "of a live model, its adapter's name in the key"),
    (r"\.(modules_to_save|original_module)\..*", "of a live model, inside the wrapper of a saved module"),
)


@dataclass(frozen=True, slots=True)
class Name:
    """What a tensor's name says.

    Attributes:
        module: the path of the module, without wrappers; of a trained parameter, its own full name.
        role: ``lora_A.weight``, ``lora_E``, ``hada_w1_a``, …; None for a parameter that was trained as a whole.
        wrappers: the wrappers that stood in the path, in order.
        depth: how many wrappers stood directly before the role.
    """

    module: str
    role: str | None
    wrappers: tuple[str, ...] = ()
    depth: int = 0


def prefix_of(names: Iterable[str]) -> str:
    """What every name of the file begins with: ``PREFIX``, or nothing in a model without the wrapping."""
    return PREFIX if all(name.startswith(PREFIX) or name in PROJECTIONS for name in names) else ""


def unwrapped(name: str) -> str:
    """The name of a saved module's parameter, where this is that of its copy or of its original inside the wrapper.

    >>> unwrapped("m.pooler.modules_to_save.default.dense.bias")
    'm.pooler.dense.bias'
    """
    return re.sub(r"\.(modules_to_save\.[^.]+|original_module)\.", ".", name, count=1)


def parse(name: str, prefix: str) -> Name | Problem:
    """The grammar of one name, or LF-504 with what the tensor is."""
    path = name.removeprefix(prefix).split(".")
    role = None
    for length in (2, 1):
        if role is None and len(path) > length and (end := ".".join(path[-length:])) in _ROLES:
            path, role = path[:-length], end
    for ending, what in _REFUSED if role is None else ():
        if re.search(f"{ending}$", name):
            return Problem("LF-504", f"the tensor is {what}", name, "save the adapter with save_pretrained")
    depth = len(path) - max((i for i, part in enumerate(path, 1) if part not in _WRAPPERS), default=0)
    wrappers = tuple(part for part in path if part in _WRAPPERS)
    return Name(".".join(part for part in path if part not in _WRAPPERS), role, wrappers, depth if role else 0)
