"""Adapters of PEFT in models that were quantised, fused or built for a device after the export: found without the base."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import optimised
import pytest
from graphs import session

from loraformat import Hints, LoraFormatError, Magnitude, digest
from loraformat.base import Options
from loraformat.registry import load, open_base
from loraformat.testing import relative_error
from loraformat.verbs.bind import bind
from loraformat.verbs.graph import detach, extract, prove
from loraformat.verbs.merge import merge, prepare
from loraformat_converters.onnx.changing.record import Record

pytestmark = pytest.mark.peer

MODELS = {
    ("minilm", "torchscript"): ["dynamic int8", "4 bits, zero points", "fused"],
    ("bert", "torchscript"): ["float16", "fused, float16"],
    ("bert", "dynamo"): ["dynamic uint8, per channel", "static QDQ", "4 bits", "8 bits", "4 bits, QDQ", "onnxslim"],
    ("gpt2", "dynamo"): ["dynamic int8"],
    ("gpt2", "torchscript"): ["fused"],
}

CASES = [(name, exporter, tool) for (name, exporter), tools in MODELS.items() for tool in tools]

FLOAT = {"onnxslim": 1e-5, "fused": 1e-5, "float16": 5e-3, "fused, float16": 5e-3}
"""How near to PEFT's own outputs a model is that keeps floats."""


@pytest.fixture(scope="module")
def changed(export, tmp_path_factory):
    """(model, exporter, tool) → (what torch exported, the file that the tool made of it), made once."""
    made = {}

    def get(name, exporter, tool):
        pytest.importorskip("onnxslim", reason="needs the peers: onnxslim, onnxconverter-common, onnxruntime-genai")
        given = export(name, exporter)
        if (name, exporter, tool) not in made:
            made[name, exporter, tool] = path = tmp_path_factory.mktemp(f"{name}-{exporter}") / "model.onnx"
            optimised.make(tool, given, name, path)
        return given, made[name, exporter, tool]

    return get


