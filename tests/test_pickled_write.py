"""What is written for torch.load: read back by our reader, and by torch itself without trust."""

import io
import zipfile

import ml_dtypes
import numpy as np
import pytest

from loraformat.pickled.file import TorchFile
from loraformat.pickled.write import write

DRAW = np.random.default_rng(4)
DTYPES = (
    *("f8", "f4", "f2", ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2),
    *("i8", "i4", "i2", "i1", "u1", "?", "u2", "u4", "u8", "c8"),
)


def tensors():
    made = {f"of.{np.dtype(dtype).name}": (9 * DRAW.standard_normal((3, 5))).astype(dtype) for dtype in DTYPES}
    transposed = (DRAW.standard_normal((300, 7))).astype(ml_dtypes.bfloat16).T
    return {
        **made,
        "transposed": transposed,
        "none": np.array(4.5, "f4"),
        "deep": made["of.float32"].reshape(1, 3, 1, 5),
    }


def written(path, made, under=None):
    with open(path, "w+b") as file:
        write(file, made, under)
    return path


@pytest.mark.parametrize("under", [None, "model"])
def test_our_own_reader_gives_the_same_values_back(under, tmp_path):
    made = tensors()
    found = TorchFile(written(tmp_path / "a.pt", made, under))
    assert list(found) == list(made)
    for name, tensor in made.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert found[name].tobytes() == tensor.tobytes(), name


def test_the_same_tensors_give_the_same_bytes_and_every_storage_begins_on_a_boundary(tmp_path):
    made = tensors()
    one, two = (written(tmp_path / name, made).read_bytes() for name in ("a.pt", "b.pt"))
    assert one == two
    found = TorchFile(tmp_path / "a.pt")
    assert {found.start(name) % 64 for name in found} == {0}
    archive = zipfile.ZipFile(io.BytesIO(one))
    assert archive.testzip() is None
    assert archive.namelist()[0] == "archive/data.pkl"


@pytest.mark.peer
@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("under", [None, "model"])
def test_torch_loads_it_without_trust(under, mapped, tmp_path):
    torch = pytest.importorskip("torch", reason="torch reads its own files: pip install 'loraformat[peers]'")
    made = tensors()
    found = torch.load(written(tmp_path / "a.pt", made, under), weights_only=True, mmap=mapped)
    found = found if under is None else found[under]
    assert list(found) == list(made)
    for name, tensor in made.items():
        assert tuple(found[name].shape) == tensor.shape
        assert str(found[name].dtype).removeprefix("torch.") == tensor.dtype.name
        assert bytes(found[name].reshape(-1).view(torch.uint8).numpy()) == tensor.tobytes(), name
