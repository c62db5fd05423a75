"""merge and verify on the command line: folders, several adapters, strengths, the plan, the proof."""

import json
import os
import re
import shlex

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import loraformat as lf


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.fixture
def home(tmp_path):
    """A base in two shards, and two adapters."""
    (tmp_path / "base").mkdir()
    tensors = {"a.weight": draw(7, 5), "b.weight": draw(6, 8, seed=1)}
    for i, (name, tensor) in enumerate(tensors.items()):
        save_file({name: tensor}, tmp_path / "base" / f"m{i}.safetensors")
    homes = {name: f"m{i}.safetensors" for i, name in enumerate(tensors)}
    (tmp_path / "base" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": homes}))
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    for seed in (10, 20):
        pairs = {n: (draw(2, t.shape[1], seed=seed), draw(t.shape[0], 2, seed=seed + 1)) for n, t in tensors.items()}
        lf.save(
            lf.Adapter({n: lf.Update((lf.Lora(a, b, 2.0, "factor"),)) for n, (a, b) in pairs.items()}),
            tmp_path / f"{seed}.safetensors",
        )
    return tmp_path


def value(home, name, *weighted):
    """W + Σ w · ΔW, by the definition."""
    total = load_file(home / "base" / f"m{'ab'.index(name[0])}.safetensors")[name]
    return total + sum(w * lf.load(home / f"{seed}.safetensors")[name].matrix() for seed, w in weighted)


def test_weights_scales_and_patterns_act_in_a_folder_and_verify_knows_them(run, home):
    words = ["10.safetensors:0.5", "20.safetensors:-1"]
    strength = ["--only", "a", "--scale", "a.weight=3"]
    told = run("merge", *words, "--into", "base", "-o", "out", *strength, "--verify")
    assert told.code == 0
    assert "out: equals base + adapter · 1 touched" in told.err
    found = load_file(home / "out" / "m0.safetensors")["a.weight"]
    assert np.allclose(found, value(home, "a.weight", (10, 1.5), (20, -3)), rtol=1e-5, atol=1e-6)
    assert (home / "out" / "m1.safetensors").read_bytes() == (home / "base" / "m1.safetensors").read_bytes()
    assert (home / "out" / "tokenizer.json").read_text() == "{}"
    both = [word for adapter in words for word in ("--adapter", adapter)]
    assert run("verify", "--base", "base", *both, *strength, "--merged", "out").code == 0
    for wrong in ([*both, "--only", "a"], [*both[:2], *strength], ["--adapter", "10.safetensors"]):
        assert run("verify", "--base", "base", *wrong, "--merged", "out").code == 1


def test_the_plan_tells_what_is_read_and_written_and_writes_nothing(run, home):
    told = run("merge", "10.safetensors", "--into", "base", "-o", "out", "--plan", "--json").json
    assert not (home / "out").exists()
    run("merge", "10.safetensors", "--into", "base", "-o", "out")
    assert told["writes"] == sum(p.stat().st_size for p in (home / "out").iterdir())
    assert told["reads"] == sum(p.stat().st_size for p in (home / "base").iterdir())
    assert told["peak"] < 100e6


def test_merge_verify_prints_one_json(run, home):
    told = run("merge", "10.safetensors", "--into", "base", "-o", "out", "--verify", "--json").json
    assert told["verified"]["valid"] is True
    assert set(told["verified"]["touched"]) == {"a.weight", "b.weight"}


def test_the_proof_gives_a_share_only_of_what_was_there_before(run, tmp_path):
    """Neither an added tensor nor a vocabulary of another size nor zeros can be changed by so many per cent."""
    save_file({"a": draw(7, 5), "e": draw(9, 4), "zero": np.zeros(3, np.float32)}, tmp_path / "base.safetensors")
    pair = lf.Lora(draw(2, 5), draw(7, 2), 2.0, "alpha/r")
    new = {"e": lf.Replace(draw(11, 4), ("resize",)), "head": lf.Replace(draw(2, 4), ("add",))}
    parts = {"a": pair, **new, "zero": lf.Replace(draw(3))}
    place = {"a": lf.Placement.of((7, 5), "out,in")}
    lf.save(lf.Adapter({k: lf.Update((p,), place.get(k)) for k, p in parts.items()}), tmp_path / "all.safetensors")
    told = run("merge", "all.safetensors", "--into", "base.safetensors", "-o", "out.safetensors")
    assert re.search(r"‖ΔW‖/‖W‖ \d+ % · added or resized: 2 · zero before: 1 · ", told.err), told.err
    lf.save(lf.Adapter({"head": lf.Update((new["head"],))}), tmp_path / "head.safetensors")
    told = run("merge", "head.safetensors", "--into", "base.safetensors", "-o", "out2.safetensors")
    assert "by name · added or resized: 1 · +" in told.err


def test_an_adapter_that_discards_what_another_did_is_told(run, home):
    whole = {i: lf.Adapter({"a.weight": lf.Update((lf.Replace(draw(7, 5, seed=i)),))}) for i in (1, 2)}
    for i, adapter in whole.items():
        lf.save(adapter, home / f"whole{i}.safetensors")
    for words, gone in (
        (["10.safetensors", "whole1.safetensors"], True),
        (["whole1.safetensors", "whole2.safetensors"], True),
        (["whole1.safetensors", "whole1.safetensors"], False),
        (["whole1.safetensors", "10.safetensors"], False),
    ):
        told = run("merge", *words, "--into", "base", "-o", "out", "--force", "--verify")
        assert told.code == 0, told.err
        assert ("default2 replaces a.weight: what came before it there is gone" in told.err) is gone


def test_a_base_that_is_a_pipe_is_not_waited_for(run, home):
    os.mkfifo(home / "pipe")
    for words in (["merge", "10.safetensors", "--into", "pipe", "-o", "out"], ["info", "pipe"]):
        told = run(*words)
        assert told.code == 1
        assert "LF-701  pipe is a pipe" in told.err


def test_where_a_download_of_the_hub_keeps_its_files_is_told(run, home):
    (home / "models--x--y" / "snapshots" / "1f2e").mkdir(parents=True)
    told = run("merge", "10.safetensors", "--into", "models--x--y", "-o", "out")
    assert told.code == 1
    assert "keeps it in models--x--y/snapshots/1f2e" in told.err


WRONG = {
    "the adapter was not applied": lambda w, d: w,
    "the adapter was applied twice": lambda w, d: w + 2 * d,
    "the scale was lost": lambda w, d: w + d / 2,
}


@pytest.mark.parametrize("cause", WRONG)
def test_verify_says_which_wrong_merge_it_was(cause, run, home):
    run("merge", "10.safetensors", "--into", "base", "-o", "out")
    delta = lf.load(home / "10.safetensors")["a.weight"].matrix()
    save_file({"a.weight": WRONG[cause](value(home, "a.weight"), delta)}, home / "out" / "m0.safetensors")
    told = run("verify", "--base", "base", "--adapter", "10.safetensors", "--merged", "out")
    assert told.code == 1
    assert cause in told.out


def test_verify_names_every_tensor_that_differs_without_being_a_target(run, home):
    extra = {"n": np.arange(5), "m": np.array([True, False]), "gone": draw(3), "cast": draw(4)}
    base, out = (home / name for name in ("one.safetensors", "two.safetensors"))
    held = {"a.weight": draw(7, 5), "b.weight": draw(6, 8, seed=1)}
    save_file({**held, **extra}, base)
    run("merge", "10.safetensors", "--into", base, "-o", out)
    merged = load_file(out)
    del merged["gone"]
    wrong = {"n": np.array([0, 1, 2, 4, 3]), "new": draw(2), "cast": merged["cast"].astype(np.float16)}
    save_file({**merged, **wrong}, out)
    told = run("verify", "--base", base, "--adapter", "10.safetensors", "--merged", out, "--json")
    assert told.code == 1
    assert {p["where"] for p in told.json["problems"]} == {"n", "new", "gone", "cast"}
    assert "F16 [4] instead of F32 [4]" in told.out


def test_a_value_that_verify_would_miss_in_a_sum_is_found(run, home):
    run("merge", "10.safetensors", "--into", "base", "-o", "out")
    tensors = load_file(home / "out" / "m0.safetensors")
    tensors["a.weight"][3, 2] *= 1.001
    save_file(tensors, home / "out" / "m0.safetensors")
    told = run("verify", "--base", "base", "--adapter", "10.safetensors", "--merged", "out")
    assert told.code == 1
    assert "1 of 35 values" in told.out


# What is printed to go on with.


def following(told):
    """The words of the command after ``next:``."""
    words = shlex.split(told.err.rpartition("next: ")[2])
    assert words.pop(0) == "loraformat"
    return words


def test_the_command_that_a_success_ends_with_is_asked_as_the_merge_was_and_works(run, home):
    (home / "10.safetensors").rename(home / "my adapter.safetensors")
    (home / "map.json").write_text(json.dumps({"a.weight": "a.weight"}))
    strength = ["--only", "a", "--scale", "a.weight=3", "--axes", "a=out,in", "--names", "map.json"]
    told = run("merge", "my adapter.safetensors:-0.5", "--into", "base", "-o", "out", *strength)
    words = following(told)
    assert words[0] == "verify"
    assert "'my adapter.safetensors:-0.5'" in told.err
    assert run(*words).code == 0
    words.remove("--scale")
    words.remove("a.weight=3")
    assert run(*words).code == 1


def test_what_was_verified_is_not_said_to_be_verified_next(run, home):
    words = following(run("merge", "10.safetensors", "--into", "base", "-o", "out", "--verify"))
    assert words == ["info", "out"]
    assert run(*words).code == 0


def test_a_merge_that_does_not_verify_ends_without_what_comes_next(run, home, monkeypatch):
    from loraformat.cli import deploy
    from loraformat.verbs.verify import Verdict

    monkeypatch.setattr(deploy, "_read_again", lambda *a: Verdict({"a.weight": 1.0}, 0, [lf.Problem("LF-611", "off")]))
    told = run("merge", "10.safetensors", "--into", "base", "-o", "out", "--verify")
    assert (told.code, "next:" in told.err) == (1, False)


def test_json_has_what_a_person_is_told_of_a_merge(run, home):
    told = run("merge", "10.safetensors", "--into", "base", "-o", "out", "--verify", "--json")
    assert (told.code, told.err) == (0, "")
    assert list(told.json) == [
        "schema",
        "verb",
        "out",
        "written",
        "targets",
        "resumed",
        "notes",
        "warnings",
        "verified",
    ]
