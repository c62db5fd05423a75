"""adapter_config.json: read strictly, and asked for the rank and alpha of a module.

Read off peft 0.21.2 (tuners/*/config.py, tuners/lora/model.py, utils/other.py).
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loraformat import canonical
from loraformat.errors import LoraFormatError, Problem, fault
from loraformat.faults import brief, is_number, is_rank
from loraformat.scale import ScaleRule
from loraformat_converters.peft import settings
from loraformat_converters.peft.methods import READ, why_not
from loraformat_converters.peft.pattern import Pattern

if TYPE_CHECKING:
    from loraformat.source import Source

__all__ = ["FILE", "Config", "has_type", "parse", "targets_match"]

FILE = "adapter_config.json"


@dataclass(frozen=True)
class Config:
    """A configuration whose every key is understood."""

    value: Mapping[str, Any]
    text: str

    @property
    def method(self) -> str:
        """One of ``methods.READ``."""
        return str(self.value["peft_type"])

    @property
    def rule(self) -> ScaleRule:
        """rsLoRA divides by the root of the rank, of the module's own rank where a pattern gives one."""
        return "alpha/sqrt(r)" if self.value.get("use_rslora") and self.method == "LORA" else "alpha/r"

    def rank(self, module: str) -> int | None:
        """The rank that the configuration states for a module."""
        found: int | None = next(self._matches("rank_pattern", module), self.value.get("r"))
        return found

    def alpha(self, module: str) -> float | None:
        """The alpha that the configuration states for a module."""
        name = "alpha" if self.method in ("LOHA", "LOKR") else "lora_alpha"
        found: float | None = next(self._matches("alpha_pattern", module), self.value.get(name))
        return found

    def alphas(self, module: str) -> list[float]:
        """Every different alpha that some pattern gives to a module, the one in force first."""
        return list(dict.fromkeys(self._matches("alpha_pattern", module)))

    def names(self, key: str) -> list[str]:
        """A list of names, such as ``modules_to_save``; empty where the key is off."""
        names: str | list[str] = self.value.get(key) or []
        return [names] if isinstance(names, str) else names

    def _matches(self, name: str, module: str) -> Iterator[Any]:
        for pattern, value in (self.value.get(name) or {}).items():
            try:
                found = _meant(pattern, module)
            except ValueError as error:
                raise fault("LF-503", f"{name} key {pattern!r}: {error}", where=FILE) from None
            if found:
                yield value


def _meant(pattern: str, module: str) -> bool:
    """Whether PEFT takes the pattern for this module (0.21.2 utils/other.py get_pattern_key): anchored at the end."""
    return _compiled(rf"(.*\.)?({pattern})$").starts(module)


@functools.lru_cache(maxsize=1024)
def _compiled(text: str) -> Pattern:
    return Pattern(text)


def has_type(source: Source) -> bool:
    """Whether a PEFT configuration lies beside the tensors."""
    text = source.sidecar(FILE)
    return text is not None and '"peft_type"' in text


def parse(text: str, where: str = FILE) -> tuple[Config, list[Problem]]:
    """The configuration and warnings about what may be meant otherwise.

    Raises:
        LoraFormatError: LF-503 it cannot be read; LF-504 it means something that has no exact form here; LF-507 a key
            stands in it twice, with two values.
    """
    value, repeated = _loads(text, where)
    if not isinstance(value, dict):
        raise fault("LF-503", "not a JSON object", where=where)
    method = value.get("peft_type")
    if why := why_not(method):
        raise fault("LF-504", f"peft_type {method} {why}", where=where, fix=f"read are {', '.join(READ)}")
    config = Config(value, text)
    problems = [*_type_problems(config, where), *settings.problems(config.method, value, where)]
    if problems:
        raise LoraFormatError(problems)
    return config, [*repeated, *settings.warnings(config.method, value, where)]


def _loads(text: str, where: str) -> tuple[Any, list[Problem]]:
    """The value, and a warning for each key that stands twice with one value: Python's own reader keeps the last."""
    twice: list[Problem] = []

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for key, value in pairs:
            if key in out and out[key] != value:
                what = f"the key {key!r} stands twice, with {brief(out[key])} and {brief(value)}"
                raise fault("LF-507", what, where=where, fix="delete the wrong one")
            if key in out:
                twice.append(Problem("LF-507", f"the key {key!r} stands twice", where, "", "warning"))
            out[key] = value
        return out

    try:
        value = json.loads(text, object_pairs_hook=once, parse_constant=canonical.no_constant)
        canonical.dumps(value)  # 1e999, 2^64 and lone surrogates pass as JSON, and could not be written back
    except (ValueError, RecursionError) as error:
        raise fault("LF-503", f"not valid JSON: {error or 'nested too deeply'}", where=where) from None
    return value, twice


def _type_problems(config: Config, where: str) -> Iterator[Problem]:
    value = config.value
    numbers = {name: value.get(name) for name in ("r", "init_r", "lora_alpha", "alpha")}
    # AdaLoRA's rank_pattern says which ranks were kept, and its layer looks at no alpha_pattern: see ``adalora``.
    for name in () if config.method == "ADALORA" else ("rank_pattern", "alpha_pattern"):
        patterns = value.get(name) or {}
        if not isinstance(patterns, dict):
            yield Problem("LF-503", f"{name} must be an object, not {brief(patterns)}", where)
            continue
        numbers |= {f"{name}[{brief(p)}]": n for p, n in patterns.items()}
        for pattern in patterns:
            try:
                _compiled(rf"(.*\.)?({pattern})$")
            except ValueError as error:
                yield Problem("LF-503", f"{name} key {brief(pattern)} is no regular expression to use: {error}", where)
    for name, number in numbers.items():
        wanted = is_rank if name.startswith(("r", "init_r")) else is_number
        if (number is not None or "[" in name) and not wanted(number):
            what = "a positive integer" if wanted is is_rank else "a finite number"
            yield Problem("LF-503", f"{name} must be {what}, not {brief(number)}", where)
    for name in ("modules_to_save", "target_parameters"):
        names = value.get(name) or []
        if not isinstance(names, (str, list)) or not all(isinstance(n, str) for n in names):
            yield Problem("LF-503", f"{name} must be a list of names, not {brief(names)}", where)
    for name in ("use_rslora", "use_dora", "lora_bias", "save_projection"):
        if not isinstance(value.get(name) or False, bool):
            yield Problem("LF-503", f"{name} must be true or false, not {brief(value[name])}", where)


def left_out(target_modules: Any, modules: Iterable[str]) -> list[str]:
    """The modules that PEFT puts no adapter on, so that it leaves their tensors out of what it loads; none in doubt."""
    if isinstance(target_modules, str) and target_modules != "all-linear":
        try:
            _compiled(target_modules)
        except ValueError:
            return []
    elif not isinstance(target_modules, list):
        return []
    # An nn.MultiheadAttention is meant by its own name, and has out_proj in it.
    ways = ((module, module.rpartition(".")[0]) for module in modules)
    return sorted(
        module for module, above in ways if not any(targets_match(target_modules, m) for m in (module, above))
    )


def targets_match(target_modules: Any, module: str) -> bool:
    """Whether PEFT would put an adapter on ``module`` (tuners_utils.check_target_module_exists); False in doubt."""
    if target_modules is None or target_modules == "all-linear":
        return True
    if isinstance(target_modules, str):
        try:
            return _compiled(target_modules).fills(module)
        except ValueError:
            return False
    names = target_modules if isinstance(target_modules, list) else []
    return any(module == name or module.endswith(f".{name}") for name in names)
