"""Weights in few bits where a change is no plain pair, the files are several, or they are damaged."""

import json
from dataclasses import replace

import numpy as np
import pytest
from mutations import edited
from quantised_goldens import LLAMA, change, golden, stored, write
from safetensors.numpy import save_file
from updates import normal

import loraformat as lf
from loraformat.pages.facts import facts

GPTQ = {"model_type": "llama", "quantization_config": {"quant_method": "gptq", "checkpoint_format": "gptq"}}
SHAPES = {"nf4": (37, 90), "nf4_nested": (130, 150), "fp4": (23, 45), "gptq_4": (64, 96), "gptq_2_act_order": (32, 96), "int8": (150, 260), "fp8": (150, 260)}  # fmt: skip


def opened(case, path):
    """(base, its tensors, a function that gives the values of the weight in one such base, [out, in])."""
    _, held, _ = golden(case, path)
    packed = case.startswith("gptq")
    write(path / "base", held, GPTQ if packed else LLAMA)

    def values(base):
        return base.dequantised("q.qweight")[...].T if packed else base.dequantised("q.weight")[...]

    return lf.open_base(path / "base"), held, values


@pytest.mark.parametrize("case", ["nf4", "gptq_4", "int8"])
def test_a_magnitude_scales_the_values(case, tmp_path):
    """Of GPTQ its norm runs over the axis that is stored first."""
    base, _, values = opened(case, tmp_path)
    out, in_ = SHAPES[case]
    magnitude = lf.Magnitude(np.abs(normal(out)) * np.float32(3) + 1)
    update = lf.Update((lf.Lora(normal(2, in_), normal(out, 2), 0.3, "factor"), magnitude))
    adapter = lf.Adapter({"q.weight": update})
    outcome = lf.merge(adapter, base, tmp_path / "out", requantize=True)
    old, merged = values(base), lf.open_base(tmp_path / "out")
    wanted = update.placed(lf.Placement.of((out, in_), "out,in")).apply(old)
    loss = np.linalg.norm(values(merged) - wanted) / np.linalg.norm(wanted - old)
    assert outcome.norms["q.weight"].loss == pytest.approx(loss, rel=1e-4)
    assert loss < 0.5
    assert lf.verify(base, adapter, merged).problems == []


@pytest.mark.parametrize("case", ["nf4", "gptq_4"])
def test_several_adapters_are_rounded_once(case, tmp_path):
    base, _, values = opened(case, tmp_path)
    out, in_ = SHAPES[case]
    other = lf.Adapter(
        {"q.weight": lf.Update((lf.Lora(normal(3, in_, seed=7), normal(out, 3, seed=8), 0.1, "factor"),))}
    )
    both = [(change(out, in_, 0.2), 0.5), (other, -1.0)]
    lf.merge(both, base, tmp_path / "out", requantize=True)
    merged = lf.open_base(tmp_path / "out")
    assert lf.verify(base, both, merged).problems == []
    assert [p.rule for p in lf.verify(base, both[:1], merged).problems] == ["LF-611"]
    whole = 0.5 * both[0][0]["q.weight"].matrix() - other["q.weight"].matrix()
    assert np.linalg.norm(values(merged) - values(base) - whole) < 0.9 * np.linalg.norm(whole)


def test_what_says_what_the_numbers_mean_may_lie_in_another_shard(tmp_path):
    _, held, _ = golden("nf4", tmp_path)
    first = {f"a.{key}": value for key, value in held.items()}
    second = {f"b.{key}": value for key, value in held.items()}
    first["b.q.weight.absmax"] = second.pop("b.q.weight.absmax")
    base = tmp_path / "base"
    base.mkdir()
    homes = {}
    for name, tensors in (("1.safetensors", first), ("2.safetensors", second)):
        save_file(tensors, base / name)
        homes |= dict.fromkeys(tensors, name)
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": homes}))
    (base / "config.json").write_text(json.dumps(LLAMA))
    both = lf.Adapter({key: change(37, 90, 0.1, key)[key] for key in ("a.q.weight", "b.q.weight")})
    lf.merge(both, lf.open_base(base), tmp_path / "out", requantize=True)
    assert lf.verify(lf.open_base(base), both, lf.open_base(tmp_path / "out")).problems == []


@pytest.mark.parametrize("case", ["nf4", "gptq_4", "int8", "fp8"])
def test_a_new_adapter_is_made_for_the_weight_and_not_for_its_scales(case, tmp_path):
    base, _, _ = opened(case, tmp_path)
    fresh = lf.init(base, ["q"], rank=2, alpha=4)
    assert {key: update.placement.shape for key, update in fresh.items()} == {"q.weight": SHAPES[case]}


def test_two_models_in_few_bits_differ_by_their_values(tmp_path):
    base, _, values = opened("int8", tmp_path)
    lf.merge(change(150, 260, 0.1), base, tmp_path / "out", requantize=True)
    merged = lf.open_base(tmp_path / "out")
    found = lf.diff(base, merged)
    assert found.changed.keys() == {"q.weight"}
    assert found.changed["q.weight"].norm == pytest.approx(np.linalg.norm(values(merged) - values(base)), rel=1e-5)


