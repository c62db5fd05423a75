"""adapter_config.json of mlx-lm: every argument of the training run, of which the loader uses three.

Read off mlx-lm 0.32.2 (lora.py, tuner/utils.py load_adapters) and, for older files, off the history of mlx-examples,
where mlx-lm came from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loraformat import canonical
from loraformat.errors import LoraFormatError, Problem, fault
from loraformat.faults import brief, is_number, is_rank
from loraformat.names import nearest

if TYPE_CHECKING:
    from loraformat.source import Source

__all__ = ["FILE", "Config", "mark", "parse"]

FILE = "adapter_config.json"
TYPES = ("lora", "dora", "full")

# About the run: no number depends on them once the tensors are there. The last lines are of older versions.
_TRAINING = frozenset(
    {
        *("model", "train", "data", "seed", "batch_size", "iters", "val_batches", "learning_rate", "config"),
        *("optimizer", "optimizer_config", "steps_per_report", "steps_per_eval", "resume_adapter_file", "adapter_path"),
        *("save_every", "test", "test_batches", "max_seq_length", "grad_checkpoint", "grad_accumulation_steps"),
        *("clear_cache_threshold", "lr_schedule", "mask_prompt", "report_to", "project_name", "trust_remote_code"),
        *("adapter_file", "hf_dataset", "hf_datasets", "prompt_feature", "wandb"),
    }
)
_READ = frozenset({"fine_tune_type", "num_layers", "lora_layers", "lora_parameters", "use_dora"})
_PARAMETERS = frozenset({"rank", "scale", "alpha", "dropout", "keys"})


@dataclass(frozen=True)
class Config:
    """A configuration that was understood."""

    value: Mapping[str, Any]
    text: str

    @property
    def type(self) -> str:
        """One of ``TYPES``; before ``fine_tune_type`` (2024-09) ``use_dora`` said it."""
        old = "dora" if self.value.get("use_dora") else "lora"
        return str(self.value.get("fine_tune_type") or old)

    @property
    def rank(self) -> int | None:
        """The rank of every pair."""
        return self.parameters.get("rank")

    @property
    def parameters(self) -> Mapping[str, Any]:
        """``lora_parameters``; empty for a full fine-tune without."""
        found: Mapping[str, Any] = self.value.get("lora_parameters") or {}
        return found

    @property
    def scale(self) -> float | None:
        """What multiplies a @ b, or None where the configuration does not say it beyond doubt. See ``doubt``."""
        return None if self.doubtful else self.parameters.get("scale")

    @property
    def readings(self) -> tuple[float, ...]:
        """What the scale can be: none where it is not stated, two in doubt. See ``doubtful``."""
        alpha, scale = self.parameters.get("alpha"), self.parameters.get("scale")
        if scale is None:
            return ()
        return (scale, scale * alpha / (self.rank or 1)) if self.doubtful and alpha is not None else (scale,)

    @property
    def doubtful(self) -> bool:
        """Whether ``scale`` may not be what the pairs were multiplied by in training.

        Up to mlx-examples c457a3f8 (2024-06-02) a pair was multiplied by scale · alpha / rank, after it by scale alone;
        alpha stayed in the defaults, so in every file, until 2025-04. Of the keys ``num_layers`` and ``fine_tune_type``
        came after the change (50e5ca81, 2024-09-30): a file that has neither may be of either time.
        """
        alpha, scale, rank = (self.parameters.get(name) for name in ("alpha", "scale", "rank"))
        told = None in (alpha, scale, rank) or alpha == rank or scale == 0
        return not told and not {"num_layers", "fine_tune_type"} & self.value.keys()


def mark(source: Source) -> str | None:
    """The key by which the configuration beside the tensors is one of mlx-lm, or None."""
    text = source.sidecar(FILE)
    if text is None or '"peft_type"' in text:
        return None
    return next((key for key in ("lora_parameters", "fine_tune_type", "lora_layers") if f'"{key}"' in text), None)


def parse(text: str) -> tuple[Config, list[Problem]]:
    """The configuration, and warnings about keys that nobody here knows.

    Raises:
        LoraFormatError: LF-503 it cannot be read, or a value has not its type; LF-504 a type of fine-tuning that is
            not known.
    """
    try:
        value = canonical.loads(text)
    except ValueError as error:
        raise fault("LF-503", f"not valid JSON: {error}", where=FILE) from None
    if not isinstance(value, dict):
        raise fault("LF-503", "not a JSON object", where=FILE)
    config = Config(value, text)
    if problems := [Problem("LF-503", what, where) for what, where in _faults(value)]:
        raise LoraFormatError(problems)
    if config.type not in TYPES:
        what = f"fine_tune_type {brief(config.type)} is none of {', '.join(TYPES)}"
        raise fault("LF-504", what, where=f"{FILE}: fine_tune_type")
    return config, _unknown(value)


def _faults(value: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Values of another type than mlx-lm's."""
    parameters = value.get("lora_parameters")
    if parameters is not None and not isinstance(parameters, dict):
        return [(f"lora_parameters is {brief(parameters)}; it is an object", f"{FILE}: lora_parameters")]
    found = []
    for name in ("scale", "alpha"):
        number = (parameters or {}).get(name)
        if number is not None and not is_number(number):
            found.append((f"{name} is {brief(number)}; it is a finite number", f"{FILE}: lora_parameters.{name}"))
    rank = (parameters or {}).get("rank")
    if rank is not None and not is_rank(rank):
        found.append((f"rank is {brief(rank)}; it is an integer of at least 1", f"{FILE}: lora_parameters.rank"))
    keys = (parameters or {}).get("keys")
    if keys is not None and not (isinstance(keys, list) and all(isinstance(key, str) for key in keys)):
        found.append((f"keys is {brief(keys)}; it is a list of names", f"{FILE}: lora_parameters.keys"))
    if not isinstance(value.get("fine_tune_type") or "", str):
        found.append((f"fine_tune_type is {brief(value['fine_tune_type'])}; it is a word", f"{FILE}: fine_tune_type"))
    return found


def _unknown(value: Mapping[str, Any]) -> list[Problem]:
    """LF-505 for keys that are not mlx-lm's and that say something."""
    problems = []
    inner = value.get("lora_parameters") or {}
    for prefix, members, known in (("", value, _TRAINING | _READ), ("lora_parameters.", inner, _PARAMETERS)):
        for name in sorted(members.keys() - known):
            if members[name] in (None, False, [], {}, ""):
                continue
            hint = nearest(name, known)
            mean = f"; did you mean {hint[0]!r}?" if hint else ""
            what = f"unknown key {prefix + name!r} with the value {brief(members[name])}{mean}"
            problems.append(
                Problem("LF-505", what, FILE, "if it changes what the adapter does, the result is wrong", "warning")
            )
    return problems
