"""A GGUF file that a stranger made: read soundly or refused by a rule, in bounded time and memory."""

import io
import random
import struct
import sys
import time
import tracemalloc

import numpy as np
import pytest
from refused import problems_of
from test_gguf import HEAD, TENSORS, written

import loraformat as lf
from loraformat.layout import ReadOptions
from loraformat.source import open_source
from loraformat_converters.gguf import layout, store
from loraformat_converters.gguf.cursor import Value
from loraformat_converters.gguf.file import GgufFile


def content(**metadata):
    buffer = io.BytesIO()
    store.write(buffer, HEAD | {key.replace("__", "."): value for key, value in metadata.items()}, TENSORS)
    return bytearray(buffer.getvalue())


def text(string):
    return struct.pack("<Q", len(string)) + string


def file(tensors=b"", count=0, values=b"", number=0, magic=b"GGUF", version=3):
    return magic + struct.pack("<IQQ", version, count, number) + values + tensors


def tensor(name=b"a", shape=(4,), kind=0, offset=0):
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def padded(head, data=b""):
    return head + b"\0" * (-len(head) % 32) + data


VALUE = text(b"k") + struct.pack("<II", 4, 7)


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (b"GGUF", "the version"),
        (b"GGUF" + struct.pack("<IQ", 3, 0), "the number of values"),
        (file(count=2**21), "2,097,152 tensors"),
        (file(number=2**17), "131,072 metadata values"),
        (file(count=1), "length of the name of tensor 0"),
        (file(number=1), "length of the key of value 0"),
        (file(values=text(b"") + VALUE[9:], number=1), "is empty"),
        (file(values=struct.pack("<Q", 2**63), number=1), "a string of 9,223"),
        (file(values=struct.pack("<Q", 60000), number=1), "needs 60,000 bytes"),
        (file(values=text(b"\xff") + VALUE[9:], number=1), "no UTF-8"),
        (file(values=VALUE * 2, number=2), "stands twice"),
        (file(values=text(b"k") + struct.pack("<I", 13), number=1), "no type of a value"),
        (file(values=text(b"k") + struct.pack("<IB", 7, 2), number=1), "a bool of 2"),
        (file(values=text(b"k") + struct.pack("<IIQ", 9, 9, 1), number=1), "array of type 9"),
        (file(values=text(b"k") + struct.pack("<IIQ", 9, 8, 2**40), number=1), "array of 1,099,511,627,776 strings"),
        (file(values=text(b"k") + struct.pack("<IIQ", 9, 12, 2**61), number=1), "bytes at byte"),
        (file(values=text(b"general.alignment") + struct.pack("<II", 4, 24), number=1), "power of two"),
        (file(values=text(b"general.alignment") + struct.pack("<II", 4, 2**30), number=1), "power of two"),
        (file(values=text(b"general.alignment") + struct.pack("<IB", 0, 32), number=1), "power of two"),
        (file(tensor(b"a" * 64), 1), "64 bytes; the most is 63"),
        (file(text(b"a") + struct.pack("<I", 5), 1), "5 axes"),
        (padded(file(tensor(shape=(2**40, 2**40)), 1), b"\0" * 32), "the file at"),
        (padded(file(tensor(shape=(4, 0)), 1)), "empty"),
        (padded(file(tensor(kind=4), 1), b"\0" * 32), "nothing that ggml knows"),
        (padded(file(tensor(kind=8), 1), b"\0" * 32), "nothing that ggml knows"),
        (padded(file(tensor(offset=32), 1), b"\0" * 64), "without overlap or hole"),
        (padded(file(tensor() + tensor(b"b"), 2), b"\0" * 64), "without overlap or hole"),
        (padded(file(tensor() + tensor(offset=32), 2), b"\0" * 64), "stands twice"),
        (padded(file(tensor(), 1), b"\0" * 8), "the tensors end at byte"),
        (padded(file(tensor(), 1), b"\0" * 33), "the tensors end at byte"),
    ],
)
def test_a_fault_is_named(data, word, tmp_path):
    (tmp_path / "a.gguf").write_bytes(data)
    problems = problems_of(GgufFile, tmp_path / "a.gguf")
    assert {p.rule for p in problems} == {"LF-511"}
    assert word in str(problems[0])


@pytest.mark.parametrize(
    ("version", "word"), [(1, "version 1"), (4, "version 4"), (3 << 24, "big-endian"), (0, "big-endian")]
)
def test_another_version_is_none_that_is_read(version, word, tmp_path):
    (tmp_path / "a.gguf").write_bytes(file(version=version))
    (problem,) = problems_of(GgufFile, tmp_path / "a.gguf")
    assert problem.rule == "LF-504"
    assert word in problem.what


