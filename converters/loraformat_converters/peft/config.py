"""adapter_config.json: which keys change what an adapter means, and the rank and alpha of a module.

Read off peft 0.21.2 (tuners/lora/config.py, tuners/lora/model.py, utils/other.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loraformat import canonical
from loraformat.errors import LoraFormatError, Problem, fault
from loraformat.names import nearest
from loraformat.scale import ScaleRule

if TYPE_CHECKING:
    from loraformat.source import Source

__all__ = ["FILE", "Config", "has_type", "parse", "targets_match"]

FILE = "adapter_config.json"

_TRAINING = frozenset(
    {
        *("auto_mapping", "base_model_name_or_path", "peft_type", "peft_version", "revision", "task_type"),
        *("target_modules", "exclude_modules", "layers_pattern", "layers_to_transform", "fan_in_fan_out"),
        *("corda_config", "eva_config", "loftq_config", "lora_ga_config", "qalora_group_size"),
        *("ensure_weight_tying", "inference_mode", "lora_dropout", "merge_weights", "runtime_config"),
        *("megatron_config", "megatron_core"),
    }
)
_OWNED = frozenset({"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights"})
# Key → what a value other than null, false or empty means. Each is refused: ignored, it would give wrong numbers.
_MEANING = {
    "alora_invocation_tokens": "aLoRA acts only after certain tokens: no change of a weight says that",
    "arrow_config": "Arrow routes between adapters at run time",
    "bias": "trained biases (bias={value!r}) are not read yet",
    "enable_lora": "the legacy enable_lora of a fused projection is not read yet",
    "kasa_config": "KaSA truncates the base weight and scales the factors by lora_diag",
    "layer_replication": "layer_replication changes the base's layers",
    "lora_bias": "lora_bias adds a trained bias, which is not read yet",
    "modules_to_save": "fully trained modules (modules_to_save={value!r}) are not read yet",
    "monteclora_config": "MonteCLoRA samples its factors",
    "target_parameters": "target_parameters (expert weights) are not read yet",
    "trainable_token_indices": "trained token rows are not read yet",
    "use_bdlora": "BD-LoRA's factors are block-diagonal",
    "use_dora": "DoRA is not read yet",
    "use_qalora": "QALoRA pools its input before A: no ΔW of the base's shape exists",
    "velora_config": "VeLoRA is not known to leave ΔW = s·BA",
}
_NOT_YET = frozenset({"ADALORA", "LOHA", "LOKR", "VERA"})
# peft 0.21.2 tuners/lora/layer.py: these initialisations subtract from the base weight when the adapter is created.
_MOVES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_KEEPS_BASE = frozenset({"gaussian", "eva", "orthogonal", "mica"})


@dataclass(frozen=True)
class Config:
    """A LoRA configuration whose every key is understood."""

    value: Mapping[str, Any]
    text: str

    @property
    def rule(self) -> ScaleRule:
        """rsLoRA divides by the root of the rank, of the module's own rank where a pattern gives one."""
        return "alpha/sqrt(r)" if self.value.get("use_rslora") else "alpha/r"

    def rank(self, module: str) -> int | None:
        """The rank that the configuration states for a module."""
        found: int | None = self._pattern("rank_pattern", module, self.value.get("r"))
        return found

    def alpha(self, module: str) -> float | None:
        """The alpha that the configuration states for a module."""
        found: float | None = self._pattern("alpha_pattern", module, self.value.get("lora_alpha"))
        return found

    def alphas(self, module: str) -> list[float]:
        """Every different alpha that some pattern gives to a module, the one in force first."""
        return list(dict.fromkeys(self._matches("alpha_pattern", module)))

    def _pattern(self, name: str, module: str, default: Any) -> Any:
        return next(self._matches(name, module), default)

    def _matches(self, name: str, module: str) -> Iterator[Any]:
        for pattern, value in (self.value.get(name) or {}).items():
            # peft 0.21.2 utils/other.py get_pattern_key: anchored at the end, first match in order wins
            if re.match(rf"(.*\.)?({pattern})$", module):
                yield value


