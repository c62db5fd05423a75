"""The adapter between two models: as near as its rank allows, what it loses stated, what it leaves out told."""

import json

import ml_dtypes
import numpy as np
import pytest
from graphs import adapter, lora, model, save
from hypothesis import given, settings
from hypothesis import strategies as st
from refused import refusal
from safetensors.numpy import load_file, save_file
from updates import normal

import loraformat as lf
from loraformat.algebra.randomised import best_pair
from loraformat.testing import relative_error

BF16 = ml_dtypes.bfloat16
Q, K, OUT = (f"model.layers.0.self_attn.{leaf}_proj.weight" for leaf in "qko")
NORM, BIAS = "model.layers.0.input_layernorm.weight", "model.layers.0.self_attn.q_proj.bias"
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False}


def tensors(dtype=np.float32):
    shapes = {Q: (12, 9), K: (5, 9), OUT: (9, 12), NORM: (9,), BIAS: (12,), EMBED: (17, 9), HEAD: (17, 9)}
    return {name: normal(*shape, seed=i).astype(dtype) for i, (name, shape) in enumerate(shapes.items())}


def checkpoint(path, held, config=LLAMA):
    path.mkdir()
    save_file(held, path / "model.safetensors")
    if config is not None:
        (path / "config.json").write_text(json.dumps(config))
    return lf.open_base(path)


def pairs(*keys, rank=2, seed=50):
    held = tensors()
    return lf.Adapter(
        {
            key: lf.Update(
                (
                    lf.Lora(
                        normal(rank, held[key].shape[1], seed=seed),
                        normal(held[key].shape[0], rank, seed=seed),
                        3.0,
                        "alpha/r",
                    ),
                )
            )
            for key in keys
        }
    )


# The nearest pair.


@pytest.mark.parametrize("shape", [(300, 190), (190, 300), (40, 30), (30, 1), (1, 30)])
def test_a_pair_loses_no_more_than_the_singular_values_beyond_its_rank(shape):
    decaying = normal(shape[0], 40) * np.float32(0.8) ** np.arange(40, dtype=np.float32) @ normal(40, shape[1])
    for matrix in (normal(*shape), np.asarray(decaying, np.float32), np.asarray(decaying.T, np.float32).T):
        values = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)
        pair = best_pair(matrix, rank=7)
        best = np.sqrt(np.sum(values[7:] ** 2) / np.sum(values**2))
        assert pair.residual == pytest.approx(relative_error(pair.B @ pair.A, matrix), rel=1e-4, abs=2e-7)
        assert pair.residual <= 1.01 * best + 1e-6
        assert pair.norm == pytest.approx(np.sqrt(np.sum(values**2)), rel=1e-6)
        assert pair.sigma == pytest.approx(values[:7][: len(pair.sigma)], rel=0.05)


@pytest.mark.parametrize("energy", [0.3, 0.9, 0.999])
def test_an_energy_takes_the_least_rank_that_holds_it(energy):
    matrix = np.asarray(
        normal(500, 60) * np.float32(0.9) ** np.arange(60, dtype=np.float32) @ normal(60, 400), np.float32
    )
    held = np.cumsum(np.linalg.svd(matrix.astype(np.float64), compute_uv=False) ** 2)
    pair = best_pair(matrix, energy=energy)
    assert len(pair.sigma) == np.argmax(held >= energy * held[-1]) + 1
    assert pair.residual**2 <= 1 - energy + 1e-6


def test_a_matrix_of_less_rank_gives_no_singular_value_that_is_only_rounding():
    pair = best_pair(np.asarray(normal(300, 3) @ normal(3, 200), np.float32), rank=16)
    assert pair.A.shape == (3, 200)
    assert pair.residual < 1e-6
    assert best_pair(np.zeros((5, 4), np.float32), rank=2).A.shape == (0, 4)


