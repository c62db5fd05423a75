"""Tied weights: what PEFT's unmerged model computes, the merged folder computes when transformers loads it."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import loraformat as lf
from loraformat.checkpoint import tied

E, H = "model.embed_tokens.weight", "lm_head.weight"
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True, "vocab_size": 37}


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def base(folder, config=LLAMA, **more):
    folder.mkdir()
    save_file({E: draw(37, 12), "model.norm.weight": draw(12, seed=1), **more}, folder / "model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return lf.open_base(folder)


def lora(out, in_, spec, seed, op=None):
    pair = lf.Lora(draw(3, in_, seed=seed), draw(out, 3, seed=seed + 1), 6.0, "alpha/r")
    shape = (out, in_) if spec == "out,in" else (in_, out)
    return lf.Update((pair,), lf.Placement.of(shape, spec), op)


EMBEDDING = lora(12, 37, "in,out", 5, "embedding")
HEAD = lora(37, 12, "out,in", 7)


def rows(seed=9):
    return lf.Update((lf.Rows(draw(2, 12, seed=seed), np.array([4, 30])),), lf.Placement((37, 12), (1,), (0,)))


def merged(adapter, opened, tmp_path):
    """(tensors, config, notes) of the folder."""
    from loraformat.base import Options
    from loraformat.verbs.merge import prepare

    plan = prepare("merge", [("default", adapter)], opened, Options(tmp_path / "out"))
    opened.apply(plan)
    assert lf.verify(opened, adapter, lf.open_base(tmp_path / "out")).problems == []
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    return tensors, json.loads((tmp_path / "out" / "config.json").read_text()), plan.notes


@pytest.mark.parametrize(
    ("targets", "changed"),
    [({E: EMBEDDING}, {E}), ({H: HEAD}, {H}), ({E: EMBEDDING, H: HEAD}, {E, H})],
    ids=["embedding", "head", "both"],
)
def test_a_change_of_one_of_two_tied_modules_unties_them(targets, changed, tmp_path):
    opened = base(tmp_path / "base")
    old = opened.read(E)
    tensors, config, notes = merged(lf.Adapter(targets), opened, tmp_path)
    for name in (E, H):
        wanted = targets[name].apply(old) if name in changed else old
        assert np.array_equal(tensors[name], wanted), name
    assert config == {**LLAMA, "tie_word_embeddings": False}
    assert len(notes) == 1
    assert "+1.8 kB" in notes[0]  # 37 × 12 × 4 bytes


@pytest.mark.parametrize("targets", [{E: rows()}, {H: rows()}, {E: rows(), H: rows()}], ids=["one", "head", "both"])
def test_trained_tokens_change_the_shared_tensor_and_leave_it_shared(targets, tmp_path):
    opened = base(tmp_path / "base")
    tensors, config, notes = merged(lf.Adapter(targets), opened, tmp_path)
    assert set(tensors) == {E, "model.norm.weight"}
    assert np.array_equal(tensors[E], rows().apply(opened.read(E)))
    assert config == LLAMA
    assert notes == ()


def test_two_modules_with_other_tokens_trained_are_no_longer_tied(tmp_path):
    tensors, config, _ = merged(lf.Adapter({E: rows(), H: rows(seed=10)}), base(tmp_path / "base"), tmp_path)
    assert not np.array_equal(tensors[E], tensors[H])
    assert config["tie_word_embeddings"] is False


def test_a_larger_vocabulary_is_one_for_both_and_for_the_configuration(tmp_path):
    values = draw(41, 12, seed=3)
    whole = lf.Update((lf.Replace(values, allows=("resize",)),), lf.Placement((41, 12), (1,), (0,)))
    tensors, config, notes = merged(lf.Adapter({E: whole}), base(tmp_path / "base"), tmp_path)
    assert np.array_equal(tensors[E], values)
    assert H not in tensors
    assert config == {**LLAMA, "vocab_size": 41}
    assert any("37 to 41" in note for note in notes)


@pytest.mark.parametrize("name", [E, H])
def test_a_module_trained_whole_in_another_size_does_not_tell_what_its_partner_holds(name, tmp_path):
    whole = lf.Update((lf.Replace(draw(41, 12, seed=3), allows=("add", "resize")),))
    with pytest.raises(lf.LoraFormatError, match=r"LF-609  trained apart from .*: the rows of those are in no file"):
        merged(lf.Adapter({name: whole}), base(tmp_path / "base"), tmp_path)
    values = {name: draw(41, 12, seed=seed) for seed, name in enumerate((E, H))}
    both = {n: lf.Update((lf.Replace(v, allows=("add", "resize")),)) for n, v in values.items()}
    tensors, config, _ = merged(lf.Adapter(both), base(tmp_path / "again"), tmp_path)
    assert all(np.array_equal(tensors[n], values[n]) for n in (E, H))
    assert config == {**LLAMA, "vocab_size": 41, "tie_word_embeddings": False}


def test_a_resized_embedding_with_a_pair_gives_its_partner_the_size_and_not_the_pair(tmp_path):
    """PEFT saves the embedding beside the factors where it is a target, and the vocabulary grew."""
    values, pair = draw(41, 12, seed=3), lora(12, 41, "in,out", 5, "embedding")
    update = lf.Update((lf.Replace(values, allows=("resize",)), *pair.parts), pair.placement, "embedding")
    tensors, config, _ = merged(lf.Adapter({E: update}), base(tmp_path / "base"), tmp_path)
    assert np.array_equal(tensors[H], values)
    assert np.array_equal(tensors[E], update.apply(values))
    assert config == {**LLAMA, "vocab_size": 41, "tie_word_embeddings": False}


def test_what_may_resize_and_does_not_is_of_its_own_module(tmp_path):
    """Without another size the tensor that PEFT saves beside a head's factors is the one that both share."""
    opened = base(tmp_path / "base")
    old = opened.read(E)
    update = lf.Update((lf.Replace(old, allows=("add", "resize")), *HEAD.parts), HEAD.placement)
    tensors, config, _ = merged(lf.Adapter({H: update}), opened, tmp_path)
    assert np.array_equal(tensors[E], old)
    np.testing.assert_allclose(tensors[H], HEAD.apply(old), atol=1e-6)
    assert config["tie_word_embeddings"] is False


