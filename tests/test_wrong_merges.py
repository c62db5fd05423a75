"""Every wrong merge that is usual, made on purpose: verify refuses it and says which it was."""

import dataclasses
import json
import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from updates import normal

import loraformat as lf

BF16 = ml_dtypes.bfloat16
R, ALPHA = 3, 6.0
KEYS = {"a.q.weight": (12, 12), "a.k.weight": (9, 12), "a.o.weight": (12, 9)}


def pair(out, in_, seed, rule="alpha/sqrt(r)", alpha=ALPHA):
    return lf.Lora(normal(R, in_, seed=seed), normal(out, R, seed=seed + 1), alpha, rule)


def made(rule="alpha/sqrt(r)", alpha=ALPHA, seed=20):
    return {
        key: lf.Update((pair(*shape, seed + i, rule, alpha),), lf.Placement.of(shape, "out,in"))
        for i, (key, shape) in enumerate(KEYS.items())
    }


def weights(dtype):
    return {
        **{key: normal(*shape, seed=i).astype(dtype) for i, (key, shape) in enumerate(KEYS.items())},
        "norm.weight": normal(12).astype(dtype),
    }


def store(path, held, config=None):
    path.mkdir(parents=True)
    save_file(held, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({"model_type": "llama", **(config or {})}))
    return lf.open_base(path)


def faults(home, dtype, wrong, adapter, keys=KEYS):
    """What verify says of a merge that was made by ``wrong(W, update)`` in float32 for ``keys``, right for the others."""
    before = weights(dtype)
    after = dict(before)
    for key, update in adapter.items():
        w = before[key].astype(np.float32)
        value = wrong(w, update) if key in keys else update.apply(w)
        after[key] = value.astype(dtype)
    base, merged = store(home / "base", before), store(home / "merged", after)
    return lf.verify(base, lf.Adapter(adapter), merged).problems


def scaled(scale):
    """W + scale · B·A."""
    return lambda w, u: w + scale(u["lora"]) * (u["lora"].lora_B @ u["lora"].lora_A)


WRONG = {
    "the adapter was not applied": lambda w, u: w,
    "the adapter was applied twice": lambda w, u: w + 2 * u.matrix(),
    "ΔW was subtracted": lambda w, u: w - u.matrix(),
    "the scale was lost (ΔW = B·A)": scaled(lambda p: 1.0),
    "alpha was taken for the scale": scaled(lambda p: p.alpha),
    "rsLoRA was ignored (alpha/r)": scaled(lambda p: p.alpha / p.r),
    "the scale was applied twice": scaled(lambda p: p.scale**2),
    "ΔW was multiplied by 0.75: the scale is 2.6 instead of 3.46": scaled(lambda p: 0.75 * p.scale),
}


@pytest.mark.parametrize("dtype", [np.float32, BF16, np.float16, np.float64], ids=["f32", "bf16", "f16", "f64"])
@pytest.mark.parametrize("words", WRONG)
def test_a_wrong_merge_is_refused_and_named(words, dtype, tmp_path):
    problems = faults(tmp_path, dtype, WRONG[words], made())
    assert {problem.where for problem in problems} == set(KEYS)
    for problem in problems:
        assert problem.what.startswith(f"{words}: "), problem.what


def test_rslora_that_was_assumed_is_told_too(tmp_path):
    wrong = scaled(lambda p: p.alpha / math.sqrt(p.r))
    assert all(
        p.what.startswith("rsLoRA was assumed (alpha/√r): ") for p in faults(tmp_path, BF16, wrong, made("alpha/r"))
    )


def test_two_mistakes_that_look_the_same_are_both_named(tmp_path):
    problems = faults(tmp_path, np.float32, scaled(lambda p: 1.0), made(alpha=float(R)))
    assert all(p.what.startswith("the scale was lost (ΔW = B·A), or rsLoRA was ignored (alpha/r): ") for p in problems)


