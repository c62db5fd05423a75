"""NF4 and FP4: bitsandbytes' own files, what their numbers mean, and the nearest numbers to W + ΔW."""

import json

import numpy as np
import pytest
from quantised_goldens import BF16, change, golden, stored, write
from refused import refusal

import loraformat as lf
from loraformat.checkpoint.grids import grid_of
from loraformat.checkpoint.requantised import Values

CASES = {"nf4": (37, 90), "fp4": (23, 45), "nf4_nested": (130, 150)}
NAMED = {"nf4": "bitsandbytes NF4", "fp4": "bitsandbytes FP4", "nf4_nested": "bitsandbytes NF4"}
STATE = "q.weight.quant_state.bitsandbytes__nf4"


def values(base, name="q.weight"):
    return Values(grid_of(name, base.files, base.config))[...]


def levels(base):
    """[out, in, 16]: every value that each weight can have."""
    grid = grid_of("q.weight", base.files, base.config)
    run = grid.run(0, grid.shape[0])
    return run.scale[..., None] * grid.table


@pytest.mark.parametrize("case", CASES)
def test_stored_numbers_mean_what_bitsandbytes_says(case, tmp_path):
    base, _, means = golden(case, tmp_path)
    # Those of nested absmax were computed with in bfloat16.
    assert np.allclose(values(base), means, rtol=2**-8 if case == "nf4_nested" else 1e-6, atol=1e-7)
    assert (means.shape, np.linalg.norm(means) > 5) == (CASES[case], True)


@pytest.mark.parametrize("case", CASES)
def test_a_run_of_rows_is_that_of_the_whole(case, tmp_path):
    base, _, _ = golden(case, tmp_path)
    grid = Values(grid_of("q.weight", base.files, base.config))
    whole = grid[...]
    for start, stop in [(0, 1), (1, 2), (5, 12), (CASES[case][0] - 1, CASES[case][0])]:
        assert np.array_equal(grid[start:stop], whole[start:stop])


@pytest.mark.parametrize("case", CASES)
def test_a_merge_stores_the_nearest_numbers_and_nothing_else_changes(case, tmp_path):
    base, held, _ = golden(case, tmp_path)
    adapter = change(*CASES[case], 0.1)
    outcome = lf.merge(adapter, base, tmp_path / "out", requantize=True)
    after = stored(tmp_path / "out")
    assert {key for key in held if not np.array_equal(held[key], after[key])} == {"q.weight"}
    merged = lf.open_base(tmp_path / "out")
    old, found, delta = values(base), values(merged), adapter["q.weight"].matrix()
    away = np.abs(found - (old + delta))
    assert np.all(away <= np.abs(levels(base) - (old + delta)[..., None]).min(axis=-1) + 1e-6)
    norms = outcome.norms["q.weight"]
    assert norms.loss == pytest.approx(np.linalg.norm(found - old - delta) / np.linalg.norm(delta), rel=1e-5)
    assert 0.05 < norms.loss < 0.9
    assert lf.verify(base, adapter, merged).problems == []
    broken = after["q.weight"].copy()
    broken[3] ^= 16
    write(tmp_path / "broken", {**after, "q.weight": broken})
    (problem,) = lf.verify(base, adapter, lf.open_base(tmp_path / "broken")).problems
    assert "rounded to the steps of their scale" in problem.what


@pytest.mark.parametrize("case", CASES)
def test_where_nothing_changes_no_byte_does(case, tmp_path):
    """FP4 has two zeros, and an odd count leaves half a byte over."""
    base, _, _ = golden(case, tmp_path)
    lf.merge(change(*CASES[case], 0.0), base, tmp_path / "out", requantize=True)
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / case / "model.safetensors").read_bytes()


@pytest.mark.parametrize("case", CASES)
def test_four_bits_are_not_rounded_to_unasked(case, tmp_path):
    base, _, _ = golden(case, tmp_path)
    found, said = refusal(lf.merge, change(*CASES[case], 0.1), base, tmp_path / "out")
    assert found == {"LF-608"}
    assert NAMED[case] in said
    assert "--requantize rounds to it and says what survives" in said


