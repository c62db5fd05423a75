"""Sketches: what they are, value by value; what they recognise, and what they must not."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

import loraformat as lf
from loraformat.sketch import cosine, recognise, sketch


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
    return (total / np.linalg.norm(total)).reshape(-1)


def test_a_sketch_is_what_its_definition_says():
    weight = normal(13, 7)
    found = linear(weight)
    assert (found.shape, found.dtype) == ((64,), np.float32)
    np.testing.assert_allclose(found, defined(weight), atol=1e-7)
    # Frozen: a sketch in a file is compared with one that is made years later.
    counted = np.arange(91, dtype=np.float32).reshape(13, 7) ** 2 % 17
    np.testing.assert_allclose(linear(counted)[:4], FROZEN, atol=1e-6)


FROZEN = (0.12131943, 0.25091064, -0.17646463, 0.02205808)


@pytest.mark.parametrize(
    ("spec", "shape"),
    [("out,in", (5, 7)), ("in,out", (7, 5)), ("in1,in2,in0,out", (3, 2, 7, 5)), ("batch,out,in", (3, 5, 7)),
     ("out,batch,in", (5, 3, 7)), ("batch,in,batch,out", (2, 7, 3, 5)), ("in1,out,in0", (2, 5, 3))],
)  # fmt: skip
def test_a_sketch_is_that_of_the_matrix_however_it_lies(spec, shape, monkeypatch):
    weight, placement = normal(*shape), lf.Placement.of(shape, spec)
    matrix = placement.to_matrix(weight)
    wanted = defined(matrix.reshape(-1, matrix.shape[-1]))
    np.testing.assert_allclose(sketch(weight, placement), wanted, atol=1e-7)
    monkeypatch.setattr("loraformat.sketch._TILE", 1)  # tile after tile gives the same
    np.testing.assert_allclose(sketch(weight, placement), wanted, atol=1e-7)


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


@pytest.fixture
def checkpoint(tmp_path):
    """(base, adapter for it)."""
    from safetensors.numpy import save_file

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
