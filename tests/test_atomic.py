"""Outputs appear whole or not at all."""

import io
import os
import resource
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import loraformat as lf
from loraformat.atomic import write_file, write_folder, write_together
from loraformat.errors import LoraFormatError
from loraformat.outputs import check_room
from loraformat.temporaries import scratch


def says(text):
    return lambda file: file.write(text.encode())


def breaks(file):
    file.write(b"half")
    raise OSError(28, "No space left on device")


def rule_of(error):
    return error.value.problems[0].rule


def everything(folder):
    return {str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_file_that_cannot_be_finished_leaves_the_old_one_and_nothing_else(tmp_path):
    write_file(tmp_path / "out", says("old"))
    with pytest.raises(LoraFormatError, match="No space left") as error:
        write_file(tmp_path / "out", breaks, force=True)
    assert rule_of(error) == "LF-703"
    assert everything(tmp_path) == {"out": "old"}


def test_an_existing_output_is_replaced_only_on_demand(tmp_path):
    write_file(tmp_path / "out", says("old"))
    with pytest.raises(LoraFormatError) as error:
        write_file(tmp_path / "out", says("new"))
    assert rule_of(error) == "LF-702"
    write_file(tmp_path / "out", says("new"), force=True)
    assert everything(tmp_path) == {"out": "new"}


def test_an_interrupted_writer_leaves_nothing_behind(tmp_path):
    def interrupted(file):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_file(tmp_path / "out", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_folder(tmp_path / "folder", {"a": says("a"), "b": interrupted})
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    write_folder(tmp_path / "out", {"a": says("1"), "b": says("2")})
    with pytest.raises(LoraFormatError):
        write_folder(tmp_path / "out", {"a": says("3"), "b": breaks}, force=True)
    assert everything(tmp_path) == {"out/a": "1", "out/b": "2"}
    write_folder(tmp_path / "out", {"a": says("3"), "b": says("4")}, force=True)
    assert everything(tmp_path) == {"out/a": "3", "out/b": "4"}


def test_a_folder_with_other_files_is_never_replaced(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")
    with pytest.raises(LoraFormatError, match=r"thesis\.tex, which would be lost"):
        write_folder(tmp_path / "home", {"a": says("1")}, force=True)
    assert everything(tmp_path) == {"home/thesis.tex": "years of work"}


def test_a_replacement_that_was_killed_between_two_renames_is_undone(tmp_path):
    write_folder(tmp_path / "out", {"a": says("old")})
    (tmp_path / "out").rename(tmp_path / ".out.old")
    with pytest.raises(LoraFormatError) as error:
        write_folder(tmp_path / "out", {"a": says("new")})
    assert rule_of(error) == "LF-702"
    assert everything(tmp_path) == {"out/a": "old"}


def test_a_missing_parent_folder_is_named(tmp_path):
    with pytest.raises(LoraFormatError, match="does not exist") as error:
        write_file(tmp_path / "nowhere" / "out", says("x"))
    assert rule_of(error) == "LF-703"


def test_files_in_folders_inside_the_folder_are_written_and_replaced_with_it(tmp_path):
    write_folder(tmp_path / "out", {"a": says("1"), "sub/deep/b": says("2")})
    write_folder(tmp_path / "out", {"a": says("3"), "sub/deep/b": says("4")}, force=True)
    assert everything(tmp_path) == {"out/a": "3", "out/sub/deep/b": "4"}
    (tmp_path / "out" / "sub" / "mine").write_text("years of work")
    with pytest.raises(LoraFormatError, match="sub/mine, which would be lost"):
        write_folder(tmp_path / "out", {"a": says("5"), "sub/deep/b": says("6")}, force=True)


# Killed and other outside forces. A fork that dies without a word is what SIGKILL leaves.


def dies(work):
    """Run ``work`` in a process of its own, which ends there and then where ``os._exit`` is called."""
    child = os.fork()
    if not child:
        try:
            work()
        finally:
            os._exit(0)
    os.waitpid(child, 0)


def test_what_a_killed_run_left_is_removed_by_the_next_to_the_same_output(tmp_path):
    def half(file):
        file.write(b"half")
        file.flush()
        os._exit(1)

    dies(lambda: write_file(tmp_path / "out", half))
    dies(lambda: write_folder(tmp_path / "dir", {"a": says("1"), "b": half}))
    assert len(list(tmp_path.iterdir())) == 2
    write_file(tmp_path / "out", says("new"))
    write_folder(tmp_path / "dir", {"a": says("1"), "b": says("2")})
    assert everything(tmp_path) == {"out": "new", "dir/a": "1", "dir/b": "2"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dir", "out"]


def test_the_temporary_of_a_living_run_is_left_alone(tmp_path):
    def slow(file):
        file.write(b"slow")
        write_file(tmp_path / "out", says("quick"))

    write_file(tmp_path / "out", slow, force=True)
    assert everything(tmp_path) == {"out": "slow"}


def test_a_strangers_file_is_no_leftover(tmp_path):
    for name in (".out.tmp", ".out.12345678.tmp.txt", ".other.12345678.tmp", "out.12345678.tmp"):
        (tmp_path / name).write_text("mine")
    (tmp_path / ".out.87654321.tmp").symlink_to(tmp_path / ".out.tmp")
    write_file(tmp_path / "out", says("new"))
    assert len(list(tmp_path.iterdir())) == 6


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("step", range(4))
def test_a_folder_that_dies_at_any_rename_is_whole_and_the_next_run_puts_it_right(step, after, tmp_path, monkeypatch):
    """Four steps: the old one aside, the new one in place, the old one to be deleted, its deletion."""
    out, aside = tmp_path / "out", tmp_path / ".out.old"
    write_folder(out, {"a": says("1"), "b": says("2")})
    steps = iter(range(9))

    def deadly(whole):
        def call(*args, **kwargs):
            now = next(steps) == step
            if now and not after:
                os._exit(1)
            whole(*args, **kwargs)
            if now:
                os._exit(1)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", deadly(os.rename))
        patch.setattr(shutil, "rmtree", deadly(shutil.rmtree))
        dies(lambda: write_folder(out, {"a": says("3"), "b": says("4")}, force=True))
    old, new = {"a": "1", "b": "2"}, {"a": "3", "b": "4"}
    assert everything(out if out.exists() else aside) in (old, new)
    assert not aside.exists() or everything(aside) == old
    with pytest.raises(LoraFormatError) as error:  # the next run, which may not replace anything, still puts it right
        write_folder(out, {"a": says("5"), "b": says("6")})
    assert rule_of(error) == "LF-702"
    assert everything(out) == (old if (step, after) in ((0, False), (0, True), (1, False)) else new)
    write_folder(out, {"a": says("5"), "b": says("6")}, force=True)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_full_disk_leaves_the_old_output(tmp_path):
    """A limit on the size of a file stands for the disk: the kernel then refuses the same writes, with another word."""
    base, out, size = tmp_path / "base.safetensors", tmp_path / "out.safetensors", 3_000_000
    save_file({"w": np.ones((size // 400, 100), np.float32), "k": np.ones(size // 4, np.float32)}, base)
    pair = lf.Lora(np.ones((1, 100), np.float32), np.ones((size // 400, 1), np.float32), 1.0, "factor")
    adapter = lf.Adapter({"w": lf.Update((pair,))})
    out.write_bytes(b"old")

    def full():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 1000, resource.RLIM_INFINITY))
        try:
            lf.merge(adapter, lf.open_base(base), out, force=True)
        except LoraFormatError as error:
            (tmp_path / "said").write_text(str(error))

    dies(full)
    assert "LF-703" in (tmp_path / "said").read_text()
    assert out.read_bytes() == b"old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base.safetensors", "out.safetensors", "said"]


@pytest.mark.parametrize("rounds", [12, pytest.param(100, marks=pytest.mark.slow)])
def test_merges_killed_at_random_moments_leave_the_old_output_or_the_new_one(rounds, tmp_path):
    """Into a folder and into a file, so many times each."""
    words = [sys.executable, str(Path(__file__).with_name("killed.py")), str(tmp_path), str(rounds), "7"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    told = [list(map(int, line.split()[1:])) for line in done.stdout.splitlines()]
    assert sum(map(sum, told)) > rounds // 2, done.stdout  # of twice as many: the others had ended already


def test_a_signal_between_the_renames_of_a_folder_waits_until_they_are_done(tmp_path, monkeypatch):
    write_folder(tmp_path / "out", {"a": says("old")})
    rename = os.rename

    def interrupted(*paths):
        rename(*paths)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr("loraformat.atomic.os.rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_folder(tmp_path / "out", {"a": says("new")}, force=True)
    assert everything(tmp_path) == {"out/a": "new"}
    assert os.listdir(tmp_path) == ["out"]


def test_a_signal_while_the_temporary_is_removed_waits_for_that(tmp_path, monkeypatch):
    remove = shutil.rmtree

    def interrupted(path):
        os.kill(os.getpid(), signal.SIGINT)
        remove(path)

    monkeypatch.setattr("loraformat.temporaries.shutil.rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_folder(tmp_path / "out", {"a": says("new"), "b": breaks})
    assert os.listdir(tmp_path) == []


def test_what_is_no_plain_file_is_never_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(LoraFormatError, match="no plain file") as error:
        write_file(tmp_path / "pipe", says("x"), force=True)
    assert rule_of(error) == "LF-703"
    assert (tmp_path / "pipe").is_fifo()


def test_a_temporary_that_cannot_be_removed_hides_nothing(tmp_path, monkeypatch):
    def refused(path):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("loraformat.temporaries.remove", refused)
    with pytest.raises(LoraFormatError, match=r"cannot write .*: No space left on device") as error:
        write_file(tmp_path / "out", breaks)
    assert rule_of(error) == "LF-703"


# Several files that belong together.


def refused(source, target, *, at):
    """``os.replace`` that fails for one target."""
    if os.fspath(target).endswith(at):
        raise OSError(5, "Input/output error")
    REPLACE(source, target)


REPLACE = os.replace


@pytest.mark.parametrize("links", [True, False])
def test_where_one_of_several_files_cannot_take_its_place_the_others_go_back(links, tmp_path, monkeypatch):
    paths = [tmp_path / name for name in ("first", "second", "last")]
    write_together({path: says(f"old {path.name}") for path in paths[1:]})
    before = everything(tmp_path)
    monkeypatch.setattr("loraformat.atomic.os.replace", partial(refused, at="last"))
    if not links:
        monkeypatch.setattr("loraformat.atomic.os.link", lambda *a, **k: breaks(io.BytesIO()))
    with pytest.raises(LoraFormatError, match="Input/output error"):
        write_together({path: says("new") for path in paths})
    # Without links a file that was replaced has no second name to come back from.
    assert everything(tmp_path) == (before if links else before | {"second": "new"})


def test_a_folder_and_the_files_beside_it_appear_together_or_not_at_all(tmp_path, monkeypatch):
    out, recipe = tmp_path / "out", tmp_path / "recipe"
    write_folder(out, {"a": says("1")}, beside={recipe: says("1")})
    before = everything(tmp_path)
    assert before == {"out/a": "1", "recipe": "1"}
    with pytest.raises(LoraFormatError, match="No space left"):
        write_folder(out, {"a": says("2")}, beside={recipe: breaks}, force=True)
    with monkeypatch.context() as patch:
        patch.setattr("loraformat.atomic.os.replace", partial(refused, at="recipe"))
        with pytest.raises(LoraFormatError, match="Input/output error"):
            write_folder(out, {"a": says("2")}, beside={recipe: says("2")}, force=True)
    with pytest.raises(LoraFormatError, match="recipe exists"):
        write_folder(tmp_path / "new", {"a": says("2")}, beside={recipe: says("2")})
    assert everything(tmp_path) == before
    assert sorted(os.listdir(tmp_path)) == ["out", "recipe"]
    write_folder(out, {"a": says("2")}, beside={recipe: says("2")}, force=True)
    assert everything(tmp_path) == {"out/a": "2", "recipe": "2"}


def test_what_a_run_makes_for_itself_is_gone_at_the_end_and_of_a_killed_one_at_the_next(tmp_path):
    def work(end):
        with scratch(tmp_path / "out", ".onnx") as name:
            name.write_text("model")
            name.with_name(f"{name.name}.0.data").write_text("data")
            name.with_name(f".{name.name}.12345678.tmp").write_text("half a model")
            end()

    work(lambda: None)
    assert os.listdir(tmp_path) == []
    dies(lambda: work(lambda: os._exit(1)))
    assert len(os.listdir(tmp_path)) == 4
    write_file(tmp_path / "other", says("new"))
    assert len(os.listdir(tmp_path)) == 5
    write_file(tmp_path / "out", says("new"))
    assert everything(tmp_path) == {"out": "new", "other": "new"}


def test_copies_take_no_room_where_the_file_system_refers_to_bytes(tmp_path, monkeypatch):
    (tmp_path / "data").write_bytes(bytes(90))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 80, 20))
    check_room(tmp_path / "out", 20)
    for count, copies in ((21, []), (100, [tmp_path / "data"])):
        with pytest.raises(LoraFormatError, match=r"takes .* bytes, and the disk has 20 left"):
            check_room(tmp_path / "out", count, copies)
    monkeypatch.setattr("loraformat.outputs.clones", lambda source, folder: True)
    check_room(tmp_path / "out", 110, [tmp_path / "data"])
    with pytest.raises(LoraFormatError):
        check_room(tmp_path / "out", 111, [tmp_path / "data"])
    assert os.listdir(tmp_path) == ["data"]
