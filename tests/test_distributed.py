"""A distributed checkpoint of torch: put together as torch does it, chunk by chunk, or refused; nothing in it runs."""

import shutil
from pathlib import Path

import numpy as np
import pytest

import loraformat as lf
from loraformat.pickled.distributed import Distributed

GOLDEN = Path(__file__).parent / "golden/megatron"
WHOLE, CUT = GOLDEN / "lora/checkpoint", GOLDEN / "lora_tensor_parallel/checkpoint"
A = "decoder.layers.self_attention.linear_qkv.adapter.linear_in.weight"
FIRST = "decoder.layers.self_attention.linear_proj.adapter.linear_in.weight"


@pytest.mark.peer
@pytest.mark.parametrize("path", [WHOLE, CUT, GOLDEN / "experts/checkpoint"], ids=lambda path: path.parent.name)
def test_every_tensor_is_what_torch_loads(path):
    import torch
    from torch.distributed import checkpoint

    found = Distributed(path)
    wanted = {name: torch.empty(array.shape) for name, array in found.items()}
    checkpoint.load(wanted, checkpoint_id=str(path), no_dist=True)
    assert found
    assert all(np.array_equal(found[name], tensor.numpy()) for name, tensor in wanted.items())


@pytest.mark.peer
def test_what_torch_itself_saves_is_read(tmp_path):
    import torch
    from torch.distributed import checkpoint

    state = {"a": torch.randn(3, 5).to(torch.bfloat16), "b": {"c": torch.arange(7)}, "n": 4, "e": torch.empty(0, 2)}
    checkpoint.save(state, checkpoint_id=str(tmp_path), no_dist=True)
    found = Distributed(tmp_path)
    assert {name: array.shape for name, array in found.items()} == {"a": (3, 5), "b.c": (7,), "e": (0, 2)}
    assert np.array_equal(found["a"].astype(np.float32), state["a"].float().numpy())
    assert found["b.c"].tolist() == list(range(7))


def test_the_pieces_that_ranks_cut_are_counted():
    found = Distributed(CUT)
    assert found[A].shape == (3, 6, 36)
    assert [found.cuts(A, axis) for axis in range(3)] == [3, 3, 1]


def test_what_is_no_tensor_is_passed_over():
    assert not [name for name in Distributed(WHOLE) if name.startswith("common_state")]


def edited(folder, path, *changes, file=".metadata"):
    """A copy of a golden in which bytes are others: the first occurrence of each."""
    shutil.copytree(path, folder, dirs_exist_ok=True)
    data = (folder / file).read_bytes()
    for old, new in changes:
        assert old in data
        data = data.replace(old, new, 1)
    (folder / file).write_bytes(data)
    return folder


def refusal(folder):
    with pytest.raises(lf.LoraFormatError) as caught:
        dict(Distributed(folder))
    (problem,) = caught.value.problems
    return problem


def number(*values):
    return b"".join(b"K" + bytes([value]) for value in values) + b"\x87"


HOSTILE = {
    "a function of the system": (b"torch.distributed.checkpoint.planner", b"subprocess.call.and.more.of.the.kind", "asks for"),
    "a file outside the folder": (b"__0_0.distcp", b"../_0.distcp", "no file of the folder"),
    "a chunk beyond its tensor": (number(2, 0, 0), number(3, 0, 0), "beyond its tensor"),
    "a chunk in no file": (number(2, 0, 0), number(2, 0, 1), "beyond its tensor"),
    "two chunks of one place": (number(2, 0, 0), number(1, 0, 0), "overlap"),
    "a tensor larger than its chunks": (number(3, 5, 24), number(4, 5, 24), "too few"),
    "a chunk of another shape": (number(1, 5, 24), number(1, 5, 23), "too few"),
    "a class that is no index": (b"\x8c\x08Metadata", b"\x8c\x08Otherata", "none of torch.distributed"),
    "a field that is not there": (b"storage_data", b"storage_Data", "no storage_data"),
    "a dtype that is none": (b"\x8c\x07float32", b"\x8c\x07floats2", "asks for torch.floats2"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_damaged_or_hostile_index_is_refused(name, tmp_path):
    old, new, said = HOSTILE[name]
    problem = refusal(edited(tmp_path, WHOLE, (old, new)))
    assert problem.rule == "LF-510"
    assert said in problem.what
    assert ".metadata" in problem.where or FIRST in problem.where


@pytest.mark.parametrize("length", [0, 1, 40, 900, 9000])
def test_a_cut_index_is_refused(length, tmp_path):
    shutil.copytree(WHOLE, tmp_path, dirs_exist_ok=True)
    (tmp_path / ".metadata").write_bytes((WHOLE / ".metadata").read_bytes()[:length])
    assert refusal(tmp_path).rule == "LF-510"


def test_a_file_of_a_rank_that_is_missing_or_cut_is_refused(tmp_path):
    shutil.copytree(CUT, tmp_path, dirs_exist_ok=True)
    last = tmp_path / "__1_0.distcp"
    last.write_bytes(last.read_bytes()[:-1])
    assert (refusal(tmp_path).rule, "bytes; a chunk ends at" in refusal(tmp_path).what) == ("LF-510", True)
    last.unlink()
    problem = refusal(tmp_path)
    assert problem.rule == "LF-701"
    assert "every rank" in problem.fix


def test_a_chunk_that_holds_another_tensor_is_refused(tmp_path):
    """Two tensors of one shape, and of the file of a rank the places of their chunks exchanged, are beyond any check;
    of other sizes they are seen."""
    data = (WHOLE / "__0_0.distcp").read_bytes()
    at = data.index(b"FloatStorage")
    folder = edited(tmp_path, WHOLE, (data[at : at + 12], b"HalfsStorage"), file="__0_0.distcp")
    assert refusal(folder).rule == "LF-510"


def test_a_checkpoint_without_an_adapter_names_its_tensors(tmp_path, run):
    changes = [(b".adapter.linear_in", b".adaptor.linear_in"), (b".adapter.linear_out", b".adaptor.linear_out")]
    folder = edited(tmp_path / "step", WHOLE)
    data = (folder / ".metadata").read_bytes()
    for old, new in changes:
        data = data.replace(old, new)
    (folder / ".metadata").write_bytes(data)
    told = run("info", "step")
    assert (told.code, "LF-501" in told.err) == (1, True)
    assert "adaptor.linear_in" in told.err.replace("\n", "").replace(" ", "")


def test_the_folder_of_a_run_names_its_steps(tmp_path):
    shutil.copytree(WHOLE, tmp_path / "iter_0000100")
    with pytest.raises(lf.LoraFormatError, match="iter_0000100") as caught:
        lf.load(tmp_path)
    assert [p.rule for p in caught.value.problems] == ["LF-501"]


@pytest.mark.parametrize("opened", [lf.load, lf.open_base])
def test_a_file_of_one_rank_names_its_folder(opened):
    with pytest.raises(lf.LoraFormatError, match="one rank") as caught:
        opened(CUT / "__0_0.distcp")
    assert [(p.rule, str(CUT) in p.fix) for p in caught.value.problems] == [("LF-501", True)]


def test_a_checkpoint_is_read_by_its_index_too():
    assert lf.digest(lf.load(WHOLE / ".metadata")) == lf.digest(lf.load(WHOLE))
