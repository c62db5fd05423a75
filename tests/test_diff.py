"""How two adapters differ, against the dense matrices; how two models differ; nothing where they are the same."""

import dataclasses
import json

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from safetensors.numpy import save_file
from updates import normal

import loraformat as lf
from loraformat.testing import KINDS, random_adapter
from loraformat.testing.strategies import adapters
from loraformat.verbs.adapt import adapt

BF16 = ml_dtypes.bfloat16


def pair(out, in_, rank, seed=0, alpha=3.0, rule="alpha/r"):
    return lf.Lora(normal(rank, in_, seed=seed), normal(out, rank, seed=seed + 1), alpha, rule)


def of(**parts):
    return lf.Adapter(
        {f"{name}.weight": lf.Update(part if isinstance(part, tuple) else (part,)) for name, part in parts.items()}
    )


@settings(max_examples=40)
@given(adapters())
def test_an_adapter_does_not_differ_from_itself(adapter):
    found = lf.diff(adapter, adapter)
    assert not found
    assert (found.only, found.metadata, found.moved(), found.forms, found.distance) == (((), ()), {}, {}, {}, 0.0)


@settings(max_examples=30)
@given(adapters(), adapters())
def test_differences_are_those_of_the_dense_matrices_and_do_not_depend_on_the_order(a, b):
    found, back = lf.diff(a, b), lf.diff(b, a)
    assert set(found.only[0]) == a.keys() - b.keys()
    assert found.only == back.only[::-1]
    squares = 0.0
    for key, target in found.targets.items():
        other = back.targets[key]
        assert target.relative == pytest.approx(other.relative, rel=1e-6)
        if not a[key].additive or a[key].matrix_shape() != b[key].matrix_shape():
            continue
        m, n = a[key].matrix().astype(np.float64), b[key].matrix().astype(np.float64)
        assert target.norms == pytest.approx((np.linalg.norm(m), np.linalg.norm(n)), rel=1e-5)
        assert target.distance == pytest.approx(np.linalg.norm(m - n), rel=1e-5, abs=1e-6)
        assert target.cosine == pytest.approx(np.sum(m * n) / np.linalg.norm(m) / np.linalg.norm(n), rel=1e-5, abs=1e-6)
        squares += np.linalg.norm(m - n) ** 2
    assert found.distance**2 == pytest.approx(squares, rel=1e-4, abs=1e-9)


def test_the_overlap_is_that_of_what_is_written_and_of_what_is_read():
    a, b = pair(20, 17, 3), pair(20, 17, 5, seed=5)
    a = dataclasses.replace(a, lora_A=b.lora_A[:3] @ np.eye(17, dtype=np.float32))  # reads what b reads, writes else
    found = lf.diff(of(q=a), of(q=b)).targets["q.weight"]
    bases = [np.linalg.qr(part.lora_B.astype(np.float64))[0] for part in (a, b)]
    out = np.sum(np.linalg.svd(bases[0].T @ bases[1], compute_uv=False) ** 2) / 3
    assert found.overlap == pytest.approx((out, 1.0), abs=1e-6)
    assert 0.05 < out < 0.9
    back = lf.diff(of(q=b), of(q=a)).targets["q.weight"]
    assert back.overlap == pytest.approx(found.overlap)


def test_matrices_of_full_rank_have_no_overlap():
    assert (
        lf.diff(of(q=lf.Delta(normal(5, 4))), of(q=lf.Delta(normal(5, 4, seed=1)))).targets["q.weight"].overlap is None
    )


@pytest.mark.parametrize("ways", [{"fold_scale": True}, {"pad_rank": True}, {"dtype": "float32"}])
def test_another_form_of_the_same_change_is_a_difference_of_form_alone(ways):
    given = of(q=pair(9, 7, 2, alpha=0.5), k=pair(6, 7, 3))
    if "dtype" in ways:
        given = adapt(given, dtype="bfloat16").adapter
    found = lf.diff(given, adapt(given, **ways).adapter)
    assert found
    assert not found.moved()
    fields = {"fold_scale": {"scale", "scale_rule"}, "pad_rank": {"rank", "scale_rule"}, "dtype": {"dtype"}}
    assert set().union(*(target.form for target in found.forms.values())) == fields[next(iter(ways))]


