"""Finding made wrong in ways that people do get wrong: each turns a real test red."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import test_onnx_folded as folded
import test_onnx_folder as folders
import test_onnx_names as names
import test_onnx_packed as packed
import test_onnx_values as values
from mutants import net

import loraformat as lf
from loraformat import likeness, sketch
from loraformat_converters.onnx import folder
from loraformat_converters.onnx.finding import components, ladder, part, together, witness
from loraformat_converters.onnx.finding.align import Alignment
from loraformat_converters.onnx.finding.doubt import Doubts
from loraformat_converters.onnx.finding.fingerprint import Finder
from loraformat_converters.onnx.graph.values import Values


def exported(check, *words):
    """A check of the exported folder."""

    def run(tmp_path):
        source = tmp_path / "t5"
        folders.shutil.copytree(folders.T5, source, ignore=folders.shutil.ignore_patterns("*_merged.onnx"))
        check(*words, source, *([tmp_path] if words else []))  # a check of outputs writes its own

    return run


CHECKS = {
    "a square weight by its sketch": lambda tmp: values.test_a_square_weight_is_found_as_the_operator_reads_it(
        "gemm", False, "sketch", tmp
    ),
    "a square weight by the base": lambda tmp: values.test_a_square_weight_is_found_as_the_operator_reads_it(
        "matmul", True, "base", tmp
    ),
    "equal twins": lambda tmp: values.test_twins_of_equal_values_are_told_apart_by_names_only("base", tmp),
    "names against values": lambda tmp: values.test_a_name_and_the_values_that_disagree_are_both_printed("sketch", tmp),
    "a weight of another base": values.test_a_weight_that_is_not_like_the_sketch_is_not_changed_by_its_name,
    "a scale in a weight": lambda tmp: values.test_a_scale_that_was_folded_into_a_weight_is_told(
        2**-0.5, True, False, "sketch", tmp
    ),
    "a scale in a small weight": partial(
        values.test_the_scale_of_a_small_weight_that_only_its_name_tells_is_compared, 0.5
    ),
    "a scale in some rows": packed.test_a_scale_that_was_folded_into_some_of_the_rows_is_told,
    "a scale in one part": folders.test_a_scale_that_was_folded_into_the_weight_of_one_part_makes_it_another_one,
    "a sketch without a scale": lambda tmp: values.test_a_scale_that_was_folded_into_a_weight_is_told(
        2**-0.5, True, False, "base, and a sketch without a scale", tmp
    ),
    "layer 1 and layer 11": names.test_layer_1_is_not_layer_11,
    "a name within a name": names.test_a_name_within_a_name_is_another_name,
    "the decoders' outputs": exported(folders.test_an_encoder_and_its_decoders_compute_what_peft_computes, "merge"),
    "a part without names": exported(folders.test_a_part_without_names_is_not_passed_over),
    "one name for two weights": folders.test_one_name_for_two_weights_in_two_parts_means_neither,
    "words of a file's name": folders.test_a_files_name_is_matched_by_whole_words,
    "a normalisation in a weight": folded.test_a_normalisation_that_onnx_runtime_folds_offline_is_seen,
    "values that are like W": folded.test_equal_values_prove_a_weight_without_a_name_and_like_ones_do_not,
    "two text encoders": folders.test_a_component_is_not_another_one_that_has_the_same_names,
}


# The mutants.


def a_transpose_is_accepted(patch):
    alike = Finder._alike

    def both(self, key, sites):
        turned = Values(self.values.index, self.values.folder)
        turned.read = lambda site: _turned(Values.read(turned, site))
        upright, self.values = self.values, turned
        found = alike(self, key, sites)
        self.values = upright
        return found or alike(self, key, sites)

    patch.setattr(Finder, "_alike", both)


def _turned(read):
    if read is None:
        return None
    weight, place = read
    return weight, replace(place, out=place.in_, in_=place.out)


def the_base_is_compared_as_it_is_stored(patch):
    patch.setattr("loraformat.axes.Placement.to_matrix", lambda self, tensor: tensor)


def the_first_twin_is_taken(patch):
    whole = Finder._equal

    def first(self, key, sites):
        found = whole(self, key, sites)
        return found and replace(found, sites=found.sites[:1])

    patch.setattr(Finder, "_equal", first)


def values_are_asked_only_where_names_are_silent(patch):
    whole = Finder.look
    patch.setattr(Finder, "look", lambda self, key, named=(): [] if named else whole(self, key))


def sketches_are_not_held_against_the_named_weight(patch):
    patch.setattr("loraformat.bound.unlike", lambda *told: None)


def a_sketch_is_divided_by_its_norm(patch):
    whole = sketch._stored
    patch.setattr(sketch, "_stored", lambda total: (drawn := whole(total)) / (np.linalg.norm(drawn) or 1))


def what_is_seen_is_of_any_scale(patch):
    patch.setattr(Finder, "_require_scale", lambda self, key, seen: None)


def parts_are_compared_by_their_cosine(patch):
    patch.setattr(together, "compare", lambda one, other: likeness.Likeness(likeness.cosine(one, other), None))


def the_own_sketch_is_enough(patch):
    patch.setattr("loraformat_converters.onnx.finding.fingerprint.has_scale", lambda drawn: True)


def names_match_within_names(patch):
    def loose(adapter, table, part):
        stems = {key: key.removesuffix(".weight").rpartition(".")[2] for key in adapter}
        return Alignment({k: n for k in adapter for n in table if stems[k] in n}, ("", ""))

    patch.setattr(witness, "_aligned", loose)


def names_match_by_their_beginning(patch):
    def loose(adapter, table, part):
        return Alignment({k: n for k in adapter for n in table if n.startswith(k.removesuffix(".q.weight"))}, ("", ""))

    patch.setattr(witness, "_aligned", loose)


def a_part_is_skipped(patch):
    whole = folder.components_of
    patch.setattr(folder, "components_of", lambda path: {c: files[:-1] or files for c, files in whole(path).items()})


def one_part_is_enough(patch):
    whole = together._places
    patch.setattr(together, "_places", lambda key, found: whole(key, found)[:1])


def silence_of_a_part_is_absence(patch):
    patch.setattr(Doubts, "of", lambda self, key: None)


def a_name_is_proof_enough_in_every_part(patch):
    patch.setattr(together, "_strangers", lambda *a: [])


def words_match_within_words(patch):
    def loose(self, key):
        return True if any(word in key for word in self.own) else None

    patch.setattr(part.Part, "holds", loose)


def components_are_ignored(patch):
    def everywhere(found, adapter, problems):
        plain = lf.Adapter({key.partition(":")[2]: update for key, update in adapter.items()})
        yield from ((component, plain) for component in found)

    patch.setattr(components, "_shared_out", everywhere)


def a_name_proves_the_values(patch):
    patch.setattr(ladder, "require_own_values", lambda *said: None)


MUTANTS = [
    (a_name_proves_the_values, "a normalisation in a weight"),
    (a_name_proves_the_values, "values that are like W"),
    (a_transpose_is_accepted, "a square weight by its sketch"),
    (the_base_is_compared_as_it_is_stored, "a square weight by the base"),
    (the_first_twin_is_taken, "equal twins"),
    (values_are_asked_only_where_names_are_silent, "names against values"),
    (sketches_are_not_held_against_the_named_weight, "a weight of another base"),
    (sketches_are_not_held_against_the_named_weight, "a scale in a small weight"),
    (a_sketch_is_divided_by_its_norm, "a scale in a weight"),
    (what_is_seen_is_of_any_scale, "a scale in a weight"),
    (what_is_seen_is_of_any_scale, "a scale in some rows"),
    (parts_are_compared_by_their_cosine, "a scale in one part"),
    (the_own_sketch_is_enough, "a sketch without a scale"),
    (names_match_within_names, "a name within a name"),
    (names_match_by_their_beginning, "layer 1 and layer 11"),
    (a_part_is_skipped, "the decoders' outputs"),
    (one_part_is_enough, "the decoders' outputs"),
    (silence_of_a_part_is_absence, "a part without names"),
    (a_name_is_proof_enough_in_every_part, "one name for two weights"),
    (words_match_within_words, "words of a file's name"),
    (components_are_ignored, "two text encoders"),
]


test_the_check_is_green_on_the_code_as_it_is, test_the_check_is_red_on_a_mutant = net(CHECKS, MUTANTS)
