"""Adapter → a file that sd-scripts, LyCORIS and ComfyUI load: tensors, alphas, and the header that they came with."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from loraformat import file, serializer
from loraformat.dtypes import dtype_name, numpy_dtype, tensor_order
from loraformat.errors import LoraFormatError, Problem, fault
from loraformat.layout import Output, tensors_file
from loraformat_converters.kohya import form, header, names, readers
from loraformat_converters.kohya.header import AlphaForm, Kept

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat.adapter import Adapter
    from loraformat.updates import Update

    Array = npt.NDArray[Any]

__all__ = ["write"]


def write(adapter: Adapter) -> Output:
    """One file.

    Raises:
        LoraFormatError: LF-508 with everything that the layout cannot hold.
    """
    if adapter.names != "kohya" or adapter.components:
        what = f"names are in the space {adapter.names!r}" if adapter.names != "kohya" else "the model has components"
        fix = "loraformat retarget FILE --to kohya gives the modules the names that these files use"
        raise fault("LF-508", f"kohya's files name modules of one mangled list; here {what}", fix=fix)
    kept = Kept.parse(adapter.extensions.get("kohya"))
    problems = [
        Problem("LF-508", why[0], key, why[1])
        for key, update in adapter.items()
        if (why := form.fault(key, update, kept.axes.get(_module(key))))
    ]
    if problems:
        raise LoraFormatError(problems)
    tensors: dict[str, Array] = {}
    for key, update in adapter.items():
        tensors |= _named(key, update, adapter, kept)
    metadata = _metadata(adapter, kept, tensors)

    return Output({"": tensors_file(tensors, metadata)}, folder=False, warnings=readers.warnings(adapter))


def _module(key: str) -> str:
    return key.rpartition(".")[0]


def _named(key: str, update: Update, adapter: Adapter, kept: Kept) -> dict[str, Array]:
    """The tensors of one target by their names in the file."""
    module, _, leaf = key.rpartition(".")
    found = dict(form.tensors(key, update, kept.axes.get(module)))
    if "diff_b" in found and _is_norm(adapter.get(f"{module}.weight")):
        found["b_norm"] = found.pop("diff_b")
    if leaf == "weight" and update.additive[0].kind != "delta":
        found["alpha"] = _alpha(form.alpha(update.additive[0]), kept.alpha(module))
    return {f"{module}.{names.SPELLED[role]}": tensor for role, tensor in found.items()}


def _is_norm(update: Update | None) -> bool:
    return update is not None and update.kind == "delta" and update["delta"].delta.ndim == 1


def _alpha(value: float | None, kept: AlphaForm) -> Array:
    """An alpha tensor in the source's own dtype where that holds it, else in the first float that does.

    Every reader turns it into a Python float or into float32; of a float64 the latter keeps 24 bits.
    """
    value = (1.0 if kept.value is None else kept.value) if value is None else value
    with np.errstate(over="ignore", invalid="ignore"):
        for dtype in (numpy_dtype(kept.dtype), np.dtype(np.float32)):
            tensor = np.full(kept.shape, value).astype(dtype)
            if float(tensor.reshape(-1)[0]) == value:
                return tensor
    return np.full(kept.shape, value, np.float64)


def _metadata(adapter: Adapter, kept: Kept, tensors: Mapping[str, Array]) -> dict[str, str]:
    """The source's own strings; what they say of these tensors is said anew where it is no longer true."""
    out = {key: text for key, text in kept.metadata.items() if key != file.KEY} or header.from_about(adapter.about)
    if "sshs_model_hash" in out and out["sshs_model_hash"] != (found := _hash(tensors)):
        out["sshs_model_hash"] = found
        out.pop("sshs_legacy_hash", None)
    ranks = {str(u.rank) for u in adapter.values() if u.rank is not None}
    if ranks and "ss_network_dim" in out and out["ss_network_dim"] not in ranks:
        alphas = {f"{a:g}" for u in adapter.values() for p in u.additive if (a := form.alpha(p)) is not None}
        # sd-scripts 48d368f networks/resize_lora.py writes "Dynamic" where ranks differ
        out["ss_network_dim"] = ranks.pop() if len(ranks) == 1 else "Dynamic"
        out["ss_network_alpha"] = alphas.pop() if len(alphas) == 1 else "Dynamic"
    return out


def _hash(tensors: Mapping[str, Array]) -> str:
    """SHA-256 of the data section, by which A1111 knows a file (library/train_util.py addnet_hash_safetensors)."""
    total = hashlib.sha256()
    dtypes = {name: dtype_name(tensor.dtype) for name, tensor in tensors.items()}
    for name in tensor_order(dtypes):
        for slab in serializer.slabs(tensors[name]):
            total.update(serializer.raw(slab))
    return total.hexdigest()
