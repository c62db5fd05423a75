"""The MLX layout: what mlx-lm wrote is read as mlx means it, and what cannot be told is refused."""

import json
import shutil
from dataclasses import replace

import mlx_goldens
import numpy as np
import pytest
from mlx_goldens import CASES, adapter_of, check_deltas, check_rewritten
from refused import problems_of

import loraformat as lf
from loraformat import Adapter, Lora, Update, registry, testing
from loraformat.axes import Placement
from loraformat.parts import Magnitude, Replace
from loraformat.verbs.convert import save
from loraformat_converters.mlx import layout


class TestPairs(testing.LayoutLaws):
    layout = layout
    kinds = ("lora",)
    files = tuple(adapter_of(case) for case in ("linear", "half", "embedding", "experts"))


class TestDora(testing.LayoutLaws):
    layout = layout
    kinds = ("dora",)
    files = (adapter_of("dora"),)


@pytest.mark.parametrize("case", CASES)
def test_the_change_is_that_which_mlx_computed(case):
    check_deltas(case)


@pytest.mark.parametrize("case", CASES)
def test_a_file_goes_through_the_native_one_and_back_byte_for_byte(case, tmp_path):
    check_rewritten(case, tmp_path)


def edited(folder, case="linear", drop=(), tensors=None, **changes):
    """A copy of a golden adapter, its configuration or tensors changed; ``rank``, ``alpha``, … lie in lora_parameters."""
    shutil.copytree(adapter_of(case), folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    inner = {name: changes.pop(name) for name in ("rank", "scale", "alpha", "keys") if name in changes}
    config = {name: value for name, value in (config | changes).items() if name not in drop}
    if isinstance(config.get("lora_parameters"), dict):
        kept = {name: value for name, value in config["lora_parameters"].items() if name not in drop}
        config["lora_parameters"] = kept | inner
    (folder / "adapter_config.json").write_text(json.dumps(config))
    if tensors is not None:
        from safetensors.numpy import load_file, save_file

        save_file(tensors(load_file(folder / "adapters.safetensors")), folder / "adapters.safetensors")
    return folder


# The scale.


def test_alpha_beside_a_scale_means_nothing_since_the_key_num_layers_exists(tmp_path):
    adapter = lf.load(edited(tmp_path / "a", alpha=16))
    assert {update.scale for update in adapter.values()} == {2.5}


def old(folder, **changes):
    """As mlx-examples wrote it from 2024-03 to 2024-09, when what multiplies the pairs changed."""
    return edited(folder, drop=("num_layers", "fine_tune_type"), lora_layers=1, **changes)


def test_alpha_beside_a_scale_in_an_older_file_can_mean_two_things(tmp_path):
    path = old(tmp_path / "a", alpha=12)
    (problem,) = problems_of(lf.load, path)
    assert problem.rule == "LF-507"
    assert "2.5, or 10" in problem.what
    assert "--alpha 2.5 (or 10) --scale-rule factor" in problem.fix
    for scale in (2.5, 10.0):
        stated = registry.ReadOptions(alpha=scale, scale_rule="factor")
        assert {u.scale for u in registry.read(path, None, stated)[0].adapter.values()} == {scale}
    problems = problems_of(registry.read, path, None, registry.ReadOptions(alpha=3, scale_rule="factor"))
    assert {p.rule for p in problems} == {"LF-507"}


def test_alpha_equal_to_the_rank_means_one_thing_at_any_time(tmp_path):
    assert {u.scale for u in lf.load(old(tmp_path / "a", alpha=3)).values()} == {2.5}


def test_a_scale_that_is_nowhere_is_asked_for(tmp_path):
    (tmp_path / "alone").mkdir()
    bare = shutil.copy(adapter_of("linear") / "adapters.safetensors", tmp_path / "alone")
    problems = problems_of(lf.load, bare)
    assert {p.rule for p in problems} == {"LF-509"}
    reading, found, _ = registry.read(bare, None, registry.ReadOptions(alpha=7.5, scale_rule="alpha/r"))
    assert found.name == "mlx"
    assert {u.scale for u in reading.adapter.values()} == {2.5}
    assert {p.rule for p in problems_of(lf.load, edited(tmp_path / "b", drop=("scale",)))} == {"LF-509"}


@pytest.mark.parametrize(
    ("changes", "rule", "word"),
    [
        ({"rank": 4}, "LF-507", "rank is 4"),
        ({"rank": 0}, "LF-503", "integer of at least 1"),
        ({"scale": "2.5"}, "LF-503", "finite number"),
        ({"keys": "q_proj"}, "LF-503", "list of names"),
        ({"lora_parameters": [1]}, "LF-503", "an object"),
        ({"fine_tune_type": "qlora"}, "LF-504", "none of lora, dora, full"),
        ({"fine_tune_type": 3}, "LF-503", "a word"),
        ({"fine_tune_type": "dora"}, "LF-303", "norm of the base's rows"),
    ],
)
def test_a_configuration_that_contradicts_is_refused(changes, rule, word, tmp_path):
    problems = problems_of(lf.load, edited(tmp_path / "a", **changes))
    assert {p.rule for p in problems} == {rule}
    assert word in problems[0].what


def test_a_key_that_nobody_knows_warns(tmp_path):
    reading, _, _ = registry.read(edited(tmp_path / "a", scales=[1]))
    (warning,) = reading.warnings
    assert (warning.rule, warning.severity) == ("LF-505", "warning")


# The tensors.


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (lambda t: {**t, "stray": np.ones(3, np.float32)}, "LF-506"),
        (lambda t: {n: v for n, v in t.items() if not n.endswith("q_proj.lora_b")}, "LF-303"),
        (lambda t: {**t, "model.layers.1.self_attn.q_proj.m": np.ones(36, np.float32)}, "LF-507"),
        (lambda t: {n: v.T.copy() for n, v in t.items()}, "LF-309"),
        (lambda t: {n: v[:0] for n, v in t.items()}, "LF-311"),
        (lambda t: {n: v.astype(np.int32) for n, v in t.items()}, "LF-314"),
        (lambda t: {n: v[None] for n, v in t.items()}, "LF-309"),
        (lambda t: {}, "LF-304"),
    ],
)
def test_tensors_that_mlx_would_not_load_are_refused(change, rule, tmp_path):
    assert {p.rule for p in problems_of(lf.load, edited(tmp_path / "a", tensors=change))} == {rule}


