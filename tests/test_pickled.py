"""PyTorch's own files: read to the last bit, and nothing in them is ever run."""

import io
import os
import pickle
import pickletools
import struct
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft_goldens import HERE, truth_of

import loraformat as lf
from loraformat.pickled import is_torch
from loraformat.pickled.file import TorchFile
from loraformat.source import open_source

BIN = HERE / "bin" / "adapter" / "adapter_model.bin"
BAIT = "the-pickle-was-run"


class Bait:
    """Unpickled by anything but us, it leaves a file."""

    def __reduce__(self):
        return os.system, (f"touch {BAIT}",)


def refusal(path):
    with pytest.raises(lf.LoraFormatError) as caught:
        TorchFile(path)
    (problem,) = caught.value.problems
    assert problem.rule == "LF-510"
    assert not os.path.exists(BAIT)
    return problem.what


# A writer of small archives by hand: what torch.save writes, or what an attacker would.

FLOAT = "ctorch\nFloatStorage\n"
REBUILD = "ctorch._utils\n_rebuild_tensor_v2\n"


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def number(value):
    return b"J" + struct.pack("<i", value)


def tensor(key="0", numel=6, offset=0, sizes=(2, 3), strides=(3, 1)):
    """The instructions that put one float tensor on the stack."""
    pid = b"(" + text("storage") + FLOAT.encode() + text(key) + text("cuda:0") + number(numel) + b"tQ"
    tuples = b"".join(b"(" + b"".join(map(number, values)) + b"t" for values in (sizes, strides))
    return REBUILD.encode() + b"(" + pid + number(offset) + tuples + b"\x89ccollections\nOrderedDict\n)RtR"


def program(*items):
    return b"\x80\x02}(" + b"".join(items) + b"u."


def archive(path, data, storages=None, root="archive", **more):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as file:
        file.writestr(f"{root}/data.pkl", data)
        for key, values in (storages or {"0": np.arange(6, dtype="<f4")}).items():
            file.writestr(f"{root}/data/{key}", np.asarray(values).tobytes())
        for name, content in more.items():
            file.writestr(f"{root}/{name}", content)
    return path


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path / "x.bin"


# Read.


def test_the_adapter_that_peft_saved_without_safetensors_gives_pefts_deltas():
    tensors, deltas = open_source(HERE / "bin" / "adapter").tensors, truth_of("bin", "delta")
    stem = "base_model.model."
    assert len(tensors) == 2 * len(deltas)
    for key, delta in deltas.items():
        a, b = (tensors[f"{stem}{key.removesuffix('.weight')}.lora_{side}.weight"] for side in "AB")
        assert np.allclose(1.5 * b @ a, delta, rtol=1e-5, atol=1e-7)


def test_the_form_is_known_by_its_bytes_not_by_its_ending(tmp_path):
    path = tmp_path / "x.safetensors-not"
    path.write_bytes(BIN.read_bytes())
    assert is_torch(path)
    assert not is_torch(HERE / "linear" / "adapter" / "adapter_model.safetensors")
    assert sorted(open_source(path).tensors) == sorted(TorchFile(BIN))


@pytest.mark.parametrize("length", [0x0280, 0x010280, 0x05F50580])
def test_a_safetensors_header_whose_length_begins_like_a_pickle_is_none(length, tmp_path):
    (tmp_path / "x").write_bytes(length.to_bytes(8, "little") + b"{")
    assert not is_torch(tmp_path / "x")


def test_a_tensor_is_a_view_of_the_file(path):
    archive(path, program(text("w"), tensor(), text("t"), tensor(sizes=(3, 2), strides=(1, 3))))
    held = TorchFile(path)
    assert np.array_equal(held["w"], np.arange(6, dtype=np.float32).reshape(2, 3))
    assert np.array_equal(held["t"], held["w"].T)
    assert not held["w"].flags.owndata
    assert not held["w"].flags.writeable
    assert (held.views["w"].contiguous, held.views["t"].contiguous) == (True, False)


def test_a_training_checkpoint_gives_its_state_dict(path):
    inner = b"}(" + text("w") + tensor() + b"u"
    archive(path, program(text("epoch"), number(3), text("state_dict"), inner))
    assert list(TorchFile(path)) == ["w"]


# Refused.


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_pickle_that_would_run_something_is_refused_by_the_name_of_it(path, protocol):
    archive(path, pickle.dumps({"w": Bait()}, protocol))
    assert f"{os.system.__module__}.system" in refusal(path)
    path.write_bytes(pickle.dumps(Bait(), protocol))
    assert f"{os.system.__module__}.system" in refusal(path)


