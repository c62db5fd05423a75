"""What a case is: a model, a configuration of PEFT, an input, and how to save."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from models import Rng
from peft import PeftConfig, PeftModel
from torch import Tensor, nn


@dataclass(frozen=True)
class Case:
    """One folder: a model, a PEFT configuration, an input, and how to save."""

    name: str
    model: Callable[[], nn.Module]
    config: PeftConfig
    x: Callable[[Rng], Tensor]
    adapter_name: str = "default"
    dtype: torch.dtype = torch.float32
    upcast: bool = True
    safe: bool = True
    near_init: bool = False
    base: Callable[[nn.Module], nn.Module] | None = None
    reloads: bool = True
    prepare: Callable[[PeftModel], None] | None = None
    save_embeddings: bool | str = "auto"
    convert: bool = False
    note: str = ""


def vectors(*shape: int) -> Callable[[Rng], Tensor]:
    return lambda rng: rng.normal(*shape)


def tokens(vocabulary: int, *shape: int) -> Callable[[Rng], Tensor]:
    return lambda rng: rng.ids(1, vocabulary, *shape)


LLAMA_LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BLOCK_LINEARS = ["proj_1", "mlp.fc"]
