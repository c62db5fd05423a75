"""combine and resize on the command line; recipes that give the same bytes, or say why not."""

import json
import re

import numpy as np
import pytest
from combined import adapter, dense

import loraformat as lf
from loraformat.testing import relative_error
from loraformat.verbs.recipe import follow, read_recipe


@pytest.fixture
def home(tmp_path):
    (tmp_path / "in").mkdir()
    lf.save(adapter(1), tmp_path / "in/one.safetensors")
    lf.save(adapter(2, rank=5), tmp_path / "in/two.safetensors")
    return tmp_path


WORDS = ("combine", "x=in/one.safetensors:0.5", "in/two.safetensors:-2")


def test_weights_of_the_command_line_are_those_of_the_result(run, home):
    told = run(*WORDS, "-o", "out.safetensors", "--weight", "x:a=3", "--weight", "b=0.5")
    assert told.code == 0, told.err
    made, one, two = (lf.load(home / p) for p in ("out.safetensors", "in/one.safetensors", "in/two.safetensors"))
    for key, (v, w) in {"a.weight": (1.5, -2), "b.weight": (0.25, -1), "c.weight": (0.5, -2)}.items():
        assert relative_error(made[key].matrix(), v * dense(one, key) + w * dense(two, key)) < 1e-6
    assert len(told.out.splitlines()) == 3
    assert re.fullmatch(
        r"out\.safetensors: cat of 2 adapters · 3 targets · exact · digest [0-9a-f]{12} · next: .*\n",
        told.err,
    )


def test_what_is_lost_is_told_for_every_target_and_stored(run, home):
    told = run(*WORDS, "-m", "ties", "--density", "0.5", "--rank", "2", "-o", "out.safetensors", "--json").json
    stored = lf.load(home / "out.safetensors").provenance["combined"]
    assert told["combined"] == json.loads(json.dumps(stored))
    assert all(0.1 < share < 1 for share in stored["residuals"].values())
    assert stored["method"] == "ties"