def test_experts_of_an_older_file_lie_in_one_axis(tmp_path):
    flat = edited(
        tmp_path / "a", "experts", tensors=lambda t: {n: v.reshape(-1, v.shape[2]) if v.ndim == 3 and n.endswith("a") else v for n, v in t.items()}
    )  # fmt: skip
    wanted, found = lf.load(adapter_of("experts")), lf.load(flat)
    for key in wanted:
        assert np.array_equal(found[key].matrix(), wanted[key].matrix()), key


def test_an_embedding_is_told_by_its_name_its_magnitude_or_the_base_and_else_not_at_all(tmp_path):
    def renamed(tensors):
        return {name.replace("embed_tokens", "table"): tensor for name, tensor in tensors.items()}

    def placed(path, base=None):
        return lf.load(path, base=base)["model.table.weight"].placement

    plain = edited(tmp_path / "a", "embedding", tensors=renamed)
    assert placed(plain) is None
    table = mlx_goldens.HERE / "embedding" / "base.safetensors"
    from safetensors.numpy import load_file, save_file

    save_file(renamed(load_file(table)), tmp_path / "base.safetensors")
    token_rows = Placement((50, 24), (1,), (0,))
    assert placed(plain, lf.open_base(tmp_path / "base.safetensors")) == token_rows
    assert placed(edited(tmp_path / "b", "dora", tensors=renamed)) == token_rows


# What is written.


def pair(rank, out, inner, scale, seed=0, batch=(), dtype=np.float32):
    draw = np.random.default_rng([seed, rank, out, inner])
    a, b = (draw.standard_normal((*batch, *shape)).astype(dtype) for shape in ((rank, inner), (out, rank)))
    return Update((Lora(a, b, scale, "factor"),))


def mlx(**targets):
    return Adapter({key.replace("_", "."): value for key, value in targets.items()}, "mlx")


def test_scales_and_ranks_that_differ_become_one_and_it_is_said(tmp_path):
    adapter = Adapter({
        "model.layers.0.q.weight": pair(2, 5, 7, 2.0),
        "model.layers.0.k.weight": pair(3, 4, 7, 2.0),
        "model.layers.0.v.weight": pair(3, 6, 7, 0.5),
        "model.layers.0.o.weight": pair(3, 8, 7, 0.3, dtype=np.float16),
    }, "mlx")  # fmt: skip
    warnings = save(adapter, tmp_path / "a", layout)
    said = {
        (w.where.rpartition(".")[2], w.what.partition(" ")[2].split(" is ")[0], w.what.rpartition("; ")[2][:8])
        for w in warnings
    }
    assert said == {("q", "rank 2", "exact"), ("v", "scale 0.5", "exact"), ("o", "scale 0.3", "residual")}
    assert all(w.severity == "warning" for w in warnings)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["lora_parameters"]["rank"] == 3
    assert config["lora_parameters"]["scale"] == 2.0
    again = lf.load(tmp_path / "a")
    for key, update in adapter.items():
        assert testing.relative_error(again[key].matrix(), update.matrix()) <= 1e-6, key
    assert again["model.layers.0.o.weight"]["lora"].lora_B.dtype == np.float32  # in float16 the fold would cost 2^-11
    assert again["model.layers.0.v.weight"]["lora"].lora_B.dtype == np.float32