@pytest.mark.parametrize("case", ["nf4", "gptq_4", "fp8"])
def test_a_report_tells_how_far_a_weight_moves_and_what_a_merge_would_lose(case, tmp_path):
    base, _, values = opened(case, tmp_path)
    adapter = change(*SHAPES[case], 0.3)
    norms = facts(adapter, "x", base=base).norms["q.weight"]
    delta = np.linalg.norm(adapter["q.weight"].matrix())
    assert norms.change == pytest.approx(delta / np.linalg.norm(values(base)), rel=1e-5)
    outcome = lf.merge(adapter, base, tmp_path / "out", requantize=True)
    assert norms.loss == pytest.approx(outcome.norms["q.weight"].loss, rel=1e-9)


def test_a_component_of_a_pipeline_may_be_in_few_bits(tmp_path):
    _, held, _ = golden("nf4", tmp_path)
    pipe = tmp_path / "pipe"
    pipe.mkdir()
    (pipe / "model_index.json").write_text(json.dumps({"unet": ["diffusers", "UNet2DConditionModel"]}))
    (pipe / "unet").mkdir()
    save_file(held, pipe / "unet/diffusion_pytorch_model.safetensors")
    adapter = replace(change(37, 90, 0.2, "unet:q.weight"), components=("unet",))
    base = lf.open_base(pipe)
    outcome = lf.merge(adapter, base, tmp_path / "out", requantize=True)
    merged = lf.open_base(tmp_path / "out")
    moved = merged.dequantised("unet:q.weight")[...] - base.dequantised("unet:q.weight")[...]
    delta = adapter["unet:q.weight"].matrix()
    loss = np.linalg.norm(moved - delta) / np.linalg.norm(delta)
    assert outcome.norms["unet:q.weight"].loss == pytest.approx(loss, rel=1e-4)
    assert lf.verify(base, adapter, merged).problems == []


MISTAKES = {
    "the adapter was not applied": [],
    "the adapter was applied twice": [1.0, 1.0],
    "alpha was taken for the scale": [3.0],
    "the scale was lost (ΔW = B·A)": [2.5],
}


@pytest.mark.parametrize("words", MISTAKES)
@pytest.mark.parametrize("case", ["nf4", "gptq_4", "fp8"])
def test_a_wrong_merge_is_named(case, words, tmp_path):
    """The scale is 0.4, alpha 1.2."""
    base, _, _ = opened(case, tmp_path)
    out, in_ = SHAPES[case]
    pair = lf.Lora(normal(3, in_, seed=1), normal(out, 3, seed=2) * np.float32(0.2), 1.2, "alpha/r")
    adapter = lf.Adapter({"q.weight": lf.Update((pair,))})
    merged = base
    if MISTAKES[words]:
        both = [(lf.Adapter({"q.weight": lf.Update((pair,))}), weight) for weight in MISTAKES[words]]
        lf.merge(both, base, tmp_path / "out", requantize=True)
        merged = lf.open_base(tmp_path / "out")
    (problem,) = lf.verify(base, adapter, merged).problems
    assert (problem.rule, problem.what.startswith(words)) == ("LF-611", True), problem.what


def damaged(held, config, random):
    """One tensor, or one word of what describes them, is another."""
    held, name = dict(held), str(random.choice(sorted(held)))
    state = next((key for key in held if "quant_state" in key), None)
    match random.integers(6):
        case 0:
            del held[name]
        case 1:
            held[name] = held[name].reshape(-1)[: max(1, held[name].size - 1)]
        case 2:
            held[name] = held[name].reshape(-1)[:, None]
        case 3 if state:
            text = edited(bytes(held[state]).decode(), random)
            held[state] = np.frombuffer(text.encode("utf-8", "surrogatepass"), np.uint8)
        case 4:
            raw = random.integers(0, 256, held[name].nbytes, dtype=np.uint8)
            held[name] = raw.view(held[name].dtype).reshape(held[name].shape)
        case _:
            config = json.loads(edited(json.dumps(config), random))
    return held, config


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("case", SHAPES)
def test_a_damaged_base_is_refused_by_a_rule_or_merged_as_it_is(case, tmp_path):
    _, held, _ = golden(case, tmp_path)
    adapter = change(*SHAPES[case], 0.3)
    for seed in range(12):
        path = tmp_path / str(seed)
        tensors, config = damaged(held, GPTQ if case.startswith("gptq") else LLAMA, np.random.default_rng(seed))
        write(path, tensors, config)
        try:
            base = lf.open_base(path)
            lf.merge(adapter, base, tmp_path / f"out{seed}", requantize=True, survival=0.0)
        except lf.LoraFormatError as error:
            assert all(problem.rule.startswith("LF-6") for problem in error.problems)
            assert not (tmp_path / f"out{seed}").exists()
            continue
        assert lf.verify(base, adapter, lf.open_base(tmp_path / f"out{seed}")).problems == []
        assert stored(tmp_path / f"out{seed}").keys() == tensors.keys()
