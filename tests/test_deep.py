"""What an adapter is made of, against the dense matrices: singular values, ranks, what is dead, odd or double."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from updates import normal

import loraformat as lf
from loraformat.testing import KINDS, random_adapter
from loraformat.testing.strategies import adapters
from loraformat.verbs.anatomy import anatomy


def pair(out, in_, rank, seed=0, alpha=3.0):
    return lf.Lora(normal(rank, in_, seed=seed), normal(out, rank, seed=seed + 1), alpha, "alpha/r")


def layers(count, alphas=()):
    made = {i: pair(9, 7, 3, seed=10 * i) for i in range(count)}
    made |= {i: dataclasses.replace(made[i], alpha=alpha) for i, alpha in dict(alphas).items()}
    return lf.Adapter({f"h.{i}.q.weight": lf.Update((part,)) for i, part in made.items()})


@settings(max_examples=30)
@given(adapters())
def test_singular_values_and_what_follows_from_them_are_those_of_the_dense_matrices(adapter):
    found = anatomy(adapter)
    assert found.organs.keys() == {key for key, update in adapter.items() if update.additive}
    for key, organ in found.organs.items():
        matrix = adapter[key].matrix().astype(np.float64)
        values = np.linalg.svd(matrix.reshape(-1, *matrix.shape[-2:]), compute_uv=False)
        assert organ.norm == pytest.approx(np.linalg.norm(matrix), rel=1e-5)
        assert organ.rms == pytest.approx(np.sqrt(np.mean(matrix**2)), rel=1e-5)
        k = organ.sigma.shape[1]
        assert np.allclose(organ.sigma, values[:, :k], rtol=1e-4, atol=1e-5 * values.max())
        shares = values / values.sum(axis=1, keepdims=True)
        entropy = -np.sum(np.where(shares > 1e-7, shares * np.log(np.maximum(shares, 1e-30)), 0), axis=1)
        assert organ.effective_rank == pytest.approx(np.mean(np.exp(entropy)), rel=1e-3)
        for energy in (0.9, 0.99):
            held = np.cumsum(values**2, axis=1) / np.sum(values**2, axis=1, keepdims=True)
            assert organ.rank_for(energy) == max(int(np.argmax(row >= energy)) + 1 for row in held)


def test_ranks_of_known_spectra():
    a, b = np.linalg.qr(normal(20, 4))[0].T, np.linalg.qr(normal(30, 4))[0]
    for values, effective, ranks in (
        ((1, 1, 1, 1), 4.0, (4, 4)),
        ((10, 1, 0, 0), 1.356, (1, 2)),
        ((0, 0, 0, 0), 0.0, (0, 0)),
    ):
        part = lf.Lora(a.astype(np.float32), (b * values).astype(np.float32), 1.0, "factor")
        organ = anatomy(lf.Adapter({"a": lf.Update((part,))})).organs["a"]
        assert organ.effective_rank == pytest.approx(effective, rel=1e-3)
        assert (organ.rank_for(0.9), organ.rank_for(0.991)) == ranks


def test_targets_that_do_nothing_are_dead():
    adapter = layers(3, {1: 0.0})
    dead = lf.Lora(normal(2, 7), np.zeros((9, 2), np.float32), 1.0, "factor")
    found = anatomy(lf.Adapter({**adapter.targets, "h.9.q.weight": lf.Update((dead,))}))
    assert found.dead == ("h.1.q.weight", "h.9.q.weight")


def test_a_target_far_from_its_like_is_an_outlier():
    found = anatomy(layers(8, {3: 60.0, 5: 0.01}))
    assert set(found.outliers) == {"h.3.q.weight", "h.5.q.weight"}
    assert found.outliers["h.3.q.weight"] == pytest.approx(20, rel=0.5)
    assert not anatomy(layers(8)).outliers
    assert not anatomy(layers(3, {1: 60.0})).outliers


def test_targets_with_the_same_parts_are_duplicates_and_dead_ones_are_not():
    adapter = layers(4)
    same = {
        **adapter.targets,
        "h.7.q.weight": adapter["h.2.q.weight"],
        "h.8.q.weight": layers(9, {8: 0.0})["h.8.q.weight"],
    }
    assert anatomy(lf.Adapter(same)).duplicates == (("h.2.q.weight", "h.7.q.weight"),)


def test_the_command_shows_it_and_json_has_it_all(run, tmp_path):
    given = layers(6, {3: 90.0, 5: 0.0})
    lf.save(lf.Adapter({**given.targets, "h.7.q.weight": given["h.2.q.weight"]}), tmp_path / "a.safetensors")
    told = run("info", "a.safetensors", "--deep")
    assert told.code == 0, told.err
    assert "h.*.q.weight  0–" in told.out
    assert "█" in told.out
    assert "dead: 1 target with ΔW = 0: h.5.q.weight" in told.out
    assert "outlier: h.3.q.weight: its ΔW is " in told.out
    assert "duplicates: 2 targets with the same parts: h.2.q.weight, h.7.q.weight" in told.out
    said = run("info", "a.safetensors", "--deep", "--json").json
    assert said["deep"]["dead"] == ["h.5.q.weight"]
    values = np.linalg.svd(given["h.0.q.weight"].matrix(), compute_uv=False)[:3]
    assert said["targets"]["h.0.q.weight"]["deep"]["singular_values"] == pytest.approx(values.tolist(), rel=1e-5)
    assert "deep" not in run("info", "a.safetensors", "--json").json


def test_every_kind_of_part_has_its_place(run, tmp_path):
    lf.save(random_adapter(3, KINDS), tmp_path / "a.safetensors")
    said = run("info", "a.safetensors", "--deep", "--json").json
    assert {key for key, target in said["targets"].items() if target["deep"] is None} == {
        "head.weight",
        "tokens.weight",
    }
    assert len(said["targets"]["moe.experts.gate"]["deep"]["singular_values"]) == 3


def test_a_base_has_no_anatomy(run, tmp_path):
    from safetensors.numpy import save_file

    save_file({"a.weight": normal(3, 2)}, tmp_path / "base.safetensors")
    told = run("info", "base.safetensors", "--deep", "--json")
    assert (told.code, json.loads(told.out)["problems"][0]["rule"]) == (2, "LF-705")
