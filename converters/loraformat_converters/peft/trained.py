"""What was trained as a whole: modules_to_save, biases, saved embedding layers (``replace``), token rows (``rows``).

Their tensors hold absolute values, not differences, and only the names and the configuration say which they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from loraformat.faults import brief
from loraformat.parts import Replace, Rows

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat_converters.peft.draft import Draft
    from loraformat_converters.peft.names import Name

    Array = npt.NDArray[Any]
    Roles = dict[str, Array]

__all__ = ["indices_of", "read_parameters", "read_tokens"]

# peft 0.21.2 utils/constants.py EMBEDDING_LAYER_NAMES: saved whole where they are targeted or the vocabulary grew.
_EMBEDDINGS = ("embed_tokens", "lm_head")


def read_parameters(found: Mapping[Name, Array], draft: Draft) -> None:
    """Every parameter in ``found`` is replaced; one that nothing explains warns, and must end like a parameter."""
    for name, value in found.items():
        module, _, leaf = name.module.rpartition(".")
        allows = _explained(name, module, leaf, draft)
        if allows is None and leaf not in ("weight", "bias"):
            what = "neither a role of the adapter nor a parameter of a module in modules_to_save"
            draft.say("LF-506", what, name.module, "another layout, or another version of PEFT?")
            continue
        if allows is None and draft.config:
            what = "a fully trained tensor that modules_to_save does not list: it replaces the base's"
            draft.warn("LF-507", what, name.module)
        draft.add(name.module, Replace(value, ("add", "resize") if allows is None else allows))


def _explained(name: Name, module: str, leaf: str, draft: Draft) -> tuple[str, ...] | None:
    """What a replacement may do besides, by what says that it is one; None where nothing does."""
    if name.wrappers and leaf == "weight":  # saved beside factors or rows: an embedding, or the head tied to it
        return ("resize",)
    if leaf.endswith("bias") and draft.setting("bias") in ("all", "lora_only", "vera_only"):
        return ()
    # peft 0.21.2 utils/other.py _set_trainable: a module is saved whose path *ends with* the listed letters.
    above = module.split(".")
    paths = [".".join(above[: i + 1]) for i in range(len(above))]
    listed = draft.config.names("modules_to_save") if draft.config else []
    if any(path.endswith(entry) for path in paths for entry in listed):
        return ("add", "resize")
    if above[-1] in _EMBEDDINGS and leaf == "weight":
        return ("resize",)
    return None


def read_tokens(found: Mapping[Name, Roles], draft: Draft) -> None:
    """Rows of embeddings: the indices are in the configuration, in the order of the rows."""
    for name, roles in found.items():
        values = roles["trainable_tokens_delta"]
        indices = indices_of(name.module, draft.config.value) if draft.config else None
        if indices is None:
            draft.say("LF-507", "trained token rows, and the configuration does not list their indices", name.module)
        elif not all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < 2**63 for i in indices):
            draft.say("LF-503", f"token indices must be non-negative integers, not {brief(indices)}", name.module)
        elif len(set(indices)) != len(indices):
            draft.say("LF-503", "a token index stands twice: which row counts?", name.module)
        elif draft.sound(name.module, roles, (2,)):
            if len(indices) != values.shape[0]:
                what = f"{len(indices)} token indices, and rows {list(values.shape)}"
                draft.say("LF-507", what, name.module)
                continue
            order = np.argsort(np.array(indices, np.int64))
            rows = Rows(values[order], np.array(indices, np.int64)[order])
            draft.add(f"{name.module}.weight", rows, assumed=("name",))


def indices_of(module: str, config: Mapping[str, Any]) -> list[Any] | None:
    """The token indices of an embedding, in the order of its rows; None where none are stated.

    A list means the input embeddings, an object the modules whose paths end with its keys
    (peft 0.21.2 utils/other.py 1568-1585); the method TRAINABLE_TOKENS has one list for all.
    """
    key = "token_indices" if config.get("peft_type") == "TRAINABLE_TOKENS" else "trainable_token_indices"
    stated = config.get(key)
    if isinstance(stated, dict):
        fits = [value for name, value in stated.items() if module.endswith(name)]
        stated = fits[0] if len(fits) == 1 else None
    return stated if isinstance(stated, list) else None
