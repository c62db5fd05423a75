"""What is trained or stored beside the pairs: biases, modules, tokens, resized vocabularies."""

from __future__ import annotations

import peft
import torch
from case import BLOCK_LINEARS, Case, tokens, vectors
from models import blocks, chain, its_causal_base, its_smaller_base, llama, llama_classifier, resized_llama
from peft import LoraConfig, TaskType
from torch import nn

X20 = vectors(3, 20)

TRAINED: tuple[Case, ...] = (
    Case(
        "embedding_saved",
        llama(1),
        LoraConfig(
            r=5,
            lora_alpha=8,
            task_type=TaskType.CAUSAL_LM,
            target_modules=["embed_tokens", "lm_head", "k_proj"],
        ),
        tokens(31, 2, 5),
        note="save_embedding_layers='auto' wrote the base weights of the embeddings beside A and B",
    ),
    Case(
        "lora_bias",
        blocks(),
        LoraConfig(r=6, lora_alpha=9, lora_bias=True, init_lora_weights=False, target_modules=BLOCK_LINEARS),
        X20,
    ),
    Case("bias_all", blocks(), LoraConfig(r=6, lora_alpha=9, bias="all", target_modules=BLOCK_LINEARS), X20),
    Case(
        "bias_lora_only",
        blocks(),
        LoraConfig(r=6, lora_alpha=9, bias="lora_only", target_modules=BLOCK_LINEARS),
        X20,
    ),
    Case(
        "modules_to_save",
        blocks(),
        LoraConfig(r=6, lora_alpha=9, modules_to_save=["head"], target_modules=BLOCK_LINEARS),
        X20,
    ),
    Case(
        "seq_cls",
        llama_classifier,
        LoraConfig(r=5, lora_alpha=8, task_type=TaskType.SEQ_CLS, target_modules=["q_proj", "v_proj"]),
        tokens(31, 2, 7),
        base=its_causal_base,
        note="the base is the language model, which has lm_head.weight and no score.weight",
    ),
    Case(
        "trainable_tokens",
        chain(tok__embed=nn.Embedding(37, 20), lm__proj_2=nn.Linear(20, 12)),
        LoraConfig(
            r=6,
            lora_alpha=9,
            target_modules=["proj_2"],
            trainable_token_indices={"tok.embed": [30, 3, 11]},
        ),
        lambda rng: torch.cat([torch.tensor([[3, 11, 30]]), rng.ids(1, 37, 1, 3)], dim=1),
    ),
    Case(
        "trainable_tokens_tied",
        llama(1, tied=True),
        LoraConfig(
            r=5,
            lora_alpha=8,
            task_type=TaskType.CAUSAL_LM,
            target_modules=["q_proj"],
            trainable_token_indices=[7, 3],
        ),
        lambda rng: torch.cat([torch.tensor([[3, 7]]), rng.ids(1, 31, 1, 4)], dim=1),
    ),
    Case(
        "vocabulary_resized",
        resized_llama,
        LoraConfig(r=5, lora_alpha=8, task_type=TaskType.CAUSAL_LM, target_modules=["k_proj"]),
        tokens(34, 2, 5),
        base=its_smaller_base,
        save_embeddings=True,
        note="three tokens were added before training: the base has 31 rows, the adapter holds all 34 of both"
        " embeddings, under their own names",
    ),
    Case(
        "tokens_resized",
        resized_llama,
        LoraConfig(
            r=5,
            lora_alpha=8,
            task_type=TaskType.CAUSAL_LM,
            target_modules=["k_proj"],
            trainable_token_indices=[33, 5, 31],
        ),
        lambda rng: torch.cat([torch.tensor([[33, 5, 31, 32]]), rng.ids(1, 34, 1, 3)], dim=1),
        base=its_smaller_base,
        save_embeddings=True,
    ),
    Case(
        "tokens_alone",
        chain(tok__embed=nn.Embedding(37, 20), lm__proj_2=nn.Linear(20, 12)),
        peft.TrainableTokensConfig(token_indices=[30, 3, 11], target_modules=["tok.embed"]),
        lambda rng: torch.cat([torch.tensor([[3, 11, 30]]), rng.ids(1, 37, 1, 3)], dim=1),
    ),
    Case(
        "lora_bias_and_bias",
        blocks(),
        LoraConfig(
            r=6,
            lora_alpha=9,
            bias="lora_only",
            lora_bias=True,
            init_lora_weights=False,
            target_modules=BLOCK_LINEARS,
        ),
        X20,
    ),
)
