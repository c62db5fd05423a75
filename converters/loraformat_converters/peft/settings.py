"""The keys of adapter_config.json: which of them change what an adapter means, for each method.

Read off the configuration classes of peft 0.21.2 (tuners/*/config.py) and off the layers that use them. A key that is
in none of these tables is unknown: it warns (LF-505) unless its value is null, false or empty.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from loraformat.errors import Problem
from loraformat.faults import brief
from loraformat.names import nearest

__all__ = ["EMPTY", "problems", "warnings"]

EMPTY: tuple[Any, ...] = (None, False, [], {}, "", "none")
"""What says that a setting is off."""

# About the run, the choice of modules or the training: no number depends on them once the tensors are there.
_TRAINING = frozenset(
    {
        *("auto_mapping", "base_model_name_or_path", "peft_type", "peft_version", "revision", "task_type"),
        *("target_modules", "exclude_modules", "layers_pattern", "layers_to_transform", "fan_in_fan_out"),
        "inference_mode",
    }
)
_LORA_TRAINING = frozenset(
    {
        *("corda_config", "eva_config", "loftq_config", "lora_ga_config", "qalora_group_size"),
        *("ensure_weight_tying", "lora_dropout", "merge_weights", "runtime_config"),
        *("megatron_config", "megatron_core"),
    }
)
_LORA_READ = frozenset(
    {
        *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights"),
        *("bias", "enable_lora", "lora_bias", "modules_to_save", "target_parameters", "trainable_token_indices"),
        *("use_bdlora", "use_dora"),
    }
)
_LYCORIS_TRAINING = frozenset({"rank_dropout", "module_dropout", "rank_dropout_scale", "init_weights"})
_LYCORIS_READ = frozenset({"r", "alpha", "rank_pattern", "alpha_pattern", "modules_to_save", "use_effective_conv2d"})

_KNOWN: Mapping[str, frozenset[str]] = {
    "LORA": _TRAINING | _LORA_TRAINING | _LORA_READ,
    "ADALORA": _TRAINING
    | _LORA_TRAINING
    | _LORA_READ
    | {"target_r", "init_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step"},
    "LOHA": _TRAINING | _LYCORIS_TRAINING | _LYCORIS_READ,
    "LOKR": _TRAINING | _LYCORIS_TRAINING | _LYCORIS_READ | {"decompose_both", "decompose_factor"},
    "VERA": _TRAINING
    | {"r", "bias", "modules_to_save", "save_projection", "projection_prng_key"}
    | {"vera_dropout", "d_initial", "init_weights"},
    "TRAINABLE_TOKENS": _TRAINING | {"token_indices", "init_weights"},
}

# Key → what a value other than ``EMPTY`` means. Each is refused: ignored, it would give wrong numbers.
_REFUSED = {
    "alora_invocation_tokens": "aLoRA acts only after certain tokens: no change of a weight says that",
    "arrow_config": "Arrow routes between adapters at run time",
    "kasa_config": "KaSA truncates the base weight and scales the factors by lora_diag",
    "layer_replication": "layer_replication changes the base's layers",
    "monteclora_config": "MonteCLoRA's file holds the state of a sampler, which has no place here",
    "use_qalora": "QALoRA pools its input before A: no ΔW of the base's shape exists",
    "velora_config": "VeLoRA's file holds the state of its training, which has no place here",
}
# peft 0.21.2 tuners/adalora: the layer knows nothing of these settings of LoRA, from which its configuration inherits.
_NOT_OF_ADALORA = ("enable_lora", "lora_bias", "target_parameters", "use_bdlora", "use_dora")
# peft 0.21.2 tuners/lora/layer.py: these initialisations subtract from the base weight when the adapter is created.
_MOVES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_KEEPS_BASE = frozenset({"gaussian", "eva", "orthogonal", "mica"})


def problems(method: str, value: Mapping[str, Any], where: str) -> Iterator[Problem]:
    """LF-504 for every setting that has no exact form here."""
    for name, why in _REFUSED.items():
        if value.get(name) not in EMPTY:
            yield Problem("LF-504", why, f"{where}: {name}")
    if method == "ADALORA":
        for name in _NOT_OF_ADALORA:
            if value.get(name) not in EMPTY:
                what = f"{name}={brief(value[name])} is a setting of LoRA that AdaLoRA does not know"
                yield Problem("LF-504", what, f"{where}: {name}")
    own = "vera_only" if method == "VERA" else "lora_only"
    if value.get("bias") not in (*EMPTY, "all", own):
        yield Problem("LF-504", f"bias={brief(value['bias'])} is none of none, all and {own}", f"{where}: bias")
    if value.get("use_dora") and value.get("lora_bias"):
        yield Problem("LF-504", "lora_bias with use_dora: peft 0.21.2 refuses it too", f"{where}: lora_bias")
    init = value.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower() not in _KEEPS_BASE:
        moves = init.lower().startswith(_MOVES_BASE)
        why = (
            "moves the base weights, so ΔW of the original base is not s·BA"
            if moves
            else "is not known to keep the base"
        )
        fix = "save it with peft's path_initial_model_for_weight_conversion, which makes it a plain LoRA"
        yield Problem("LF-504", f"init_lora_weights={brief(init)} {why}", f"{where}: init_lora_weights", fix)


def warnings(method: str, value: Mapping[str, Any], where: str) -> Iterator[Problem]:
    """LF-505 for every key that nobody here knows."""
    known = _KNOWN[method] | frozenset(_REFUSED)
    for name in sorted(value.keys() - known):
        if value[name] not in EMPTY:
            hint = nearest(name, known)
            mean = f"; did you mean {hint[0]!r}?" if hint else ""
            what = f"unknown key {name!r} with the value {brief(value[name])}{mean}"
            yield Problem("LF-505", what, where, "if it changes what the adapter does, the result is wrong", "warning")
