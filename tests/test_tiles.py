"""Widening by bits, patched copies, and reading by runs of rows."""

import io
import os
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from threadpoolctl import threadpool_info

import loraformat as lf
from loraformat import patch, ranges, tiles
from loraformat.parts import Magnitude, Rows
from loraformat.patch import Patch, patched_size, write_patched
from loraformat.rounding import rounded, widened

BF16 = np.dtype(ml_dtypes.bfloat16)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("dtype", [np.dtype(np.float16), BF16], ids=str)
def test_widening_is_exact_for_every_value_of_16_bits(dtype):
    stored = np.arange(1 << 16, dtype=np.uint16).view(dtype)
    finite = stored[np.isfinite(stored)]
    for values in (stored, finite, finite.reshape(-1, 32)[::2, ::3], finite[7:8].reshape(())):
        before = values.copy()
        wide = widened(values)
        assert wide.dtype == np.float32
        np.testing.assert_array_equal(wide, values.astype(np.float32))
        wide[...] = 0  # an array of its own
        assert values.tobytes() == before.tobytes()


def test_what_lies_beyond_the_range_becomes_infinite():
    assert rounded(np.float32([3.4e38, -3.4e38, 1e6]), BF16).astype(np.float32).tolist()[:2] == [np.inf, -np.inf]
    assert rounded(np.float32([1e6]), np.dtype(np.float16)).tolist() == [np.inf]


# Patched copies.


def patched(tmp_path, old, pieces):
    (tmp_path / "old").write_bytes(old)
    patches = [Patch(a, b, sum(map(len, new)), lambda new=new: map(memoryview, new)) for a, b, new in pieces]
    with open(tmp_path / "old", "rb") as source, open(tmp_path / "new", "w+b") as target:
        write_patched(target, source, patches)
    result = (tmp_path / "new").read_bytes()
    assert len(result) == patched_size(len(old), patches)
    return result


@pytest.mark.parametrize("kernel", [True, False])
@settings(max_examples=60)
@given(st.data())
def test_a_patched_copy_is_the_file_with_its_pieces_exchanged(kernel, tmp_path_factory, data):
    old = data.draw(st.binary(max_size=200))
    ends = sorted(data.draw(st.lists(st.integers(0, len(old)), max_size=8)))
    spans = list(zip(ends[::2], ends[1::2], strict=False))
    pieces = [(a, b, data.draw(st.lists(st.binary(min_size=1, max_size=20), max_size=3))) for a, b in spans]
    wanted, position = io.BytesIO(), 0
    for a, b, new in pieces:
        wanted.write(old[position:a] + b"".join(new))
        position = b
    wanted.write(old[position:])
    with pytest.MonkeyPatch.context() as monkey:
        if not kernel:
            monkey.delattr(os, "copy_file_range")
        assert patched(tmp_path_factory.mktemp("p"), old, pieces) == wanted.getvalue()


def test_without_positioned_reads_and_writes_the_copy_is_the_same(tmp_path, monkeypatch):
    for name in ("preadv", "pwrite", "copy_file_range", "posix_fadvise"):  # as on Windows
        monkeypatch.delattr(os, name)
    old = bytes(range(256)) * 1000
    assert patched(tmp_path, old, [(5, 9, [b"new"]), (100_000, 100_007, [b"x" * 9])]) == (
        old[:5] + b"new" + old[9:100_000] + b"x" * 9 + old[100_007:]
    )


def test_patches_that_overlap_or_give_another_length_are_errors(tmp_path):
    with pytest.raises(ValueError, match="overlap"):
        patched(tmp_path, b"0123456789", [(2, 6, [b"a"]), (5, 8, [b"b"])])
    with open(tmp_path / "old", "rb") as source, open(tmp_path / "new", "w+b") as target:
        wrong = Patch(0, 1, 5, lambda: [memoryview(b"four")])
        with pytest.raises(ValueError, match="5 bytes gave 4"):
            write_patched(target, source, [wrong])


def test_an_error_in_one_patch_stops_the_others(tmp_path, monkeypatch):
    made = []

    def broken():
        raise OSError(28, "No space left on device")

    def counted():
        made.append(1)
        return [memoryview(b"x")]

    monkeypatch.setattr(patch, "_WORKERS", 1)
    (tmp_path / "old").write_bytes(b"0" * 500)
    patches = [Patch(0, 1, 1, broken), *(Patch(i, i + 1, 1, counted) for i in range(1, 500))]
    with (
        open(tmp_path / "old", "rb") as source,
        open(tmp_path / "new", "w+b") as target,
        pytest.raises(OSError, match="space"),
    ):
        write_patched(target, source, patches)
    assert made == []


def test_a_source_that_became_shorter_is_an_error_and_no_crash(tmp_path):
    (tmp_path / "old").write_bytes(b"0" * 10)
    with open(tmp_path / "old", "rb") as file, pytest.raises(OSError, match="shorter"):
        ranges.read_range(file, memoryview(bytearray(20)), 0)


