"""The container's bytes: those of the reference serializer, and read again what was written."""

import io
import math

import ml_dtypes
import numpy as np
import safetensors
from hypothesis import given
from hypothesis import strategies as st

from loraformat import container, serializer
from loraformat.dtypes import DTYPES
from loraformat.mapped import place, read_ahead

TEXTS = st.text(st.characters(exclude_categories=("Cs",)), max_size=6)
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
    serializer.write(file, tensors, metadata)
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
    assert FLAVOURS.keys() == DTYPES.keys()


def test_a_tensor_of_the_other_byte_order_or_of_strides_is_written_as_its_values():
    values = np.arange(12, dtype="<f4").reshape(3, 4)
    wanted = written({"a": values}, {})
    assert written({"a": values.astype(">f4")}, {}) == wanted
    assert written({"a": np.asfortranarray(values)}, {}) == wanted
    assert written({"a": np.repeat(values, 2, axis=1)[:, ::2]}, {}) == wanted


def test_what_lies_otherwise_in_memory_is_written_as_its_values(tmp_path, monkeypatch):
    """Transposed, cut, big-endian, a view of a mapped file: the bytes are those of a plain copy."""
    monkeypatch.setattr(serializer, "_SLAB", 1000)  # several of a matrix
    draw = np.random.default_rng(3)
    wide = draw.standard_normal((300, 517)).astype(ml_dtypes.bfloat16)
    tensors = {
        "transposed": wide.T,
        "cut": wide[7:290:3, 11:400:2],
        "turned": wide[::-1, ::-1],
        "cut and transposed": wide[5:, 131:].T,
        "three axes": draw.standard_normal((3, 5, 7)).transpose(2, 0, 1),
        "big": draw.standard_normal((40, 30)).astype(">f4").T,
        "none": np.array(2.5, "f4"),
    }
    for _ in range(2):
        with open(tmp_path / "a.safetensors", "wb") as file:
            serializer.write(file, tensors, {})
        found = container.Container(tmp_path / "a.safetensors")
        for name, tensor in tensors.items():
            assert found[name].tobytes() == np.ascontiguousarray(tensor.astype(found[name].dtype)).tobytes(), name
        (tmp_path / "a.safetensors").rename(tmp_path / "b.safetensors")
        held = container.Container(tmp_path / "b.safetensors")
        tensors = {name: held[name].T if held[name].ndim == 2 else held[name] for name in held}  # of mapped memory


def test_pages_are_asked_for_of_mapped_files_alone(tmp_path):
    large = np.ones((1 << 10, 1 << 9), np.float32)
    with open(tmp_path / "a.safetensors", "wb") as file:
        serializer.write(file, {"a": large, "b": large[:3]}, {})
    held = container.Container(tmp_path / "a.safetensors")
    for tensor in (large, large.T, held["a"], held["a"].T, held["a"][5:], held["a"][::-1], held["b"], np.float32(1)):
        before = np.asarray(tensor).tobytes()
        read_ahead(np.asarray(tensor))
        assert np.asarray(tensor).tobytes() == before


def test_large_tensors_go_from_file_to_file_as_they_are(tmp_path):
    """Parts of a mapped file between values of the program's own: the bytes are those of a plain copy."""
    draw = np.random.default_rng(8)
    own = {name: draw.standard_normal((n, 1 << 9)).astype("f4") for name, n in (("a", 700), ("b", 601), ("c", 3))}
    with open(tmp_path / "a.safetensors", "wb") as file:
        serializer.write(file, own, {})
    held = container.Container(tmp_path / "a.safetensors")
    mixed = {"z": held["a"], "y": own["c"], "x": held["b"][40:], "w": held["a"][:, 5:], "v": held["c"]}
    assert place(mixed["z"]) is not None
    assert place(mixed["x"]) is not None
    assert place(mixed["w"]) is None
    assert place(own["a"]) is None
    with open(tmp_path / "b.safetensors", "w+b") as file:
        serializer.write(file, mixed, {})
    whole = io.BytesIO()
    serializer.write(whole, {name: tensor.copy() for name, tensor in mixed.items()}, {})
    assert (tmp_path / "b.safetensors").read_bytes() == whole.getvalue()
