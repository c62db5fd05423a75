"""Sketches: what they are, value by value; what they recognise, and what they must not."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.numpy import save_file

import loraformat as lf
from loraformat.likeness import SCALE, compare, cosine, has_scale, recognise
from loraformat.sketch import sketch


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def linear(weight):
    return sketch(weight, lf.Placement(weight.shape, (0,), (1,)))


def defined(matrix):
    """The definition, one sign after the other."""
    out, in_ = matrix.shape
    streams = [
        hashlib.shake_128(b"loraformat/1\nsketch\n" + side).digest(n) for side, n in ((b"out", out), (b"in", in_))
    ]
    p, q = ([[1 if byte & (1 << k) else -1 for k in range(8)] for byte in stream] for stream in streams)
    total = np.array(p, np.float64).T @ matrix.astype(np.float64) @ np.array(q, np.float64)
    return total.reshape(-1)


def test_a_sketch_is_what_its_definition_says():
    weight = normal(13, 7)
    found = linear(weight)
    assert (found.shape, found.dtype) == ((64,), np.float32)
    np.testing.assert_allclose(found, defined(weight), rtol=1e-6, atol=1e-5)
    # Frozen: a sketch in a file is compared with one that is made years later.
    counted = np.arange(91, dtype=np.float32).reshape(13, 7) ** 2 % 17
    np.testing.assert_array_equal(linear(counted)[:4], (88, 182, -128, 16))


@pytest.mark.parametrize(
    ("spec", "shape"),
    [("out,in", (5, 7)), ("in,out", (7, 5)), ("in1,in2,in0,out", (3, 2, 7, 5)), ("batch,out,in", (3, 5, 7)),
     ("out,batch,in", (5, 3, 7)), ("batch,in,batch,out", (2, 7, 3, 5)), ("in1,out,in0", (2, 5, 3))],
)  # fmt: skip
def test_a_sketch_is_that_of_the_matrix_however_it_lies(spec, shape, monkeypatch):
    weight, placement = normal(*shape), lf.Placement.of(shape, spec)
    matrix = placement.to_matrix(weight)
    wanted = defined(matrix.reshape(-1, matrix.shape[-1]))
    np.testing.assert_allclose(sketch(weight, placement), wanted, rtol=1e-6, atol=1e-5)
    monkeypatch.setattr("loraformat.sketch._TILE", 1)  # tile after tile gives the same
    np.testing.assert_allclose(sketch(weight, placement), wanted, rtol=1e-6, atol=1e-5)


def test_a_weight_is_recognised_after_casts_and_quantisation():
    weight, others = normal(48, 40), {i: linear(normal(48, 40, seed=i)) for i in range(1, 40)}
    steps = np.abs(weight).max(0) / 7
    changed = {
        "fp16": linear(weight.astype(np.float16)),
        "int8": linear(np.round(weight * 31) / 31),
        "int4": linear(np.round(weight / steps) * steps),
        "stored the other way": sketch(np.ascontiguousarray(weight.T), lf.Placement((40, 48), (1,), (0,))),
    }
    for name, found in changed.items():
        met = recognise(linear(weight), {0: found, **others})
        assert met.names == (0,), name
        assert met.cosine > 0.95, name


def test_the_transpose_of_a_square_weight_is_another_weight():
    weight = normal(32, 32)
    assert abs(cosine(linear(weight), linear(np.ascontiguousarray(weight.T)))) < 0.7
    assert recognise(linear(weight), {"turned": linear(weight.T)}).names == ()


def test_equal_twins_are_two_candidates():
    weight = linear(normal(9, 8))
    assert recognise(weight, {"a": weight, "b": weight, "c": linear(normal(9, 8, seed=1))}).names == ("a", "b")


@pytest.mark.parametrize(("value", "names"), [(0.69, ("same",)), (0.71, ("same", "near"))])
def test_a_near_rival_is_not_passed_over_in_silence(value, names):
    one, other = np.eye(64, dtype=np.float32)[:2]
    near = (value * one + np.sqrt(1 - value**2) * other).astype(np.float32)
    assert recognise(one, {"same": one, "near": near}).names == names


@pytest.mark.parametrize(("value", "names"), [(0.89, ()), (0.91, ("a",))])
def test_a_weight_that_is_only_somewhat_alike_is_another_one(value, names):
    one, other = np.eye(64, dtype=np.float32)[:2]
    assert recognise(one, {"a": (value * one + np.sqrt(1 - value**2) * other).astype(np.float32)}).names == names


def test_zero_weights_resemble_nothing():
    zero = linear(np.zeros((5, 6), np.float32))
    assert not zero.any()
    assert recognise(zero, {"zero": zero}).names == ()
    assert recognise(linear(normal(5, 6)), {"zero": zero}).names == ()


def test_what_has_no_sketch():
    assert sketch(normal(5), lf.Placement((5,), (0,), ())) is None
    assert linear(np.full((5, 6), np.nan, np.float32)) is None
    assert linear(np.full((5, 6), 3e38, np.float32)) is None  # the sums are no numbers of float32
    assert linear(np.full((5, 6), 1e300)) is None


# The scale.

ELEMENTS = st.floats(-100, 100, width=32)


@given(hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=12), elements=ELEMENTS),
       st.floats(-1e6, 1e6).filter(lambda c: abs(c) > 1e-6))  # fmt: skip
def test_a_multiple_of_a_weight_has_that_multiple_of_its_sketch(weight, factor):
    whole = linear(weight.astype(np.float64))
    np.testing.assert_allclose(
        linear(factor * weight.astype(np.float64)), factor * whole, rtol=1e-5, atol=abs(factor) * 1e-9
    )


@pytest.mark.parametrize(("factor", "same"), [(0.83, False), (0.84, True), (1.19, True), (1.21, False), (-1, True)])
def test_the_band_is_six_fifths(factor, same):
    like = compare(linear(normal(24, 16)), linear(np.float32(factor) * normal(24, 16)))
    assert (like.same_weight, like.same_scale) == (factor > 0, same)


@given(st.integers(0, 99), st.floats(1e-4, 1e4))
def test_only_a_factor_near_1_is_the_same_scale(seed, factor):
    weight = normal(24, 16, seed=seed)
    like = compare(linear(weight), linear((factor * weight.astype(np.float64)).astype(np.float32)))
    assert like.same_weight
    assert like.scale == pytest.approx(factor, rel=1e-5)
    assert like.same_scale == (1 / SCALE <= like.scale <= SCALE)


@pytest.mark.parametrize("factor", [0.5, 0.5**0.5, 2**0.5, 2, *(d**-0.5 for d in (32, 48, 64, 80, 96, 128)), 64**-0.25])
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_what_tools_fold_is_another_scale_and_rounding_is_none(bits, factor):
    for seed in range(20):
        weight = normal(48, 40, seed=seed)
        step = np.abs(weight).max(1, keepdims=True) / (2 ** (bits - 1) - 1)
        rounded = np.round(weight / step) * step
        assert compare(linear(weight), linear(rounded)).same_scale
        assert not compare(linear(weight), linear(np.float32(factor) * rounded)).same_scale


def test_a_sketch_of_norm_1_tells_no_scale():
    weight = normal(24, 16)
    unit = linear(weight) / np.linalg.norm(linear(weight))
    assert (has_scale(linear(weight)), has_scale(unit), has_scale(np.zeros(64, np.float32))) == (True, False, False)
    for one, other in ((unit, linear(2 * weight)), (linear(weight), unit)):
        like = compare(one, other)
        assert (like.same_weight, like.scale, like.same_scale) == (True, None, True)


@pytest.mark.parametrize("factor", [1, 0.5])
def test_a_checkpoint_that_holds_a_multiple_is_refused_where_no_digest_tells(factor, checkpoint, tmp_path):
    base, adapter = checkpoint
    bound = lf.bind(adapter, base)
    given = lf.Adapter({key: replace(update, base_sha256=None) for key, update in bound.items()})
    save_file(
        {name: (factor * base.read(name)).astype(np.float32) for name in ("q.weight", "k.weight")},
        tmp_path / "other.safetensors",
    )
    other = lf.open_base(tmp_path / "other.safetensors")
    if factor == 1:
        assert lf.merge(given, other, tmp_path / "out.safetensors")
        return
    with pytest.raises(lf.LoraFormatError, match=r"LF-616  q\.weight is 0\.5 times"):
        lf.merge(given, other, tmp_path / "out.safetensors")
    assert lf.merge(given, other, tmp_path / "out.safetensors", any_base=True)


@pytest.fixture
def checkpoint(tmp_path):
    """(base, adapter for it)."""
    save_file({"q.weight": normal(5, 7), "k.weight": normal(7, 5), "q.bias": normal(5)}, tmp_path / "base.safetensors")
    updates = {k: lf.Update((lf.Lora(normal(2, i), normal(o, 2), 1.0, "factor"),)) for k, o, i in
               (("q.weight", 5, 7), ("k.weight", 7, 5))}  # fmt: skip
    return lf.open_base(tmp_path / "base.safetensors"), lf.Adapter(updates)


def test_bind_writes_sketches_and_the_digest_stays(checkpoint, tmp_path):
    base, adapter = checkpoint
    bound = lf.bind(adapter, base)
    np.testing.assert_array_equal(bound["q.weight"].sketch, linear(base.read("q.weight")))
    assert lf.digest(bound) == lf.digest(adapter)
    lf.save(bound, tmp_path / "a.safetensors")
    np.testing.assert_array_equal(lf.load(tmp_path / "a.safetensors")["k.weight"].sketch, bound["k.weight"].sketch)


def test_bind_leaves_sketches_out_where_asked(checkpoint, tmp_path, run):
    base, adapter = checkpoint
    lf.save(adapter, tmp_path / "a.safetensors")
    assert run("bind", "a.safetensors", "--base", base.path, "-o", "bare.safetensors", "--no-sketch").code == 0
    assert run("bind", "a.safetensors", "--base", base.path, "-o", "full.safetensors").code == 0
    held = {name: lf.load(tmp_path / f"{name}.safetensors")["q.weight"] for name in ("bare", "full")}
    assert held["bare"].sketch is None
    assert held["full"].sketch is not None
    assert held["bare"].base_sha256 == held["full"].base_sha256
