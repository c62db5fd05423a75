"""Modules that PEFT adapts without being told to, because their weight is tied to one that was chosen.

peft 0.21.2 wraps the head that is tied to the embedding beside it: with TRAINABLE_TOKENS always
(tuners/trainable_tokens/model.py, which refuses a head that is chosen as well), with LoRA where ensure_weight_tying
says so (tuners/tuners_utils.py). Its tensors are then the embedding's own, of LoRA the other way round
(tuners/lora/model.py), and the file holds them twice. That is the evidence: a configuration does not name the head.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from loraformat_converters.peft import config as configs
from loraformat_converters.peft import names
from loraformat_converters.peft.names import Name

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[Any]
    Roles = Mapping[str, Array]

__all__ = ["by_module", "followers"]


def followers(config: configs.Config | None, found: Mapping[str, Roles]) -> set[str]:
    """The modules of ``found`` (module → role → tensor) that no pattern chooses, with the tensors of one that is."""
    if config is None or not (config.method == "TRAINABLE_TOKENS" or config.value.get("ensure_weight_tying")):
        return set()
    chosen = {module for module in found if configs.targets_match(config.value.get("target_modules"), module)}
    return {module for module in found.keys() - chosen if any(_tied(found[module], found[other]) for other in chosen)}


def by_module(tensors: Iterable[tuple[str, Array]]) -> dict[str, dict[str, Array]]:
    """Module → role → tensor, of tensors by their names without PEFT's prefix."""
    found: dict[str, dict[str, Array]] = {}
    for key, tensor in tensors:
        name = names.parse(key, "")
        if isinstance(name, Name) and name.role is not None:
            found.setdefault(name.module, {})[name.role] = tensor
    return found


def _tied(head: Roles, embedding: Roles) -> bool:
    """Whether a head's tensors are those of an embedding: rows as they are, factors transposed and exchanged."""
    rows = "trainable_tokens_delta"
    if rows in head and rows in embedding:
        return np.array_equal(head[rows], embedding[rows])
    pairs = (("lora_A.weight", "lora_embedding_B"), ("lora_B.weight", "lora_embedding_A"))
    return all(
        one in head and other in embedding and np.array_equal(head[one], embedding[other].T) for one, other in pairs
    )
