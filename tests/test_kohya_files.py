"""Files of kohya's layout that no golden has: alphas of every form, damage, mixtures, hostile names, both spellings."""

import itertools

import ml_dtypes
import numpy as np
import pytest
from kohya_goldens import HERE, LAYOUT, file_of
from mutations import damaged
from peft_goldens import adapter_of as peft_adapter

import loraformat as lf
from loraformat import registry, testing
from loraformat.errors import LoraFormatError
from loraformat.serializer import write
from loraformat.source import open_source
from loraformat_converters.kohya import split

GOLDEN = HERE.parent
DRAW = np.random.default_rng(7)


def normal(*shape, dtype=np.float32):
    return DRAW.standard_normal(shape).astype(dtype)


def pair(module="lora_unet_a", r=3, alpha=6.0, out=11, in_=7):
    tensors = {f"{module}.lora_down.weight": normal(r, in_), f"{module}.lora_up.weight": normal(out, r)}
    return tensors if alpha is None else {**tensors, f"{module}.alpha": np.array(alpha, np.float32)}


def saved(folder, tensors, header=None, name="a.safetensors"):
    with open(folder / name, "wb") as file:
        write(file, tensors, header or {})
    return folder / name


@pytest.fixture
def reading(tmp_path):
    """Tensors → (the adapter, warnings), through a file that only this layout claims."""

    def read(tensors, header=None, **options):
        path = saved(tmp_path, tensors, header)
        found, layout, _ = registry.read(path, options=registry.ReadOptions(**options))
        assert layout is LAYOUT
        return found.adapter, found.warnings

    return read


@pytest.fixture
def refusal(reading):
    """Tensors → the problems that refuse them."""

    def refuse(tensors, header=None, **options):
        with pytest.raises(LoraFormatError) as caught:
            reading(tensors, header, **options)
        return caught.value.problems

    return refuse


def rules(problems):
    return {problem.rule for problem in problems}


KEY = "lora_unet_a.weight"

# alpha.


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize(
    "dtype", ["float64", "float32", "float16", ml_dtypes.bfloat16, "int64", "int32", "uint8", "uint64"]
)
def test_an_alpha_of_any_dtype_and_shape_is_its_number_and_is_given_back_as_it_was(dtype, shape, tmp_path, reading):
    tensors = pair(alpha=None) | {"lora_unet_a.alpha": np.full(shape, 7, dtype)}
    adapter, _ = reading(tensors)
    assert adapter[KEY].scale == 7 / 3
    testing.check_rewrite(LAYOUT, tmp_path / "a.safetensors", tmp_path)


def test_an_alpha_that_16_bits_rounded_is_the_rounded_number(reading):
    tensors = pair(alpha=None) | {"lora_unet_a.alpha": np.array(7.3, ml_dtypes.bfloat16)}
    assert reading(tensors)[0][KEY].scale == 7.3125 / 3


@pytest.mark.parametrize(
    ("alpha", "rule"),
    [
        (np.array(np.nan, np.float32), "LF-306"),
        (np.array(np.inf, np.float16), "LF-306"),
        (np.array(1e300), "LF-306"),
        (np.array([1.0, 2.0], np.float32), "LF-309"),
        (np.zeros(0, np.float32), "LF-309"),
        (np.array(True), "LF-314"),
        (np.array(0.0, np.float32), "LF-507"),
    ],
)
def test_an_alpha_that_is_no_number_or_that_readers_disagree_about_is_refused(alpha, rule, refusal):
    (problem,) = refusal(pair(alpha=None) | {"lora_unet_a.alpha": alpha})
    assert (problem.rule, problem.where) == (rule, "lora_unet_a")


def test_an_alpha_of_zero_is_what_the_user_says(reading):
    assert reading(pair(alpha=0.0), alpha=0.0)[0][KEY].scale == 0.0
    assert reading(pair(alpha=0.0), alpha=3.0)[0][KEY].scale == 1.0