@pytest.mark.parametrize(("name", "exporter", "tool"), CASES)
def test_an_adapter_with_sketches_is_attached_to_what_a_tool_made(name, exporter, tool, changed, tmp_path):
    given, path = changed(name, exporter, tool)
    base = open_base(path)
    bound = bind(load(given.adapter), open_base(given.checkpoint))
    plan = prepare("attach", [("default", bound)], base, Options(tmp_path / "out.onnx"), any_base="float16" in tool)
    assert len(plan.jobs[0].resolution.targets) == given.targets
    base.apply(plan)
    np.savez(tmp_path / "inputs.npz", **given.feeds)
    proof = prove(base, plan, tmp_path / "inputs.npz")
    assert proof.error <= proof.limit <= 5e-2
    before, after = (session(p).run(["out"], dict(given.feeds))[0] for p in (path, tmp_path / "out.onnx"))
    lost, rest = relative_error(before, given.base), relative_error(after, given.truth)
    moved = relative_error(given.base, given.truth)
    assert rest <= FLOAT.get(tool, 2 * lost + 0.05)  # what quantisation lost stays lost, and no more is
    assert rest < moved / 2
    attached = open_base(tmp_path / "out.onnx")
    assert digest(extract(attached)) == digest(bound)
    detach(attached, tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == path.read_bytes()


CHOSEN = {
    ("minilm", "torchscript", "dynamic int8"): None, ("minilm", "torchscript", "4 bits, zero points"): 1e-5,
    ("bert", "dynamo", "static QDQ"): None, ("bert", "dynamo", "4 bits"): 1e-5, ("gpt2", "torchscript", "fused"): 1e-5,
}  # fmt: skip
"""How near a row is to the same row of the attached model; None where 8 bits are rounded in steps that rows share."""


@pytest.mark.parametrize("case", CHOSEN)
def test_rows_choose_in_what_a_tool_made(case, changed, tmp_path):
    given, path = changed(*case)
    base, bound = open_base(path), bind(load(given.adapter), open_base(given.checkpoint))
    base.apply(prepare("attach", [("a", bound)], base, Options(tmp_path / "branch.onnx")))
    base.apply(prepare("attach", [("a", bound)], base, Options(tmp_path / "out.onnx", "stack", rows=("input_ids",))))
    names, running = ["out"], session(tmp_path / "out.onnx")
    bare, changes = (session(p).run(names, dict(given.feeds))[0] for p in (path, tmp_path / "branch.onnx"))
    rows = next(iter(given.feeds.values())).shape[0]
    limit = CHOSEN[case] or 0.3 * relative_error(bare, changes)
    for index in (np.arange(rows) % 2, (np.arange(rows) + 1) % 2):
        found = running.run(names, {**given.feeds, "lora.index": index})[0]
        for row, chosen in enumerate(index):
            assert relative_error(found[row], (changes if chosen else bare)[row]) <= limit


def test_what_stays_in_8_bits_between_operators_is_found_and_refused(export, tmp_path):
    given = export("bert", "dynamo")
    optimised.quiet(optimised.static("QOperator"))(given, "bert", tmp_path / "model.onnx")
    base, bound = open_base(tmp_path / "model.onnx"), bind(load(given.adapter), open_base(given.checkpoint))
    assert len(base.resolve(bound, Hints()).require().targets) == given.targets
    with pytest.raises(LoraFormatError, match=r"LF-608.*QLinearMatMul (gives 8 bits, which|takes its x in 8 bits)"):
        prepare("attach", [("default", bound)], base, Options(tmp_path / "out.onnx"))


# onnxruntime-genai, whose graphs have one product for q, k and v.


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A Llama of the sizes that GroupQueryAttention takes, and PEFT's adapter of it."""
    exports = pytest.importorskip("exports", reason="needs the peers: torch, transformers, peft, onnxscript")
    pytest.importorskip("onnxruntime_genai", reason="needs the peer onnxruntime-genai")
    lora = {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]}
    recipe = exports.Recipe(
        lambda: exports.llama(tied=False, head_dim=16), {**lora, "r": 4, "lora_alpha": 5}, targets=15
    )
    return exports.made(recipe, "torchscript", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def built(llama, tmp_path_factory):
    """Precision → the folder that the builder wrote, made once."""
    made, folder = {}, tmp_path_factory.mktemp("built")

    def get(precision):
        if precision not in made:
            made[precision] = folder / precision
            optimised.build(llama.checkpoint, precision, made[precision])
        return made[precision]

    return get


def logits(path, given):
    """Of the rows that are not masked: the builder's attention leaves the others as they come."""
    running, feeds = session(path), {}
    for value in running.get_inputs():
        kind = np.float16 if "float16" in value.type else np.float32
        feeds[value.name] = given.feeds.get(value.name, np.zeros((2, 2, 0, 16), kind))
    return running.run(["logits"], feeds)[0][given.feeds["attention_mask"].astype(bool)].astype(np.float32)


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "limit"), [("fp32", 1e-5), ("int4", None)])
def test_an_adapter_with_sketches_is_attached_to_what_genai_built(precision, limit, llama, built):
    path = built(precision) / "model.onnx"
    out = path.with_name("out.onnx")
    base = open_base(path)
    bound = bind(load(llama.adapter), open_base(llama.checkpoint))
    plan = prepare("attach", [("default", bound)], base, Options(out))
    found = plan.jobs[0].resolution.targets
    rows = {k.rsplit(".", 2)[1]: places[0].rows for k, places in found.items() if places[0].rows}
    assert (len(found), rows) == (15, {"q_proj": (0, 64), "k_proj": (64, 96), "v_proj": (96, 128)})
    base.apply(plan)
    shown = llama.feeds["attention_mask"].astype(bool)
    lost, rest = (
        relative_error(logits(path, llama), llama.base[shown]),
        relative_error(logits(out, llama), llama.truth[shown]),
    )
    assert rest <= (limit or 2 * lost + 0.05)
    assert rest < relative_error(llama.base[shown], llama.truth[shown]) / 2


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "int4"])
@pytest.mark.parametrize("mode", ["branch", "swap"])
def test_what_genai_built_is_proved_by_inputs_that_are_made_up(precision, mode, llama, built, tmp_path):
    """The builder names the sizes in its own configuration, and onnx.checker refuses its graphs before any change."""
    bound = bind(load(llama.adapter), open_base(llama.checkpoint))
    base, options = open_base(built(precision) / "model.onnx"), Options(tmp_path / "out.onnx", mode=mode)
    plan = prepare("attach", [("default", bound)], base, options)
    base.apply(plan)
    proof = base.prove(plan)
    assert proof.holds
    assert proof.moved > 10 * proof.limit if precision == "fp32" else proof.moved > proof.limit