HOSTILE = {
    "builtins.eval": b"\x80\x02cbuiltins\neval\n(" + text("1") + b"tR.",
    "getattr": program(text("w"), b"cbuiltins\ngetattr\n"),
    "a class of torch": program(text("w"), b"ctorch.nn.modules.linear\nLinear\n)\x81"),
    "NEWOBJ": b"\x80\x02ccollections\nOrderedDict\n)\x81.",
    "INST": b"\x80\x02(ios\nsystem\n.",
    "OBJ": b"\x80\x02(ccollections\nOrderedDict\no.",
    "EXT1": b"\x80\x02\x82\x01.",
    "a call of a number": b"\x80\x02" + number(1) + b")R.",
    "a call of a storage type": b"\x80\x02" + FLOAT.encode() + b")R.",
    "attributes of a tensor": program(text("w"), tensor(), b"}b"),
    "a memo of two thousand million": b"\x80\x02}r\xff\xff\xff\x7fj\x00\xff\xff\x7f.",
    "a text of four thousand million": b"\x80\x02X\xff\xff\xff\xffabc.",
    "nested tuples as a key": b"\x80\x02}" + b")" + b"2\x86" * 60 + b"Ns.",
    "nested tuples by the memo": b"\x80\x02})" + b"q\x00h\x00\x86" * 60 + b"Ns.",
    "no end": b"\x80\x02}",
    "nothing": b"",
    "no mark": b"\x80\x02t.",
    "an empty stack": b"\x80\x020.",
    "a list": b"\x80\x02].",
    "a dict without tensors": program(text("a"), number(1)),
    "a tensor beside a number": program(text("w"), tensor(), text("a"), number(1)),
    "a key that is no text": program(number(1), tensor()),
    "an offset beyond the storage": program(text("w"), tensor(offset=1)),
    "a negative offset": program(text("w"), tensor(offset=-1)),
    "a negative stride": program(text("w"), tensor(offset=5, strides=(-3, -1))),
    "a negative size": program(text("w"), tensor(sizes=(-2, -3))),
    "a size beyond the storage": program(text("w"), tensor(sizes=(2, 30))),
    "a few bytes seen a thousand million times": program(text("w"), tensor(sizes=(2**30, 2**30), strides=(0, 0))),
    "sizes and strides of other lengths": program(text("w"), tensor(sizes=(6,), strides=(3, 1))),
    "forty axes": program(text("w"), tensor(sizes=(1,) * 40, strides=(1,) * 40)),
    "a storage that is not there": program(text("w"), tensor(key="1")),
    "a storage by a path": program(text("w"), tensor(key="../data.pkl")),
    "a storage of another length": program(text("w"), tensor(numel=7)),
    "a negative storage": program(text("w"), tensor(numel=-6)),
    "a persistent id that is none": b"\x80\x02" + number(1) + b"Q.",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_pickle_is_refused(name, path):
    archive(path, HOSTILE[name])
    assert refusal(path)


def test_a_pickle_without_end_of_instructions_is_given_up(path, monkeypatch):
    monkeypatch.setattr("loraformat.pickled.machine._MOST_STEPS", 1000)
    archive(path, program(*[text("w") + tensor()] * 100))
    assert "more than 1,000 instructions" in refusal(path)


def test_a_compressed_archive_is_refused(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", program(text("w"), tensor()))
    assert "compressed" in refusal(path)


def test_an_entry_that_lies_inside_another_is_refused(path):
    archive(path, program(text("w"), tensor()), {"0": np.arange(6, dtype="<f4"), "1": np.arange(6, dtype="<f4")})
    data = bytearray(path.read_bytes())
    second = data.rindex(b"PK\x01\x02")  # the directory's last entry now leads to the local header of the first
    data[second + 42 : second + 46] = struct.pack("<I", 0)
    path.write_bytes(data)
    assert refusal(path)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_entries_of_one_name_are_refused(path):
    archive(path, program(text("w"), tensor()), **{"data/0": b"x" * 24})
    assert "twice" in refusal(path)


def test_values_of_another_byte_order_are_refused(path):
    archive(path, program(text("w"), tensor()), byteorder=b"big")
    assert "big-endian" in refusal(path)


@settings(max_examples=300)
@given(st.data())
def test_a_damaged_file_is_refused_or_read_and_never_anything_else(tmp_path_factory, data):
    whole = bytearray(BIN.read_bytes())
    path = tmp_path_factory.mktemp("damaged") / "x.bin"
    if data.draw(st.booleans()):
        del whole[data.draw(st.integers(0, len(whole) - 1)) :]
    else:
        for _ in range(data.draw(st.integers(1, 8))):
            whole[data.draw(st.integers(0, 1200) | st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(whole)
    try:
        held = TorchFile(path)
        for name in held:
            held[name].sum()
    except lf.LoraFormatError as error:
        assert {p.rule for p in error.problems} <= {"LF-510", "LF-701"}


def test_every_instruction_that_is_not_on_the_list_is_refused():
    from loraformat.pickled.machine import run

    running = {"REDUCE", "BUILD", "BINPERSID", "GLOBAL", "STACK_GLOBAL"}
    taken = set()
    for opcode in pickletools.opcodes:
        if opcode.arg is None and opcode.name != "STOP":
            try:
                run(io.BytesIO(b"\x80\x02" + opcode.code.encode("latin-1") + b"."), None, None)
            except lf.LoraFormatError as error:
                if "which no state dict needs" in str(error):
                    continue
            taken.add(opcode.name)
    known = {
        *("NONE", "NEWTRUE", "NEWFALSE", "EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE", "MARK", "MEMOIZE"),
        *("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "APPEND", "APPENDS", "SETITEM", "SETITEMS"),
    }
    assert taken == known | (running - {"GLOBAL"})


# Against torch.


@pytest.mark.peer
@pytest.mark.parametrize("stream", [False, True], ids=["archive", "stream"])
def test_every_tensor_that_torch_saves_is_read_to_the_last_bit(path, stream):
    torch = pytest.importorskip("torch", reason="pip install 'loraformat[peers]'")
    whole = torch.randn(9, 10)
    tensors = {
        "f32": whole,
        "tied": whole,
        "cut": whole[2:5, 1:8],
        "turned": whole.T,
        "parameter": torch.nn.Parameter(torch.randn(3)),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
        **{str(d): torch.randn(3, 5).to(d) for d in (torch.float64, torch.float16, torch.bfloat16, torch.complex64)},
        **{str(d): torch.arange(6).to(d) for d in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)},
        "bool": torch.tensor([True, False]),
        "float8": torch.randn(5).to(torch.float8_e4m3fn),
        "uint16": torch.arange(4).to(torch.uint16),
    }
    ordered = OrderedDict(tensors)
    ordered._metadata = OrderedDict({"": {"version": 1}})
    torch.save(ordered, path, _use_new_zipfile_serialization=not stream)
    held = TorchFile(path)
    assert list(held) == list(tensors)
    for name, value in tensors.items():
        bits = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        assert held[name].shape == tuple(value.shape)
        assert np.array_equal(np.ascontiguousarray(held[name]).reshape(-1).view(np.uint8), bits), name


@pytest.mark.peer
@pytest.mark.parametrize("stream", [False, True], ids=["archive", "stream"])
def test_a_merged_pytorch_file_is_the_same_file_with_other_values(path, stream, tmp_path):
    torch = pytest.importorskip("torch", reason="pip install 'loraformat[peers]'")
    tensors = {"a.weight": torch.randn(7, 5).bfloat16(), "b.weight": torch.randn(3, 4), "n": torch.arange(3)}
    torch.save(tensors, path, _use_new_zipfile_serialization=not stream)
    draw = np.random.default_rng(0)
    pair = [draw.standard_normal(shape).astype(np.float32) for shape in ((2, 5), (7, 2))]
    adapter = lf.Adapter({"a.weight": lf.Update((lf.Lora(*pair, 3.0, "factor"),))})
    base = lf.open_base(path)
    lf.merge(adapter, base, tmp_path / "out.bin")
    found = torch.load(tmp_path / "out.bin", weights_only=True)
    wanted = adapter["a.weight"].placed(lf.Placement.of((7, 5), "out,in")).apply(base.read("a.weight"))
    assert torch.equal(found["a.weight"], torch.from_numpy(wanted).bfloat16())
    assert torch.equal(found["b.weight"], tensors["b.weight"])
    assert torch.equal(found["n"], tensors["n"])
    assert lf.verify(base, adapter, lf.open_base(tmp_path / "out.bin")).problems == []
    assert (tmp_path / "out.bin").stat().st_size == path.stat().st_size
    if not stream:
        assert zipfile.ZipFile(tmp_path / "out.bin").testzip() is None  # every checksum


@pytest.mark.peer
def test_a_pytorch_file_that_shares_the_bytes_of_a_target_is_refused(path, tmp_path):
    torch = pytest.importorskip("torch", reason="pip install 'loraformat[peers]'")
    whole = torch.randn(7, 5)
    torch.save({"a.weight": whole, "b.weight": whole, "c.weight": torch.randn(5, 7).T}, path)
    pair = (np.ones((2, 5), np.float32), np.ones((7, 2), np.float32))
    for name, rule in (("a.weight", "LF-609"), ("c.weight", "LF-608")):
        adapter = lf.Adapter({name: lf.Update((lf.Lora(*pair, 3.0, "factor"),))})
        with pytest.raises(lf.LoraFormatError) as caught:
            lf.merge(adapter, lf.open_base(path), tmp_path / "out.bin")
        assert [p.rule for p in caught.value.problems] == [rule]
        assert not (tmp_path / "out.bin").exists()
