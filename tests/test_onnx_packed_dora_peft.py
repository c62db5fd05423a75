"""DoRAs of PEFT on q, k and v that onnxruntime-genai's builder packed in one product, or ONNX Runtime's optimizer in one Attention."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import optimised
import pytest
from graphs import session
from onnx import numpy_helper

import loraformat as lf
from loraformat import digest
from loraformat.base import Options
from loraformat.registry import load, open_base
from loraformat.testing import relative_error
from loraformat.verbs.bind import bind
from loraformat.verbs.graph import detach, extract
from loraformat.verbs.merge import prepare
from loraformat_converters.onnx.changing.record import Record
from loraformat_converters.onnx.effective import Effective
from loraformat_converters.onnx.runtime import Session

pytestmark = pytest.mark.peer

DORA = ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"]


@dataclass(frozen=True)
class Built:
    """What the builder wrote, the weights that it computes with, and what torch computes with these.

    Attributes:
        truths: name of an adapter, or None for the base → logits of what is not masked.
    """

    path: Path
    feeds: dict[str, np.ndarray]
    adapters: dict[str, lf.Adapter]
    truths: dict[str | None, np.ndarray]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(a Llama whose q, k and v have a bias, what it is fed, a folder of each adapter)."""
    exports = pytest.importorskip("exports", reason="needs the peers: torch, transformers, peft, onnxscript")
    pytest.importorskip("onnxruntime_genai", reason="needs the peer onnxruntime-genai")
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    torch.manual_seed(11)
    folder = tmp_path_factory.mktemp("made")
    config = exports.llama(tied=False, head_dim=16).m.config
    config.attention_bias = True
    model = LlamaForCausalLM(config).eval()
    exports.randomise(model)
    exports._save(model, folder / "checkpoint")
    kinds = {
        "dora": {"target_modules": DORA, "use_dora": True, "lora_alpha": 5},
        "plain": {"target_modules": ["q_proj", "v_proj"], "use_rslora": True},
        "dora of q": {"target_modules": ["q_proj"], "use_dora": True},
        "pair of v": {"target_modules": ["v_proj"], "lora_alpha": 3},
    }
    for name, kind in kinds.items():
        adapted = get_peft_model(model, LoraConfig(r=4, **kind))
        exports.randomise(adapted)
        if kind.get("use_dora"):  # near the norms, as training leaves them, and not at zero
            for own in adapted.modules():
                if hasattr(own, "lora_magnitude_vector") and "default" in own.lora_magnitude_vector:
                    vector = own.lora_magnitude_vector["default"].weight
                    vector.data.copy_(torch.linspace(0.7, 1.4, vector.numel()) * own.weight.norm(dim=1))
        adapted.save_pretrained(folder / name)
        model = adapted.unload()
    return folder, {name: value.numpy() for name, value in exports.tokens().items()}


CHOSEN = {None: [], "dora": ["dora"], "plain": ["plain"], "mixed": ["dora of q", "pair of v"]}
"""Which of PEFT's adapters are active at once."""


def truths(checkpoint, weights, feeds, folder):
    """What PEFT computes with each choice, unmerged, of a checkpoint with some other weights."""
    import torch
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    found = {}
    for choice, names in CHOSEN.items():
        model = LlamaForCausalLM.from_pretrained(checkpoint, attn_implementation="eager").eval()
        model.load_state_dict({name: torch.tensor(value) for name, value in weights.items()}, strict=False)
        running = model
        for n, name in enumerate(names):
            if n == 0:
                running = PeftModel.from_pretrained(model, folder / name, adapter_name=name)
            else:
                running.load_adapter(folder / name, adapter_name=name)
        if names:
            running.base_model.set_adapter(names)
        with torch.no_grad():
            given = {name: torch.tensor(value) for name, value in feeds.items()}
            found[choice] = running(**given, use_cache=False).logits.numpy()[feeds["attention_mask"].astype(bool)]
    return found


def dequantised(model):
    """Checkpoint's name → the weight that four bits stand for, by the operator's own documentation."""
    held = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    sizes, found = {"q_proj": 64, "k_proj": 32, "v_proj": 32}, {}
    for node in model.graph.node:
        if node.op_type == "MatMulNBits":
            kept = {attribute.name: attribute.i for attribute in node.attribute}
            codes, steps = held[node.input[1]], held[node.input[2]].reshape(kept["N"], -1, 1)
            values = np.stack([codes & 15, codes >> 4], -1).reshape(*codes.shape[:2], -1).astype(np.float64) - 8
            whole = (values * steps).reshape(kept["N"], -1)[:, : kept["K"]].astype(np.float32)
            name = node.input[1].removesuffix(".MatMul.weight_Q4").replace(".attn.", ".self_attn.")
            if name.endswith("qkv_proj"):
                parts = np.split(whole, np.cumsum(list(sizes.values()))[:-1])
                found |= {name.replace("qkv_proj", part) + ".weight": w for part, w in zip(sizes, parts, strict=True)}
            else:
                found[f"{name}.weight"] = whole
    return found


