"""The net over combine, resize and the algebra beneath them: each is made wrong in one place, and its check turns red."""

import math
from dataclasses import replace
from types import SimpleNamespace

import combined
import numpy as np
import test_cli_algebra
import test_combine
import test_combine_absolute
import test_combine_exact
import test_combine_peft
import test_combine_refusals
import test_lowrank
import test_resize
import test_truncated
from mutants import net

from loraformat.algebra import factors, lowrank, sides, svd, truncated
from loraformat.combining import absolutes, agree, beside, entries, methods, peft, terms, weights
from loraformat.verbs import combine, resize

CHECKS = {
    **{
        f"formula of {name}": lambda _, name=name: test_combine.test_a_method_is_its_published_formula(name)
        for name in (*methods.DENSE, "cat", "linear")
    },
    **{f"peft {name}": lambda _, name=name: test_combine_peft.test_the_change_is_that_of_peft(name) for name in test_combine_peft.CASES},
    "peft factors": lambda _: test_combine_peft.test_the_factors_are_those_of_peft("linear"),
    "svd": lambda _: test_combine.test_svd_is_the_nearest_of_the_sum(2),
    "arc": lambda _: test_combine.test_the_point_on_the_arc(),
    "ends": lambda _: test_combine.test_the_ends_of_the_arc_and_what_lies_between_equals(),
    "patterns": lambda _: test_combine_exact.test_weights_by_pattern_multiply_where_they_mean_a_target(),
    "zero": lambda _: test_combine.test_an_adapter_of_weight_zero_takes_no_part("sce"),
    "powers of two": lambda _: test_combine_exact.test_ratios_that_are_powers_of_two_lose_no_digit_in_16_bits(),
    "absolute": lambda _: test_combine_absolute.test_what_has_no_exact_combination_is_refused_by_name("cat", (((test_combine_absolute.HEAD,), 0.5),)),
    "bases": lambda _: test_combine_refusals.test_adapters_of_different_models_are_refused(
        lambda: replace(combined.ONE, base_model={"name": "other"}), "LF-607"
    ),
    "energy": lambda _: test_resize.test_the_fewest_ranks_that_keep_the_energy(0.9, False),
    "energy per target": lambda _: test_resize.test_the_fewest_ranks_that_keep_the_energy(0.9, True),
    "residual": lambda _: test_resize.test_no_more_is_lost_than_the_residual(0.1, False),
    "resize": lambda _: test_resize.test_the_result_is_the_nearest_of_the_rank(3),
    "cancel": lambda _: test_lowrank.test_what_nearly_cancels_keeps_its_digits(),
    "values": lambda _: test_lowrank.test_singular_values_and_vectors_are_those_of_the_matrix((2, 1), (1, 3)),
    "angles": lambda _: test_lowrank.test_principal_angles_are_those_that_the_spaces_were_turned_by(1e-10),
    "leading": lambda _: test_truncated.test_what_is_lost_is_the_least_that_can_be("slow decay", 6),
    "nan": lambda _: test_cli_algebra.test_a_value_that_is_none_is_told_before_it_spreads(None, None),
}  # fmt: skip


def patched(where, name, value):
    def mutant(monkeypatch):
        monkeypatch.setattr(where, name, value)

    return mutant


def mutated(where, name, change):
    """The function with its result, or what it is given, made wrong."""
    return patched(where, name, change(getattr(where, name)))


