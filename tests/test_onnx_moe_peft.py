"""Mixtures of experts of Transformers, exported by torch, with what PEFT trained on their stacks."""

from __future__ import annotations

import logging
import warnings

import numpy as np
import pytest
from graphs import session

torch = pytest.importorskip("torch", reason="needs torch: the peers extra")
pytest.importorskip("onnxscript", reason="needs onnxscript: the peers extra")

import loraformat as lf  # noqa: E402
from loraformat.registry import open_base  # noqa: E402
from loraformat.sketch import sketch  # noqa: E402
from loraformat.testing import relative_error  # noqa: E402
from loraformat.verbs.merge import attach, merge  # noqa: E402

pytestmark = pytest.mark.peer
SIZES = {
    "vocab_size": 29,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 22,
    "num_experts_per_tok": 2,
    "use_cache": False,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
CASES = {
    "mixtral": ("Mixtral", {"num_local_experts": 3}),
    "qwen3_moe": ("Qwen3Moe", {"num_experts": 3, "moe_intermediate_size": 10, "head_dim": 4}),
    "gpt_oss": ("GptOss", {"num_local_experts": 3, "head_dim": 4}),
}
STACKS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


class Logits(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(input_ids=ids).logits


def made(case):
    import transformers

    name, more = CASES[case]
    torch.manual_seed(5)
    config = getattr(transformers, f"{name}Config")(**SIZES, **more)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    model.set_experts_implementation("batched_mm")  # the only one that torch's exporter takes (transformers 5.23)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(scope="module", params=CASES)
def tuned(request, tmp_path_factory):
    """(the exported base, PEFT's folder with the checkpoint, ids, the base's logits, PEFT's)."""
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp(request.param)
    model, ids = made(request.param), torch.randint(3, 29, (2, 5))
    save_file(model.state_dict(), folder / "base.safetensors")  # in the names that the model has while it runs
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Logits(model), (ids,), str(folder / "base.onnx"), dynamo=True, input_names=["ids"], verbose=False
        )
        base = model(input_ids=ids).logits.numpy()
        config = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=STACKS, init_lora_weights=False)
        other = get_peft_model(model, config)
        other.save_pretrained(folder / "adapter")
        truth = other.merge_and_unload()(input_ids=ids).logits.numpy()
    return folder, ids.numpy(), base, truth


@pytest.mark.parametrize("verb", [merge, attach])
def test_the_experts_of_the_graph_are_pefts(verb, tuned, tmp_path):
    folder, ids, base, truth = tuned
    checkpoint = open_base(folder / "base.safetensors")
    adapter = lf.load(folder / "adapter", base=checkpoint)
    assert {key.rpartition(".")[2] for key in adapter} == {"weight", "gate_up_proj", "down_proj"}
    out = tmp_path / "out.onnx"
    verb(adapter, open_base(folder / "base.onnx"), out, lf.Hints(base=checkpoint))
    assert relative_error(session(folder / "base.onnx").run(None, {"ids": ids})[0], base) <= 1e-5
    assert relative_error(session(out).run(None, {"ids": ids})[0], truth) <= 1e-5
    assert relative_error(base, truth) > 0.01
    assert np.isfinite(truth).all()


def test_the_base_that_the_message_asks_for_tells_which_pair_is_whose(tuned, run):
    folder, ids, _, truth = tuned
    words = [str(folder / "adapter"), "--to", str(folder / "base.onnx"), "-o", "out.onnx"]
    told = run("attach", *words)
    assert told.code == 1
    assert "the file does not say which pair is whose" in told.err
    assert "give the base, whose shapes tell: --base" in told.err
    words += ["--base", str(folder / "base.safetensors"), "--verify"]
    assert run("resolve", words[0], "--in", words[2], *words[-3:-1]).code == 0
    assert run("attach", *words).code == 0
    assert relative_error(session("out.onnx").run(None, {"ids": ids})[0], truth) <= 1e-5


@pytest.mark.slow
def test_experts_that_genai_built_in_4_bits_are_found_in_turns_and_rounded_again(tmp_path):
    """onnxruntime-genai's builder (0.18) lays gate and up in turns, and says nothing of ``weights_prepacked``."""
    pytest.importorskip("onnxruntime_genai", reason="needs the peer onnxruntime-genai")
    import optimised
    from transformers import Lfm2MoeConfig, Lfm2MoeForCausalLM

    more = {"moe_intermediate_size": 32, "num_experts": 3, "num_dense_layers": 1, "layer_types": ["full_attention"] * 2}
    sizes = {**SIZES, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "tie_word_embeddings": True}
    torch.manual_seed(5)
    model = Lfm2MoeForCausalLM(Lfm2MoeConfig(**sizes, **more))
    model.save_pretrained(tmp_path / "checkpoint")
    optimised.build(tmp_path / "checkpoint", "int4", tmp_path / "built", architecture="Lfm2MoeForCausalLM")
    draw, targets = np.random.default_rng(2), {}
    for key, stack in model.named_parameters():
        if key.endswith(("experts.gate_up_proj", "experts.down_proj")):
            weight, place = stack.detach().numpy(), lf.Placement(tuple(stack.shape), (1,), (2,), (0,))
            a, b = (
                draw.standard_normal(s).astype(np.float32) for s in ((3, 2, place.shape[2]), (3, place.shape[1], 2))
            )
            pair = lf.Lora(a, b, float(0.3 * weight.std() / np.std(b @ a)), "factor")
            targets[key] = lf.Update((pair,), place, sketch=sketch(weight, place))
    path, out = tmp_path / "built" / "model.onnx", tmp_path / "out.onnx"
    base, adapter = open_base(path), lf.Adapter(targets)
    found = base.resolve(adapter, lf.Hints()).require().targets
    assert [places[0].handle.operator for places in found.values()] == ["com.microsoft.QMoE"] * 2
    assert merge(adapter, base, out, requantize=True).norms
    session(out)
    merged = open_base(out)
    for key, (place, *_) in found.items():
        site = merged.index.sites[place.handle.number]
        (before, _), (after, _) = base.values.read(place.handle), merged.values.read(site)
        change = targets[key].matrix()
        if key.endswith("gate_up_proj"):
            change = np.stack(np.split(change, 2, 1), 2).reshape(change.shape)
        step = np.abs(before).reshape(3, 64, -1, 32).max(-1, keepdims=True).repeat(32, -1).reshape(before.shape) / 7
        assert (np.abs(after - before - change) <= 0.51 * step).mean() > 0.9