@pytest.fixture(scope="module")
def builder(made):
    """Precision → the builder's graph; of four bits with float sums, where its own choice for a CPU rounds x to eight."""
    (folder, feeds), known = made, {}

    def get(precision):
        if precision not in known:
            path, weights = folder / precision / "model.onnx", {}
            optimised.build(folder / "checkpoint", precision, path.parent)
            if precision == "int4":
                model = onnx.load(path)
                for node in model.graph.node:
                    for attribute in node.attribute:
                        if attribute.name == "accuracy_level":
                            attribute.i = 1
                onnx.save(model, path.with_name("floats.onnx"))
                path, weights = path.with_name("floats.onnx"), dequantised(model)
            known[precision] = Built(path, feeds, own, truths(folder / "checkpoint", weights, feeds, folder))
        return known[precision]

    checkpoint = open_base(folder / "checkpoint")
    parts = {
        choice: [bind(load(folder / name), checkpoint) for name in names] for choice, names in CHOSEN.items() if names
    }
    own = {choice: lf.Adapter({k: v for one in each for k, v in one.items()}) for choice, each in parts.items()}
    return get


@pytest.fixture(params=["fp32", "int4"])
def built(request, builder):
    return builder(request.param)


def fed(built, running):
    """The builder's inputs, with empty caches."""
    known = {value.name for value in running.get_inputs()}
    more = {name: np.zeros((2, 2, 0, 16), np.float32) for name in known if name.startswith("past_key_values")}
    return {name: value for name, value in (built.feeds | more).items() if name in known}


def shown(built, logits):
    return logits[built.feeds["attention_mask"].astype(bool)]


def put(built, adapters, out, verb="attach", **options):
    base = open_base(built.path)
    plan = prepare(verb, adapters, base, Options(out, **options))
    base.apply(plan)
    assert any(match.rows for places in plan.jobs[0].resolution.targets.values() for match in places)
    return base


def comes_out(base, out, adapters):
    for name, adapter in adapters:
        assert digest(extract(open_base(out), name=name)) == digest(adapter)
    detach(open_base(out), out.with_name("again.onnx"))
    assert open_base(out.with_name("again.onnx")).identity == base.identity


def computes(built, choice, out):
    for optimise in (True, False):
        running = session(out, optimise=optimise)
        found = shown(built, running.run(["logits"], fed(built, running))[0])
        assert relative_error(found, built.truths[choice]) <= 1e-5
    assert relative_error(built.truths[None], built.truths[choice]) > 0.05


@pytest.mark.slow
@pytest.mark.parametrize("choice", ["dora", "mixed"])
@pytest.mark.parametrize("topology", ["separate", "concat", "folded"])
def test_a_branch_of_packed_parameters_is_what_peft_computes(choice, topology, built, tmp_path):
    base = put(built, [(choice, built.adapters[choice])], tmp_path / "out.onnx", topology=topology)
    computes(built, choice, tmp_path / "out.onnx")
    comes_out(base, tmp_path / "out.onnx", [(choice, built.adapters[choice])])


@pytest.mark.slow
@pytest.mark.parametrize("choice", ["dora", "mixed"])
def test_a_merge_into_packed_parameters_is_what_peft_computes(choice, builder, tmp_path):
    built = builder("fp32")
    put(built, [(choice, built.adapters[choice])], tmp_path / "out.onnx", "merge")
    computes(built, choice, tmp_path / "out.onnx")


@pytest.mark.slow
def test_doras_of_packed_parameters_are_fed_and_taken_away(built, tmp_path):
    base = put(built, list(built.adapters.items()), tmp_path / "out.onnx", mode="swap")
    gains = {key for key, slot in Record.of_file(tmp_path / "out.onnx").slots.slots.items() if slot.gain}
    assert sum("qkv"[n] + "_proj" in key for key in gains for n in range(3)) == 6
    running = Session(tmp_path / "out.onnx")
    for name, adapter in built.adapters.items():
        running.load(name, tmp_path / f"out.{name}.onnx_adapter")
        running.load(f"{name} of memory", adapter)
    feeds = fed(built, session(built.path))
    for choice in ("dora", "mixed of memory", None, "plain", "dora of memory", "mixed"):
        found = shown(built, running.use(choice).run(feeds)["logits"])
        assert relative_error(found, built.truths[choice and choice.removesuffix(" of memory")]) <= 1e-5
    off, bare = (
        session(path, optimise=False).run(["logits"], feeds)[0] for path in (tmp_path / "out.onnx", built.path)
    )
    assert np.array_equal(off, bare)
    comes_out(base, tmp_path / "out.onnx", [])


