"""Laws of the small arithmetic: canonical JSON, the container's bytes, placements, tiles, scales, the generator."""

import hashlib
import io
import itertools
import json
import math
import statistics

import ml_dtypes
import numpy as np
import pytest
import rfc8785
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st

import loraformat as lf
from loraformat import canonical, container, testing
from loraformat.normal import normal, uniform
from loraformat.scale import scale_of

settings.register_profile("here", deadline=None, derandomize=True, max_examples=150)
settings.load_profile("here")

# Canonical JSON.

TEXTS = st.text(st.characters(exclude_categories=("Cs",)), max_size=6)
NUMBERS = st.integers(-(2**53) + 1, 2**53 - 1) | st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=20,
)


@given(VALUES)
@settings(max_examples=400)
def test_canonical_json_is_that_of_another_implementation_of_rfc_8785(value):
    assert canonical.dumps(value).encode() == rfc8785.dumps(value)


@given(st.integers(0, 2**64 - 1).map(lambda bits: np.uint64(bits).view(np.float64).item()).filter(math.isfinite))
@settings(max_examples=1500)
def test_every_float64_has_the_spelling_of_ecmascript(number):
    assert canonical.dumps(number).encode() == rfc8785.dumps(number)


@given(VALUES)
def test_canonical_json_read_again_is_the_value(value):
    """Beyond 2^53 the text of a float is that of another integer: it is compared as the float that it stands for."""
    assert as_floats(canonical.loads(canonical.dumps(value))) == as_floats(value)


@given(VALUES)
def test_canonical_json_has_one_spelling(value):
    text = canonical.dumps(value)
    assert canonical.dumps(canonical.loads(text)) == text


def as_floats(value):
    if isinstance(value, dict | list):
        return {k: as_floats(v) for k, v in value.items()} if isinstance(value, dict) else [as_floats(v) for v in value]
    return float(value) if type(value) is int else value


@given(VALUES)
def test_canonical_json_is_the_same_for_the_same_value(value):
    shuffled = json.loads(json.dumps(value), object_pairs_hook=lambda pairs: dict(reversed(pairs)))
    assert canonical.dumps(shuffled) == canonical.dumps(value)


# RFC 8785, appendix B: the bits of a double and its text.
SAMPLES = {
    "0000000000000000": "0",
    "8000000000000000": "0",
    "0000000000000001": "5e-324",
    "7fefffffffffffff": "1.7976931348623157e+308",
    "4340000000000000": "9007199254740992",
    "4430000000000000": "295147905179352830000",
    "44b52d02c7e14af5": "9.999999999999997e+22",
    "44b52d02c7e14af6": "1e+23",
    "444b1ae4d6e2ef4e": "999999999999999700000",
    "444b1ae4d6e2ef50": "1e+21",
    "3eb0c6f7a0b5ed8c": "9.999999999999997e-7",
    "3eb0c6f7a0b5ed8d": "0.000001",
    "41b3de4355555553": "333333333.3333332",
    "becbf647612f3696": "-0.0000033333333333333333",
}


@pytest.mark.parametrize("bits", SAMPLES)
def test_the_samples_of_the_rfc_are_spelled_as_it_says(bits):
    assert canonical.dumps(float(np.frombuffer(bytes.fromhex(bits), ">f8")[0])) == SAMPLES[bits]


@pytest.mark.parametrize("value", [math.nan, math.inf, 2**53 + 1, "\ud800", {"\udfff": 1}])
def test_what_has_no_canonical_form_is_refused(value):
    with pytest.raises(ValueError, match=r".+"):
        canonical.dumps(value)


@pytest.mark.parametrize("text", ['{"a": 1, "a": 1}', "NaN", "[-Infinity]", "[" * 100_000, "{} {}", ""])
def test_what_is_no_strict_json_is_refused(text):
    with pytest.raises(ValueError, match=r".+"):
        canonical.loads(text)


# The container.

