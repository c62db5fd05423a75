"""A run that writes a folder and is killed is gone on with by the next one, which trusts nothing that it cannot check."""

import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import loraformat as lf
from loraformat.atomic import write_folder
from loraformat.base import Options
from loraformat.checkpoint import pipeline, task
from loraformat.checkpoint.safetensors import SafetensorsShard
from loraformat.journal import NAME
from loraformat.verbs.merge import prepare


def everything(folder):
    return {str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


class Noted:
    """A task that notes how often each file was written."""

    def __init__(self, identity="what is made of what"):
        self.name, self.written, self.resumed, self.asked = identity, [], {}, 0

    def identity(self):
        self.asked += 1
        return self.name

    def note(self, name):
        return {"length": len(name)}

    def resume(self, name, note):
        self.resumed[name] = note

    def check(self):
        pass

    def writers(self, texts, end=None):
        def writer(name, text):
            def write(file):
                self.written.append(name)
                if name == end:
                    deadline = time.monotonic() + 20
                    while len(journal.read_text().splitlines() if (journal := journal_of(Path(file.name))) else []) < 3:
                        assert time.monotonic() < deadline
                        time.sleep(0.01)
                    file.write(b"half")
                    file.flush()
                    os.kill(os.getpid(), signal.SIGKILL)
                file.write(text.encode())

            return write

        return {name: writer(name, text) for name, text in texts.items()}


def journal_of(path):
    return next((folder / NAME for folder in path.parents if (folder / NAME).exists()), None)


TEXTS = {"a": "one", "b/c": "two", "d": "three", "e": "four"}


@pytest.fixture
def impatient(monkeypatch):
    """A journal is kept from the first file on."""
    monkeypatch.setattr("loraformat.journal.PATIENCE", 0.0)


def test_a_run_of_a_moment_keeps_no_journal(tmp_path):
    seen = []

    class Watching(Noted):
        def writers(self, texts, end=None):
            def write(file):
                seen.append(journal_of(Path(file.name)))
                file.write(b"x")

            return dict.fromkeys(texts, write)

    task = Watching()
    write_folder(tmp_path / "out", task.writers(TEXTS), task=task)
    assert (seen, task.asked) == ([None] * len(TEXTS), 0)  # and need not know what is made of what


def killed_at(path, name, identity="what is made of what"):
    """A run that is killed while it writes ``name``, when what came before is in the journal."""
    child = os.fork()
    if not child:
        task = Noted(identity)
        write_folder(path, task.writers(TEXTS, name), task=task)
        os._exit(0)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])


@pytest.mark.usefixtures("impatient")
def test_the_next_run_of_the_same_task_goes_on_where_a_killed_one_was(tmp_path):
    killed_at(tmp_path / "out", "d")
    assert not (tmp_path / "out").exists()
    task = Noted()
    write_folder(tmp_path / "out", task.writers(TEXTS), task=task)
    assert (task.written, task.resumed) == (["d", "e"], {"a": {"length": 1}, "b/c": {"length": 3}})
    assert everything(tmp_path) == {f"out/{name}": text for name, text in TEXTS.items()}


@pytest.mark.usefixtures("impatient")
def test_another_task_begins_anew_and_takes_the_leftovers_away(tmp_path):
    killed_at(tmp_path / "out", "d")
    task = Noted("something else")
    write_folder(tmp_path / "out", task.writers(TEXTS), task=task)
    assert (task.written, task.resumed) == (list(TEXTS), {})
    assert everything(tmp_path) == {f"out/{name}": text for name, text in TEXTS.items()}


@pytest.mark.usefixtures("impatient")
def test_a_finished_file_that_is_no_longer_what_it_was_is_written_again(tmp_path):
    killed_at(tmp_path / "out", "d")
    (left,) = tmp_path.iterdir()
    (left / "a").write_text("0ne")
    task = Noted()
    write_folder(tmp_path / "out", task.writers(TEXTS), task=task)
    assert (task.written, list(task.resumed)) == (["a", "d", "e"], ["b/c"])
    assert (tmp_path / "out/a").read_text() == "one"


