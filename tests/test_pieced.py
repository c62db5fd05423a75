"""Tensors that are put together where they are read: the values of a plain array, and never the whole of it in memory."""

import io
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from updates import normal

import loraformat as lf
from loraformat import Adapter, Lora, Update, identity, serializer
from loraformat.pieced import Pieced, pieced
from loraformat.verbs.convert import save
from loraformat_converters.kohya import layout as kohya

EVERY = slice(None)
CASES = {
    "blocks": ((9, 5), [((slice(0, 4), slice(0, 2)), (4, 2)), ((slice(5, 9), slice(2, 5)), (4, 3))]),
    "rows in another order": ((7, 3), [((np.array([6, 0, 3]),), (3, 3)), ((np.array([1, 2]),), (2, 3))]),
    "a stack": ((4, 2, 3), [((3,), (2, 3)), ((0,), (2, 3))]),
    "rows of every matrix": ((2, 6, 3), [((EVERY, np.array([4, 1])), (2, 2, 3)), ((EVERY, slice(2, 4)), (2, 2, 3))]),
    "matrices in the middle": ((3, 4, 2), [((EVERY, 2), (3, 2)), ((EVERY, 0), (3, 2))]),
    "a vector": ((6,), [((slice(4, 6),), (2,)), ((np.array([3, 0]),), (2,))]),
}


def both(case, dtypes=(np.float32, np.float32)):
    shape, places = CASES[case]
    pieces = [(at, normal(*size, seed=n).astype(dtypes[n])) for n, (at, size) in enumerate(places)]
    plain = np.zeros(shape, np.result_type(*dtypes) if dtypes[0] != dtypes[1] else dtypes[0])
    for at, piece in pieces:
        plain[at] = piece
    return pieced(shape, pieces), plain


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtypes", [(np.float32,) * 2, (ml_dtypes.bfloat16,) * 2, (np.float16, np.float64)], ids=str)
def test_it_has_the_values_of_a_plain_array(case, dtypes):
    found, plain = both(case, dtypes)
    assert (found.shape, found.dtype, found.ndim, found.size, found.nbytes, len(found)) == (
        plain.shape, plain.dtype, plain.ndim, plain.size, plain.nbytes, len(plain),
    )  # fmt: skip
    np.testing.assert_array_equal(np.asarray(found), plain)
    for start in range(len(plain) + 1):
        for stop in range(start, len(plain) + 2):
            np.testing.assert_array_equal(found[start:stop], plain[start:stop])
    for key in (0, -1, EVERY, slice(None, None, 2), ..., (Ellipsis, 0), np.array([1, 0])):
        np.testing.assert_array_equal(found[key], plain[key])
    with pytest.raises(IndexError):
        found[len(plain)]


def test_it_is_taken_for_an_array():
    found, plain = both("blocks")
    other = normal(5, 9)
    for made, wanted in ((found @ other, plain @ other), (other @ found, other @ plain), (2 * found, 2 * plain)):
        np.testing.assert_array_equal(made, wanted)
    np.testing.assert_array_equal(np.concatenate([found, found]), np.concatenate([plain, plain]))
    np.testing.assert_array_equal(found.T, plain.T)
    np.testing.assert_array_equal(found.astype(np.float64), plain)
    np.testing.assert_array_equal(np.asarray(found, np.float16), plain.astype(np.float16))
    np.testing.assert_array_equal(found.reshape(3, 15), plain.reshape(3, 15))
    assert found.reshape(9, 5) is found.reshape((9, 5)) is found
    assert not hasattr(found, "__array_interface__")  # of memory that nobody holds
    with pytest.raises(TypeError):
        found += 1
    total = np.zeros(plain.shape, np.float32)
    total += found
    np.testing.assert_array_equal(total, plain)


@pytest.mark.parametrize("case", CASES)
def test_it_is_written_and_hashed_as_a_plain_array(case, monkeypatch):
    monkeypatch.setattr("loraformat.pieced._RUN", 40)  # bytes: a run is a few rows
    found, plain = both(case)
    files = io.BytesIO(), io.BytesIO()
    for file, tensor in zip(files, (found, plain), strict=True):
        serializer.write(file, {"a": tensor}, {})
    assert files[0].getvalue() == files[1].getvalue()
    assert identity.tensor_sha256(found) == identity.tensor_sha256(plain)


def test_what_is_fused_is_written_without_being_held(tmp_path):
    keys = [f"transformer:transformer_blocks.{i}.attn.to_{n}.weight" for i in range(6) for n in "qkv"]
    keys += ["transformer:single_transformer_blocks.0.attn.to_q.weight"]  # which only Flux has
    r, size = 96, 512
    pairs = [Update((Lora(normal(r, size, seed=n), normal(size, r, seed=n), r, "alpha/r"),)) for n in range(len(keys))]
    apart = Adapter(dict(zip(keys, pairs, strict=True)), components=("transformer",))
    lf.retarget(apart, "kohya")  # makes the tables
    tracemalloc.start()
    fused = lf.retarget(apart, "kohya").adapter
    save(fused, tmp_path / "fused.safetensors", kohya)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    large = [u["lora"].lora_B for u in fused.values() if u.rank == 3 * r]
    assert len(large) == 6
    assert all(isinstance(b, Pieced) for b in large)
    assert peak < sum(b.nbytes for b in large) / 2