def test_the_same_matrix_gives_the_same_pair():
    one, two = (best_pair(normal(300, 200), rank=4, seed_name="a") for _ in range(2))
    assert one.A.tobytes() == two.A.tobytes()


# Two checkpoints.


@settings(max_examples=15)
@given(st.integers(0, 1000), st.sampled_from([1, 2, 4]), st.booleans())
def test_what_was_merged_is_extracted_within_rounding(tmp_path_factory, seed, rank, turned):
    home = tmp_path_factory.mktemp("law")
    names = [f"h.0.{leaf}.weight" for leaf in ("c_attn", "c_proj")]
    config = {"model_type": "gpt2"} if turned else {"model_type": "llama"}
    base = checkpoint(
        home / "base", {name: normal(11, 11 if i else 7, seed=seed + i) for i, name in enumerate(names)}, config
    )
    made = {}
    for i, name in enumerate(names):
        out, in_ = base.linears(lf.Hints())[name].matrix_shape
        made[name] = lf.Update(
            (lf.Lora(normal(rank, in_, seed=seed + 7), normal(out, rank, seed=seed + 8 + i), 1.5, "alpha/r"),)
        )
    lf.merge(lf.Adapter(made), base, home / "tuned")
    found = lf.extract(base, lf.open_base(home / "tuned"), rank=rank)
    assert found.adapter.keys() == made.keys()
    for name, update in made.items():
        assert relative_error(found.adapter[name].matrix(), update.matrix()) < 1e-5
        assert found.adapter[name].rank == rank
        assert found.adapter[name].placement == base.linears(lf.Hints())[name]
    assert found.whole < 1e-5
    assert not found.left_out


def test_16_bit_bases_give_the_pair_within_their_rounding_and_state_it(tmp_path):
    base = checkpoint(tmp_path / "base", tensors(BF16))
    given = pairs(Q, OUT)
    lf.merge(given, base, tmp_path / "tuned")
    found = lf.extract(base, lf.open_base(tmp_path / "tuned"), rank=2)
    assert sorted(found.adapter) == sorted(given)
    assert found.equal == 5
    for name, update in given.items():
        difference = load_file(tmp_path / "tuned/model.safetensors")[name].astype(np.float32) - tensors(BF16)[
            name
        ].astype(np.float32)
        assert found.residuals[name] == pytest.approx(
            relative_error(found.adapter[name].matrix(), difference), rel=1e-3
        )
        assert relative_error(found.adapter[name].matrix(), update.matrix()) < 0.02
    digests = {lf.digest(lf.extract(base, lf.open_base(tmp_path / "tuned"), rank=2).adapter) for _ in range(2)}
    assert digests == {lf.digest(found.adapter)}


@pytest.fixture
def tuned(tmp_path):
    """(base, tuned): two linears, a norm, a bias and the embedding differ; a head is new, another tensor is gone."""
    held = {**tensors(BF16), "model.rotary.inv_freq": normal(4)}
    changed = {
        name: (held[name].astype(np.float32) + 0.3 * normal(*held[name].shape, seed=9)).astype(BF16)
        for name in (Q, K, NORM, BIAS)
    }
    bigger = {EMBED: np.concatenate([held[EMBED], held[EMBED][:2]])}
    after = {**held, **changed, **bigger, "score.weight": normal(2, 9).astype(BF16)}
    del after["model.rotary.inv_freq"]
    return checkpoint(tmp_path / "base", held), checkpoint(tmp_path / "tuned", after)


def test_what_is_no_linear_is_left_out_with_its_size(tuned):
    found = lf.extract(*tuned, rank=3)
    assert sorted(found.adapter) == [K, Q]
    assert {(other.name, other.kind, other.nbytes) for other in found.left_out} == {
        (NORM, "norms", 18),
        (BIAS, "biases", 24),
        (EMBED, "embeddings", 19 * 9 * 2),
        ("score.weight", "new", 36),
        ("model.rotary.inv_freq", "missing", 16),
    }
    assert found.equal == 2
    assert {update.rank for update in found.adapter.values()} == {3}