def test_absolute_values_are_compared_by_themselves():
    magnitude = lf.Magnitude(abs(normal(9)) + 1)
    one = of(q=(pair(9, 7, 2), magnitude), t=lf.Rows(normal(2, 4), np.array([1, 3])), h=lf.Replace(normal(5, 4)))
    other = of(
        q=(pair(9, 7, 2), lf.Magnitude(magnitude.magnitude * 1.5)),
        t=lf.Rows(normal(2, 4), np.array([1, 4])),
        h=lf.Replace(normal(5, 4) * np.float32(0.5)),
    )
    found = lf.diff(one, other)
    assert found.targets["q.weight"].parts == {"magnitude": pytest.approx(1 / 3)}
    assert found.targets["h.weight"].parts == {"replace": pytest.approx(0.5)}
    assert found.targets["t.weight"].parts == {"rows": np.inf}
    assert set(found.moved()) == {"q.weight", "h.weight", "t.weight"}
    plain = lf.diff(one, of(q=pair(9, 7, 2)))
    assert plain.targets["q.weight"].parts == {"magnitude": np.inf}
    assert plain.targets["q.weight"].form["kind"] == ("dora", "lora")


def test_changes_of_other_shapes_or_orientations_have_no_distance():
    for other in (
        of(q=pair(8, 7, 2)),
        lf.Adapter({"q.weight": lf.Update((pair(9, 7, 2),), lf.Placement.of((7, 9), "in,out"))}),
    ):
        one = lf.Adapter({"q.weight": lf.Update((pair(9, 7, 2),), lf.Placement.of((9, 7), "out,in"))})
        target = lf.diff(one, other).targets["q.weight"]
        if target.distance == 0.0:  # equal tensors: what differs is where they lie
            assert target.form["axes"] == ("out,in", "in,out")
            continue
        assert target.distance is None
        assert target.relative == np.inf


def test_an_adapter_of_other_names_is_compared_by_a_map():
    one, two = of(q=pair(9, 7, 2)), lf.Adapter({"model.q.weight": lf.Update((pair(9, 7, 2),))})
    assert lf.diff(one, two).only == (("q.weight",), ("model.q.weight",))
    assert not lf.diff(one, two, lf.Hints({"*": "model.*"}))


def test_metadata_is_compared_entry_by_entry():
    one = dataclasses.replace(of(q=pair(9, 7, 2)), base_model={"name": "a", "revision": "1"}, about={"title": "x"})
    two = dataclasses.replace(one, base_model={"name": "b", "revision": "1"}, about={})
    assert lf.diff(one, two).metadata == {"base_model.name": ("a", "b"), "about.title": ("x", None)}


def test_what_cannot_be_compared_is_refused(tmp_path):
    save_file({"a.weight": normal(3, 2)}, tmp_path / "base.safetensors")
    adapter = of(q=pair(9, 7, 2))
    with pytest.raises(lf.LoraFormatError, match="LF-705"):
        lf.diff(adapter, lf.open_base(tmp_path / "base.safetensors"))
    broken = of(q=dataclasses.replace(pair(9, 7, 2), lora_A=np.full((2, 7), np.nan, np.float32)))
    with pytest.raises(lf.LoraFormatError, match="LF-312"):
        lf.diff(adapter, broken)


# Two models.


def models(tmp_path):
    held = {
        "a.weight": normal(7, 5),
        "b.weight": normal(6, 5, seed=1),
        "n": np.arange(5),
        "gone": normal(2),
        "grown": normal(3, 4),
        "cast": normal(4),
    }
    after = {
        **held,
        "b.weight": held["b.weight"] + 0.5 * normal(6, 5, seed=2),
        "n": np.array([0, 1, 2, 4, 3]),
        "new": normal(3),
        "grown": normal(5, 4),
        "cast": held["cast"].astype(np.float64),
    }
    del after["gone"]
    for name, tensors in (("one", held), ("two", after)):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text(json.dumps({"model_type": "llama", "name": name}))
    return held, after


