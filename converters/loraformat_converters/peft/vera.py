"""VeRA: one projection for all modules, scaled on both sides for each: ΔW = (λ_b ⊙ B[:out]) · (λ_d ⊙ A[:, :in]).

Exactly a LoRA, where the projection is at hand (``save_projection``; else PEFT draws it again with torch's generator).
The width of a module is in no tensor: the base says it, or there is only one module, whose width A has
(peft 0.21.2 tuners/vera/model.py _find_dim: A is as wide as the widest module, B as high as the highest).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from loraformat.parts import Lora
from loraformat.products import single
from loraformat_converters.peft.draft import SHAPES_TELL, Draft
from loraformat_converters.peft.names import PROJECTIONS

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat_converters.peft.names import Name

    Array = npt.NDArray[Any]
    Roles = dict[str, Array]

__all__ = ["ROLES", "read"]

ROLES = frozenset({"vera_lambda_b", "vera_lambda_d"})


def read(found: Mapping[Name, Roles], shared: Roles, draft: Draft) -> None:
    """Every adapted module of ``found``, with the projection in ``shared``, as parts of ``draft``."""
    if any(name not in shared for name in PROJECTIONS):
        fix = "train or load it with PEFT and save it with save_projection=True"
        draft.say("LF-504", "the projection is not in the file: PEFT draws it with torch's random generator", "", fix)
        return
    a, b = (shared[name] for name in PROJECTIONS)
    if not draft.sound("base_model", shared, (2,)):
        return
    for name, roles in sorted(found.items(), key=lambda item: item[0].module):
        if missing := sorted(ROLES - roles.keys()):
            draft.say("LF-303", f"{', '.join(missing)} is missing", name.module, "the file is incomplete")
        elif draft.sound(name.module, roles, (1,)):
            _add(name.module, roles["vera_lambda_b"], roles["vera_lambda_d"], a, b, len(found) == 1, draft)


def _add(module: str, lambda_b: Array, lambda_d: Array, a: Array, b: Array, alone: bool, draft: Draft) -> None:
    out, r = len(lambda_b), len(lambda_d)
    if out > b.shape[0] or r != a.shape[0] or r != b.shape[1]:
        what = f"λ_b [{out}] and λ_d [{r}] do not fit the projection {list(b.shape)} · {list(a.shape)}"
        draft.say("LF-309", what, module)
        return
    key = f"{module}.weight"
    in_ = a.shape[1] if alone else _width(draft.shapes.get(key), out)
    if in_ is None or in_ > a.shape[1]:
        what = f"how wide the module is no tensor says, only that it is at most {a.shape[1]}"
        draft.say("LF-504", what, module, SHAPES_TELL)
        return
    left = single(lambda_b)[:, None] * single(b[:out])
    right = single(lambda_d)[:, None] * single(a[:, :in_])
    draft.add(key, Lora(right, left, 1.0, "factor"), assumed=("name",))


def _width(shape: tuple[int, ...] | None, out: int) -> int | None:
    """The other size of a weight with ``out`` outputs, in either orientation."""
    if shape is None or len(shape) != 2 or out not in shape:
        return None
    return shape[1] if shape[0] == out else shape[0]
