"""What is written for kohya: exact scales, honest headers, refusals that name the way out."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from kohya_goldens import LAYOUT, file_of, loaded
from safetensors.numpy import load_file

import loraformat as lf
from loraformat import testing
from loraformat.axes import Placement
from loraformat.errors import LoraFormatError
from loraformat.layout import WriteOptions
from loraformat.parts import Delta, Loha, Lokr, Lora, Magnitude
from loraformat.scale import alpha_for
from loraformat.source import open_source
from loraformat.testing import strategies
from loraformat.updates import Update
from loraformat.verbs.adapt import adapt
from loraformat.verbs.convert import save
from loraformat_converters.kohya import magnitudes

DRAW = np.random.default_rng(9)


def normal(*shape, dtype=np.float32):
    return DRAW.standard_normal(shape).astype(dtype)


def pair(alpha=6.0, rule="alpha/r", r=3, out=11, in_=7):
    return Lora(normal(r, in_), normal(out, r), alpha, rule)


def kohya(update, key="lora_unet_a.weight"):
    return lf.Adapter({key: update}, "kohya")


def written(adapter, folder):
    save(adapter, folder / "a.safetensors", LAYOUT, force=True)
    return load_file(folder / "a.safetensors")


# The scale.


@given(scale=strategies.alphas(), rule=strategies.scale_rules())
def test_an_alpha_gives_the_scale_back_to_the_last_bit_or_the_one_beside_it(scale, rule):
    for r in (1, 3, 5, 16, 48, 100):
        wanted = pair(scale, rule, r=r).scale
        alpha = alpha_for(wanted, r)
        assert abs(alpha / r - wanted) <= np.spacing(abs(wanted))


def test_rslora_is_folded_into_alpha_without_touching_a_factor(tmp_path):
    part = pair(6.0, "alpha/sqrt(r)", r=4)
    tensors = written(kohya(Update((part,))), tmp_path)
    assert tensors["lora_unet_a.alpha"] == 12.0
    assert tensors["lora_unet_a.lora_up.weight"].tobytes() == part.lora_B.tobytes()


def test_an_alpha_is_float32_where_that_holds_it_and_float64_where_not(tmp_path):
    for alpha, dtype in ((4.5, np.float32), (0.1, np.float64)):
        assert written(kohya(Update((pair(alpha),))), tmp_path)["lora_unet_a.alpha"].dtype == dtype
        assert lf.load(tmp_path / "a.safetensors")["lora_unet_a.weight"].scale == alpha / 3


def test_an_alpha_that_its_sources_dtype_does_not_hold_gets_another(tmp_path):
    adapter = loaded("sd15")
    key = min(adapter)
    part = replace(adapter[key]["lora"], alpha=7.3)
    changed = replace(adapter, targets={**adapter, key: replace(adapter[key], parts=(part,))})
    save(changed, tmp_path / "b.safetensors", LAYOUT)
    assert lf.load(tmp_path / "b.safetensors")[key]["lora"].alpha == 7.3


@given(module=strategies.keys())
def test_any_legal_name_is_read_back_or_refused(module, tmp_path_factory):
    adapter, folder = kohya(Update((pair(),)), f"{module}.weight"), tmp_path_factory.mktemp("named")
    assert testing.check_exact_or_refused(LAYOUT, adapter, folder) or module.startswith(".") or not module


# The header.


def test_a_header_that_is_no_longer_true_is_said_anew(tmp_path):
    adapter = adapt(loaded("sd15"), pad_rank=True, to_lora=5).adapter
    padded = {k: replace(u, parts=(_padded(u["lora"]),)) for k, u in adapter.items()}
    save(replace(adapter, targets=padded), tmp_path / "b.safetensors", LAYOUT)
    before, after = (dict(open_source(path).header) for path in (file_of("sd15"), tmp_path / "b.safetensors"))
    assert after["ss_network_dim"] == "6"
    assert after["ss_network_alpha"] == "Dynamic"
    assert after["sshs_model_hash"] != before["sshs_model_hash"]
    assert "sshs_legacy_hash" not in after
    gone = {"ss_network_dim", "ss_network_alpha", "sshs_model_hash", "sshs_legacy_hash"}
    assert {k: v for k, v in before.items() if k not in gone} == {k: v for k, v in after.items() if k not in gone}


def _padded(part):
    more = 6 - part.r
    return replace(
        part, lora_A=np.pad(part.lora_A, ((0, more), (0, 0))), lora_B=np.pad(part.lora_B, ((0, 0), (0, more)))
    )


def test_the_hash_is_that_of_sd_scripts_which_a_rewrite_therefore_keeps(tmp_path):
    lf.convert(file_of("sd15"), tmp_path / "b.safetensors", to_layout="kohya")
    assert open_source(tmp_path / "b.safetensors").header["sshs_legacy_hash"] == "e3b0c442"


def test_what_people_wrote_of_an_adapter_from_elsewhere_becomes_modelspec(tmp_path):
    about = {"title": "T", "license": "MIT", "trigger_words": ["hrbr", "boat"], "training": {"x": 1}, "tags": [1]}
    save(replace(kohya(Update((pair(),))), about=about), tmp_path / "a.safetensors", LAYOUT)
    wanted = {"modelspec.title": "T", "modelspec.license": "MIT", "modelspec.trigger_phrase": "hrbr, boat"}
    assert dict(open_source(tmp_path / "a.safetensors").header) == wanted


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"metadata":{"a":1},"alpha":FORM}', '{"metadata":[],"alpha":FORM}', '{"metadata":{},"alpha":[]}',
     '{"metadata":{},"alpha":{"dtype":"F32","shape":[2]}}', '{"metadata":{},"alpha":{"dtype":"X","shape":[]}}',
     '{"metadata":{},"alpha":{"dtype":"F32","shape":1}}', '{"metadata":{},"alpha":{"dtype":"F32","shape":[1.0]}}',
     '{"metadata":{},"alpha":{"dtype":"F32","shape":[],"value":1e400}}', '{"metadata":{},"alpha":FORM,"axes":{"a":1e400}}',
     '{"metadata":{},"alpha":FORM,"axes":{"a":9}}', '{"metadata":{},"alpha":FORM,"alphas":{"a":null}}'],
)  # fmt: skip
def test_damaged_notes_of_a_source_are_refused(text, tmp_path):
    notes = {"kohya": text.replace("FORM", '{"dtype":"F32","shape":[]}')}
    with pytest.raises(LoraFormatError) as caught:
        save(replace(kohya(Update((pair(),))), extensions=notes), tmp_path / "a.safetensors", LAYOUT)
    assert [problem.rule for problem in caught.value.problems] == ["LF-508"]


def test_what_was_kept_of_a_header_makes_no_native_file(tmp_path):
    notes = '{"alpha":{"dtype":"F32","shape":[]},"metadata":{"loraformat":"{}","ss_v2":"False"}}'
    save(replace(kohya(Update((pair(),))), extensions={"kohya": notes}), tmp_path / "a.safetensors", LAYOUT)
    assert dict(open_source(tmp_path / "a.safetensors").header) == {"ss_v2": "False"}


# What has no place.

CONV = Placement((11, 7, 3, 3), (0,), (1, 2, 3))
LINE = Placement((11, 7), (0,), (1,))
LOKR_B = {"lokr_w2_a": normal(5, 2), "lokr_w2_b": normal(2, 4)}
REFUSALS = {
    "another leaf": (Update((pair(),)), "lora_unet_a.kernel", "no 'kernel'"),
    "no module": (Update((pair(),)), "weight", "a weight and a bias"),
    "an empty module": (Update((pair(),)), ".weight", "a weight and a bias"),
    "factors of a bias": (Update((pair(),)), "lora_unet_a.bias", "a bias changes by a whole difference"),
    "an embedding": (Update((pair(),), LINE, op="embedding"), None, "no reader applies a pair to an embedding"),
    "a Conv1D": (Update((pair(),), Placement((7, 11), (1,), (0,))), None, "the weight is in,out [7, 11]"),
    "a batch": (Update((Lora(normal(2, 3, 7), normal(2, 11, 3), 1.0, "factor"),)), None, "factors with a batch axis"),
    "two methods": (Update((pair(), Delta(normal(11, 7))), LINE), None, "a reader applies one method"),
    "scale 0": (Update((pair(0.0),)), None, "take an alpha of 0 for the rank"),
    "a scale too large": (Update((pair(3e38, "factor"),)), None, "needs an alpha beyond float32"),
    "a scaled difference": (Update((Delta(normal(11, 7), 0.5),), LINE), None, "scale 0.5"),
    "a scaled whole LoKr": (Update((Lokr(0.5, "factor", normal(2, 3), lokr_w2=normal(5, 4)),)), None, "readers take 1"),
    "two ranks of LoHa": (
        Update((Loha(normal(11, 3), normal(3, 7), normal(11, 2), normal(2, 7), 1.0, "factor"),)), None, "different ranks",
    ),
    "two ranks of LoKr": (
        Update((Lokr(1.0, "factor", lokr_w1_a=normal(4, 3), lokr_w1_b=normal(3, 2), **LOKR_B),)), None, "different ranks",
    ),
    "two ranks of a core": (
        Update((Lora(normal(2, 7), normal(11, 3), 1.0, "factor", normal(3, 2, 3, 3)),), CONV), None, "two ranks",
    ),
    "a core of unknown axes": (Update((Loha(*(normal(3, n) for n in (11, 7, 11, 7)), 1.0, "factor", normal(3, 3, 4, 1), normal(3, 3, 4, 1)),)), None, "whether the kernel has the last axis"),
    "a core of another kernel": (Update((Lora(normal(3, 7), normal(11, 3), 1.0, "factor", normal(3, 3, 9, 1)),), CONV), None, "the kernel of the weight [3, 3]"),
    "another norm": (Update((Lora(normal(3, 63), normal(11, 3), 1.0, "factor"), Magnitude(abs(normal(3)), (2,))), CONV), None, "the first or the second"),
    "another eps": (Update((pair(), Magnitude(abs(normal(11)), None, 1e-5)), LINE), None, "eps 1e-05"),
    "a magnitude of a whole": (Update((Delta(normal(11, 7)), Magnitude(abs(normal(11)))), LINE), None, "beside a whole difference"),
    "a flattened kernel": (
        Update((Loha(normal(11, 3), normal(3, 63), normal(11, 3), normal(3, 63), 1.0, "factor"), Magnitude(abs(normal(11))))), None, "a kernel may be flattened",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_what_has_no_place_is_refused_by_name(case, tmp_path):
    update, key, words = REFUSALS[case]
    with pytest.raises(LoraFormatError) as caught:
        save(kohya(update, key or "lora_unet_a.weight"), tmp_path / "a.safetensors", LAYOUT)
    (problem,) = caught.value.problems
    assert problem.rule == "LF-508"
    assert words in problem.what
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("case", ["scale 0", "a scaled difference", "a scaled whole LoKr"])
def test_the_way_out_that_a_refusal_names_leads_out(case, tmp_path):
    adapter = kohya(REFUSALS[case][0])
    folded = adapt(adapter, fold_scale=True).adapter
    again = testing.check_round_trip(LAYOUT, folded, tmp_path)
    for key, update in adapter.items():
        assert testing.relative_error(again[key].matrix(), update.matrix()) <= 1e-6


@pytest.mark.parametrize("names", ["torch", "gguf", "org.example.names"])
def test_names_of_another_space_are_refused_with_the_command_that_renames(names, tmp_path):
    with pytest.raises(LoraFormatError) as caught:
        LAYOUT.write(replace(kohya(Update((pair(),))), names=names), WriteOptions())
    assert "retarget" in caught.value.problems[0].fix


def test_what_some_readers_read_otherwise_is_said(tmp_path):
    def said(update, key="lora_unet_a.weight"):
        return [w.what for w in save(kohya(update, key), tmp_path / "a.safetensors", LAYOUT, force=True)]

    assert said(Update((pair(),))) == []
    dora = said(Update((pair(), Magnitude(abs(normal(11)), None, magnitudes.EPS)), LINE))
    assert ["ComfyUI normalises DoRA otherwise" in what for what in dora] == [True]
    assert len(said(Update((pair(), Magnitude(abs(normal(11)))), LINE))) == 2
    core = Lora(normal(3, 7), normal(11, 3), 1.0, "factor", normal(3, 3, 3, 3))
    assert ["lora_mid" in what for what in said(Update((core,), CONV))] == [True]
    core = Lora(normal(3, 7), normal(11, 3), 1.0, "factor", normal(3, 3, 5))
    line = Placement((11, 7, 5), (0,), (1, 2))
    assert ["one-dimensional kernel" in what for what in said(Update((core,), line))] == [False, True]
    assert ["reads pairs alone" in what for what in said(Update((Delta(normal(11, 7)),), LINE))] == [True]


def test_an_alpha_that_diffusers_would_lose_is_told(tmp_path):
    names = [f"lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_{leaf}.weight" for leaf in "qkv"]
    targets = {name: Update((pair(alpha),)) for name, alpha in zip(names, (1.0, 1.0, 2.0), strict=True)}
    (warning,) = save(lf.Adapter(targets, "kohya"), tmp_path / "a.safetensors", LAYOUT)
    assert warning.where == names[2]
    same = {name: Update((pair(1.0),)) for name in names}
    assert save(lf.Adapter(same, "kohya"), tmp_path / "a.safetensors", LAYOUT, force=True) == []


def test_a_core_gets_the_axes_of_the_kernel_that_it_is_placed_in(tmp_path):
    line, core = Placement((11, 7, 4), (0,), (1, 2)), normal(3, 3, 4, 1)  # as PEFT stores that of a Conv1d
    loha = Loha(*(normal(3, n) for n in (11, 7, 11, 7)), 1.0, "factor", core, core)
    lokr = Lokr(1.0, "factor", normal(11, 7), lokr_w2=normal(1, 1, 4, 1))
    pair = Lora(normal(3, 7), normal(11, 3), 1.0, "factor", core)
    for part, name, shape in (
        (loha, "hada_t1", (3, 3, 4)),
        (lokr, "lokr_w2", (1, 1, 4)),
        (pair, "lora_mid.weight", (3, 3, 4)),
    ):
        assert written(kohya(Update((part,), line)), tmp_path)[f"lora_unet_a.{name}"].shape == shape
        again = lf.load(tmp_path / "a.safetensors")["lora_unet_a.weight"]
        assert again.placement == line
        assert testing.relative_error(again.matrix(), part_matrix(part)) <= 1e-6


def test_a_pair_around_a_core_is_a_convolutions_though_nothing_else_says_so(tmp_path):
    part = Lora(normal(3, 7), normal(11, 3), 1.0, "factor", normal(3, 3, 2, 4))
    shapes = {name.split(".")[1]: tensor.shape for name, tensor in written(kohya(Update((part,))), tmp_path).items()}
    assert shapes == {"lora_down": (3, 7, 1, 1), "lora_up": (11, 3, 1, 1), "lora_mid": (3, 3, 2, 4), "alpha": ()}


def part_matrix(part):
    return Update((part,)).matrix()


def test_a_norm_keeps_its_two_tensors_and_a_bias_alone_its_own(tmp_path):
    weight, bias = (Update((Delta(normal(9)),), Placement((9,), (0,), ())) for _ in range(2))
    names = set(written(lf.Adapter({"lora_unet_n.weight": weight, "lora_unet_n.bias": bias}, "kohya"), tmp_path))
    assert names == {"lora_unet_n.w_norm", "lora_unet_n.b_norm"}
    assert set(written(kohya(bias, "lora_unet_n.bias"), tmp_path)) == {"lora_unet_n.diff_b"}