@pytest.mark.slow
def test_without_sketches_the_builders_names_tell_what_is_not_packed(llama, built):
    found = open_base(built("int4") / "model.onnx").resolve(load(llama.adapter), Hints())
    assert {key.removesuffix(".weight").rpartition(".")[2] for key in found.targets} == {
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
        "lm_head",
    }
    assert len(found.targets) == 9
    assert {problem.rule for problem in found.unresolved} == {"LF-602"}


@pytest.mark.slow
@pytest.mark.parametrize("provider", ["cpu", "cuda"])
def test_rows_choose_in_what_genai_built(provider, llama, built):
    """One of two rows is the base, the other has the adapter, on q, k and v in one product too."""
    path = built("fp32") / "model.onnx"
    out, base = path.with_name(f"stack-{provider}.onnx"), open_base(path)
    bound = bind(load(llama.adapter), open_base(llama.checkpoint))
    base.apply(prepare("attach", [("a", bound)], base, Options(out, "stack", rows=("input_ids",), provider=provider)))
    shown = llama.feeds["attention_mask"].astype(bool)
    row = np.nonzero(shown)[0]
    for index in ([0, 1], [1, 0]):
        found = logits(out, replace(llama, feeds={**llama.feeds, "lora.index": np.array(index)}))
        for n in range(2):
            wanted = (llama.truth if index[n] else llama.base)[shown][row == n]
            assert relative_error(found[row == n], wanted) <= 1e-5
    assert relative_error(llama.truth[shown], llama.base[shown]) > 0.01


def rescaled(adapter, checkpoint, modules):
    """The adapter with magnitudes at these modules, a fifth over the norms of their weights."""
    targets = dict(adapter.items())
    for key, update in adapter.items():
        if key.rsplit(".", 2)[1] in modules:
            norms = np.linalg.norm(checkpoint.read(key), axis=1)
            targets[key] = replace(update, parts=(*update.parts, Magnitude((1.2 * norms).astype(np.float32))))
    return replace(adapter, targets=targets)


@pytest.mark.slow
@pytest.mark.parametrize(("names", "doras"), [("genai", ()), ("native", ("q_proj", "v_proj", "down_proj"))])
def test_genai_generates_with_the_adapter_of_a_swap(names, doras, llama, built, tmp_path):
    """What it computes with ``og.Adapters`` are the logits of the merged model, token by token; without, the base's."""
    og = pytest.importorskip("onnxruntime_genai", reason="needs the peer onnxruntime-genai")
    checkpoint = open_base(llama.checkpoint)
    adapter = rescaled(bind(load(llama.adapter), checkpoint), checkpoint, doras)
    base = open_base(built("fp32") / "model.onnx")
    folders = {name: shutil.copytree(built("fp32"), tmp_path / name) for name in ("swap", "merged")}
    options = Options(folders["swap"] / "model.onnx", "swap", slot_names=names)
    base.apply(prepare("attach", [("style", adapter)], base, options), force=True)
    slots = Record.of_file(options.out).slots.slots
    assert len(slots) == 15  # q, k and v too, which one product computes
    assert sum(slot.gain is not None for slot in slots.values()) == 2 * len(doras)
    merge(adapter, base, folders["merged"] / "model.onnx", force=True)

    def generated(folder, path=None):
        model = og.Model(str(folder))
        params = og.GeneratorParams(model)
        params.set_search_options(max_length=9, do_sample=False)
        generator = og.Generator(model, params)
        if path is not None:
            adapters = og.Adapters(model)
            adapters.load(str(path), "style")
            generator.set_active_adapter(adapters, "style")
        generator.append_tokens(np.array([[5, 17, 40]], np.int32))
        found = []
        while not generator.is_done():
            found.append(np.array(generator.get_logits()).reshape(-1))
            generator.generate_next_token()
        return np.stack(found), list(generator.get_sequence(0))

    fed, tokens = generated(folders["swap"], folders["swap"] / "model.style.onnx_adapter")
    merged, wanted = generated(folders["merged"])
    assert (tokens, relative_error(fed, merged) <= 1e-5) == (wanted, True)
    bare, off = generated(built("fp32")), generated(folders["swap"])
    assert (off[1], relative_error(off[0], bare[0]) <= 1e-6) == (bare[1], True)
    assert relative_error(fed[0], bare[0][0]) > 0.05