def test_what_is_taken_along_makes_the_tuned_tensors_again_bit_for_bit(tuned, tmp_path):
    base, after = tuned
    found = lf.extract(base, after, energy=1.0, take=("norms", "biases", "embeddings", "new"))
    assert [other.kind for other in found.left_out] == ["missing"]
    lf.save(found.adapter, tmp_path / "a.safetensors")
    lf.merge(lf.load(tmp_path / "a.safetensors"), base, tmp_path / "again")
    again, wanted = (load_file(tmp_path / name / "model.safetensors") for name in ("again", "tuned"))
    for name in (NORM, BIAS, EMBED, "score.weight", OUT, HEAD, Q, K):
        assert np.array_equal(again[name].view(np.uint16), wanted[name].view(np.uint16)), name


def test_differences_can_be_taken_in_the_place_of_values_and_weighed(tuned, tmp_path):
    base, after = tuned
    found = lf.extract(base, after, rank=1, take=("norms", "biases"), form="delta")
    lf.merge([(found.adapter, 0.5)], base, tmp_path / "half")
    half, old, new = (
        load_file(tmp_path / name / "model.safetensors")[NORM].astype(np.float32) for name in ("half", "base", "tuned")
    )
    assert np.allclose(half, (old + new) / 2, rtol=2**-8)
    assert refusal(lf.extract, base, after, rank=1, take=("embeddings",), form="delta")[0] == {"LF-612"}


def test_an_embedding_of_the_same_size_is_taken_as_a_difference_of_looked_up_rows(tmp_path):
    held = tensors()
    after = {**held, EMBED: held[EMBED] + normal(17, 9, seed=30)}
    base, new = checkpoint(tmp_path / "base", held), checkpoint(tmp_path / "tuned", after)
    found = lf.extract(base, new, rank=1, take=("embeddings",), form="delta").adapter
    assert found[EMBED].op == "embedding"
    assert np.allclose(found[EMBED].delta(), after[EMBED] - held[EMBED])


def test_names_of_the_tuned_model_are_suggested_and_then_taken(tmp_path):
    held = {"layers.0.q.weight": normal(7, 5), "layers.1.q.weight": normal(7, 5, seed=1), "norm.weight": normal(5)}
    after = {f"bert.{name}": value + 0.1 * normal(*value.shape, seed=3) for name, value in held.items()}
    base, new = checkpoint(tmp_path / "base", held), checkpoint(tmp_path / "tuned", after)
    found, said = refusal(lf.extract, base, new, rank=2)
    assert found == {"LF-602"}
    assert '--names map.json with {"*": "bert.*"}' in said
    found = lf.extract(base, new, rank=2, hints=lf.Hints({"*": "bert.*"}))
    assert sorted(found.adapter) == ["layers.0.q.weight", "layers.1.q.weight"]
    assert [other.name for other in found.left_out] == ["norm.weight"]
    assert '{"bert.*": "*"}' in refusal(lf.extract, new, base, rank=2)[1]
    assert sorted(lf.extract(new, base, rank=2, hints=lf.Hints({"bert.*": "*"})).adapter)[0] == "bert.layers.0.q.weight"


def test_an_orientation_is_never_guessed(tmp_path):
    base, new = (
        checkpoint(tmp_path / name, {Q: normal(9, 9, seed=i), "A_log": normal(4, 3, seed=i)}, None)
        for i, name in enumerate(("base", "tuned"))
    )
    found, said = refusal(lf.extract, base, new, rank=2)
    assert found == {"LF-604"}
    assert f"--axes '{Q}=out,in'" in said
    found = lf.extract(base, new, rank=2, hints=lf.Hints(axes={"q_proj": "in,out"}))
    assert found.adapter[Q].placement == lf.Placement.of((9, 9), "in,out")
    assert [(other.name, other.kind) for other in found.left_out] == [("A_log", "others")]


