"""Adapter → loralib: the tensors that ``load_state_dict(…, strict=False)`` puts into a model of loralib's layers."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from loraformat import canonical
from loraformat.errors import LoraFormatError, Problem, fault
from loraformat.layout import Output, WriteOptions, tensors_file
from loraformat.pickled.write import write as write_torch
from loraformat_converters.loralib.convolution import viewed
from loraformat_converters.loralib.merged import blocks

if TYPE_CHECKING:
    import numpy.typing as npt

    from loraformat.adapter import Adapter
    from loraformat.updates import Update

    Array = npt.NDArray[Any]

__all__ = ["write"]

PICKLED = frozenset({".pt", ".pth", ".bin", ".ckpt"})


def write(adapter: Adapter, options: WriteOptions) -> Output:
    """One file, of ``torch.save`` where its name ends so, else safetensors; the scale, which no file holds, is told.

    Raises:
        LoraFormatError: LF-508 with everything that loralib has no layer for.
    """
    if adapter.names != "torch" or adapter.components:
        raise fault("LF-508", "loralib names torch modules of one model", fix="retarget --to torch")
    form = _Form(adapter)
    for key, update in adapter.items():
        form.put(key, update)
    if form.problems:
        raise LoraFormatError(form.problems)

    pickled = options.ending in PICKLED
    file = partial(write_torch, tensors=form.tensors) if pickled else tensors_file(form.tensors, {"format": "pt"})
    return Output({"": file}, folder=False, warnings=form.told())


class _Form:
    """What is about to be written."""

    def __init__(self, adapter: Adapter) -> None:
        self.tensors: dict[str, Array] = {}
        self.problems: list[Problem] = []
        self.scales: dict[tuple[int, float], list[str]] = {}
        kept = _kept(adapter.extensions.get("loralib"))
        self.enabled: Mapping[str, list[bool]] = kept["enable_lora"]
        self.convolutions: Mapping[str, tuple[str, int]] = kept["convolutions"]

    def put(self, key: str, update: Update) -> None:
        """One target."""
        module = key.removesuffix(".weight")
        if "replace" in update:
            self.tensors[key] = update["replace"].replace
        if "lora" not in update:
            return
        part, place = update["lora"], update.placement
        if part.mid is not None or part.lora_A.ndim != 2 or not key.endswith(".weight"):
            self.refuse(key, "loralib adapts the .weight of a module, by one pair of two axes")
        elif place is not None and len(place.shape) > 2:
            self._convolution(key, update)
        else:
            a, b, rank = part.lora_A, part.lora_B, part.r
            enabled = self.enabled.get(module)
            if enabled and (small := blocks(b, enabled)) is not None:
                b, rank = small, small.shape[1]
            self._pair(module, a, b, rank, part.scale)

    def _convolution(self, key: str, update: Update) -> None:
        part, place = update["lora"], update.placement
        assert place is not None
        shape = place.shape
        module, groups = self.convolutions.get(key, (key.removesuffix(".weight"), 1))
        if place.out != (0,) or place.in_ != (1, 2, 3) or len(shape) != 4 or shape[2] != shape[3]:
            self.refuse(key, f"loralib adapts a Conv2d [out, in, k, k], no {place.spec} of {list(shape)}")
        elif groups != 1:
            self.refuse(key, "a grouped convolution is read from loralib, and not written back")
        else:
            a, b = viewed(part.lora_A, part.lora_B, shape)
            self._pair(module, a, b, a.shape[0] // shape[2], part.scale)

    def _pair(self, module: str, a: Array, b: Array, rank: int, scale: float) -> None:
        self.tensors |= {f"{module}.lora_A": a, f"{module}.lora_B": b}
        self.scales.setdefault((rank, scale * rank), []).append(module)

    def refuse(self, key: str, what: str) -> None:
        """Note LF-508."""
        self.problems.append(Problem("LF-508", what, key))

    def told(self) -> list[Problem]:
        """Which numbers the layers must be built with, or this is another adapter."""
        return [
            Problem(
                "LF-509",
                f"loralib stores no scale: build {'the layers' if len(self.scales) == 1 else _names(modules)} "
                f"with r={rank}, lora_alpha={alpha:g}",
                severity="warning",
            )
            for (rank, alpha), modules in self.scales.items()
        ]


def _kept(text: str | None) -> dict[str, Any]:
    """What the reader kept: module → enable_lora, key → (module, groups); LF-508 where a stranger changed it."""
    try:
        value = canonical.loads(text) if text is not None else {}
        enabled = {
            str(module): [bool(part) for part in parts] for module, parts in value.get("enable_lora", {}).items()
        }
        kernels = {str(v["key"]): (str(m), int(v["groups"])) for m, v in value.get("convolutions", {}).items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise fault("LF-508", f"what was kept of loralib's layers is damaged: {error!r}") from None
    return {"enable_lora": enabled, "convolutions": kernels}


def _names(modules: list[str]) -> str:
    return modules[0] if len(modules) == 1 else f"{modules[0]} and {len(modules) - 1} more"