@pytest.mark.slow
@pytest.mark.parametrize("provider", ["cpu", "cuda"])
def test_rows_choose_among_doras_of_packed_parameters(provider, built, tmp_path):
    adapters = list(built.adapters.items())
    base = put(built, adapters, tmp_path / "out.onnx", mode="stack", rows=("input_ids",), provider=provider)
    row, names = np.nonzero(built.feeds["attention_mask"])[0], [None, *built.adapters]
    running = {optimise: session(tmp_path / "out.onnx", optimise=optimise) for optimise in (True, False)}
    bare = session(built.path, optimise=False)
    bare = shown(built, bare.run(["logits"], fed(built, bare))[0])
    for index in ([0, 1], [3, 0], [2, 3], [1, 2]):
        for optimise, one in running.items():
            more = {"lora.index": np.array(index)}
            found = shown(built, one.run(["logits"], fed(built, one) | more)[0])
            for n, chosen in enumerate(index):
                assert relative_error(found[row == n], built.truths[names[chosen]][row == n]) <= 1e-5
                assert chosen or optimise or np.array_equal(found[row == n], bare[row == n])
    comes_out(base, tmp_path / "out.onnx", adapters)


@pytest.mark.slow
def test_doras_of_packed_parameters_act_in_the_weights(builder):
    built = builder("fp32")
    running = Effective(built.path, built.adapters)
    feeds = fed(built, session(built.path))
    for choice in ("dora", "plain", None, "mixed"):
        running.use(choice)
        assert relative_error(shown(built, running.run(feeds, ["logits"])["logits"]), built.truths[choice]) <= 1e-5


# The fused Attention of ONNX Runtime's optimizer holds q, k and v, and their biases.


@pytest.fixture(scope="module")
def fused(tmp_path_factory):
    """(a BERT with a DoRA of PEFT, as torch exported it; the same with its attention fused)."""
    exports = pytest.importorskip("exports", reason="needs the peers: torch, transformers, peft, onnxscript")
    from exported_models import bert

    lora = {"target_modules": ["query", "key", "value", "dense"], "r": 3, "lora_alpha": 5, "use_dora": True}
    folder = tmp_path_factory.mktemp("fused")
    given = exports.made(exports.Recipe(bert, lora, targets=12), "torchscript", folder)
    optimised.make("fused", given, "bert", folder / "fused.onnx")
    return given, folder / "fused.onnx"


@pytest.mark.parametrize(
    "options",
    [{}, {"topology": "concat"}, {"prefold": True}, {"verb": "merge"}],
    ids=["branch", "concat", "prefold", "merge"],
)
def test_a_dora_of_peft_in_a_fused_attention(options, fused, tmp_path):
    """Its biases are in the operator, and are not rescaled."""
    given, path = fused
    assert [node.op_type for node in onnx.load(path).graph.node].count("Attention") == 2
    base, dora = open_base(path), bind(load(given.adapter), open_base(given.checkpoint))
    options = dict(options)
    plan = prepare(options.pop("verb", "attach"), [("a", dora)], base, Options(tmp_path / "out.onnx", **options))
    assert sum(places[0].rows is not None for places in plan.jobs[0].resolution.targets.values()) == 6
    base.apply(plan)
    for optimise in (True, False):
        found = session(tmp_path / "out.onnx", optimise=optimise).run(["out"], dict(given.feeds))[0]
        assert relative_error(found, given.truth) <= 1e-5
    assert relative_error(given.base, given.truth) > 0.05
    if plan.verb == "attach" and not options.get("prefold"):
        comes_out(base, tmp_path / "out.onnx", [("a", dora)])


@pytest.mark.parametrize("mode", ["swap", "stack"])
def test_a_dora_of_peft_is_fed_and_chosen_in_a_fused_attention(mode, fused, tmp_path):
    """The product stands alone there; its biases are added behind it."""
    given, path = fused
    base, dora = open_base(path), bind(load(given.adapter), open_base(given.checkpoint))
    out, rows = tmp_path / "out.onnx", len(given.base)
    base.apply(prepare("attach", [("a", dora)], base, Options(out, mode, rows=("input_ids",))))
    running, before = Session(out), session(path).run(["out"], dict(given.feeds))[0]
    if mode == "swap":
        running.load("a", given.adapter)
    chosen, none = ("a", None) if mode == "swap" else (["a"] * rows, [None] * rows)
    assert relative_error(running.use(chosen).run(given.feeds)["out"], given.truth) <= 1e-5
    assert relative_error(running.use(none).run(given.feeds)["out"], before) <= 1e-6