def test_a_quantised_tensor_is_described_and_needs_a_package_to_be_read(tmp_path, monkeypatch):
    (tmp_path / "a.gguf").write_bytes(padded(file(tensor(shape=(256,), kind=12), 1), b"\0" * 160))
    found = GgufFile(tmp_path / "a.gguf")
    assert found.infos["a"].type == "Q4_K"
    monkeypatch.setitem(sys.modules, "gguf", None)
    (problem,) = problems_of(found.__getitem__, "a")
    assert problem.rule == "LF-704"
    assert "loraformat[gguf]" in problem.fix


def test_all_faults_of_the_tensors_are_told_and_not_more_than_a_hundred(tmp_path):
    (tmp_path / "a.gguf").write_bytes(padded(file(tensor(kind=99) + tensor(b"b", (0,), offset=0), 2)))
    assert [p.where for p in problems_of(GgufFile, tmp_path / "a.gguf")] == ["a", "b"]
    (tmp_path / "a.gguf").write_bytes(padded(file(tensor(kind=99) * 5000, 5000)))
    assert len(problems_of(GgufFile, tmp_path / "a.gguf")) == 100


@pytest.mark.parametrize("seed", range(12))
def test_a_mutated_file_is_read_soundly_or_refused_by_a_rule(seed, tmp_path):
    """Two hundred and fifty mutations a seed: bytes, words and lengths changed, pieces cut out, doubled or cut off."""
    chance = random.Random(seed)
    lists = {"a__tags": Value("[str]", ["x", "y"]), "a__list": Value("[i16]", [1, -2]), "a__big": Value("u64", 2**63)}
    whole = content(**lists)
    path = tmp_path / "a.gguf"
    began, refused = time.monotonic(), 0
    if seed == 0:  # it makes everything slow
        tracemalloc.start()
    for _ in range(250):
        data = bytearray(whole)
        for _ in range(chance.randint(1, 3)):
            mutate(data, chance)
        path.write_bytes(data)
        try:
            adapter = layout.read(open_source(path), ReadOptions()).adapter
        except lf.LoraFormatError as error:
            assert all(problem.rule.startswith("LF-") for problem in error.problems)
            refused += 1
        else:
            with np.errstate(all="ignore"):  # a value may be anything
                for update in adapter.values():
                    update.matrix()
    if seed == 0:
        assert tracemalloc.get_traced_memory()[1] < 64 * 2**20
        tracemalloc.stop()
    assert refused > 50
    assert time.monotonic() - began < 60


def mutate(data, chance):
    at = chance.randrange(max(1, len(data) - 8))
    match chance.randrange(6):
        case 0 if data:
            data[at] = chance.randrange(256)
        case 1:
            data[at : at + 8] = struct.pack(
                "<Q", chance.choice([0, 1, 2**31, 2**32, 2**62, 2**63, 2**64 - 1, chance.randrange(2**64)])
            )
        case 2:
            data[at : at + 4] = struct.pack("<I", chance.choice([0, 1, 7, 8, 9, 13, 2**31, 2**32 - 1]))
        case 3:
            del data[at:]
        case 4:
            del data[at : at + chance.randrange(1, 64)]
        case 5:
            data[at:at] = data[at : at + chance.randrange(1, 64)]


def test_a_file_cannot_ask_for_more_memory_than_it_has(tmp_path):
    """A million strings, an array of a billion numbers and a long vocabulary cost no more than a walk over them."""
    vocabulary = text(b"v") + struct.pack("<IIQ", 9, 8, 30_000) + text(b"x") * 30_000
    (tmp_path / "a.gguf").write_bytes(padded(file(values=vocabulary, number=1)))
    tracemalloc.start()
    found = GgufFile(tmp_path / "a.gguf")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found.metadata["v"] == Value("[str]", None)
    assert peak < 2**20


def test_an_empty_file_and_one_that_is_gone(tmp_path):
    (tmp_path / "a.gguf").touch()
    assert problems_of(GgufFile, tmp_path / "a.gguf")[0].rule == "LF-511"
    assert problems_of(GgufFile, tmp_path / "b.gguf")[0].rule == "LF-701"


def test_a_tensor_is_a_view_of_the_file(tmp_path):
    found = GgufFile(written(tmp_path / "a.gguf"))["blk.0.attn_q.weight.lora_a"]
    assert not found.flags.owndata
    assert np.array_equal(found, TENSORS["blk.0.attn_q.weight.lora_a"])