FLAVOURS = {
    "F64": "f8", "F32": "f4", "F16": "f2", "I64": "i8", "I32": "i4", "I16": "i2", "I8": "i1", "U64": "u8", "U32": "u4",
    "U16": "u2", "U8": "u1", "BOOL": "?", "C64": "c8", "BF16": ml_dtypes.bfloat16, "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
}  # fmt: skip
# The names that safetensors' own serializer takes (0.8: the Rust enum's, in lower case and without E4M3's fn).
THEIRS = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "BF16": "bfloat16", "BOOL": "bool", "C64": "complex64"}
TENSORS = st.dictionaries(
    TEXTS.filter(lambda name: name != "__metadata__"),
    st.tuples(st.sampled_from(sorted(FLAVOURS)), st.lists(st.integers(0, 4), max_size=3), st.integers(0, 2**32)),
    max_size=6,
)


def tensor(flavour, shape, seed):
    dtype = np.dtype(FLAVOURS[flavour])
    data = np.random.default_rng(seed).bytes(dtype.itemsize * math.prod(shape))
    data = bytes(b & 1 for b in data) if flavour == "BOOL" else data
    return np.frombuffer(data, dtype).reshape(shape)


def written(tensors, metadata):
    file = io.BytesIO()
    container.write(file, tensors, metadata)
    return file.getvalue()


@given(TENSORS, st.dictionaries(TEXTS, TEXTS, max_size=1))
def test_a_file_has_the_bytes_of_the_reference_serializer(flavours, metadata):
    tensors = {name: tensor(*flavour) for name, flavour in flavours.items()}
    specs = {
        name: safetensors.TensorSpec(
            dtype=THEIRS.get(flavours[name][0], t.dtype.name),
            shape=t.shape,
            data_ptr=t.ctypes.data,
            data_len=t.nbytes,
        )
        for name, t in tensors.items()
    }
    assert written(tensors, metadata) == bytes(safetensors.serialize(specs, metadata or None))


@given(TENSORS)
def test_a_file_read_again_holds_the_same_tensors(tmp_path_factory, flavours):
    tensors = {name: tensor(*flavour) for name, flavour in flavours.items()}
    path = tmp_path_factory.getbasetemp() / "again.safetensors"
    path.write_bytes(written(tensors, {}))
    found = container.Container(path)
    assert found.keys() == tensors.keys()
    for name, wanted in tensors.items():
        assert (found[name].dtype, found[name].shape) == (wanted.dtype, wanted.shape)
        assert found[name].tobytes() == wanted.tobytes()


def test_every_dtype_of_the_container_is_tried():
    assert FLAVOURS.keys() == container.DTYPES.keys()


def test_a_tensor_of_the_other_byte_order_or_of_strides_is_written_as_its_values():
    values = np.arange(12, dtype="<f4").reshape(3, 4)
    wanted = written({"a": values}, {})
    assert written({"a": values.astype(">f4")}, {}) == wanted
    assert written({"a": np.asfortranarray(values)}, {}) == wanted
    assert written({"a": np.repeat(values, 2, axis=1)[:, ::2]}, {}) == wanted


# Placements.


@st.composite
def placements(draw, batch=True):
    """Up to five axes of sizes 1 to 4, each in one list, in any order, at least one out."""
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=5)))
    order = draw(st.permutations(range(len(shape))))
    first = draw(st.integers(1, len(order)))
    second = draw(st.integers(first, len(order))) if batch else len(order)
    return lf.Placement(shape, tuple(order[:first]), tuple(order[first:second]), tuple(order[second:]))


def numbered(shape):
    return np.arange(math.prod(shape), dtype=np.float32).reshape(shape)


@given(placements())
def test_a_base_tensor_as_a_matrix_and_back_is_itself(place):
    assert place.fault() is None
    base = numbered(place.shape)
    matrix = place.to_matrix(base)
    assert matrix.shape == place.matrix_shape
    assert np.array_equal(place.from_matrix(matrix), base)


@given(placements())
def test_a_matrix_holds_at_each_index_what_the_definition_says(place):
    base, matrix = numbered(place.shape), place.to_matrix(numbered(place.shape))
    for index in np.ndindex(place.shape):
        row, column = (
            int(np.ravel_multi_index([index[a] for a in axes], [place.shape[a] for a in axes])) if axes else 0
            for axes in (place.out, place.in_)
        )
        assert matrix[(*(index[a] for a in place.batch), row, column)] == base[index]


