"""Models of BERT and GPT-2 whose attentions ONNX Runtime's optimizer fused: swapped and stacked as PEFT computes them."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import onnx
import optimised
import pytest
from graphs import session

from loraformat import digest
from loraformat.base import Options
from loraformat.registry import load, open_base
from loraformat.strength import strengthen
from loraformat.testing import relative_error
from loraformat.verbs.bind import bind
from loraformat.verbs.graph import detach, extract
from loraformat.verbs.merge import merge, prepare
from loraformat_converters.onnx.runtime import Session

pytestmark = pytest.mark.peer


@dataclass(frozen=True)
class Given:
    """A fused model, its adapters, and the outputs of torch without an adapter (""), and of PEFT with each or a mixture."""

    path: object
    adapters: dict
    feeds: dict
    truths: dict
    attentions: int
    limit: float = 1e-5
    any_base: bool = False


MIXED = {"a": 0.7, "b": 0.4}


def gpt2(folder):
    """With a past, and two adapters of PEFT of its c_attn, which is q, k and v."""
    torch = pytest.importorskip("torch", reason="needs the peers: torch, transformers, peft")
    peft = pytest.importorskip("peft", reason="needs the peers: torch, transformers, peft")
    from exported_cached import LAYERS, CachedGpt2, texts
    from exports import randomise

    torch.manual_seed(3)
    model, feeds = CachedGpt2().eval(), texts()
    randomise(model)
    config = {"r": 4, "lora_alpha": 7, "fan_in_fan_out": True}
    kinds = {"a": config, "b": config | {"r": 3, "use_rslora": True}}
    modules = {"a": ["c_attn", "c_out"], "b": ["c_attn", "c_proj"]}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        _export(model, feeds, folder / "base.onnx")
        truths, adapted = {"": model(*feeds.values())}, None
        for name, kind in kinds.items():
            made = peft.LoraConfig(target_modules=modules[name], **kind)
            adapted = adapted or peft.get_peft_model(model, made, adapter_name=name)
            if name not in adapted.peft_config:
                adapted.add_adapter(name, made)
            adapted.set_adapter(name)
            randomise(adapted)
        adapted.add_weighted_adapter(list(MIXED), list(MIXED.values()), "mixed", combination_type="cat")
        for name in ("a", "b", "mixed"):
            adapted.set_adapter(name)
            truths[name] = adapted(*feeds.values())
        adapted.save_pretrained(folder, selected_adapters=list(MIXED))
    optimised.quiet(_fuse)(folder / "base.onnx", folder / "model.onnx")
    adapters = {name: load(folder / name) for name in MIXED}
    values = {name: [value.numpy() for value in held] for name, held in truths.items()}
    return Given(folder / "model.onnx", adapters, {k: v.numpy() for k, v in feeds.items()}, values, LAYERS)


def _export(model, feeds, path):
    import torch

    past = [name for name in feeds if name.startswith("past")]
    outs = ["logits", *(name.replace("past", "present") for name in past)]
    sizes = {name: {0: "rows", 1: "tokens"} for name in ("input_ids", "position_ids", "logits")}
    sizes |= {name: {1: "rows", 3: name[:-2]} for name in (*past, *outs[1:])} | {
        "attention_mask": {0: "rows", 1: "seen"}
    }
    names = {"input_names": list(feeds), "output_names": outs, "dynamic_axes": sizes}
    torch.onnx.export(model, tuple(feeds.values()), path, dynamo=False, opset_version=14, **names)


def _fuse(path, out):
    from onnxruntime.transformers import optimizer

    tool = optimizer.optimize_model(str(path), model_type="gpt2", num_heads=3, hidden_size=24, opt_level=0)
    tool.save_model_to_file(str(out))


def bert(given, tool, folder):
    """Its mask as lengths, with PEFT's adapter of q, k and v among others, and another of some of its targets."""
    optimised.make(tool, given, "bert", folder / "model.onnx")
    first, half = bind(load(given.adapter), open_base(given.checkpoint)), "float16" in tool
    rest = {key: update for key, update in first.items() if "key" not in key}
    adapters = {"a": first, "b": strengthen(type(first)(rest), -0.5)}
    truths = {"": [given.base], "a": [given.truth]}
    for name, strengths in (("b", {"b": 1.0}), ("mixed", MIXED)):
        put_in = [(adapters[one], strength) for one, strength in strengths.items()]
        merge(put_in, open_base(given.model), folder / f"{name}.onnx", any_base=True)
        truths[name] = session(folder / f"{name}.onnx").run(["out"], dict(given.feeds))
    return Given(folder / "model.onnx", adapters, dict(given.feeds), truths, 2, 5e-3 if half else 1e-5, half)


