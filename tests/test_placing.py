"""A placement comes from evidence that agrees: what the sizes alone can say, and where they cannot."""

import numpy as np
import pytest

import loraformat as lf
from loraformat.placing import place


def lora(*matrix):
    *batch, out, in_ = matrix
    return lf.Update((lf.Lora(np.ones((*batch, 2, in_)), np.ones((*batch, out, 2)), 1.0, "factor"),))


FITS = {
    "a linear": ((5, 7), (5, 7), "out,in"),
    "a Conv1D": ((7, 5), (5, 7), "in,out"),
    "experts": ((3, 5, 7), (3, 5, 7), "batch,out,in"),
    "experts [in, out]": ((3, 7, 5), (3, 5, 7), "batch,in,out"),
    "shared experts": ((3, 7, 5), (1, 5, 7), "batch,in,out"),
    "as many experts as outputs": ((5, 5, 7), (5, 5, 7), "batch,out,in"),
    "a flattened kernel": ((5, 7, 3, 2), (5, 42), "out,in,in,in"),
    "a flattened kernel of one axis": ((5, 7, 3), (5, 21), "out,in,in"),
}
OPEN = {
    "a square": ((5, 5), (5, 5)),
    "square experts": ((3, 5, 5), (3, 5, 5)),
    "a kernel with another axis of the size of out": ((3, 7, 3, 2), (3, 42)),
    "a kernel that ends with out": ((3, 2, 7, 5), (5, 42)),
}


@pytest.mark.parametrize("name", FITS)
def test_sizes_that_fit_in_one_way_are_evidence(name):
    shape, matrix, spec = FITS[name]
    found, evidence = place("w", lora(*matrix), shape, None, ())
    assert found.spec == spec
    assert evidence[0].startswith("shape: ")


@pytest.mark.parametrize("name", OPEN)
def test_sizes_that_fit_in_several_ways_are_none_and_the_fix_can_be_typed(name):
    shape, matrix = OPEN[name]
    with pytest.raises(lf.LoraFormatError) as caught:
        place("w", lora(*matrix), shape, None, ())
    (problem,) = caught.value.problems
    assert problem.rule == "LF-604"
    spec = problem.fix.split("=")[1].split("'")[0]
    if name != "a kernel that ends with out":
        assert place("w", lora(*matrix), shape, spec, ())[0].spec == spec


@pytest.mark.parametrize(("shape", "matrix"), [((5, 8), (5, 7)), ((3, 5, 8), (3, 5, 7)), ((5, 7, 3, 3), (5, 42))])
def test_sizes_that_fit_in_no_way_are_another_base(shape, matrix):
    with pytest.raises(lf.LoraFormatError) as caught:
        place("w", lora(*matrix), shape, None, ())
    assert caught.value.problems[0].rule == "LF-606"


def test_a_replacement_that_may_resize_is_laid_out_in_its_own_shape():
    part = lf.Replace(np.ones((9, 7)), ("resize",))
    update = lf.Update((part, *lora(9, 7).parts))
    assert place("w", update, (5, 7), None, ())[0] == lf.Placement((9, 7), (0,), (1,))
    assert place("w", update, (5, 7), None, (("out,in", "config: …"),))[0].shape == (9, 7)
    with pytest.raises(lf.LoraFormatError) as caught:
        place("w", lf.Update((lf.Replace(part.replace), *lora(9, 7).parts)), (5, 7), None, ())
    assert caught.value.problems[0].rule == "LF-606"
