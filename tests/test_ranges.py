"""Runs of bytes: what takes several writes arrives whole, at its place, and nothing else is touched."""

from __future__ import annotations

import io
import os

import numpy as np
import pytest

from loraformat import ranges

SIZES = [0, 1, ranges._RUN - 1, ranges._RUN, ranges._RUN + 1, 3 * ranges._RUN + 7]


def drawn(count):
    return memoryview(np.random.default_rng(count).integers(0, 256, count, np.uint8).tobytes())


@pytest.mark.parametrize("count", SIZES)
def test_what_takes_several_writes_is_written_whole(count, tmp_path):
    data, before = drawn(count), bytes(drawn(count + 20))
    (tmp_path / "f").write_bytes(before)
    with open(tmp_path / "f", "r+b") as file:
        ranges.write_range(file, data, 9)
    assert (tmp_path / "f").read_bytes() == before[:9] + bytes(data) + before[9 + count :]


def test_a_write_that_takes_less_than_it_was_given_goes_on(monkeypatch, tmp_path):
    pwrite, data = os.pwrite, drawn(ranges._RUN + 5)
    monkeypatch.setattr(os, "pwrite", lambda handle, part, offset: pwrite(handle, part[: len(part) // 2 + 1], offset))
    with open(tmp_path / "f", "w+b") as file:
        ranges.write_range(file, data, 0)
    assert (tmp_path / "f").read_bytes() == bytes(data)


@pytest.mark.parametrize("count", SIZES)
def test_what_is_appended_stands_behind_what_was_there(count, tmp_path, monkeypatch):
    monkeypatch.setattr(ranges, "_WRITEBACK", 1 << 16)
    data, source = drawn(count), tmp_path / "source"
    source.write_bytes(b"abc" + bytes(data) + b"def")
    memory = io.BytesIO()
    with open(tmp_path / "f", "w+b") as file, open(source, "rb") as other:
        file.write(b"head")
        ranges.append(file, data)
        ranges.append_copy(file, other, 3, count)
        file.write(b"tail")
        ranges.append(memory, data)
    assert (tmp_path / "f").read_bytes() == b"head" + bytes(data) * 2 + b"tail"
    assert memory.getvalue() == bytes(data)


def test_the_kernel_is_asked_to_store_every_run_once(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(ranges, "_WRITEBACK", 1 << 16)
    monkeypatch.setattr(ranges, "start_writing", lambda file, offset, length: asked.append((offset, length)))
    with open(tmp_path / "f", "w+b") as file:
        for count in (70_000, 10, 150_000):
            ranges.append(file, drawn(count))
    assert asked == [(0, 1 << 16), (1 << 16, 2 << 16)]
