"""Files of kohya and LyCORIS: what the tools wrote is read as they mean it, and written again as they wrote it."""

import pytest
from kohya_goldens import (
    HERE,
    LAYOUT,
    REFUSED,
    SD_SCRIPTS,
    SUPPORTED,
    check_against,
    check_deltas,
    check_rewrite,
    check_scales,
    file_of,
    loaded,
    truth_of,
)

import loraformat as lf
from loraformat import registry, testing
from loraformat.testing import LayoutLaws
from loraformat_converters.kohya import magnitudes

every = pytest.mark.parametrize("case", SUPPORTED)


def warnings_of(case, **options):
    return registry.read(file_of(case), options=registry.ReadOptions(**options))[0].warnings


class TestKohya(LayoutLaws):
    layout = LAYOUT
    kinds = ("lora", "conv", "dora", "loha")
    files = tuple(file_of(case) for case in SUPPORTED if case not in SD_SCRIPTS)


def test_the_goldens_are_all_here_and_each_is_either_supported_or_refused():
    assert {path.parent.name for path in HERE.glob("*/golden.json")} == {*SUPPORTED, *REFUSED}


@every
def test_a_golden_changes_the_parameters_that_the_tool_changes_by_the_delta_that_it_computed(case):
    check_deltas(case)


@every
def test_a_golden_has_the_scales_that_the_tools_modules_hold(case):
    check_scales(case)


@pytest.mark.parametrize("case", [case for case in SUPPORTED if case != "old"])
def test_a_golden_through_the_native_file_comes_back_with_equal_tensors_and_an_equal_header(case, tmp_path):
    check_rewrite(case, tmp_path)


@pytest.mark.parametrize("case", [*SUPPORTED, *REFUSED])
def test_a_golden_is_claimed_by_this_layout_alone(case):
    testing.check_claimed_alone(LAYOUT, file_of(case))


@pytest.mark.parametrize("case", [case for case in SUPPORTED if case not in ("old", "split_qkv")])
def test_a_golden_is_read_without_a_warning(case):
    assert warnings_of(case) == []


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_sum_of_factors_is_refused_by_name_once(case):
    with pytest.raises(lf.LoraFormatError) as caught:
        lf.load(file_of(case))
    (problem,) = caught.value.problems
    assert problem.rule == "LF-504"
    assert REFUSED[case] in problem.what


# What the files say of where a matrix lies.


def test_a_pair_of_two_axes_says_nothing_of_the_weight_and_is_unplaced():
    assert loaded("locon")["lycoris_blocks_1_to_q.weight"].placement is None


@pytest.mark.parametrize(
    ("case", "module", "shape"),
    [
        ("locon", "conv", (35, 20, 3, 2)),
        ("locon", "conv_1x1", (15, 8, 1, 1)),
        ("locon", "lora_down", (28, 9, 3)),
        ("locon", "volume", (10, 6, 2, 1, 3)),
        ("locon_tucker", "volume", (10, 6, 2, 1, 3)),
        ("loha_tucker", "conv", (35, 20, 3, 2)),
        ("lokr_whole", "conv", (35, 20, 3, 2)),
        ("lokr_tucker", "lora_down", (28, 9, 3)),
        ("full", "to_q", (42, 30)),
        ("full", "conv", (35, 20, 3, 2)),
        ("dora", "to_out_0", (12, 12)),
        ("dora_in", "to_out_0", (12, 12)),
        ("loha_dora_in", "lora_down", (28, 9, 3)),
        ("loha_dora_in", "conv_1x1", (15, 8, 1, 1)),
    ],
)
def test_a_tensor_with_the_axes_of_the_weight_places_it(case, module, shape):
    place = lf.Placement(shape, (0,), tuple(range(1, len(shape))))
    assert loaded(case)[f"lycoris_blocks_1_{module}.weight"].placement == place


def test_the_shape_of_dora_scale_says_over_which_axis_the_norm_runs():
    out, in_ = (loaded(case)["lycoris_blocks_1_to_out_0.weight"]["magnitude"] for case in ("dora", "dora_in"))
    assert (out.magnitude_axes, in_.magnitude_axes) == (None, (1,))
    assert out.eps == in_.eps == magnitudes.EPS


# What the header says to people.


def test_what_people_wrote_into_the_header_is_read():
    adapter = loaded("sd15")
    assert adapter.about["title"] == "Harbour sketches"
    assert adapter.about["license"] == "CC-BY-4.0"
    assert adapter.about["trigger_words"] == ["hrbr"]
    assert adapter.about["tags"] == ["ink", "harbour"]
    assert adapter.about["training"]["network_dim"] == "3"
    assert "training_comment" not in adapter.about["training"]  # sd-scripts wrote None
    assert adapter.base_model == {
        "name": "tiny.safetensors",
        "version": "sd_v1",
        "architecture": "stable-diffusion-v1/lora",
    }


def test_names_stay_as_the_file_spells_them():
    adapter = loaded("encoders")
    assert adapter.names == "kohya"
    assert adapter.components == ()
    assert {key.partition("_text_model")[0] for key in adapter if key.startswith("lora_te")} == {"lora_te1", "lora_te2"}


def test_an_old_file_without_alphas_is_read_as_scale_one_and_says_so():
    (warning,) = warnings_of("old")
    assert (warning.rule, warning.severity) == ("LF-509", "warning")
    assert "67 modules have no alpha" in warning.what
    assert {(u.scale, u.assumed) for u in loaded("old").values()} == {(1.0, ("alpha",))}


# Fused query-key-value pairs.


def test_a_fused_pair_is_read_as_a_reader_computes_it_and_the_lost_strength_is_told():
    (warning,) = warnings_of("split_qkv")
    assert (warning.rule, warning.where) == ("LF-507", "lora_unet_single_blocks_0_linear1.weight")
    assert "fused from 4 pairs in the first: as ss_network_args says, it was" in warning.what
    assert warning.fix == "--split-qkv 4 restores what was trained"


def test_the_trained_strength_is_restored_where_it_is_asked_for():
    assert warnings_of("split_qkv", split_qkv=4) == []
    check_against(loaded("split_qkv", split_qkv=4), truth_of("split_qkv", "trained"), {})


def test_a_restored_pair_is_written_so_that_readers_give_it_its_strength(tmp_path, run):
    assert run("convert", file_of("split_qkv"), "new.safetensors", "--to", "kohya", "--split-qkv", "4").code == 0
    check_against(lf.load(tmp_path / "new.safetensors"), truth_of("split_qkv", "trained"), {})


def test_a_number_of_pairs_that_no_factor_shows_is_refused():
    for case in ("split_qkv", "locon"):
        with pytest.raises(lf.LoraFormatError, match="split_qkv is stated as 3") as caught:
            loaded(case, split_qkv=3)
        assert [p.rule for p in caught.value.problems] == ["LF-507"]