@pytest.mark.parametrize("dtype", [np.float32, BF16], ids=["f32", "bf16"])
def test_a_square_change_that_was_transposed_is_named_and_its_lost_scale_too(dtype, tmp_path):
    adapter = {key: update for key, update in made().items() if key == "a.q.weight"}
    (problem,) = faults(tmp_path, dtype, lambda w, u: w + u.matrix().T, adapter)
    assert problem.what.startswith("ΔW was added transposed: ")
    (problem,) = faults(tmp_path / "x", dtype, lambda w, u: w + u.matrix().T / 3, adapter)
    assert problem.what.startswith("ΔW was added transposed, and multiplied by 0.33")


def test_a_stack_of_square_changes_that_was_transposed_is_named(tmp_path):
    place = lf.Placement((3, 8, 8), (1,), (2,), (0,))
    update = lf.Update((lf.Lora(normal(3, 2, 8), normal(3, 8, 2), 3.0, "alpha/r"),), place)
    weight = normal(3, 8, 8)
    base, merged = (
        store(tmp_path / "base", {"experts": weight}),
        store(tmp_path / "merged", {"experts": weight + update.matrix().swapaxes(1, 2)}),
    )
    (problem,) = lf.verify(base, lf.Adapter({"experts": update}), merged).problems
    assert problem.what.startswith("ΔW was added transposed: ")


def test_a_target_that_was_skipped_among_others_is_called_so(tmp_path):
    (problem,) = faults(tmp_path, BF16, lambda w, u: w, made(), keys=["a.k.weight"])
    assert (problem.rule, problem.where) == ("LF-611", "a.k.weight")
    assert problem.what.startswith("the target was skipped: the adapter was not applied: ")


def test_what_was_rounded_more_than_once_is_no_other_mistake(tmp_path):
    """As a merge in 16 bits does it: ΔW is rounded before it is added, which itself rounds."""

    def in_16_bits(w, u):
        p = u["lora"]
        delta = (
            (p.lora_B.astype(BF16).astype(np.float32) @ p.lora_A.astype(BF16).astype(np.float32)).astype(BF16)
            * np.float32(0.01)
        ).astype(BF16)
        return (w.astype(BF16) + delta).astype(np.float32)

    adapter = {
        key: dataclasses.replace(update, parts=(dataclasses.replace(update["lora"], alpha=0.01, scale_rule="factor"),))
        for key, update in made().items()
    }
    problems = faults(tmp_path, BF16, in_16_bits, adapter)
    assert problems
    assert all(p.what.startswith("ΔW is there, rounded more than once: ") for p in problems), problems


def test_what_no_usual_mistake_explains_gets_no_name(tmp_path):
    problems = faults(tmp_path, np.float32, lambda w, u: w + u.matrix() + normal(*w.shape, seed=99), made())
    assert all(" values are not W + ΔW rounded once" in p.what and p.what[0].isdigit() for p in problems)


def test_of_several_adapters_the_one_that_is_missing_is_named(tmp_path):
    one, two = lf.Adapter(made(seed=20)), lf.Adapter(made(seed=60))
    base = store(tmp_path / "base", weights(np.float32))
    for merged, words in (
        ([(one, 1.0)], "adapter 2 was not applied: "),
        ([(one, 2.0), (two, 0.3)], "adapter 1 was applied twice, adapter 2 was multiplied by 0.3: "),
    ):
        lf.merge(merged, base, tmp_path / "out", force=True)
        problems = lf.verify(base, [(one, 1.0), (two, 1.0)], lf.open_base(tmp_path / "out")).problems
        assert len(problems) == 3
        assert all(p.what.startswith(words) for p in problems), problems[0].what


DORA = {
    "the adapter was not applied": lambda w, u: w,
    "the adapter was applied twice": lambda w, u: u.apply(u.apply(w)),
    "the magnitude was ignored (plain LoRA)": lambda w, u: w + u.matrix(),
    "rsLoRA was ignored (alpha/r)": lambda w, u: dataclasses.replace(
        u, parts=(dataclasses.replace(u["lora"], scale_rule="alpha/r"), u["magnitude"])
    ).apply(w),
}


