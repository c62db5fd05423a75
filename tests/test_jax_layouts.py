"""gemma, jax-lorax and MaxText: what they wrote changes their weights as they computed, and is written again alike."""

import json
import shutil

import numpy as np
import pytest
from jax_goldens import (
    GEMMA,
    GEMMA_CASES,
    GOLDEN,
    LORAX,
    MAXTEXT,
    SCANNED,
    base_of,
    check_gemma,
    check_lorax,
    check_merged,
    expected,
    scanned,
)

import loraformat as lf
from loraformat import Adapter, Lora, LoraFormatError, Update, registry
from loraformat.axes import Placement
from loraformat.layout import ReadOptions
from loraformat.testing import check_claimed_alone, relative_error
from loraformat.verbs.convert import save
from loraformat_converters.flax.msgpack import read as leaves

FILES = [("gemma", GEMMA / case / "lora.msgpack") for case in GEMMA_CASES] + [("lorax", LORAX / "state.npz")]


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def written(adapter, layout, path):
    save(adapter, path, registry.layout(layout))
    return path


def refused(rule, path, layout, **options):
    with pytest.raises(LoraFormatError) as caught:
        registry.read(path, layout, ReadOptions(**options))
    assert {p.rule for p in caught.value.problems} == {rule}, caught.value
    return str(caught.value)


# gemma


@pytest.mark.parametrize("case", GEMMA_CASES)
def test_what_gemma_wrote_changes_its_weights_as_it_computed(case, tmp_path):
    check_gemma(case, tmp_path)


@pytest.mark.parametrize("case", ["gqa", "mha"])
def test_gemmas_own_modules_need_no_base_but_for_the_einsum_that_lies_in_two_ways(case, tmp_path):
    check_gemma(case, tmp_path, based=False)
    adapter = lf.load(GEMMA / case / "lora.msgpack")
    assert [key for key, update in adapter.items() if update.placement is None] == ["layer_0/mlp/gating_einsum"]
    assert {update.scale for update in adapter.values()} == {1.0}


@pytest.mark.parametrize("case", GEMMA_CASES)
def test_the_same_leaves_are_written_again(case, tmp_path):
    options = ReadOptions(base=base_of(GEMMA / case, tmp_path))
    adapter = registry.read(GEMMA / case / "lora.msgpack", "gemma", options)[0].adapter
    again = leaves(written(adapter, "gemma", tmp_path / "again.msgpack"))
    before = leaves(GEMMA / case / "lora.msgpack")
    assert {k: (v.shape, v.tobytes()) for k, v in again.items()} == {
        k: (v.shape, v.tobytes()) for k, v in before.items()
    }


@pytest.mark.peer
def test_gemmas_orbax_folder_is_the_same(tmp_path):
    folder = GEMMA / "gqa" / "orbax"
    check_claimed_alone(registry.layout("gemma"), folder)
    assert lf.digest(lf.load(folder)) == lf.digest(lf.load(GEMMA / "gqa" / "lora.msgpack"))


def test_a_collection_around_the_tree_is_no_part_of_the_names(tmp_path):
    found = {f"params/{path}": value for path, value in leaves(GEMMA / "gqa" / "lora.msgpack").items()}
    np.savez(tmp_path / "a.npz", **found)
    adapter = lf.load(tmp_path / "a.npz")
    assert lf.digest(adapter) == lf.digest(lf.load(GEMMA / "gqa" / "lora.msgpack"))
    placed = Adapter({k: u for k, u in adapter.items() if u.placement}, names="flax", extensions=adapter.extensions)
    with np.load(written(placed, "gemma", tmp_path / "b.npz")) as again:
        assert all(found[name].tobytes() == again[name].tobytes() for name in again.files)
        assert len(again.files) == len(found) - 2


@pytest.mark.parametrize(
    ("update", "fix"),
    [
        (Update((Lora(normal(2, 7), normal(5, 2), 3.0, "alpha/r"),), Placement((7, 5), (1,), (0,))), "--fold-scale"),
        (Update((Lora(normal(2, 7), normal(5, 2), 1.0, "factor"),)), "--base"),
        (
            Update((Lora(normal(3, 2, 7), normal(3, 5, 2), 1.0, "factor"),), Placement((3, 7, 5), (2,), (1,), (0,))),
            "batch",
        ),
    ],
)
def test_what_gemma_cannot_hold_is_refused(update, fix, tmp_path):
    with pytest.raises(LoraFormatError, match="LF-508") as caught:
        written(Adapter({"layer_0/mlp/linear": update}, names="flax"), "gemma", tmp_path / "a.npz")
    assert fix in str(caught.value)


# jax-lorax


def test_what_lorax_wrote_changes_its_weights_as_it_computed():
    check_lorax()