def test_models_that_store_a_linear_the_other_way_are_compared_as_matrices(tmp_path):
    weight, update = normal(7, 5), normal(7, 2) @ normal(2, 5)
    base = checkpoint(tmp_path / "base", {"h.0.c_fc.weight": weight})
    new = checkpoint(tmp_path / "tuned", {"h.0.c_fc.weight": (weight + update).T.copy()}, {"model_type": "gpt2"})
    found = lf.extract(base, new, rank=2).adapter
    assert relative_error(found["h.0.c_fc.weight"].matrix(), update) < 1e-5


QUANTISED = {
    "GPTQ": {
        "q.qweight": np.zeros((1, 6), np.int32),
        "q.qzeros": np.zeros((1, 1), np.int32),
        "q.scales": normal(1, 6),
        "q.g_idx": np.zeros(8, np.int32),
    },
    "AWQ": {"q.qweight": np.zeros((8, 1), np.int32), "q.qzeros": np.zeros((1, 1), np.int32), "q.scales": normal(1, 8)},
    "HQQ": {"q.W_q": np.zeros((6, 3), np.uint8)},
    "compressed-tensors, packed": {"q.weight_packed": np.zeros((6, 1), np.int32), "q.weight_scale": normal(6, 1)},
}


@pytest.mark.parametrize("name", QUANTISED)
def test_a_quantised_model_is_refused_by_the_name_of_its_form(name, tmp_path):
    from loraformat import serializer

    plain = checkpoint(tmp_path / "base", {"q.weight": normal(6, 3)})
    (tmp_path / "tuned").mkdir()
    with open(tmp_path / "tuned/model.safetensors", "wb") as file:
        serializer.write(file, QUANTISED[name], {})
    (tmp_path / "tuned/config.json").write_text(json.dumps(LLAMA))
    new = lf.open_base(tmp_path / "tuned")
    for two in ((plain, new), (new, plain)):
        found, said = refusal(lf.extract, *two, rank=2)
        assert found == {"LF-608"}
        assert f"quantised in {two[two[0] is plain].path.name}: {name} (" in said


F8 = ml_dtypes.float8_e4m3fn
EIGHT_BITS = {
    "bitsandbytes LLM.int8": (
        {"q.weight": (normal(6, 3) * 40).astype(np.int8), "q.SCB": normal(6)},
        normal(6)[:, None] / 127,
    ),
    "FP8 in blocks": ({"q.weight": normal(6, 3).astype(F8), "q.weight_scale_inv": normal(1, 1)}, normal(1, 1)),
    "ComfyUI's scaled FP8": ({"q.weight": normal(6, 3).astype(F8), "q.scale_weight": normal(1)}, normal(1)),
    "FP8 without a scale": ({"q.weight": normal(6, 3).astype(F8)}, np.ones(1)),
}


@pytest.mark.parametrize("name", EIGHT_BITS)
def test_what_lies_between_8_bits_and_floats_is_that_of_their_values(name, tmp_path):
    from loraformat import serializer

    held, scale = EIGHT_BITS[name]
    tuned, update = tmp_path / "tuned", normal(6, 1) @ normal(1, 3)
    tuned.mkdir()
    with open(tuned / "model.safetensors", "wb") as file:
        serializer.write(file, held, {})
    (tuned / "config.json").write_text(json.dumps(LLAMA))
    values = (held["q.weight"].astype(np.float64) * scale).astype(np.float32)
    plain = checkpoint(tmp_path / "base", {"q.weight": values - update})
    found = lf.extract(plain, lf.open_base(tuned), rank=1)
    assert relative_error(found.adapter["q.weight"].matrix(), update) < 1e-5
    assert not found.left_out