def has_type(source: Source) -> bool:
    """Whether a PEFT configuration lies beside the tensors."""
    text = source.sidecar(FILE)
    return text is not None and '"peft_type"' in text


def parse(text: str, where: str = FILE) -> tuple[Config, list[Problem]]:
    """The configuration and warnings about keys that nobody here knows.

    Raises:
        LoraFormatError: LF-503 it cannot be read; LF-504 it means something that has no exact form here.
    """
    try:
        value = canonical.loads(text)
    except ValueError as error:
        raise fault("LF-503", f"not valid JSON: {error}", where=where) from None
    if not isinstance(value, dict):
        raise fault("LF-503", "not a JSON object", where=where)
    kind = value.get("peft_type")
    if kind != "LORA":
        why = "is not read yet" if kind in _NOT_YET else "is not LoRA: its change of the base has no exact form here"
        raise fault("LF-504", f"peft_type {kind} {why}", where=where, fix="LORA is read")
    problems = [*_type_problems(value, where), *_meaning_problems(value, where)]
    if problems:
        raise LoraFormatError(problems)
    return Config(value, text), list(_unknown(value, where))


def _type_problems(value: Mapping[str, Any], where: str) -> Iterator[Problem]:
    numbers = {"r": value.get("r"), "lora_alpha": value.get("lora_alpha")}
    for name in ("rank_pattern", "alpha_pattern"):
        patterns = value.get(name) or {}
        if not isinstance(patterns, dict):
            yield Problem("LF-503", f"{name} must be an object, not {patterns!r}", where)
            continue
        numbers |= {f"{name}[{p!r}]": n for p, n in patterns.items()}
        for pattern in patterns:
            try:
                re.compile(pattern)
            except (re.error, RecursionError, OverflowError) as error:
                yield Problem("LF-503", f"{name} key {pattern!r} is no regular expression: {error}", where)
    for name, number in numbers.items():
        rank = name == "r" or name.startswith("rank")
        if number is None and "[" not in name:
            continue
        if isinstance(number, bool) or not isinstance(number, int if rank else (int, float)) or (rank and number < 1):
            wanted = "a positive integer" if rank else "a number"
            yield Problem("LF-503", f"{name} must be {wanted}, not {number!r}", where)
    if not isinstance(value.get("use_rslora") or False, bool):
        yield Problem("LF-503", f"use_rslora must be true or false, not {value['use_rslora']!r}", where)


def _meaning_problems(value: Mapping[str, Any], where: str) -> Iterator[Problem]:
    for name, why in _MEANING.items():
        if value.get(name) not in (None, False, [], {}, "", "none"):
            yield Problem("LF-504", why.format(value=value[name]), f"{where}: {name}")
    init = value.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower() not in _KEEPS_BASE:
        moves = init.lower().startswith(_MOVES_BASE)
        why = (
            "moves the base weights, so ΔW of the original base is not s·BA"
            if moves
            else "is not known to keep the base"
        )
        fix = "save it with peft's path_initial_model_for_weight_conversion, which makes it a plain LoRA"
        yield Problem("LF-504", f"init_lora_weights={init!r} {why}", f"{where}: init_lora_weights", fix)


def _unknown(value: Mapping[str, Any], where: str) -> Iterator[Problem]:
    known = _TRAINING | _OWNED | frozenset(_MEANING)
    for name in value.keys() - known:
        if value[name] not in (None, False, [], {}, ""):
            hint = nearest(name, known)
            mean = f"; did you mean {hint[0]!r}?" if hint else ""
            what = f"unknown key {name!r} with the value {value[name]!r}{mean}"
            yield Problem("LF-505", what, where, "if it changes what the adapter does, the result is wrong", "warning")


def targets_match(target_modules: Any, module: str) -> bool:
    """Whether PEFT would put an adapter on ``module`` (tuners_utils.check_target_module_exists)."""
    if target_modules is None or target_modules == "all-linear":
        return True
    if isinstance(target_modules, str):
        return re.fullmatch(target_modules, module) is not None
    return any(module == t or module.endswith(f".{t}") for t in target_modules)