@pytest.fixture(scope="module", params=["gpt2", "fused", "fused, float16"])
def given(request, export, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fused")
    return gpt2(folder) if request.param == "gpt2" else bert(export("bert", "torchscript"), request.param, folder)


def put(given, out, **options):
    base = open_base(given.path)
    plan = prepare("attach", list(given.adapters.items()), base, Options(out, **options), any_base=given.any_base)
    assert f"{given.attentions} × Attention is taken apart, into MatMul and MultiHeadAttention" in plan.notes
    base.apply(plan)
    onnx.checker.check_model(out, full_check=True)
    return Session(out)


def restored(given, out):
    detach(open_base(out), out.with_name("again.onnx"))
    return out.with_name("again.onnx").read_bytes() == given.path.read_bytes()


def worst(found, wanted):
    return max(relative_error(one, other) for one, other in zip(found, wanted, strict=True))


def test_what_the_optimizer_wrote_is_swapped(given, tmp_path):
    running = put(given, tmp_path / "out.onnx", mode="swap")
    for name, adapter in given.adapters.items():
        running.load(name, adapter, any_base=given.any_base)
    before = session(given.path).run(None, given.feeds)
    for name in given.adapters:
        found = list(running.use(name).run(given.feeds).values())
        assert worst(found, given.truths[name]) <= given.limit
        assert worst(found, before) > 0.05
    assert worst(running.use(MIXED).run(given.feeds).values(), given.truths["mixed"]) <= given.limit
    assert worst(running.run(given.feeds).values(), before) <= (1e-6 if given.limit == 1e-5 else 1e-3)
    assert restored(given, tmp_path / "out.onnx")


@pytest.mark.parametrize("provider", ["cpu", "cuda"])
def test_rows_choose_in_what_the_optimizer_wrote(provider, given, tmp_path):
    running = put(given, tmp_path / "out.onnx", mode="stack", rows=("input_ids",), provider=provider)
    rows, before = len(given.feeds["input_ids"]), session(given.path).run(None, given.feeds)
    for chosen in (["", "a", "b"], ["b", "", "a"], ["a", "b", ""]):
        found = list(running.use([name or None for name in chosen[:rows]]).run(given.feeds).values())
        for row, name in enumerate(chosen[:rows]):
            wanted = given.truths[name] if name else before
            limit = given.limit if name else (1e-6 if given.limit == 1e-5 else 1e-3)
            assert relative_error(found[0][row], wanted[0][row]) <= limit
            assert all(
                relative_error(p[:, row], q[:, row]) <= limit for p, q in zip(found[1:], wanted[1:], strict=True)
            )
    for name, adapter in given.adapters.items():
        assert digest(extract(open_base(tmp_path / "out.onnx"), name=name)) == digest(adapter)
    assert restored(given, tmp_path / "out.onnx")


def test_rows_mix_in_what_the_optimizer_wrote(given, tmp_path):
    running = put(given, tmp_path / "out.onnx", mode="stack", rows=("input_ids",), select="weights")
    rows, before = len(given.feeds["input_ids"]), session(given.path).run(None, given.feeds)
    found = next(iter(running.use([MIXED, None, "b"][:rows]).run(given.feeds).values()))
    for row, name in enumerate(("mixed", "", "b")[:rows]):
        wanted = given.truths[name] if name else before
        assert relative_error(found[row], wanted[0][row]) <= given.limit
