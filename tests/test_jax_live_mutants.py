"""The net over live JAX parameters has no hole: factors put beside a weight wrongly turn a check red."""

from dataclasses import replace

import numpy as np
import pytest
from mutants import net

pytest.importorskip("jax", reason="needs jax: the peers extra")
pytest.importorskip("flax.nnx", reason="needs flax: the peers extra")
import test_jax_live as live

from loraformat_converters.jax_live import branched, factored, merged, operations


def product(name):
    return lambda folder: live.test_a_product_goes_through_the_factors(name)


def factors(monkeypatch, change):
    whole = branched.factors_of
    monkeypatch.setattr(branched, "factors_of", lambda *args: change(*whole(*args)))


def the_scale_is_lost(monkeypatch):
    whole = branched._Target
    monkeypatch.setattr(branched, "_Target", lambda key, name, at, scale, labels: whole(key, name, at, 1.0, labels))


def the_scale_is_squared(monkeypatch):
    whole = operations._through
    monkeypatch.setattr(operations, "_through", lambda f, *more: f.scale * whole(f, *more))


def heads_are_labelled_the_other_way(monkeypatch):
    factors(monkeypatch, lambda a, b, la, lb: (a, b.swapaxes(-1, -2).reshape(b.shape) if b.ndim > 2 else b, la, lb))


def the_in_side_is_labelled_the_other_way(monkeypatch):
    factors(monkeypatch, lambda a, b, la, lb: (a[::-1], b, la, lb))


def a_transpose_is_lost(monkeypatch):
    factors(monkeypatch, lambda a, b, la, lb: (a.T.reshape(a.shape), b, la, lb))


def layers_take_their_factors_backwards(monkeypatch):
    whole = factored.Factored.stacked

    def backwards(self):
        found = whole(self)
        return found and replace(found, a=found.a[::-1])

    monkeypatch.setattr(factored.Factored, "stacked", backwards)


def a_reshape_forgets_the_factors(monkeypatch):
    whole = factored._regrouped

    def wrong(factor, *args):
        tensor, labels = whole(factor, *args)
        return tensor[..., ::-1], labels

    monkeypatch.setattr(factored, "_regrouped", wrong)


def merging_forgets_the_change(monkeypatch):
    whole = merged._sum
    monkeypatch.setattr(merged, "_sum", lambda update: np.float32(0.5) * whole(update))


def what_is_trained_is_taken_out_turned(monkeypatch):
    whole = branched.pair_of

    def turned(*args):
        a, b = whole(*args)
        return a[..., ::-1, :], b

    monkeypatch.setattr(branched, "pair_of", turned)


NAMES = ("x @ W", "heads out", "heads first", "heads in", "reshaped", "transposed and reshaped", "looked up")
CHECKS = {name: product(name) for name in NAMES}
CHECKS |= {"scan": lambda folder: live.test_layers_that_a_scan_runs_through(1, "")}
CHECKS |= {"linen": lambda folder: live.test_a_linen_model_is_called_unchanged()}
CHECKS |= {"saved": live.test_factors_are_trained_and_saved}
MUTANTS = [
    *((the_scale_is_lost, name) for name in ("x @ W", "looked up")),
    *((the_scale_is_squared, name) for name in ("x @ W", "heads in")),
    *((heads_are_labelled_the_other_way, name) for name in ("heads out", "heads first")),
    *((the_in_side_is_labelled_the_other_way, name) for name in ("x @ W", "heads in", "looked up")),
    *((a_transpose_is_lost, name) for name in ("x @ W", "linen")),
    (layers_take_their_factors_backwards, "scan"),
    (a_reshape_forgets_the_factors, "reshaped"),
    (merging_forgets_the_change, "x @ W"),
    (what_is_trained_is_taken_out_turned, "saved"),
]

_green, _red = net(CHECKS, MUTANTS)
test_live_jax_is_green, test_a_mutant_of_live_jax_turns_red = pytest.mark.peer(_green), pytest.mark.peer(_red)