def test_what_the_user_states_counts_where_the_file_is_silent(reading):
    assert reading(pair(alpha=None), alpha=6.0)[0][KEY].scale == 2.0
    adapter, warnings = reading(pair(alpha=None), alpha=6.0, scale_rule="alpha/sqrt(r)")
    assert adapter[KEY].scale == 6 / np.sqrt(3)
    assert adapter[KEY].assumed == ()
    assert warnings == []


@pytest.mark.parametrize("options", [{"alpha": 5.0}, {"rank": 4}, {"scale_rule": "alpha/sqrt(r)"}])
def test_what_the_user_states_against_the_file_is_refused(options, refusal):
    assert rules(refusal(pair(), **options)) == {"LF-507"}


def test_what_the_header_says_of_alpha_is_a_hint_that_nobody_reads(reading):
    header = {"ss_network_dim": "64", "ss_network_alpha": "32"}
    assert reading(pair(alpha=1.5), header)[0][KEY].scale == 0.5


# Which tensors make a module.

HADA = {f"lora_unet_a.hada_w{n}": t for n, t in zip(("1_a", "1_b", "2_a", "2_b"), (normal(11, 3), normal(3, 7)) * 2, strict=True)}  # fmt: skip
LOKR = {"lora_unet_a.lokr_w1": normal(2, 3), "lora_unet_a.lokr_w2_a": normal(5, 2), "lora_unet_a.lokr_w2_b": normal(2, 4)}  # fmt: skip
ALPHA = {"lora_unet_a.alpha": np.array(3.0, np.float32)}