def test_no_other_threads_multiply_while_ours_do(tmp_path):
    def counted():
        seen.extend(pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas")
        return [memoryview(b"x")]

    seen = []
    (tmp_path / "old").write_bytes(b"0")
    with open(tmp_path / "old", "rb") as source, open(tmp_path / "new", "w+b") as target:
        write_patched(target, source, [Patch(0, 1, 1, counted)])
    assert set(seen) <= {1}


# Runs of rows.


@pytest.mark.parametrize(
    ("a", "b", "scale"), [(1e30, 1e-30, 1e-10), (1e-30, 1e30, 1e10), (1.0, 1e-44, 1e30), (1, 2, 0)]
)
def test_a_scale_is_folded_into_a_factor_only_where_no_digit_is_lost(a, b, scale):
    draw = np.random.default_rng(0)
    pair = [(np.float32(size) * draw.uniform(1, 2, s)).astype(np.float32) for size, s in ((a, (2, 6)), (b, (5, 2)))]
    update = lf.Update((lf.Lora(*pair, scale, "factor"),), lf.Placement.of((5, 6), "out,in"))
    wanted = scale * pair[1].astype(np.float64) @ pair[0].astype(np.float64)
    np.testing.assert_allclose(tiles.prepared(update).delta(), wanted, rtol=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, BF16, np.float64], ids=str)
def test_a_tensor_in_runs_of_rows_is_the_tensor_at_once(dtype, monkeypatch):
    draw = np.random.default_rng(0)
    old = draw.standard_normal((11, 6)).astype(dtype)
    pair = lf.Lora(draw.standard_normal((2, 6), np.float32), draw.standard_normal((11, 2), np.float32), 3.0, "alpha/r")
    update = lf.Update((pair,), lf.Placement.of((11, 6), "out,in"))
    whole, norms = list(tiles.changed([update, update], old, tiles.Norms())), tiles.Norms()
    monkeypatch.setattr(tiles, "_TILE", 13)
    found = list(tiles.changed([update, update], old, norms))
    assert (len(whole), len(found)) == (1, 6)
    close = 2e-6 if np.dtype(dtype).itemsize > 2 else 2.0**-7  # the sum of another order may round to the next value
    assert np.allclose(*(a.astype(np.float64) for a in (np.concatenate(found), whole[0])), rtol=close)
    assert whole[0].dtype == dtype
    assert np.isclose(norms.delta, 4 * np.square(update.delta()).sum(), rtol=1e-5)
    assert np.isclose(norms.base, np.square(old.astype(np.float64)).sum(), rtol=1e-5)


@pytest.mark.parametrize("spec", ["out,in", "in,out"])
@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_a_run_of_rows_of_a_product_holds_no_more_than_itself(kind, spec):
    """Of a Hadamard or Kronecker product a run is computed alone: the whole would be as large as the weight."""
    draw = np.random.default_rng(0).standard_normal
    out, in_ = 24 * 40, 30 * 50
    part = {
        "loha": lf.Loha(draw((out, 4)), draw((4, in_)), draw((out, 3)), draw((3, in_)), 2.0, "alpha/r"),
        "lokr": lf.Lokr(2.0, "factor", lokr_w1=draw((24, 30)), lokr_w2_a=draw((40, 5)), lokr_w2_b=draw((5, 50))),
    }[kind]
    shape = (out, in_) if spec == "out,in" else (in_, out)
    update = lf.Update((part,), lf.Placement.of(shape, spec))
    ready, whole = tiles.prepared(update), update.delta()
    for rows in ((0, 7), (33, 90), (shape[0] - 3, shape[0])):
        tracemalloc.start()
        found = ready.delta(rows=rows)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        np.testing.assert_allclose(found, whole[slice(*rows)], rtol=1e-4, atol=1e-4)
        assert most < 4 * found.nbytes + 200_000


# Norms that run over axis 0.


class Asked:
    """A tensor that notes how many rows it is asked for at once."""

    def __init__(self, values):
        self.values, self.shape, self.dtype, self.most = values, values.shape, values.dtype, 0

    def __getitem__(self, rows):
        start, stop, _ = rows.indices(self.shape[0])
        self.most = max(self.most, stop - start)
        return self.values[rows]


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
@pytest.mark.parametrize("kind", ["alone", "behind another", "with rows", "of a span"])
def test_a_magnitude_whose_norm_runs_over_axis_0_is_applied_by_runs_of_rows(kind, dtype):
    draw = np.random.default_rng(3)
    weight = draw.standard_normal((900, 700)).astype(dtype)  # [in, out]
    place = lf.Placement((900, 700), (1,), (0,))

    def pair(seed):
        a, b = (
            np.random.default_rng(seed + i).standard_normal(n, np.float32) for i, n in enumerate([(3, 900), (700, 3)])
        )
        return lf.Lora(a, b, 0.5, "factor")

    m = 1 + draw.random(700, np.float32)
    part = Magnitude(m, span=(100, 300)) if kind == "of a span" else Magnitude(m, eps=1e-3)
    parts = (pair(1), part)
    if kind == "with rows":
        parts = (*parts, Rows(draw.standard_normal((2, 700), np.float32), np.array([5, 800])))
    updates = [lf.Update(parts, place)]
    if kind == "behind another":
        updates.insert(0, lf.Update((pair(7),), place))
    wanted = weight.astype(np.float64)
    for update in updates:
        wanted += update["lora"].lora_B.T.astype(np.float64).T.dot(update["lora"].lora_A.astype(np.float64)).T * 0.5
    length = np.linalg.norm(wanted, axis=0) + part.eps
    inside = (np.arange(700) >= 100) & (np.arange(700) < 300) if kind == "of a span" else np.ones(700, bool)
    wanted = np.where(inside, m * wanted / length, m * wanted)
    if kind == "with rows":
        wanted[[5, 800]] = parts[2].values
    base = Asked(weight)
    got = np.concatenate(list(tiles.changed(updates, base, tiles.Norms()))).astype(np.float64)
    assert np.linalg.norm(got - wanted) <= (3e-4 if dtype == np.float16 else 1e-6) * np.linalg.norm(wanted)
    assert base.most < 900