def test_loraxs_leaves_are_written_again(tmp_path):
    path = written(check_lorax(), "lorax", tmp_path / "again.npz")
    with np.load(path) as again, np.load(LORAX / "state.npz") as before:
        assert sorted(again.files) == sorted(before.files)
        for name in before.files:
            assert (again[name].shape, again[name].tobytes()) == (before[name].shape, before[name].tobytes()), name


def test_lorax_states_no_alpha_and_is_asked_for_it():
    assert "--alpha" in refused("LF-509", LORAX / "state.npz", None)
    refused("LF-507", LORAX / "state.npz", "lorax", alpha=3.0, rank=4)


def test_a_weight_of_torch_goes_to_lorax_the_other_way_round(tmp_path):
    """b·a is W's own shape: of [out, in] b is B."""
    part = Lora(normal(2, 7), normal(5, 2, seed=1), 4.0, "alpha/r")
    adapter = Adapter({"x/w": Update((part,), Placement((5, 7), (0,), (1,)))}, names="flax")
    with np.load(written(adapter, "lorax", tmp_path / "a.npz")) as arrays:
        assert np.array_equal(arrays["x/w/b"], part.lora_B)
        assert np.array_equal(arrays["x/w/a"], part.lora_A)
    again = registry.read(tmp_path / "a.npz", "lorax", ReadOptions(alpha=4.0))[0].adapter
    assert relative_error(again["x/w"].delta(), adapter["x/w"].delta()) < 1e-6
    unplaced = Adapter({"x/w": Update((part,))}, names="flax")
    with pytest.raises(LoraFormatError, match="LF-508"):
        written(unplaced, "lorax", tmp_path / "b.npz")


# MaxText


@pytest.mark.peer
def test_what_maxtext_made_changes_its_kernels_as_it_computed(tmp_path):
    pytest.importorskip("orbax.checkpoint", reason="needs orbax: the peers extra")
    adapter = lf.load(MAXTEXT / "native")
    assert {u.scale for u in adapter.values()} == {8 / 5}
    check_merged(adapter, MAXTEXT / "native")
    assert lf.digest(lf.load(MAXTEXT / "native" / "0" / "items")) == lf.digest(adapter)
    check_claimed_alone(registry.layout("maxtext"), MAXTEXT / "native")
    shutil.copytree(MAXTEXT / "native", tmp_path / "configured")
    config = json.loads((MAXTEXT / "native" / "adapter_config.json").read_text()) | {"peft_type": "LORA"}
    (tmp_path / "configured" / "adapter_config.json").write_text(json.dumps(config))
    check_claimed_alone(registry.layout("maxtext"), tmp_path / "configured")
    written(adapter, "maxtext", tmp_path / "again")
    assert lf.digest(lf.load(tmp_path / "again")) == lf.digest(adapter)
    shutil.copytree(MAXTEXT / "native", tmp_path / "bare")
    (tmp_path / "bare" / "adapter_config.json").unlink()
    refused("LF-509", tmp_path / "bare", "maxtext")
    refused("LF-507", MAXTEXT / "native", "maxtext", alpha=3.0)


def attention(scanned=True):
    """A pair for each projection, as MaxText's kernels lie."""
    batch, axes = ((3,), "in,batch,out,out") if scanned else ((), "in,out,out")
    shape = (10, *batch, 6, 4)
    out_axes = "in,batch,in,out" if scanned else "in,in,out"
    made = {
        "query": Update(
            (Lora(normal(*batch, 5, 10), normal(*batch, 24, 5, seed=1), 8.0, "alpha/r"),), Placement.of(shape, axes)
        ),
        "out": Update(
            (Lora(normal(*batch, 5, 24, seed=2), normal(*batch, 10, 5, seed=3), 8.0, "alpha/r"),),
            Placement.of((6, *batch, 4, 10), out_axes),
        ),
    }
    layer = "layers" if scanned else "layers_0"
    return Adapter({f"decoder/{layer}/self_attention/{name}/kernel": u for name, u in made.items()}, names="flax")


@pytest.mark.parametrize("scan", [True, False])
def test_maxtexts_shapes_are_those_of_its_loader(scan, tmp_path):
    """utils/lora_utils.get_lora_abstract_state: base[:-2] + [r] and [r] + base[1:]; of out base[:-1] + [r] and [r, L, E]."""
    adapter = attention(scan)
    with np.load(written(adapter, "maxtext", tmp_path / "a.npz")) as arrays:
        shapes = {name.partition("self_attention/")[2]: arrays[name].shape for name in arrays.files}
        layers = (3,) if scan else ()
        assert shapes == {
            "query/lora_a.kernel": (10, *layers, 5),
            "query/lora_b.kernel": (5, *layers, 6, 4),
            "out/lora_a.kernel": (6, *layers, 4, 5),
            "out/lora_b.kernel": (5, *layers, 10),
        }
    again = registry.read(tmp_path / "a.npz", None, ReadOptions(alpha=8.0))[0].adapter
    assert lf.digest(again) == lf.digest(adapter)
    for key, update in adapter.items():
        assert again[key].placement == update.placement


