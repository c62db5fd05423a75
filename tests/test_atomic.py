"""Outputs appear whole or not at all."""

import pytest

from loraformat.atomic import write_file, write_folder
from loraformat.errors import LoraFormatError


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
