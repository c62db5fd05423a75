"""adapter_config.json: which keys change what an adapter means, and the rank and alpha of a module.

Read off peft 0.21.2 (tuners/lora/config.py, tuners/lora/model.py, utils/other.py).
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loraformat import canonical
from loraformat.errors import LoraFormatError, Problem, fault
from loraformat.names import nearest
from loraformat.scale import ScaleRule
from loraformat_converters.peft.pattern import Pattern

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
    "bias": "trained biases (bias={value}) are not read yet",
    "enable_lora": "the legacy enable_lora of a fused projection is not read yet",
    "kasa_config": "KaSA truncates the base weight and scales the factors by lora_diag",
    "layer_replication": "layer_replication changes the base's layers",
    "lora_bias": "lora_bias adds a trained bias, which is not read yet",
    "modules_to_save": "fully trained modules (modules_to_save={value}) are not read yet",
    "monteclora_config": "MonteCLoRA samples its factors",
    "target_parameters": "target_parameters (expert weights) are not read yet",
    "trainable_token_indices": "trained token rows are not read yet",
    "use_bdlora": "BD-LoRA's block-diagonal factors are not read yet",
    "use_dora": "DoRA is not read yet",
    "use_qalora": "QALoRA pools its input before A: no ΔW of the base's shape exists",
    "velora_config": "VeLoRA is not known to leave ΔW = s·BA",
}
# peft 0.21.2, by the ``merge`` of each tuner's layer.py. A type in none of these tables is refused without a why.
_NOT_YET = frozenset({"ADALORA", "LOHA", "LOKR", "TRAINABLE_TOKENS", "VERA"})
_MULTIPLIES = frozenset({"BOFT", "HIRA", "HRA", "IA3", "OFT", "ROAD"})
_PROMPTS = frozenset(
    {
        *("ADAPTION_PROMPT", "CARTRIDGE", "CPT", "MULTITASK_PROMPT_TUNING"),
        *("PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING"),
    }
)
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
            try:
                found = _meant(pattern, module)
            except ValueError as error:
                raise fault("LF-503", f"{name} key {pattern!r}: {error}", where=FILE) from None
            if found:
                yield value


# No repetition, choice or group: ``re`` itself needs no more than the square of the name's length.
_PLAIN = re.compile(r"[^*+?{|(]*")


def _meant(pattern: str, module: str) -> bool:
    """Whether PEFT takes the pattern for this module (0.21.2 utils/other.py get_pattern_key): anchored at the end."""
    whole = rf"(.*\.)?({pattern})$"
    if _PLAIN.fullmatch(pattern):
        return re.match(whole, module) is not None
    return _parsed(whole).starts(module)


@functools.lru_cache(maxsize=1024)
def _parsed(text: str) -> Pattern:
    return Pattern(text)


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
        canonical.dumps(value)  # 1e999, 2^64 and lone surrogates pass as JSON, and could not be written back
    except (ValueError, RecursionError) as error:
        raise fault("LF-503", f"not valid JSON: {error or 'nested too deeply'}", where=where) from None
    if not isinstance(value, dict):
        raise fault("LF-503", "not a JSON object", where=where)
    kind = value.get("peft_type")
    if kind != "LORA":
        raise fault("LF-504", f"peft_type {kind} {_why_not(kind)}", where=where, fix="LORA is read")
    problems = [*_type_problems(value, where), *_meaning_problems(value, where)]
    if problems:
        raise LoraFormatError(problems)
    return Config(value, text), list(_unknown(value, where))


def _why_not(kind: Any) -> str:
    if not isinstance(kind, str):
        return "says nothing: PEFT writes the method's name there"
    if kind in _NOT_YET:
        return "is not read yet"
    if kind in _MULTIPLIES:
        return "multiplies the base weight: there is no ΔW without it"
    if kind in _PROMPTS:
        return "trains prompts or prefixes: no weight of the base changes"
    return "is another method than LoRA, and is not read"


def _type_problems(value: Mapping[str, Any], where: str) -> Iterator[Problem]:
    numbers = {"r": value.get("r"), "lora_alpha": value.get("lora_alpha")}
    for name in ("rank_pattern", "alpha_pattern"):
        patterns = value.get(name) or {}
        if not isinstance(patterns, dict):
            yield Problem("LF-503", f"{name} must be an object, not {_brief(patterns)}", where)
            continue
        numbers |= {f"{name}[{_brief(p)}]": n for p, n in patterns.items()}
        for pattern in patterns:
            try:
                _parsed(rf"(.*\.)?({pattern})$")
            except ValueError as error:
                yield Problem("LF-503", f"{name} key {_brief(pattern)} is no regular expression to use: {error}", where)
    for name, number in numbers.items():
        wanted = _is_rank if name.startswith("r") else _is_alpha
        if (number is not None or "[" in name) and not wanted(number):
            what = "a positive integer" if wanted is _is_rank else "a finite number"
            yield Problem("LF-503", f"{name} must be {what}, not {_brief(number)}", where)
    if not isinstance(value.get("use_rslora") or False, bool):
        yield Problem("LF-503", f"use_rslora must be true or false, not {_brief(value['use_rslora'])}", where)


def _is_rank(number: Any) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and 1 <= number < 2**31


def _is_alpha(number: Any) -> bool:
    """A finite number that float64 holds: JSON has no limit of its own."""
    if isinstance(number, bool) or not isinstance(number, (int, float)):
        return False
    return math.isfinite(number) if isinstance(number, float) else abs(number) <= 2**53


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:119]}…"


def _meaning_problems(value: Mapping[str, Any], where: str) -> Iterator[Problem]:
    for name, why in _MEANING.items():
        if value.get(name) not in (None, False, [], {}, "", "none"):
            yield Problem("LF-504", why.format(value=_brief(value[name])), f"{where}: {name}")
    init = value.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower() not in _KEEPS_BASE:
        moves = init.lower().startswith(_MOVES_BASE)
        why = (
            "moves the base weights, so ΔW of the original base is not s·BA"
            if moves
            else "is not known to keep the base"
        )
        fix = "save it with peft's path_initial_model_for_weight_conversion, which makes it a plain LoRA"
        yield Problem("LF-504", f"init_lora_weights={_brief(init)} {why}", f"{where}: init_lora_weights", fix)


def _unknown(value: Mapping[str, Any], where: str) -> Iterator[Problem]:
    known = _TRAINING | _OWNED | frozenset(_MEANING)
    for name in sorted(value.keys() - known):
        if value[name] not in (None, False, [], {}, ""):
            hint = nearest(name, known)
            mean = f"; did you mean {hint[0]!r}?" if hint else ""
            what = f"unknown key {name!r} with the value {_brief(value[name])}{mean}"
            yield Problem("LF-505", what, where, "if it changes what the adapter does, the result is wrong", "warning")


def targets_match(target_modules: Any, module: str) -> bool:
    """Whether PEFT would put an adapter on ``module`` (tuners_utils.check_target_module_exists); False in doubt."""
    if target_modules is None or target_modules == "all-linear":
        return True
    if isinstance(target_modules, str):
        try:
            return _parsed(target_modules).fills(module)
        except ValueError:
            return False
    names = target_modules if isinstance(target_modules, list) else []
    return any(module == name or module.endswith(f".{name}") for name in names)