@pytest.mark.parametrize("allows", [(), ("add", "resize")], ids=["only", "allowed to resize"])
def test_a_module_that_was_trained_whole_leaves_its_partner_as_it_was(allows, tmp_path):
    values, opened = draw(37, 12, seed=3), base(tmp_path / "base")
    whole = lf.Update((lf.Replace(values, allows=allows),), lf.Placement((37, 12), (1,), (0,)))
    tensors, config, _ = merged(lf.Adapter({E: whole}), opened, tmp_path)
    assert np.array_equal(tensors[E], values)
    assert np.array_equal(tensors[H], opened.read(E))
    assert config["tie_word_embeddings"] is False


def test_a_head_that_is_stored_twice_is_untied_in_the_configuration_alone(tmp_path):
    opened = base(tmp_path / "base", **{H: draw(37, 12)})
    tensors, config, notes = merged(lf.Adapter({E: EMBEDDING}), opened, tmp_path)
    assert np.array_equal(tensors[H], draw(37, 12))
    assert config["tie_word_embeddings"] is False
    assert len(notes) == 1


def test_trained_tokens_of_a_head_that_is_stored_twice_change_both(tmp_path):
    tensors, config, _ = merged(lf.Adapter({E: rows()}), base(tmp_path / "base", **{H: draw(37, 12)}), tmp_path)
    assert np.array_equal(tensors[H], tensors[E])
    assert config == LLAMA


@pytest.mark.parametrize(
    "config",
    [{**LLAMA, "tie_word_embeddings": False}, {**LLAMA, "architectures": ["LlamaForSequenceClassification"]}],
    ids=["said", "headless"],
)
def test_a_base_that_ties_nothing_has_no_head_to_change(config, tmp_path):
    opened = base(tmp_path / "base", config)
    assert opened.tied == {}
    with pytest.raises(lf.LoraFormatError) as caught:
        opened.resolve(lf.Adapter({H: HEAD}), lf.Hints()).require()
    assert [p.rule for p in caught.value.problems] == ["LF-602"]


def test_an_end_of_one_tie_leaves_no_other_head_without_a_tensor(tmp_path):
    other = "language_model.model.embed_tokens.weight"
    tensors, _, notes = merged(
        lf.Adapter({H: HEAD}), base(tmp_path / "base", **{other: draw(37, 12, seed=2)}), tmp_path
    )
    assert np.array_equal(tensors["language_model.lm_head.weight"], tensors[other])
    assert len(notes) == 1


def test_more_than_two_modules_on_one_tensor_are_not_taken_apart(tmp_path):
    (tmp_path / "t5").mkdir()
    save_file({"shared.weight": draw(37, 12)}, tmp_path / "t5" / "model.safetensors")
    (tmp_path / "t5" / "config.json").write_text(json.dumps({"model_type": "t5", "tie_word_embeddings": True}))
    with pytest.raises(lf.LoraFormatError) as caught:
        lf.merge(lf.Adapter({H: HEAD}), lf.open_base(tmp_path / "t5"), tmp_path / "out")
    assert {p.rule for p in caught.value.problems} == {"LF-609"}
    assert not (tmp_path / "out").exists()


def test_an_embedding_that_is_tied_to_nobody_knows_what_is_refused(tmp_path):
    (tmp_path / "base").mkdir()
    save_file(
        {"net.tokens.weight": draw(37, 12), "net.places.weight": draw(21, 12)}, tmp_path / "base" / "model.safetensors"
    )
    (tmp_path / "base" / "config.json").write_text(json.dumps({**LLAMA, "model_type": "mine"}))
    opened = lf.open_base(tmp_path / "base")
    lf.merge(lf.Adapter({"net.places.weight": lora(12, 21, "in,out", 5, "embedding")}), opened, tmp_path / "out")
    with pytest.raises(lf.LoraFormatError) as caught:
        lf.merge(lf.Adapter({"net.tokens.weight": EMBEDDING}), opened, tmp_path / "other")
    assert [p.rule for p in caught.value.problems] == ["LF-609"]
    lf.merge(lf.Adapter({"net.tokens.weight": rows()}), opened, tmp_path / "rows")  # of the tensor, tied or not


def test_a_single_file_says_that_its_configuration_must_change(tmp_path):
    from loraformat.base import Options
    from loraformat.verbs.merge import prepare

    base(tmp_path / "base")
    opened = lf.open_base(tmp_path / "base" / "model.safetensors")
    plan = prepare("merge", [("default", lf.Adapter({H: HEAD}))], opened, Options(tmp_path / "out.safetensors"))
    assert any("config.json" in note for note in plan.notes)


def test_the_inner_configuration_of_a_model_of_two_towers_is_untied_too():
    config = {"tie_word_embeddings": True, "text_config": {"tie_word_embeddings": True, "vocab_size": 9}}
    assert tied.unties(config)["text_config"] == {"tie_word_embeddings": False, "vocab_size": 9}
    assert tied.vocabulary(config, 9, 11)["text_config"]["vocab_size"] == 11
