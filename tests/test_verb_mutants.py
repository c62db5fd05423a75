"""The nets under the ways out, the loaders' rules and the journal have no hole: each mutant turns a real test red."""

from dataclasses import replace

import test_adapt as adapting
import test_journal as journal_tests
import test_loaders as loading
from mutants import net

from loraformat import journal, loaders
from loraformat.verbs import adapt
from loraformat_converters.loaders import findings, servers


def impatient(check):
    """A check of a journal that is kept from the first file on."""

    def run(folder):
        patience, journal.PATIENCE = journal.PATIENCE, 0.0
        try:
            check(folder)
        finally:
            journal.PATIENCE = patience

    return run


CHECKS = {
    "folded": lambda folder: adapting.test_what_is_exact_keeps_every_matrix({"fold_scale": True}),
    "padded": lambda folder: adapting.test_what_is_exact_keeps_every_matrix({"pad_rank": True}),
    "one scale": lambda folder: adapting.test_a_folded_scale_is_one_everywhere_and_a_padded_rank_the_same(),
    "16 bits": lambda folder: adapting.test_a_scale_folded_into_16_bits_says_what_the_rounding_cost(),
    "nearest": lambda folder: adapting.test_the_nearest_pair_has_the_residual_of_the_singular_values_left_out(),
    "dropped": lambda folder: adapting.test_what_is_dropped_is_named_and_what_is_left_is_as_it_was(),
    "beyond": lambda folder: adapting.test_a_value_beyond_the_dtype_is_refused({"dtype": "float16"}),
    "kinds": lambda folder: loading.test_a_kind_that_a_loader_lacks_is_named_with_its_target_and_source(
        "vllm", "magnitude"
    ),
    "ranks": lambda folder: loading.test_vllm_has_ranks_of_its_own(17, "if", "--max-lora-rank 32"),
    "largest": lambda folder: loading.test_vllm_has_ranks_of_its_own(513, "no", "resize"),
    "one scale for all": lambda folder: loading.test_one_scale_for_all_is_wrong_by_the_factor_told("sglang"),
    "comfyui": lambda folder: loading.test_a_scale_in_the_header_is_not_seen_by_comfyui(),
    "layout": lambda folder: loading.test_another_layout_says_what_to_convert_to(),
    "plain": lambda folder: loading.test_a_plain_pair_loads_everywhere("vllm"),
    "goes on": impatient(journal_tests.test_the_next_run_of_the_same_task_goes_on_where_a_killed_one_was),
    "another task": impatient(journal_tests.test_another_task_begins_anew_and_takes_the_leftovers_away),
    "damaged": impatient(journal_tests.test_a_finished_file_that_is_no_longer_what_it_was_is_written_again),
    "cut off": impatient(journal_tests.test_a_journal_that_the_kill_cut_off_is_read_as_far_as_it_goes),
    "a moment": journal_tests.test_a_run_of_a_moment_keeps_no_journal,
}


def the_scale_lost(patch):
    patch.setattr(adapt, "_fold", lambda part: (replace(part, alpha=1.0, scale_rule="factor"), 0.0))


def folded_twice(patch):
    real = adapt._fold
    patch.setattr(adapt, "_fold", lambda part: (replace(real(part)[0], alpha=part.scale), 0.0))


def alpha_of_the_old_rank(patch):
    real = adapt._padded

    def wrong(update, most):
        padded, error = real(update, most)
        parts = tuple(replace(p, scale_rule="alpha/r") if p.kind == "lora" else p for p in padded.parts)
        return replace(padded, parts=parts), error

    patch.setattr(adapt, "_padded", wrong)


def roundings_not_told(patch):
    patch.setattr(adapt, "moved", lambda old, new, where: 0.0)


def half_of_what_is_lost_is_told(patch):
    real = adapt._as_lora
    patch.setattr(adapt, "_as_lora", lambda update, rank: (real(update, rank)[0], (real(update, rank)[1] or 0.0) / 2))


def one_rank_short(patch):
    real = adapt._as_lora
    patch.setattr(adapt, "_as_lora", lambda update, rank: real(update, rank - 1))


def dropped_without_a_word(patch):
    real = adapt._drop
    patch.setattr(adapt, "_drop", lambda adapter, kinds: replace(real(adapter, kinds), dropped=()))


def another_kind_is_looked_for(patch):
    patch.setattr(findings, "lacking", lambda adapter, kinds, *rest, **words: iter(()))


def one_rank_too_many(patch):
    real = findings.beyond
    patch.setattr(findings, "beyond", lambda adapter, most: real(adapter, most + 1))


def the_ratio_upside_down(patch):
    real = findings.scale_of_all

    def turned(adapter, source, one):
        return real(adapter, source, 1 / one if one else one)

    patch.setattr(findings, "scale_of_all", turned)


def scales_never_compared(patch):
    patch.setattr(findings, "scale_of_all", lambda adapter, source, one: iter(()))


def any_layout_is_loaded(patch):
    patch.setattr(loading, "judge", lambda made, layout, loader: loaders.judge(made, loader.layouts[0], loader))


def a_reason_without_cause(patch):
    patch.setattr(servers.Vllm, "reasons", lambda self, adapter: [loaders.Reason("no", "x")])


def checksums_not_compared(patch):
    patch.setattr(journal, "_crc", lambda path, over=None: 0)


def any_task_is_this_one(patch):
    real = journal._entries

    def careless(path, identity):
        try:
            first = journal.canonical.loads(path.read_text(encoding="utf-8").split("\n")[0])
        except (OSError, ValueError):
            return {}
        return real(path, lambda: first["identity"])

    patch.setattr(journal, "_entries", careless)


def nothing_is_gone_on_with(patch):
    patch.setattr(journal.Journal, "finished", lambda self, name: None)


def notes_lost(patch):
    real = journal.Journal.finished
    patch.setattr(journal.Journal, "finished", lambda self, name: {} if real(self, name) is not None else None)


def never_patient(patch):
    patch.setattr(journal, "PATIENCE", 0.0)
    patch.setattr(journal._Clerk, "enter", lambda self, name, note: self._enter(name, note))


test_the_checks, test_a_mutant_turns_its_check_red = net(
    CHECKS,
    [
        (the_scale_lost, "folded"),
        (the_scale_lost, "16 bits"),
        (folded_twice, "one scale"),
        (alpha_of_the_old_rank, "padded"),
        (roundings_not_told, "16 bits"),
        (roundings_not_told, "beyond"),
        (half_of_what_is_lost_is_told, "nearest"),
        (one_rank_short, "nearest"),
        (dropped_without_a_word, "dropped"),
        (another_kind_is_looked_for, "kinds"),
        (one_rank_too_many, "ranks"),
        (the_ratio_upside_down, "one scale for all"),
        (scales_never_compared, "comfyui"),
        (any_layout_is_loaded, "layout"),
        (a_reason_without_cause, "plain"),
        (checksums_not_compared, "damaged"),
        (any_task_is_this_one, "another task"),
        (nothing_is_gone_on_with, "goes on"),
        (notes_lost, "goes on"),
        (never_patient, "a moment"),
    ],
)