def test_a_training_state_beside_the_parameters_is_not_the_adapters(tmp_path):
    path = written(attention(), "maxtext", tmp_path / "a.npz")
    with np.load(path) as arrays:
        state = {f"params/params/{name}": arrays[name] for name in arrays.files} | {"step": np.int32(7)}
    np.savez(tmp_path / "state.npz", **state, **{"opt_state/0/mu/x": np.ones(3, np.float32)})
    again = registry.read(tmp_path / "state.npz", None, ReadOptions(alpha=8.0))[0].adapter
    assert lf.digest(again) == lf.digest(attention())


@pytest.mark.parametrize(
    ("change", "fix"),
    [
        (lambda a: {k.replace("query", "wi_0"): u for k, u in a.items()}, "qwix"),
        (lambda a: {k: Update(u.parts) for k, u in a.items()}, "--base"),
        (lambda a: {k: Update((Lora(u["lora"].lora_A, u["lora"].lora_B, n + 1.0, "factor"),), u.placement) for n, (k, u) in enumerate(a.items())}, "--fold-scale"),
    ],
)  # fmt: skip
def test_what_maxtext_cannot_hold_is_refused(change, fix, tmp_path):
    with pytest.raises(LoraFormatError, match="LF-508") as caught:
        written(Adapter(change(attention()), names="flax"), "maxtext", tmp_path / "a.npz")
    assert fix in str(caught.value)


@pytest.mark.parametrize("case", SCANNED)
def test_maxtexts_scanned_layers_of_qwix_are_a_batch(case, tmp_path):
    adapter = scanned(case, tmp_path)
    check_merged(adapter, MAXTEXT / case)
    axis = int(case[-1])
    assert {update.placement.batch for update in adapter.values()} == {(axis,)}
    with (
        np.load(written(adapter, "qwix", tmp_path / "again.npz")) as again,
        np.load(MAXTEXT / case / "lora.npz") as before,
    ):
        for name in before.files:
            assert (again[name].shape, again[name].tobytes()) == (before[name].shape, before[name].tobytes()), name


def test_layers_of_axis_1_may_be_an_einsums_until_a_base_tells():
    assert "--base" in refused("LF-504", MAXTEXT / "llama-1" / "lora.npz", "qwix", alpha=6.0)


# EasyDeL


def test_what_easydel_splits_off_is_nnxs_and_merges_as_it_merged(tmp_path):
    adapter = lf.load(GOLDEN / "easydel" / "lora.msgpack")
    assert sorted(adapter) == sorted(expected(GOLDEN / "easydel"))
    check_merged(adapter, GOLDEN / "easydel")
    check_claimed_alone(registry.layout("nnx"), GOLDEN / "easydel" / "lora.msgpack")
    again, before = leaves(written(adapter, "nnx", tmp_path / "a.msgpack")), leaves(GOLDEN / "easydel" / "lora.msgpack")
    assert {k: v.tobytes() for k, v in again.items()} == {k: v.tobytes() for k, v in before.items()}


# All of them


@pytest.mark.parametrize(("layout", "path"), FILES, ids=[f"{layout}-{path.parent.name}" for layout, path in FILES])
def test_a_file_is_claimed_by_its_own_layout_alone(layout, path):
    check_claimed_alone(registry.layout(layout), path)


@pytest.mark.parametrize("damage", ["stray", "alone", "integers", "ranks"])
@pytest.mark.parametrize(("layout", "path"), FILES[::3], ids=["gemma", "lorax"])
def test_what_is_damaged_is_refused_by_a_rule(layout, path, damage, tmp_path):
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            found = dict(arrays)
    else:
        found = leaves(path)
    first = next(iter(found))
    match damage:
        case "stray":
            found["layer_0/attn/q_norm/scale"] = np.ones(3, np.float32)
        case "alone":
            del found[first]
        case "integers":
            found[first] = found[first].astype(np.int32)
        case "ranks":
            found[first] = np.concatenate([found[first], found[first]], -1 if layout == "gemma" else -2)
    np.savez(tmp_path / "a.npz", **found)
    rule = {"stray": "LF-506", "alone": "LF-303", "integers": "LF-314", "ranks": "LF-309"}[damage]
    refused(rule, tmp_path / "a.npz", layout, alpha=3.0)


def test_expected_values_are_there():
    for folder in (*(GEMMA / case for case in GEMMA_CASES), LORAX, MAXTEXT / "native"):
        assert len(expected(folder)) >= 4
