"""The header's metadata: kept word for word in ``extensions``, its notes for people in ``about`` and ``base_model``.

sd-scripts writes some ninety strings, ``ss_*`` (train_network.py) and ``modelspec.*`` (library/sai_model_spec.py). What
they say of rank and alpha is a hint that no reader looks at: the tensors rule. Beside them is kept how the alpha tensors
were stored, so that the same file can be written again.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from loraformat import canonical
from loraformat.dtypes import DTYPES, dtype_name
from loraformat.errors import fault

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[Any]

__all__ = ["AlphaForm", "Kept", "about", "base_model", "from_about", "trained_with"]

# modelspec key → field of ``about``; the first that is there counts.
_ABOUT = (
    ("title", ("modelspec.title", "ss_output_name")),
    ("license", ("modelspec.license",)),
    ("author", ("modelspec.author",)),
    ("description", ("modelspec.description",)),
    ("usage_hint", ("modelspec.usage_hint",)),
)
_LISTS = (("trigger_words", "modelspec.trigger_phrase"), ("tags", "modelspec.tags"))
_TRAINING = (
    *("network_module", "network_args", "network_dim", "network_alpha", "optimizer", "learning_rate", "unet_lr"),
    *("text_encoder_lr", "lr_scheduler", "steps", "num_epochs", "num_train_images", "resolution", "training_comment"),
)
_BASE = (("name", "ss_sd_model_name"), ("version", "ss_base_model_version"), ("architecture", "modelspec.architecture"))

_NUMBERS = DTYPES.keys() - {"BOOL", "C64"}
_MOST_AXES = 8  # torch's convolutions have five at most


@dataclass(frozen=True, slots=True)
class AlphaForm:
    """How an alpha tensor was stored: its dtype and shape, and its value where no scale comes from it."""

    dtype: str = "F32"
    shape: tuple[int, ...] = ()
    value: float | None = None

    @classmethod
    def of(cls, tensor: Array, value: float | None = None) -> AlphaForm:
        """Of a tensor."""
        return cls(dtype_name(tensor.dtype), tuple(tensor.shape), value)

    def as_json(self) -> dict[str, Any]:
        """As the extension states it."""
        out: dict[str, Any] = {"dtype": self.dtype, "shape": list(self.shape)}
        return out if self.value is None else {**out, "value": self.value}


@dataclass(frozen=True)
class Kept:
    """What a source says that is no update.

    Attributes:
        metadata: the header's strings.
        alphas: the form of a module's alpha tensor.
        axes: how many axes a module's weight has, where only its dora_scale tells.
    """

    metadata: Mapping[str, str] = field(default_factory=dict)
    alphas: Mapping[str, AlphaForm] = field(default_factory=dict)
    axes: Mapping[str, int] = field(default_factory=dict)
    usual: AlphaForm = AlphaForm()

    def alpha(self, module: str) -> AlphaForm:
        """How the alpha of a module is to be stored."""
        return self.alphas.get(module, self.usual)

    @property
    def text(self) -> str:
        """The extension: canonical JSON, with the commonest form of an alpha said once."""
        forms = Counter(form for form in self.alphas.values() if form.value is None)
        usual = forms.most_common(1)[0][0] if forms else self.usual
        rest = {module: form.as_json() for module, form in self.alphas.items() if form != usual}
        value: dict[str, Any] = {"alpha": usual.as_json(), "metadata": dict(self.metadata)}
        more = {"alphas": rest, "axes": dict(self.axes)}
        return canonical.dumps(value | {name: member for name, member in more.items() if member})

    @classmethod
    def parse(cls, text: str | None) -> Kept:
        """Of the extension's text; nothing of None. LF-508 where it is damaged."""
        if text is None:
            return cls()
        try:
            value = canonical.loads(text)
            metadata = {str(key): _string(item) for key, item in value["metadata"].items()}
            alphas = {module: _form(item) for module, item in value.get("alphas", {}).items()}
            axes = {module: _count(n) for module, n in value.get("axes", {}).items()}
            return cls(metadata, alphas, axes, _form(value["alpha"]))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise fault("LF-508", f"what was kept of the source's header is damaged: {error!r}") from None


def _string(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no string")
    return value


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value <= _MOST_AXES:
        raise ValueError(f"{value!r} is no number of axes")
    return value


def _form(value: Any) -> AlphaForm:
    dtype, shape, stated = value["dtype"], value["shape"], value.get("value")
    if dtype not in _NUMBERS or not isinstance(shape, list) or any(type(n) is not int or n != 1 for n in shape):
        raise ValueError(f"no alpha tensor is {dtype} {shape}")
    if stated is not None and not abs(float(stated)) < math.inf:
        raise ValueError(f"no alpha is {stated}")
    return AlphaForm(dtype, (1,) * _count(len(shape)), None if stated is None else float(stated))


def about(metadata: Mapping[str, str]) -> dict[str, Any]:
    """``about``: title, license, trigger_words, tags, training, and what else a person wrote. No time, no path."""
    told = _told(metadata)
    out: dict[str, Any] = {
        name: next(told[key] for key in keys if key in told)
        for name, keys in _ABOUT
        if any(key in told for key in keys)
    }
    for name, key in _LISTS:
        if words := [word.strip() for word in told.get(key, "").split(",") if word.strip()]:
            out[name] = words
    if training := {name: told[f"ss_{name}"] for name in _TRAINING if f"ss_{name}" in told}:
        out["training"] = training
    return out


def base_model(metadata: Mapping[str, str]) -> dict[str, str]:
    """``base_model``: the name, version and architecture that the header states."""
    told = _told(metadata)
    return {name: told[key] for name, key in _BASE if key in told}


def trained_with(metadata: Mapping[str, str], name: str) -> bool:
    """Whether ``ss_network_args`` has a switch on, which sd-scripts and LyCORIS write as the text "True"."""
    try:
        args = canonical.loads(metadata.get("ss_network_args", ""))
    except ValueError:
        return False
    return isinstance(args, dict) and args.get(name) in ("True", "true", True)


def from_about(notes: Mapping[str, Any]) -> dict[str, str]:
    """The ``modelspec.*`` strings of an adapter that came without any."""
    out = {keys[0]: notes[name] for name, keys in _ABOUT if isinstance(notes.get(name), str)}
    for name, key in _LISTS:
        words = notes.get(name)
        if isinstance(words, (list, tuple)) and words and all(isinstance(word, str) for word in words):
            out[key] = ", ".join(words)
    return out


def _told(metadata: Mapping[str, str]) -> dict[str, str]:
    """Without what is not said: sd-scripts writes the text of Python's None."""
    return {key: value for key, value in metadata.items() if value not in ("", "None")}