def test_a_scale_of_zero_among_others_is_zeros(tmp_path):
    adapter = mlx(a_weight=pair(2, 5, 7, 0.0), b_weight=pair(2, 4, 7, 0.0), c_weight=pair(2, 3, 7, 1.5))
    save(adapter, tmp_path / "a", layout)
    again = lf.load(tmp_path / "a")
    assert not again["a.weight"].matrix().any()
    assert testing.relative_error(again["c.weight"].matrix(), adapter["c.weight"].matrix()) <= 1e-6


def test_a_factor_that_experts_share_is_copied_for_each(tmp_path):
    shared = Update(
        (
            Lora(
                pair(2, 5, 7, 1.0, batch=(1,))["lora"].lora_A,
                pair(2, 5, 7, 1.0, batch=(3,))["lora"].lora_B,
                1.0,
                "factor",
            ),
        )
    )
    save(mlx(up_weight=shared), tmp_path / "a", layout)
    assert np.array_equal(lf.load(tmp_path / "a")["up.weight"].matrix(), shared.matrix())


def with_magnitude(update, place, axes=None, eps=0.0):
    size = place.shape[(axes or place.out)[0]]
    return replace(
        update, parts=(*update.parts, Magnitude(np.arange(1, size + 1, dtype=np.float32), axes, eps)), placement=place
    )


LINEAR, TABLE = Placement((5, 7), (0,), (1,)), Placement((7, 5), (1,), (0,))


@pytest.mark.parametrize(
    ("adapter", "word"),
    [
        (mlx(a_weight=pair(2, 5, 7, 1), b_weight=with_magnitude(pair(2, 5, 7, 1), LINEAR)), "a plain pair beside DoRA"),
        (mlx(a_weight=with_magnitude(pair(2, 5, 7, 1), TABLE)), "one for each row"),
        (mlx(a_weight=with_magnitude(pair(2, 5, 7, 1), LINEAR, eps=1e-6)), "eps"),
        (mlx(a_weight=with_magnitude(pair(2, 5, 7, 1), LINEAR, (1,))), "one for each row"),
        (mlx(a_gate=pair(2, 5, 7, 1)), "the .weight of a module"),
        (mlx(a_weight=pair(2, 5, 7, 1, batch=(2, 3))), "2 batch axes"),
        (mlx(a_weight=pair(2, 5, 7, 1, dtype=np.float64)), "F64"),
        (mlx(a_weight=pair(2, 5, 7, 1), b_weight=Update((Replace(np.ones(3)),))), "a replace update beside others"),
        (mlx(b_weight=Update((Replace(np.ones(3), ("add",)),))), "may add"),
        (mlx(a_weight=replace(pair(2, 5, 12, 1), placement=Placement((5, 3, 4), (0,), (1, 2)))), "no convolution"),
        (replace(mlx(a_weight=pair(2, 5, 7, 1)), names="torch"), "in the space 'torch'"),
    ],
)
def test_what_mlx_has_no_layer_for_is_refused(adapter, word, tmp_path):
    problems = problems_of(save, adapter, tmp_path / "a", layout)
    assert {p.rule for p in problems} == {"LF-508"}
    assert word in problems[0].what
    assert not list(tmp_path.iterdir())


def test_the_kept_configuration_is_given_back_only_where_it_still_holds(tmp_path):
    adapter = lf.load(adapter_of("linear"))
    more = {**adapter, "model.layers.0.self_attn.q_proj.weight": pair(3, 36, 24, 2.5)}
    save(replace(adapter, targets=more), tmp_path / "a", layout)  # beyond the last block, which num_layers names
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["num_layers"] == -1
    other = {key: replace(u, parts=(replace(u["lora"], alpha=1.0),)) for key, u in adapter.items()}
    save(replace(adapter, targets=other), tmp_path / "b", layout)
    assert {u.scale for u in lf.load(tmp_path / "b").values()} == {1.0}