def test_a_change_that_four_bits_swallow_is_refused(tmp_path):
    base, _, _ = golden("nf4", tmp_path)
    found, said = refusal(lf.merge, change(37, 90, 1e-3), base, tmp_path / "out", requantize=True)
    assert found == {"LF-615"}
    assert "of ΔW survives in bitsandbytes NF4" in said
    assert not (tmp_path / "out").exists()


GPT2 = {"model_type": "gpt2"}


def test_of_a_conv1d_the_numbers_lie_as_those_of_a_linear(tmp_path):
    """transformers turns its weight before it is quantised: the parameter is [in, out], the numbers are [out, in]."""
    _, held, _ = golden("nf4", tmp_path)
    named = {key.replace("q.", "h.0.attn.c_attn.", 1): value for key, value in held.items()}
    write(tmp_path / "gpt2", named, GPT2)
    base, key = lf.open_base(tmp_path / "gpt2"), "h.0.attn.c_attn.weight"
    adapter = change(37, 90, 0.1, key)
    for placement in (None, lf.Placement.of((90, 37), "in,out")):
        own = lf.Adapter({key: adapter[key].placed(placement) if placement else adapter[key]})
        out = tmp_path / f"out{placement is None}"
        lf.merge(own, base, out, requantize=True)
        merged = lf.open_base(out)
        moved = values(merged, key) - values(base, key)
        assert np.linalg.norm(moved - adapter[key].matrix()) < 0.9 * np.linalg.norm(adapter[key].matrix())
        assert lf.verify(base, own, merged).problems == []
    bound = lf.bind(adapter, base)
    assert (bound[key].placement.spec, bound[key].placement.shape) == ("in,out", (90, 37))
    lf.merge(bound, base, tmp_path / "bound", requantize=True)


def test_a_square_conv1d_in_int8_is_not_turned_either(tmp_path):
    numbers = np.random.default_rng(0).integers(-127, 128, (12, 12)).astype(np.int8)
    held = {"h.0.attn.c_proj.weight": numbers, "h.0.attn.c_proj.SCB": np.full(12, 127.0, np.float32)}
    write(tmp_path / "base", held, GPT2)
    adapter = change(12, 12, 30.0, "h.0.attn.c_proj.weight")
    lf.merge(adapter, lf.open_base(tmp_path / "base"), tmp_path / "out", requantize=True)
    wanted = np.clip(np.rint(numbers + adapter["h.0.attn.c_proj.weight"].matrix()), -127, 127)
    assert np.array_equal(stored(tmp_path / "out")["h.0.attn.c_proj.weight"], wanted)


def test_an_adapter_between_two_quantised_models_is_that_of_their_values(tmp_path):
    base, _, _ = golden("nf4", tmp_path)
    lf.merge(change(37, 90, 0.3), base, tmp_path / "out", requantize=True)
    merged = lf.open_base(tmp_path / "out")
    found = lf.extract(base, merged, rank=37)
    assert set(found.adapter) == {"q.weight"}
    assert found.left_out == []
    moved = values(merged) - values(base)
    assert np.allclose(found.adapter["q.weight"].matrix(), moved, atol=1e-5)


def test_and_between_one_and_its_unquantised_model(tmp_path):
    base, _, means = golden("nf4", tmp_path)
    tuned = means + change(37, 90, 0.3)["q.weight"].matrix()
    write(tmp_path / "tuned", {"q.weight": tuned})
    found = lf.extract(base, lf.open_base(tmp_path / "tuned"), rank=2)
    assert found.whole < 1e-5
    assert found.left_out == []


def test_a_bound_adapter_finds_its_base_in_four_bits(tmp_path):
    """By the sketch of the values: the numbers alone would be like nothing."""
    _, _, means = golden("nf4", tmp_path)
    write(tmp_path / "whole", {"q.weight": means})
    write(tmp_path / "other", {"q.weight": means[::-1].copy()})
    adapter = change(37, 90, 0.3)
    quantised = lf.open_base(tmp_path / "nf4")
    for name, expected in (("whole", None), ("other", {"LF-607"})):
        bound = lf.bind(adapter, lf.open_base(tmp_path / name))
        unsealed = lf.Adapter({k: lf.Update(u.parts, u.placement, sketch=u.sketch) for k, u in bound.items()})
        if expected is None:
            lf.merge(unsealed, quantised, tmp_path / "out", requantize=True)
        else:
            assert refusal(lf.merge, unsealed, quantised, tmp_path / "out2", requantize=True)[0] == expected