@pytest.mark.parametrize("dtype", [np.float32, BF16], ids=["f32", "bf16"])
@pytest.mark.parametrize("words", DORA)
def test_a_wrong_merge_of_dora_is_named(words, dtype, tmp_path):
    adapter = {
        key: dataclasses.replace(u, parts=(*u.parts, lf.Magnitude(abs(normal(KEYS[key][0], seed=3)) + 3)))
        for key, u in made().items()
    }
    for problem in faults(tmp_path, dtype, DORA[words], adapter):
        assert problem.what.startswith(f"{words}: "), problem.what


@settings(max_examples=25)
@given(
    st.integers(0, 10**6),
    st.sampled_from([*WRONG, "right"]),
    st.sampled_from([np.float32, BF16, np.float16]),
    st.sampled_from(["alpha/r", "alpha/sqrt(r)", "factor"]),
    st.floats(0.05, 20.0),
)
def test_verify_accepts_what_is_right_and_rejects_each_wrong_merge(tmp_path_factory, seed, words, dtype, rule, alpha):
    adapter = made(rule, alpha, seed)
    wrong = WRONG.get(words, lambda w, u: u.apply(w))
    before = weights(dtype)
    after = dict(before)
    moved = False
    for key, update in adapter.items():
        w = before[key].astype(np.float32)
        right = update.apply(w)
        after[key] = wrong(w, update).astype(dtype)
        moved = moved or np.linalg.norm(after[key].astype(np.float32) - right) > 1e-2 * np.linalg.norm(right - w)
    home = tmp_path_factory.mktemp("law")
    problems = lf.verify(store(home / "base", before), lf.Adapter(adapter), store(home / "merged", after)).problems
    assert bool(problems) is bool(moved) or words != "right"
    assert not problems if words == "right" else bool(problems) or not moved


# Ties.

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TIED = {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True, "vocab_size": 17}


def tied(tmp_path, merged, config=TIED, stored=(EMBED,)):
    base = store(tmp_path / "base", dict.fromkeys(stored, normal(17, 6)), TIED)
    return base, store(tmp_path / "merged", merged, config)


HEAD_LORA = lf.Adapter({HEAD: lf.Update((pair(17, 6, 5),), lf.Placement.of((17, 6), "out,in"))})
ROWS = lf.Adapter(
    {EMBED: lf.Update((lf.Rows(normal(2, 6, seed=4), np.array([3, 11])),), lf.Placement((17, 6), (1,), (0,)))}
)


def test_a_change_of_a_head_that_went_into_the_shared_tensor_is_named(tmp_path):
    base, merged = tied(tmp_path, {EMBED: HEAD_LORA[HEAD].apply(normal(17, 6))})
    (problem,) = lf.verify(base, HEAD_LORA, merged).problems
    assert problem.where == EMBED
    assert (
        problem.what
        == f"no target, and yet changed, as {HEAD}, to which it is tied in the base: the tie was to be ended"
    )


def test_trained_rows_that_one_of_two_tied_modules_missed_are_named(tmp_path):
    w = normal(17, 6)
    base, merged = tied(tmp_path, {EMBED: ROWS[EMBED].apply(w), HEAD: w}, {**TIED, "tie_word_embeddings": False})
    (problem,) = lf.verify(base, ROWS, merged).problems
    assert problem.what.startswith(f"the tie was broken ({HEAD} is {EMBED}): the adapter was not applied to {HEAD}: ")


def test_values_of_which_the_configuration_would_lose_one_are_named(tmp_path):
    w = normal(17, 6)
    base, merged = tied(tmp_path, {EMBED: w, HEAD: HEAD_LORA[HEAD].apply(w)})
    (problem,) = lf.verify(base, HEAD_LORA, merged).problems
    assert problem.where == HEAD
    assert (
        problem.what == f"config.json ties it to {EMBED}, and the two hold different values: loading loses one of them"
    )


def test_what_merge_itself_does_with_ties_is_right(tmp_path):
    for i, adapter in enumerate((HEAD_LORA, ROWS)):
        home = tmp_path / str(i)
        home.mkdir()
        base = store(home / "base", {EMBED: normal(17, 6)}, TIED)
        lf.merge(adapter, base, home / "out")
        assert lf.verify(base, adapter, lf.open_base(home / "out")).problems == []
        assert set(load_file(home / "out/model.safetensors")) >= {EMBED}