@pytest.mark.usefixtures("impatient")
def test_a_journal_that_the_kill_cut_off_is_read_as_far_as_it_goes(tmp_path):
    killed_at(tmp_path / "out", "d")
    (left,) = tmp_path.iterdir()
    text = (left / NAME).read_text()
    (left / NAME).write_text(text[: text.rindex('"crc32"')])
    task = Noted()
    write_folder(tmp_path / "out", task.writers(TEXTS), task=task)
    assert list(task.resumed) == ["a"]
    assert NAME not in everything(tmp_path / "out")


@pytest.mark.usefixtures("impatient")
def test_a_merge_that_was_killed_goes_on_and_knows_the_norms_of_what_was_finished(tmp_path):
    (tmp_path / "base").mkdir()
    draw, homes = np.random.default_rng(0), {}
    for i in range(4):
        save_file({f"l.{i}.weight": draw.standard_normal((9 + i, 8), np.float32)}, tmp_path / f"base/m{i}.safetensors")
        homes[f"l.{i}.weight"] = f"m{i}.safetensors"
    (tmp_path / "base/model.safetensors.index.json").write_text(json.dumps({"weight_map": homes}))
    pairs = {name: (draw.standard_normal((2, 8)), draw.standard_normal((9 + int(name[2]), 2))) for name in homes}
    adapter = lf.Adapter({name: lf.Update((lf.Lora(a, b, 1.0, "factor"),)) for name, (a, b) in pairs.items()})
    wanted = lf.merge(adapter, lf.open_base(tmp_path / "base"), tmp_path / "whole")
    child = os.fork()
    if not child:
        made = SafetensorsShard.write

        def write(self, target, changes):
            made(self, target, changes)
            if self.path.name == "m2.safetensors":
                while len(journal_of(Path(target.name)).read_text().splitlines()) < 3:
                    time.sleep(0.01)
                os.kill(os.getpid(), signal.SIGKILL)

        SafetensorsShard.write = write
        lf.merge(adapter, lf.open_base(tmp_path / "base"), tmp_path / "out")
        os._exit(0)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    found = lf.merge(adapter, lf.open_base(tmp_path / "base"), tmp_path / "out")
    assert (wanted.resumed, found.resumed) == ((), ("m0.safetensors", "m1.safetensors"))
    assert found.norms == wanted.norms
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "whole").iterdir()
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out", "whole"]


# What a merge is made of.


def made_of(adapter, base, out, **options):
    opened = lf.open_base(base)
    plan = prepare("merge", [("default", adapter)], opened, Options(out, **options))
    return task.identity(plan, opened.files)


@pytest.fixture
def checkpoint(tmp_path):
    home = tmp_path / "base"
    home.mkdir()
    save_file({"a.weight": np.ones((7, 5), np.float32)}, home / "model.safetensors")
    (home / "config.json").write_text("{}")
    return home


def pair(value=1.0, alpha=3.0):
    a, b = np.full((2, 5), value, np.float32), np.ones((7, 2), np.float32)
    return lf.Adapter({"a.weight": lf.Update((lf.Lora(a, b, alpha, "alpha/r"),))})


def test_a_merge_of_anything_else_is_another_task(checkpoint, tmp_path):
    out = tmp_path / "out"
    first = made_of(pair(), checkpoint, out)()
    assert made_of(pair(), checkpoint, tmp_path / "elsewhere")() == first
    others = [made_of(pair(2.0), checkpoint, out), made_of(pair(alpha=4.0), checkpoint, out)]
    others.append(made_of(pair(), checkpoint, out, requantize=True))
    assert len({first, *(other() for other in others)}) == 4
    for name in ("model.safetensors", "config.json"):
        before = made_of(pair(), checkpoint, out)
        os.utime(checkpoint / name, ns=(1, 1))
        assert made_of(pair(), checkpoint, out)() != before()  # the files count as they lay when it was planned
        first = before()
    assert made_of(pair(), checkpoint, out)() != first


def test_a_pipelines_other_files_count_too():
    own = {"unet": type("Own", (), {"identity": lambda self: "x"})()}
    found = {pipeline._Together(own, rest).identity() for rest in ([], [["vae/a", 1, 2, 3]], [["vae/a", 1, 9, 3]])}
    assert len(found) == 3