def test_two_models_are_compared_tensor_by_tensor(tmp_path):
    held, after = models(tmp_path)
    one, two = (lf.open_base(tmp_path / name) for name in ("one", "two"))
    found = lf.diff(one, two)
    assert found.equal == ("a.weight",)
    assert found.only == (("gone",), ("new",))
    assert set(found.resized) == {"grown"}
    assert set(found.changed) == {"b.weight", "n", "cast"}
    assert found.changed["b.weight"].norm == pytest.approx(
        np.linalg.norm(after["b.weight"] - held["b.weight"]), rel=1e-6
    )
    assert found.changed["b.weight"].change == pytest.approx(
        found.changed["b.weight"].norm / np.linalg.norm(held["b.weight"])
    )
    assert found.changed["n"].norm == 2
    assert found.changed["cast"].norm == 0
    assert found.config == {"name": ("one", "two")}
    assert not lf.diff(one, lf.open_base(tmp_path / "one"))


# On the command line.


def test_the_command_ends_with_1_where_something_differs(run, tmp_path):
    given = random_adapter(3, KINDS)
    lf.save(given, tmp_path / "a.safetensors")
    lf.save(given, tmp_path / "b.safetensors")
    told = run("diff", "a.safetensors", "b.safetensors")
    assert (told.code, told.out) == (0, "")
    assert told.err == "a.safetensors and b.safetensors are the same: 10 of 10 shared targets do the same\n"
    folded = adapt(random_adapter(3, KINDS), fold_scale=True).adapter
    lf.save(folded, tmp_path / "c.safetensors")
    assert run("diff", "a.safetensors", "c.safetensors").code == 1
    assert run("diff", "a.safetensors", "c.safetensors", "--ignore", "form").code == 0
    lf.save(random_adapter(4, KINDS[1:]), tmp_path / "d.safetensors")
    told = run("diff", "a.safetensors", "d.safetensors")
    assert told.code == 1
    assert "only in A: blocks.0.attn.weight" in told.out
    assert "1 only in A" in told.err
    said = run("diff", "a.safetensors", "d.safetensors", "--json").json
    assert (said["schema"], said["kind"], said["different"]) == (1, "adapters", True)
    assert set(said["targets"]["embed.weight"]) == {"norms", "distance", "cosine", "overlap", "parts", "form"}
    for tolerance in ("nan", "-1"):
        assert run("diff", "a.safetensors", "b.safetensors", "--tolerance", tolerance).code == 2


def test_the_command_compares_models_and_says_which_tensors_changed(run, tmp_path):
    models(tmp_path)
    told = run("diff", "one", "two")
    assert told.code == 1
    assert "grown: F32 [3, 4] | F32 [5, 4]" in told.out
    assert "cast      0: the dtype alone" in told.out
    assert (
        told.err == "one and two differ: 1 tensor equal · 3 changed · 1 of another shape · 1 only in A · 1 only in B\n"
    )
    assert run("diff", "one", "one").code == 0
    said = run("diff", "one", "two", "--json").json
    assert said["kind"] == "models"
    assert said["changed"].keys() == {"b.weight", "n", "cast"}


def test_a_model_with_nan_is_told_in_json_that_can_be_read(run, tmp_path):
    for i in range(2):
        save_file({"a": np.array([1.0, np.nan][:2], np.float32) * (i + 1)}, tmp_path / f"{i}.safetensors")
    told = run("diff", "0.safetensors", "1.safetensors", "--json")
    assert told.code == 1
    assert told.json["changed"]["a"]["norm"] is None


def test_hostile_names_do_not_reach_the_terminal(run, tmp_path):
    for i in range(2):
        save_file({"a\x1b[31m\nb": normal(3, seed=i)}, tmp_path / f"{i}.safetensors")
    told = run("diff", "0.safetensors", "1.safetensors")
    assert told.code == 1
    assert "\x1b" not in told.out