def spoiled(held, **changes):
    told = json.loads(bytes(held[STATE]))
    text = json.dumps({**told, **changes}).encode()
    return {**held, STATE: np.frombuffer(text, np.uint8)}


DAMAGE = {
    "no JSON": lambda held: {**held, STATE: np.frombuffer(b"{", np.uint8)},
    "another kind": lambda held: spoiled(held, quant_type="fp4"),
    "another shape": lambda held: spoiled(held, shape=[37, 91]),
    "three axes": lambda held: spoiled(held, shape=[37, 9, 10]),
    "a negative size": lambda held: spoiled(held, shape=[-37, -90]),
    "blocks of nothing": lambda held: spoiled(held, blocksize=0),
    "other blocks": lambda held: spoiled(held, blocksize=128),
    "nested, without an offset": lambda held: spoiled(held, nested_blocksize=256),
    "no absmax": lambda held: {key: value for key, value in held.items() if key != "q.weight.absmax"},
    "a short table": lambda held: {**held, "q.weight.quant_map": held["q.weight.quant_map"][:15]},
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_description_is_refused(name, tmp_path):
    _, held, _ = golden("nf4", tmp_path)
    write(tmp_path / "base", DAMAGE[name](held))
    call = (lf.merge, change(37, 90, 1.0), lf.open_base(tmp_path / "base"), tmp_path / "out")
    assert refusal(*call, requantize=True)[0] == {"LF-610"}


def test_numbers_that_lie_in_16_bits_are_refused_by_the_name_of_their_form(tmp_path):
    """bnb_4bit_quant_storage: the tensor then looks like one of floats."""
    _, held, _ = golden("nf4", tmp_path)
    odd = np.append(held["q.weight"].reshape(-1), np.uint8(0))[:, None]
    write(tmp_path / "base", {**held, "q.weight": odd.reshape(-1, 2).view(BF16)})
    base = lf.open_base(tmp_path / "base")
    found, said = refusal(lf.merge, change(37, 90, 1.0), base, tmp_path / "out", requantize=True)
    assert (found, "bitsandbytes NF4" in said) == ({"LF-608"}, True)


def test_what_is_not_finite_is_refused(tmp_path):
    base, _, _ = golden("nf4", tmp_path)
    part = lf.Lora(np.full((1, 90), 3e38, np.float32), np.full((37, 1), 3e38, np.float32), 1.0, "factor")
    huge = lf.Adapter({"q.weight": lf.Update((part,))})
    assert refusal(lf.merge, huge, base, tmp_path / "out", requantize=True)[0] == {"LF-611"}


def test_what_replaces_a_scaled_weight_is_refused(tmp_path):
    """Its numbers would have to be divided by the scale that stands beside them."""
    base, _, _ = golden("fp8", tmp_path)
    new = np.full((150, 260), 2.0, np.float32)
    place = lf.Placement.of((150, 260), "out,in")
    adapter = lf.Adapter({"q.weight": lf.Update((lf.Replace(new),), place)})
    for requantize in (False, True):
        assert refusal(lf.merge, adapter, base, tmp_path / "out", requantize=requantize)[0] == {"LF-608"}


@pytest.mark.peer
@pytest.mark.parametrize("case", CASES)
def test_bitsandbytes_loads_what_was_merged_and_has_our_values(case, tmp_path):
    torch = pytest.importorskip("torch", reason="needs the peer torch")
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="needs the peer bitsandbytes")
    from safetensors.torch import load_file

    base, _, _ = golden(case, tmp_path)
    lf.merge(change(*CASES[case], 0.1), base, tmp_path / "out", requantize=True)
    held = load_file(tmp_path / "out/model.safetensors")
    stats = {key.removeprefix("q."): tensor for key, tensor in held.items() if key != "q.weight"}
    loaded = bitsandbytes.nn.Params4bit.from_prequantized(held["q.weight"], stats, device="cpu")
    state = loaded.quant_state
    state.dtype = torch.float32  # what it is stored for is bfloat16
    found = bitsandbytes.functional.dequantize_4bit(loaded.data, state).numpy()
    assert np.allclose(found, values(lf.open_base(tmp_path / "out")), rtol=1e-6, atol=1e-7)