def test_a_peft_folder_comes_out_where_one_is_asked_for(run, home):
    assert run(*WORDS, "-m", "svd", "-r", "2", "-o", "folder").code == 0
    config = json.loads((home / "folder/adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert {u.rank for u in lf.load(home / "folder").values()} == {2}


def test_nothing_is_overwritten_and_nothing_computed_in_vain(run, home, monkeypatch):
    (home / "out.safetensors").write_bytes(b"")
    monkeypatch.setattr("loraformat.verbs.combine.combine", None)
    monkeypatch.setattr("loraformat.verbs.resize.resize", None)
    for words in (WORDS, ("resize", "in/one.safetensors", "--rank", "1")):
        told = run(*words, "-o", "out.safetensors")
        assert (told.code, told.err[:6]) == (1, "LF-702")


@pytest.mark.parametrize(
    "words",
    [
        ("-m", "tie"),
        ("-m", "svd"),
        ("--rank", "many"),
        ("--weight", "nowhere=2"),
        ("--weight", "x:nowhere=2"),
        ("--weight", "a"),
        ("--density", "0.5"),
    ],
)
def test_a_command_line_that_means_nothing_is_usage(run, home, words):
    told = run(*WORDS, *words, "-o", "out.safetensors")
    assert told.code == 2
    assert not (home / "out.safetensors").exists()


def test_resize_tells_what_is_lost(run, home):
    told = run("resize", "in/two.safetensors", "--rank", "2", "-o", "out.safetensors")
    assert told.code == 0
    assert [line.split()[0] for line in told.out.splitlines()] == ["a.weight", "b.weight", "c.weight"]
    assert all(re.search(r"rank 5 → 2 +lost [0-9.]+ %$", line) for line in told.out.splitlines())
    assert "3 targets, 15 ranks → 6, at most 2 · lost " in told.err
    data = run("resize", "in/two.safetensors", "--residual", "0.5", "-o", "o2.safetensors", "--json").json
    assert data["residual"] <= 0.5
    assert data["ranks"]["a.weight"]["before"] == 5


def test_resize_wants_one_of_three(run, home):
    assert run("resize", "in/two.safetensors", "-o", "out.safetensors").code == 2
    assert run("resize", "in/two.safetensors", "--rank", "2", "--energy", "0.5", "-o", "out.safetensors").code == 2


# Recipes.


@pytest.fixture
def recipe(run, home):
    """A recipe and its result."""
    words = ("-m", "dare_ties", "--density", "0.6", "--rank", "3", "--seed", "5", "--weight", "x:a=3")
    assert run(*WORDS, *words, "-o", "out.safetensors", "--save-recipe", "in/recipe.json").code == 0
    return home / "in/recipe.json"


def changed(file, **members):
    value = json.loads(file.read_text()) | members
    file.write_text(json.dumps({name: member for name, member in value.items() if member is not None}))


def test_a_recipe_gives_the_same_bytes(run, home, recipe):
    assert run("combine", "--recipe", recipe, "-o", "again.safetensors", "--save-recipe", "in/second.json").code == 0
    assert (home / "again.safetensors").read_bytes() == (home / "out.safetensors").read_bytes()
    assert (home / "in/second.json").read_text() == recipe.read_text()


def test_a_recipe_names_its_inputs_from_where_it_lies(recipe):
    value = json.loads(recipe.read_text())
    assert [item["path"] for item in value["inputs"]] == ["one.safetensors", "two.safetensors"]
    assert value["inputs"][0]["weight"] == {"*": 0.5, "a": 3.0}
    assert {"method": "dare_ties", "density": 0.6, "rank": 3, "seed": 5}.items() <= value.items()


def test_inputs_that_lie_elsewhere_are_known_by_their_digest(run, home, recipe):
    for name in ("one", "two"):
        (home / f"in/{name}.safetensors").rename(home / f"{name}.moved.safetensors")
    assert run("combine", "--recipe", recipe, "-o", "b.safetensors").code == 1
    words = ("two.moved.safetensors", "one.moved.safetensors", "--recipe", recipe)
    assert run("combine", *words, "-o", "again.safetensors").code == 0
    assert (home / "again.safetensors").read_bytes() == (home / "out.safetensors").read_bytes()
    told = run("combine", "out.safetensors", *words, "-o", "c.safetensors")
    assert "LF-614  the recipe has no input of this digest  @ out.safetensors" in told.err


def test_another_input_is_refused(run, home, recipe):
    lf.save(adapter(3), home / "in/one.safetensors", force=True)
    told = run("combine", "--recipe", recipe, "-o", "again.safetensors")
    assert (told.code, told.err[:6]) == (1, "LF-614")
    assert not (home / "again.safetensors").exists()


def test_another_result_is_refused_unless_none_is_promised(run, home, recipe):
    changed(recipe, result="0" * 64)
    told = run("combine", "--recipe", recipe, "-o", "again.safetensors")
    assert (told.code, told.err[:6]) == (1, "LF-614")
    changed(recipe, result=None)
    assert run("combine", "--recipe", recipe, "-o", "again.safetensors").code == 0
    changed(recipe, seed=6)
    assert lf.digest(follow(recipe).adapter) != lf.digest(lf.load(home / "out.safetensors"))


def test_flags_beside_a_recipe_are_refused(run, home, recipe):
    for words in (("--rank", "4"), ("--seed", "5"), ("--weight", "a=1")):
        assert run("combine", "--recipe", recipe, *words, "-o", "again.safetensors").code == 2
    words = ("in/one.safetensors:0.5", "in/two.safetensors")
    assert run("combine", *words, "--recipe", recipe, "-o", "again.safetensors").code == 2


@pytest.mark.parametrize(
    "members",
    [
        {"recipe": 2},
        {"method": None},
        {"method": 3},
        {"density": "half"},
        {"seed": 1.5},
        {"seed": True},
        {"inputs": []},
        {"inputs": ["one.safetensors"]},
        {"inputs": [{"path": "one.safetensors", "digest": "0", "weight": 1.0}]},
        {"inputs": [{"path": "one.safetensors", "digest": "0", "weight": {"*": "x"}}]},
        {"surprise": 1},
        {"rank": "half"},
        {"density": 7},
    ],
)
def test_what_is_no_recipe_is_refused(recipe, members):
    changed(recipe, **members)
    with pytest.raises(lf.LoraFormatError, match=r"LF-705"):
        follow(recipe)


def test_a_recipe_that_cannot_be_read(tmp_path):
    with pytest.raises(lf.LoraFormatError, match="LF-701"):
        read_recipe(tmp_path / "none.json")
    (tmp_path / "broken.json").write_bytes(b"{\xff")
    with pytest.raises(lf.LoraFormatError, match="LF-705"):
        read_recipe(tmp_path / "broken.json")


# What cannot be computed.


def test_a_value_that_is_none_is_told_before_it_spreads(run, home):
    bad = adapter(4)
    bad["a.weight"]["lora"].lora_A[0, 0] = np.nan
    for work in (lambda: lf.combine([(bad, 1.0)]), lambda: lf.resize(bad, rank=1)):
        with pytest.raises(lf.LoraFormatError, match=r"LF-312.*a\.weight\.lora_A"):
            work()


@pytest.mark.parametrize(
    ("method", "how"),
    [
        ("svd", {"rank": 2}),
        ("ties", {"density": 0.5, "rank": 2}),
        ("peft_linear", {}),
        ("dare_linear", {"density": 0.5, "rank": "full"}),
    ],
)
@pytest.mark.filterwarnings("error")
def test_what_goes_beyond_float32_is_an_error_of_its_target(method, how):
    big = lf.Adapter(
        {
            "a.weight": lf.Update(
                (lf.Lora(np.full((2, 300), 1e30, np.float32), np.full((310, 2), 1e30, np.float32), 1.0, "factor"),)
            )
        }
    )
    with pytest.raises(lf.LoraFormatError, match=r"LF-612.*a\.weight"):
        lf.combine([(big, 1e30), (big, 1e20)], method, **how)
