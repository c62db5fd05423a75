"""What is written is loaded by llama.cpp, and the model gives PEFT's probabilities: rsLoRA and patterns too."""

import numpy as np
import pytest
from gguf_goldens import HERE
from safetensors.numpy import load_file

import loraformat as lf

pytestmark = pytest.mark.peer
llama = pytest.importorskip("xllamacpp", reason="needs the peer xllamacpp")

CASES = ("llama", "rslora_patterns", "mixtral", "qwen2", "phi3")  # permuted or not, experts, fused tensors
LENGTHS = (1, 4, 9)
WORDS = 40


def log_probabilities(model, tokens, adapter=None):
    """[lengths, words]: of the word that follows each beginning of ``tokens``, as llama.cpp computes them."""
    params = llama.CommonParams()
    params.model.path = str(model)
    params.n_ctx = params.n_batch = params.n_ubatch = 64
    params.n_parallel = params.cpuparams.n_threads = 1
    params.n_gpu_layers, params.verbosity, params.warmup = 0, -1, False
    params.cache_type_k = params.cache_type_v = llama.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = llama.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if adapter is not None:
        params.lora_adapters = [llama.CommonAdapterLoraInfo(str(adapter), 1.0)]
    server = llama.Server(params)
    found = np.full((len(LENGTHS), WORDS), np.nan)
    for row, length in zip(found, LENGTHS, strict=True):
        prompt = [int(token) for token in tokens[:length]]
        asked = {"prompt": prompt, "n_predict": 1, "n_probs": WORDS, "temperature": 0.0, "cache_prompt": False}
        answer = server.handle_completions(asked)
        for word in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
            row[word["id"]] = word["logprob"]
    return found


def by_peft(truth, name):
    logits = truth[name][0][[length - 1 for length in LENGTHS]].astype(np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def difference(case, adapter=None):
    """The largest between llama.cpp's log-probabilities and PEFT's, of the base or with the adapter."""
    truth = load_file(HERE / case / "truth.safetensors")
    found = log_probabilities(HERE / case / "base.gguf", truth["x"][0], adapter)
    return float(np.abs(found - by_peft(truth, "y" if adapter else "y_base")).max())


@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_gives_pefts_probabilities(case, tmp_path):
    lf.convert(HERE / case / "peft", tmp_path / "a.gguf", base=HERE / case / "config.json")
    assert difference(case) <= 1e-5  # the model itself
    assert difference(case, tmp_path / "a.gguf") <= 1e-5


def test_the_adapter_changes_them_by_much():
    """By ten thousand times what is allowed: a scale that is off by a thousandth would be seen."""
    for case in CASES:
        truth = load_file(HERE / case / "truth.safetensors")
        assert np.abs(by_peft(truth, "y") - by_peft(truth, "y_base")).max() > 0.2


def test_rows_in_the_order_of_transformers_would_be_seen(tmp_path, monkeypatch):
    from loraformat_converters.gguf import names

    monkeypatch.setattr(names, "interleaved", lambda rows, heads: np.arange(rows))
    lf.convert(HERE / "llama" / "peft", tmp_path / "a.gguf", base=HERE / "llama" / "config.json")
    assert difference("llama", tmp_path / "a.gguf") > 1e-2


def test_sixteen_bits_are_loaded_too(tmp_path):
    from loraformat.verbs.adapt import adapt

    for dtype, most in (("float16", 1e-2), ("bfloat16", 5e-2)):
        path = tmp_path / f"{dtype}.gguf"
        config = HERE / "llama" / "config.json"
        lf.convert(HERE / "llama" / "peft", path, base=config, adapt=lambda a, d=dtype: adapt(a, dtype=d))
        assert difference("llama", path) <= most