scale_lost_in_the_factors = patched(
    combine, "lowrank", lambda update: lowrank.total((1.0, factors._factors(p)) for p in update.additive)
)
ratio_of_scales_lost = patched(beside, "_times", lambda tensor, ratio: tensor)
ratio_squared = mutated(beside, "_times", lambda f: lambda tensor, ratio: f(tensor, ratio * abs(ratio)))
every_ratio_exact = patched(beside, "_times", lambda tensor, ratio: (tensor.astype(float) * ratio).astype(tensor.dtype))
weight_lost = patched(terms.Term, "delta", lambda self, _: np.ascontiguousarray(self.change.matrix()))
sign_of_the_weight_lost = patched(
    terms.Term, "delta", lambda self, _: np.ascontiguousarray(self.change.matrix()) * np.float32(abs(self.weight))
)
weight_without_root = patched(peft, "math", SimpleNamespace(sqrt=lambda x: x, copysign=math.copysign))
sign_on_neither_side = patched(peft, "math", SimpleNamespace(sqrt=math.sqrt, copysign=lambda x, _: x))
minority_elected = mutated(entries, "_majority", lambda f: lambda parts: -f(parts))
smallest_kept = mutated(entries, "_largest", lambda f: lambda size, count: f(size, size.size - count))
not_rescaled = patched(methods, "drop", lambda delta, density, draw: entries.drop(delta, density, draw) or delta.__imul__(np.float32(density)))  # fmt: skip
small_ones_kept_more = mutated(methods, "drop_small", lambda f: lambda delta, d, e, draw: f(delta, d, -e, draw))
outliers_kept = mutated(methods, "trim_both", lambda f: lambda delta, d, gamma: f(delta, d, 0.0))
upper_bits = patched(
    peft.Stream,
    "below",
    lambda self, d, shape: (self._bits.randint(0, 1 << 32, size=shape, dtype=np.uint32) >> 8) * 2.0**-24 < d,
)
signs_elected_with_weights = mutated(
    peft, "elect", lambda f: lambda ts, ws: f([t * np.float32(w) for t, w in zip(ts, ws, strict=True)])
)
least_variance = mutated(methods, "most_varied", lambda f: lambda deltas, d: f(deltas, 1 - d))
equal_shares = mutated(methods, "erase_minority", lambda f: lambda deltas, w: f(deltas, [1.0] * len(w)))
right_angle = patched(methods, "cosine", lambda m, n: 0.0)
patterns_added = patched(
    combine, "weight_of", lambda key, w: sum(x for p, x in w.items() if weights.matches(key, (p,))) or 1.0
)
zero_takes_part = mutated(
    combine._Making, "_terms", lambda f: lambda self, key: [terms.Term(combine.weight_of(key, w), a[key], d) for a, w, d in zip(self.adapters, self.weights, self.digests, strict=True) if key in a]
)  # fmt: skip
half_of_a_tensor = patched(absolutes, "_weight", lambda having, kind: None)
bases_unseen = patched(agree, "_bases", lambda adapters: iter(()))
values_for_squares = patched(
    resize._Pairs, "squares", property(lambda self: np.sum(self.found.s, axis=tuple(range(self.found.s.ndim - 1))))
)
residual_not_squared = mutated(
    resize, "_allowed", lambda f: lambda rank, energy, residual, per: residual if residual else f(rank, energy, residual, per)
)  # fmt: skip
every_target_alone = mutated(
    resize, "_fewest", lambda f: lambda held, lost: {k: resize._beyond(s, lost) for k, s in held.items()}
)
all_as_one = mutated(resize, "_beyond", lambda f: lambda squares, lost: f(squares, lost * 4))
root_on_one_side = patched(
    svd.SVD, "cut", lambda s, r: lowrank.LowRank(s.Vt[..., :r, :], s.U[..., :r] * np.sqrt(s.s[..., None, :r]))
)
gram_alone = patched(
    sides, "_twice", lambda tall: sides.Side(np.linalg.cholesky(tall.swapaxes(-1, -2) @ tall + 1e-12 * np.eye(tall.shape[-1])).swapaxes(-1, -2), tall, None)
)  # fmt: skip
fold_of_the_wrong_side = mutated(sides, "_gathered", lambda f: lambda t, axes, side: f(t, axes, side)[..., ::-1, :])
from_the_cosine = patched(svd.np, "arcsin", lambda x: np.arccos(np.sqrt(1 - x**2)))
one_step = patched(truncated, "_GAIN", 1.0)
nan_unseen = patched(combine, "check_values", lambda sources: None)

MUTANTS = [
    (scale_lost_in_the_factors, "svd"),
    (ratio_of_scales_lost, "formula of cat"),
    (ratio_squared, "formula of cat"),
    (every_ratio_exact, "powers of two"),
    (weight_lost, "formula of ties"),
    (weight_lost, "formula of magnitude_prune"),
    (sign_of_the_weight_lost, "formula of ties"),
    (weight_without_root, "peft linear"),
    (weight_without_root, "peft factors"),
    (sign_on_neither_side, "peft linear"),
    (minority_elected, "formula of ties"),
    (minority_elected, "formula of sce"),
    (minority_elected, "peft ties"),
    (minority_elected, "peft ties_svd"),
    (smallest_kept, "formula of magnitude_prune"),
    (smallest_kept, "peft magnitude_prune"),
    (not_rescaled, "formula of dare_linear"),
    (not_rescaled, "formula of dare_ties"),
    (small_ones_kept_more, "formula of della"),
    (outliers_kept, "formula of breadcrumbs"),
    (upper_bits, "peft dare_linear"),
    (upper_bits, "peft dare_ties_svd"),
    (signs_elected_with_weights, "peft ties"),
    (signs_elected_with_weights, "peft dare_ties_svd"),
    (least_variance, "formula of sce"),
    (equal_shares, "formula of sce"),
    (right_angle, "arc"),
    (right_angle, "ends"),
    (patterns_added, "patterns"),
    (zero_takes_part, "zero"),
    (half_of_a_tensor, "absolute"),
    (bases_unseen, "bases"),
    (values_for_squares, "energy"),
    (values_for_squares, "energy per target"),
    (residual_not_squared, "residual"),
    (every_target_alone, "energy"),
    (all_as_one, "energy per target"),
    (root_on_one_side, "svd"),
    (root_on_one_side, "resize"),
    (gram_alone, "cancel"),
    (fold_of_the_wrong_side, "values"),
    (from_the_cosine, "angles"),
    (one_step, "leading"),
    (nan_unseen, "nan"),
]

test_the_checks_are_green, test_each_mutant_turns_its_check_red = net(CHECKS, MUTANTS)
