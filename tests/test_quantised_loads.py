"""What transformers quantised with bitsandbytes, merged here, is loaded by transformers and computes with our values."""

import numpy as np
import pytest

import loraformat as lf

pytestmark = pytest.mark.peer
torch = pytest.importorskip("torch", reason="needs the peer torch")
transformers = pytest.importorskip("transformers", reason="needs the peer transformers")
pytest.importorskip("bitsandbytes", reason="needs the peer bitsandbytes")

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
FP4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}
INT8 = {"load_in_8bit": True}


def llama():
    """All widths are a multiple of 64: a block across two rows is read otherwise by bitsandbytes (0.50.2) with AVX-512."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(num_hidden_layers=1, vocab_size=50, tie_word_embeddings=False, **sizes)
    return transformers.LlamaForCausalLM(config), ("q_proj", "v_proj", "down_proj")


def gpt2():
    """Conv1D: the parameter is [in, out], and one of them is square."""
    config = transformers.GPT2Config(n_embd=64, n_layer=1, n_head=4, vocab_size=50, n_positions=32)
    return transformers.GPT2LMHeadModel(config), ("c_attn", "c_fc", "attn.c_proj")


def loaded(path, **how):
    """In float32 on every processor: bitsandbytes (0.50.2) multiplies in bfloat16 where one can, and some sizes not at all."""
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, device_map="cpu", **how)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def logits(model):
    with torch.no_grad():
        return model(torch.arange(7)[None]).logits.numpy()


def adapter_for(plain, base, targets):
    """A change of half the size of each weight: what survives 4 bits is seen in it."""
    draw, updates = np.random.default_rng(1), {}
    for key, place in base.linears(lf.Hints()).items():
        if key.removesuffix(".weight").endswith(targets):
            out, in_ = place.matrix_shape
            a, b = (draw.standard_normal(shape).astype(np.float32) for shape in ((2, in_), (out, 2)))
            size = 0.5 * np.linalg.norm(plain.read(key)) / np.linalg.norm(b @ a)
            updates[key] = lf.Update((lf.Lora(a, b * np.float32(size), 1.0, "factor"),))
    assert len(updates) == 3
    return lf.Adapter(updates)


@pytest.mark.parametrize(
    ("model", "how"), [(llama, NF4), (llama, FP4), (gpt2, NF4), (gpt2, INT8)], ids=lambda v: getattr(v, "__name__", "")
)
def test_transformers_computes_with_the_values_that_we_claim(model, how, tmp_path):
    torch.manual_seed(0)
    whole, targets = model()
    whole.save_pretrained(tmp_path / "plain")
    few = loaded(tmp_path / "plain", quantization_config=transformers.BitsAndBytesConfig(**how))
    few.save_pretrained(tmp_path / "few")
    plain, base = lf.open_base(tmp_path / "plain"), lf.open_base(tmp_path / "few")
    adapter = adapter_for(plain, base, targets)
    lf.merge(adapter, base, tmp_path / "merged", requantize=True)
    merged = lf.open_base(tmp_path / "merged")
    assert lf.verify(base, adapter, merged).problems == []
    state = whole.state_dict()
    for key in base.linears(lf.Hints()):
        if (known := merged.dequantised(key)) is None:
            continue
        turned = model is gpt2 and key != "lm_head.weight"
        new, old = (np.array(tensor[...].T if turned else tensor[...]) for tensor in (known, base.dequantised(key)))
        state[key].copy_(torch.from_numpy(new))
        if key in adapter:
            delta = adapter[key].matrix().T if turned else adapter[key].matrix()
            assert np.linalg.norm(new - old - delta) < 0.5 * np.linalg.norm(delta), key
    whole.eval().load_state_dict(state)
    found, wanted, before = logits(loaded(tmp_path / "merged")), logits(whole), logits(few)
    close = 0.02 if how is INT8 else 1e-5  # LLM.int8 rounds its inputs to 8 bits too
    assert np.linalg.norm(found - wanted) < close * np.linalg.norm(wanted)
    assert np.linalg.norm(found - before) > 0.1 * np.linalg.norm(before)