@pytest.mark.parametrize(
    ("asked", "rule"),
    [
        ({}, "LF-705"), ({"rank": 2, "energy": 0.5}, "LF-705"), ({"rank": 0}, "LF-705"), ({"energy": 1.1}, "LF-705"),
        ({"energy": float("nan")}, "LF-705"), ({"rank": 1, "take": ("norm",)}, "LF-705"), ({"rank": 1, "only": ("zzz",)}, "LF-705"),
        ({"rank": 1, "only": ("o_proj",)}, "LF-304"),
    ],
)  # fmt: skip
def test_what_means_nothing_is_refused(asked, rule, tuned):
    assert refusal(lf.extract, *tuned, **asked)[0] == {rule}


def test_a_tuned_model_with_nan_is_refused_by_the_tensor(tmp_path):
    held = tensors()
    broken = {**held, Q: held[Q].copy()}
    broken[Q][3, 4] = np.nan
    found, said = refusal(
        lf.extract, checkpoint(tmp_path / "base", held), checkpoint(tmp_path / "tuned", broken), rank=2
    )
    assert (found, Q in said) == ({"LF-312"}, True)


def test_only_some_tensors_are_looked_at(tuned):
    found = lf.extract(*tuned, rank=2, only=("q_proj",))
    assert sorted(found.adapter) == [Q]
    assert [other.name for other in found.left_out] == [BIAS]


# Two graphs.


def test_two_graphs_give_the_adapter_that_lies_between_them(tmp_path):
    made = model(
        """g (float[N, 7] x) => (float[N, 11] y) <float[7, 5] a.q.weight, float[5, 11] a.v.weight> { h = MatMul (x, a.q.weight)  y = MatMul (h, a.v.weight) }""".replace(
            "a.q.weight", "q"
        ).replace("a.v.weight", "v")
    )
    for node, tensor, name in zip(made.graph.node, made.graph.initializer, ("a.q.weight", "a.v.weight"), strict=True):
        node.input[1] = tensor.name = name
    save(made, tmp_path / "base.onnx")
    given = adapter({"a.q.weight": lora(5, 7, seed=1)})
    lf.merge(given, lf.open_base(tmp_path / "base.onnx"), tmp_path / "tuned.onnx")
    found = lf.extract(lf.open_base(tmp_path / "base.onnx"), lf.open_base(tmp_path / "tuned.onnx"), rank=2)
    assert sorted(found.adapter) == ["a.q.weight"]
    assert found.adapter["a.q.weight"].placement is None
    assert relative_error(found.adapter["a.q.weight"].matrix(), given["a.q.weight"].matrix()) < 1e-5


# On the command line.


def test_the_command_states_what_is_lost_and_what_is_left_out(run, tuned, tmp_path):
    told = run("extract", "base", "tuned", "--rank", "2", "--with", "norms,biases", "-o", "a.lora.safetensors")
    assert told.code == 0, told.err
    assert "left out: 1 tensor, embeddings (342 B): --with embeddings takes them" in told.err
    assert f"{EMBED}  BF16  [17, 9] → [19, 9]" in told.err
    assert "a.lora.safetensors: 4 targets, digest " in told.err
    assert "· rank 2 · residual " in told.err
    assert told.err.rstrip().endswith("next: loraformat info a.lora.safetensors")
    assert lf.load(tmp_path / "a.lora.safetensors").provenance == {"verb": "extract", "rank": 2}
    told = run("extract", "base", "tuned", "--energy", "0.9", "-o", "b.lora.safetensors", "--json").json
    assert set(told["residuals"]) == {Q, K}
    assert max(told["residuals"].values()) ** 2 <= 0.1
    assert {left["kind"] for left in told["left_out"]} == {"norms", "biases", "embeddings", "new", "missing"}


@pytest.mark.parametrize(
    "words", [["base", "--rank", "2"], ["base", "tuned", "--name", "x", "--rank", "2"], ["base", "tuned"]]
)
@pytest.mark.usefixtures("tuned")
def test_options_of_one_model_are_not_those_of_two(words, run, tmp_path):
    assert run("extract", *words, "-o", "out.safetensors").code == 2
    assert not (tmp_path / "out.safetensors").exists()