@given(placements())
def test_the_words_of_a_placement_give_it_back(place):
    assert lf.Placement.of(place.shape, place.spec).matrix_shape == place.matrix_shape
    again = lf.Placement.of(place.shape, place.spec)
    assert (again.out, again.in_) == (place.out, place.in_)


@pytest.mark.parametrize(
    ("out", "in_", "batch"),
    [((), (0, 1), ()), ((0,), (), ()), ((0,), (0, 1), ()), ((0,), (2,), ()), ((0,), (1,), (1,))],
)
def test_axes_that_do_not_name_each_axis_once_are_no_placement(out, in_, batch):
    assert lf.Placement((3, 4), out, in_, batch).fault()


# Updates and their tiles.


@given(placements(), st.integers(1, 3), st.integers(0, 2**32), st.data())
def test_runs_of_rows_put_together_are_the_whole(place, rank, seed, data):
    draw = np.random.default_rng(seed)
    *batch, out, in_ = place.matrix_shape
    shared = [data.draw(st.sampled_from([1, n])) for n in batch]
    a, b = draw.standard_normal((*shared, rank, in_)), draw.standard_normal((*batch, out, rank))
    update = lf.Update((lf.Lora(a.astype(np.float32), b.astype(np.float32), 1.7, "alpha/r"),), place)
    base = draw.standard_normal(place.shape).astype(np.float32)
    wanted = np.broadcast_to(1.7 / rank * (b @ a), place.matrix_shape)
    assert testing.relative_error(update.delta(), place.from_matrix(wanted)) <= 1e-5
    inner = data.draw(st.sets(st.sampled_from(range(1, max(2, place.shape[0])))))
    runs = list(itertools.pairwise([0, *sorted(inner - {place.shape[0]}), place.shape[0]]))
    deltas = [update.delta(rows=run) for run in runs]
    np.testing.assert_allclose(np.concatenate(deltas), update.delta(), rtol=1e-5, atol=1e-6)
    applied = [update.apply(base[slice(*run)], run) for run in runs]
    np.testing.assert_allclose(np.concatenate(applied), update.apply(base), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "shape"),
    [("conv", None), ("embedding", None), ("experts", None), ("delta", None), ("dora", None), ("rows", None), ("replace", (6, 9)), ("lora", (11, 7)), ("loha", (10, 8)), ("lokr", (6, 35))],
)  # fmt: skip
def test_runs_of_rows_of_every_kind_are_the_whole(kind, shape):
    (update,) = testing.random_adapter(seed=3, kinds=[kind]).values()
    if shape:
        update = update.placed(lf.Placement(shape, (0,), (1,)))
    base = np.random.default_rng(4).standard_normal(update.placement.shape).astype(np.float32)
    testing.check_tiles(update, base)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_the_product_is_taken_in_float32_whatever_the_factors_are_stored_in(dtype):
    draw = np.random.default_rng(0)
    a, b = (draw.standard_normal(s).astype(dtype) for s in ((64, 40), (30, 64)))
    update = lf.Update((lf.Lora(a, b, 64, "alpha/r"),))
    assert update.matrix().dtype == np.float32
    assert testing.relative_error(update.matrix(), b.astype(np.float64) @ a.astype(np.float64)) <= 1e-6


@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 5), st.floats(-9, 9), st.integers(0, 2**32))
def test_the_norm_by_the_factors_is_the_norm_of_the_matrix(rank, out, in_, alpha, seed):
    draw = np.random.default_rng(seed)
    a, b = (draw.standard_normal(s).astype(np.float32) for s in ((rank, in_), (out, rank)))
    update = lf.Update((lf.Lora(a, b, alpha, "alpha/sqrt(r)"),))
    assert update.norm() == pytest.approx(np.linalg.norm(update.matrix().astype(np.float64)), rel=1e-5, abs=1e-9)


# Scales.


@given(st.floats(-1e9, 1e9), st.integers(1, 4096))
def test_the_scale_rules_are_their_formulas(alpha, r):
    assert scale_of(alpha, "factor", r) == alpha
    assert scale_of(alpha, "factor", None) == alpha
    assert scale_of(alpha, "alpha/r", r) == alpha / r
    assert scale_of(alpha, "alpha/sqrt(r)", r) == alpha / math.sqrt(r)