@pytest.mark.parametrize(
    ("tensors", "rule", "words"),
    [
        ({n: t for n, t in pair().items() if "up" not in n}, "LF-303", "lora_up.weight is missing"),
        (ALPHA | pair("lora_unet_b"), "LF-303", "alpha without any factor"),
        ({n: t for n, t in HADA.items() if "w2_a" not in n} | ALPHA, "LF-303", "hada_w2_a is missing"),
        ({n: t for n, t in LOKR.items() if "w1" not in n} | ALPHA, "LF-309", "either lokr_w1"),
        (pair() | HADA, "LF-506", "tensors of LoCon and LoHa for one weight"),
        (pair() | {"lora_unet_a.diff": normal(11, 7)}, "LF-506", "a reader takes one of them"),
        (
            {"lora_unet_a.diff": normal(11, 7), "lora_unet_a.dora_scale": normal(11, 1)},
            "LF-506",
            "dora_scale: no reader",
        ),
        ({"lora_unet_a.diff_b": normal(11), "lora_unet_a.b_norm": normal(11)}, "LF-506", "which is the bias's"),
        (pair() | {"lora_unet_a.lora_A.weight": normal(3, 7)}, "LF-506", "a second lora_down.weight"),
        (pair() | {"lora_unet_a.lora_sideways.weight": normal(3)}, "LF-506", "ends with no role"),
        (pair() | {"optimizer": normal(3)}, "LF-506", "ends with no role"),
        (pair() | {"lora_unet_a.scalar": normal(1)}, "LF-504", "a scalar of LyCORIS"),
        (pair() | {"lora_unet_a.reshape_weight": np.array([12, 7])}, "LF-504", "pads the base weight"),
        (pair() | {"lora_unet_b.set_weight": normal(3, 4)}, "LF-504", "in the place of the base's"),
        ({"lora_unet_a.lora_down.0.weight": normal(3, 7)}, "LF-504", "several pairs of a live module"),
        (pair() | {"bundle_emb.hrbr.string_to_param.*": normal(2, 7)}, "LF-504", "textual inversion"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value,
)
def test_tensors_that_are_no_whole_change_are_refused_by_name(tensors, rule, words, refusal):
    problems = refusal(tensors)
    assert [problem.rule for problem in problems] == [rule]
    assert words in problems[0].what


@pytest.mark.parametrize(
    ("down", "up", "mid"),
    [
        ((3, 7), (11, 4), None),
        ((3, 7), (11, 3, 1, 1), None),
        ((3, 7, 3, 3), (11, 3), None),
        ((3, 7, 3, 3), (11, 3, 3, 3), None),
        ((3, 7, 3, 3), (11, 3, 1, 1), (3, 3, 3, 3)),
        ((3, 7, 1, 1), (11, 3, 1, 1), (2, 3, 3, 3)),
        ((3,), (11,), None),
    ],
)
def test_factors_that_do_not_fit_each_other_are_refused(down, up, mid, refusal):
    tensors = {"lora_unet_a.lora_down.weight": normal(*down), "lora_unet_a.lora_up.weight": normal(*up)}
    core = {} if mid is None else {"lora_unet_a.lora_mid.weight": normal(*mid)}
    assert rules(refusal(tensors | core | ALPHA)) == {"LF-309"}


@pytest.mark.parametrize("role", ["diff_b", "w_norm", "b_norm"])
def test_a_bias_or_a_norm_that_is_no_vector_is_refused(role, refusal):
    assert rules(refusal({f"lora_unet_a.{role}": normal(3, 4)})) == {"LF-309"}


def test_factors_of_integers_or_without_values_are_refused(refusal):
    whole = pair() | {"lora_unet_a.lora_up.weight": np.ones((11, 3), np.int32)}
    assert rules(refusal(whole)) == {"LF-314"}
    empty = pair() | {"lora_unet_a.lora_up.weight": np.ones((0, 3), np.float32)}
    assert rules(refusal(empty)) == {"LF-311"}


def test_all_faults_of_a_file_are_told_at_once(refusal):
    tensors = {
        **pair("lora_unet_a", alpha=np.nan),
        **{n: t for n, t in pair("lora_unet_b").items() if "up" not in n},
        "lora_unet_c.on_input": np.array(1),
        "what": normal(2),
    }
    assert sorted(problem.rule for problem in refusal(tensors)) == ["LF-303", "LF-306", "LF-504", "LF-506"]


def test_an_alpha_that_no_reader_looks_at_is_told(reading):
    adapter, (warning,) = reading({"lora_unet_a.diff": normal(11, 7)} | ALPHA)
    assert adapter[KEY].scale == 1.0
    assert (warning.rule, warning.where) == ("LF-506", "lora_unet_a")


@pytest.mark.parametrize(
    "other",
    [{"lora_unet_a.diff": normal(11, 7)}, {"lora_unet_a.lokr_w1": normal(2, 3), "lora_unet_a.lokr_w2": normal(5, 4)}],
)
def test_an_alpha_that_no_reader_looks_at_is_still_a_number(other, refusal):
    assert rules(refusal(other | {"lora_unet_a.alpha": normal(3, 4)})) == {"LF-309"}


def test_whole_factors_that_rslora_trained_at_another_scale_than_readers_take_are_told(reading):
    whole = {"lora_unet_a.lokr_w1": normal(2, 3), "lora_unet_a.lokr_w2": normal(5, 4)} | ALPHA
    assert reading(whole)[1] == []
    adapter, (warning,) = reading(whole, {"ss_network_args": '{"rs_lora": "True"}'})
    assert adapter[KEY].scale == 1.0
    assert "every reader takes 1" in warning.what


def test_the_products_of_a_lokr_with_two_ranks_are_refused(refusal):
    one = {"lora_unet_a.lokr_w1_a": normal(6, 3), "lora_unet_a.lokr_w1_b": normal(3, 4)}
    two = {"lora_unet_a.lokr_w2_a": normal(5, 2), "lora_unet_a.lokr_w2_b": normal(2, 8)}
    (problem,) = refusal(one | two | ALPHA)
    assert problem.rule == "LF-507"
    assert "ranks 2 and 3" in problem.what


# DoRA.


@pytest.mark.parametrize("shape", [(11,), (11, 7), (1, 8), (10, 1), (11, 1, 1), (1, 1), ()])
def test_a_dora_scale_of_another_shape_is_refused(shape, refusal):
    problems = refusal(pair() | {"lora_unet_a.dora_scale": np.ones(shape, np.float32)})
    assert rules(problems) <= {"LF-309", "LF-311", "LF-403"}


def test_a_norm_over_the_outputs_needs_the_kernel_that_a_flattened_factor_hides(refusal):
    flat = {f"lora_unet_a.hada_w{n}_{e}": normal(*s) for n in (1, 2) for e, s in (("a", (11, 3)), ("b", (3, 5 * 6)))}
    (problem,) = refusal(flat | ALPHA | {"lora_unet_a.dora_scale": normal(1, 5, 1, 1)})
    assert problem.rule == "LF-504"
    assert "no tensor has the sizes of the kernel" in problem.what


@pytest.mark.parametrize(("out", "in_", "axes"), [(1, 7, None), (11, 1, None), (1, 1, None)])
def test_a_dora_scale_of_a_weight_with_one_row_or_column_is_still_told(out, in_, axes, reading):
    tensors = pair(out=out, in_=in_) | {"lora_unet_a.dora_scale": np.ones((out, 1), np.float32)}
    assert reading(tensors)[0][KEY]["magnitude"].magnitude_axes == axes


# Names.

NAMES = [
    "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0",
    "lora_te1_text_model_encoder_layers_11_mlp_fc1",
    "lora_te3_encoder_block_0_layer_0_SelfAttention_q",
    "lora_transformer_blocks_0_attn_to_q",
    "lora_prior_unet_down_blocks_0_0_attention_attn_in_proj",
    "lora_prior_te_text_projection",
    "lycoris_lora_down",
    "lora_unet_weight",
    "lora_unet_alpha",
    "lycoris_layer.alpha",
    "lora_unet_層_重み",
    "diffusion_model.double_blocks.0.img_attn.qkv",
    "diffusion_model.lora_up.weight.lora_down",
    "transformer_blocks.0.attn",
    "x",
    "_",
]


@pytest.mark.parametrize("module", NAMES)
def test_a_hostile_name_survives_and_is_claimed_by_this_layout_alone(module, tmp_path):
    path = saved(tmp_path, pair(module))
    testing.check_claimed_alone(LAYOUT, path)
    assert list(lf.load(path)) == [f"{module}.weight"]
    testing.check_rewrite(LAYOUT, path, tmp_path)


def test_pefts_words_after_a_mangled_name_are_read_as_comfyui_reads_them(tmp_path):
    a, b = normal(3, 7), normal(11, 3)
    path = saved(tmp_path, {"lora_unet_a.lora_A.weight": a, "lora_unet_a.lora_B.weight": b} | ALPHA)
    testing.check_claimed_alone(LAYOUT, path)
    np.testing.assert_allclose(lf.load(path)[KEY].matrix(), b @ a, rtol=1e-6)


# Which layout.


OTHERS = sorted(
    folder.name for folder in GOLDEN.iterdir() if folder.is_dir() and folder.name not in ("kohya", "comfyui")
)


@pytest.mark.parametrize("layout", OTHERS)
def test_no_golden_of_another_layout_is_claimed_nor_a_file_of_it_without_its_folder(layout):
    for file in GOLDEN.joinpath(layout).rglob("*"):
        if file.suffix in (".safetensors", ".bin", ".pt") and file.stat().st_size:
            assert LAYOUT.detect(open_source(file)) is None, file
            assert LAYOUT.detect(open_source(file.parent)) is None if file.stem == "adapter_model" else True, file


@pytest.mark.parametrize("kind", testing.KINDS)
def test_no_native_file_is_claimed(kind, tmp_path):
    lf.save(testing.random_adapter(2, (kind,)), tmp_path / "a.lora.safetensors")
    assert LAYOUT.detect(open_source(tmp_path / "a.lora.safetensors")) is None


@pytest.mark.parametrize(
    "names",
    [
        ("unet.down.attn.to_q.lora.down.weight", "unet.down.attn.to_q.lora.up.weight"),
        ("unet.attn1.processor.to_q_lora.down.weight", "unet.attn1.processor.to_q_lora.up.weight"),
        ("text_encoder.q_proj.lora_linear_layer.down.weight", "text_encoder.q_proj.lora_linear_layer.up.weight"),
        ("layers.0.attn.q_proj.lora_a.weight", "layers.0.attn.q_proj.lora_b.weight"),
        ("layers.0.attn.lora_A", "layers.0.attn.lora_B"),
        ("model.layers.0.q_proj.lora_a", "model.layers.0.q_proj.lora_b"),
        ("model.lora_unet.weight", "model.alpha"),
        ("lora_proj.lora_A.weight", "lora_proj.lora_B.weight"),
        ("lora_unet.x.lora_A.weight", "lora_unet.x.lora_B.weight"),
    ],
)
def test_no_file_of_another_layout_is_claimed(names, tmp_path):
    path = saved(tmp_path, dict(zip(names, (normal(3, 7), normal(11, 3)), strict=True)))
    assert LAYOUT.detect(open_source(path)) is None


def test_a_file_that_mixes_two_layouts_is_refused_with_the_evidence_for_both(tmp_path):
    peft = open_source(peft_adapter("linear")).tensors
    with pytest.raises(LoraFormatError) as caught:
        lf.load(saved(tmp_path, pair() | dict(peft)))
    (problem,) = caught.value.problems
    assert problem.rule == "LF-502"
    assert "kohya (a tensor is called lora_unet_a" in problem.what
    assert "peft (" in problem.what


@pytest.mark.parametrize("case", ["mixed", "loha_dora", "lokr_tucker"])
def test_a_damaged_file_is_read_or_refused_by_a_rule(case, tmp_path):
    whole = file_of(case).read_bytes()
    draw = np.random.default_rng(11)
    for _ in range(150):
        (tmp_path / "d.safetensors").write_bytes(damaged(whole, draw))
        try:
            lf.load(tmp_path / "d.safetensors", layout="kohya")
        except LoraFormatError as error:
            assert error.problems


# Fused pairs.


def block_diagonal(sizes, r):
    b = np.zeros((sum(sizes), r * len(sizes)), np.float32)
    for n, (start, size) in enumerate(zip(itertools.accumulate(sizes, initial=0), sizes, strict=False)):
        b[start : start + size, n * r : (n + 1) * r] = normal(size, r)
    return b


@pytest.mark.parametrize(
    ("sizes", "r", "blocks"), [((5, 5, 5), 2, 3), ((5, 5, 5, 13), 2, 4), ((4, 3), 1, 2), ((9,), 4, 1)]
)
def test_the_blocks_of_a_factor_are_counted(sizes, r, blocks):
    assert split.blocks(block_diagonal(sizes, r)) == blocks


def test_what_is_no_run_of_diagonal_blocks_is_one():
    b = block_diagonal((4, 4, 4), 2)
    turned, mixed = b[::-1].copy(), b.copy()
    mixed[11, 0] = 1e-9
    for dense in (turned, mixed, np.zeros((6, 4), np.float32), normal(6, 1)):
        assert split.blocks(dense) == 1


def fused(alpha):
    down, up = normal(6, 7), block_diagonal((5, 5, 5), 2)
    return {"lora_unet_a.lora_down.weight": down, "lora_unet_a.lora_up.weight": up, "lora_unet_a.alpha": np.float32(alpha).reshape(())}  # fmt: skip


def test_blocks_without_any_word_of_the_header_are_told_unless_alpha_shows_a_converters_hand(reading):
    assert [w.rule for w in reading(fused(2.0))[1]] == ["LF-507"]
    assert reading(fused(6.0))[1] == []
    assert [w.rule for w in reading(fused(6.0), {"ss_network_args": '{"split_qkv": "True"}'})[1]] == ["LF-507"]
    assert reading(fused(6.0), {"ss_network_args": '{"split_qkv": "False"}'})[1] == []
    assert reading(fused(6.0), {"ss_network_args": "[" * 10**5})[1] == []


def test_restoring_says_which_pairs_have_another_number_of_blocks(reading):
    other = {n.replace("_a.", "_b."): t for n, t in fused(2.0).items()} | {
        "lora_unet_b.lora_up.weight": block_diagonal((5, 5, 5, 3, 3, 3), 1)
    }
    adapter, warnings = reading(fused(2.0) | other, split_qkv=3)
    assert {key: update.scale for key, update in adapter.items()} == {KEY: 1.0, "lora_unet_b.weight": 2.0}
    assert [w.where for w in warnings] == ["lora_unet_b.weight"]