@pytest.mark.parametrize("rule", ["alpha/r", "alpha/sqrt(r)"])
@pytest.mark.parametrize("r", [None, 0, -1])
def test_a_rule_that_divides_by_the_rank_needs_one(rule, r):
    with pytest.raises(ValueError, match="needs a rank"):
        scale_of(1.0, rule, r)


# The generator.


def test_the_bits_are_those_of_shake_128_and_nothing_else():
    stream = hashlib.shake_128(b"loraformat/1\n42\nmodel.q.weight").digest(80)
    wanted = [(int.from_bytes(stream[i : i + 8], "little") >> 11) + 0.5 for i in range(0, 80, 8)]
    assert uniform(42, "model.q.weight", 10).tolist() == [x / 2**53 for x in wanted]


def test_the_numbers_of_a_seed_are_these_forever():
    assert hashlib.sha256(normal(42, "model.q.weight", 1000).astype("<f8").tobytes()).hexdigest() == NORMAL
    assert hashlib.sha256(uniform(42, "model.q.weight", 1000).astype("<f8").tobytes()).hexdigest() == UNIFORM


NORMAL = "2e52bbddf3d6a1f1950c5d79b974d499fd3d103e6305ad9fe48131fe65e81dd3"
UNIFORM = "163bc38ab7e4981b4d0ec1cbff5e3f8e10c1d1a4e66626ed9b533854076d259f"


def test_a_seed_and_a_name_each_give_other_numbers_and_a_count_only_more_of_them():
    whole = normal(0, "a", 1000)
    assert np.array_equal(normal(0, "a", 10), whole[:10])
    assert not np.intersect1d(whole, normal(1, "a", 1000)).size
    assert not np.intersect1d(whole, normal(0, "b", 1000)).size


# p and the quantile of the standard normal distribution, to 17 digits (Wichura 1988 prints the first three).
QUANTILES = {
    0.25: -0.67448975019608171,
    0.001: -3.0902323061678133,
    1e-20: -9.2623400897984076,
    0.5: 0.0,
    0.975: 1.9599639845400539,
    0.9: 1.2815515655446004,
    1e-5: -4.2648907939228246,
    1e-10: -6.3613409024040557,
    2.0**-54: -8.2923610758135955,
}


@pytest.mark.parametrize("p", QUANTILES)
def test_the_inverse_distribution_function_has_its_known_values(p, monkeypatch):
    monkeypatch.setattr("loraformat.normal.uniform", lambda seed, name, count: np.full(count, p))
    assert normal(0, "", 1)[0] == pytest.approx(QUANTILES[p], rel=2e-15, abs=1e-16)


@given(st.floats(1e-16, 1 - 1e-16))
def test_the_inverse_distribution_function_is_that_of_the_standard_library(p):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("loraformat.normal.uniform", lambda seed, name, count: np.full(count, p))
        found = normal(0, "", 1)[0]
    assert found == pytest.approx(statistics.NormalDist().inv_cdf(p), rel=1e-13, abs=1e-15)


def test_the_numbers_are_normal():
    numbers = normal(7, "moments", 1_000_000)
    assert numbers.mean() == pytest.approx(0, abs=5e-3)
    assert numbers.var() == pytest.approx(1, abs=7e-3)
    assert (numbers**3).mean() == pytest.approx(0, abs=0.02)
    assert (numbers**4).mean() == pytest.approx(3, abs=0.05)
    assert np.corrcoef(numbers[:-1], numbers[1:])[0, 1] == pytest.approx(0, abs=5e-3)
    for quantile in (0.01, 0.25, 0.5, 0.9):
        assert np.mean(numbers < statistics.NormalDist().inv_cdf(quantile)) == pytest.approx(quantile, abs=2.5e-3)


def test_the_uniform_numbers_lie_strictly_within_zero_and_one():
    numbers = uniform(7, "moments", 1_000_000)
    assert 0 < numbers.min() < 1e-5
    assert 1 - 1e-5 < numbers.max() < 1
    assert np.histogram(numbers, 10, (0, 1))[0] == pytest.approx(100_000, rel=0.02)
