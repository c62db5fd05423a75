"""Canonical JSON is RFC 8785: one text for a value, the same as other implementations write."""

import json
import math

import numpy as np
import pytest
import rfc8785
from hypothesis import given, settings
from hypothesis import strategies as st

from loraformat import canonical

TEXTS = st.text(st.characters(exclude_categories=("Cs",)), max_size=6)
NUMBERS = st.integers(-(2**53) + 1, 2**53 - 1) | st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=20,
)


@given(VALUES)
@settings(max_examples=400)
def test_canonical_json_is_that_of_another_implementation_of_rfc_8785(value):
    assert canonical.dumps(value).encode() == rfc8785.dumps(value)


@given(st.integers(0, 2**64 - 1).map(lambda bits: np.uint64(bits).view(np.float64).item()).filter(math.isfinite))
@settings(max_examples=1500)
def test_every_float64_has_the_spelling_of_ecmascript(number):
    assert canonical.dumps(number).encode() == rfc8785.dumps(number)


@given(VALUES)
def test_canonical_json_read_again_is_the_value(value):
    """Beyond 2^53 the text of a float is that of another integer: it is compared as the float that it stands for."""
    assert as_floats(canonical.loads(canonical.dumps(value))) == as_floats(value)


@given(VALUES)
def test_canonical_json_has_one_spelling(value):
    text = canonical.dumps(value)
    assert canonical.dumps(canonical.loads(text)) == text


def as_floats(value):
    if isinstance(value, dict | list):
        return {k: as_floats(v) for k, v in value.items()} if isinstance(value, dict) else [as_floats(v) for v in value]
    return float(value) if type(value) is int else value


@given(VALUES)
def test_canonical_json_is_the_same_for_the_same_value(value):
    shuffled = json.loads(json.dumps(value), object_pairs_hook=lambda pairs: dict(reversed(pairs)))
    assert canonical.dumps(shuffled) == canonical.dumps(value)


# RFC 8785, appendix B: the bits of a double and its text.
SAMPLES = {
    "0000000000000000": "0",
    "8000000000000000": "0",
    "0000000000000001": "5e-324",
    "7fefffffffffffff": "1.7976931348623157e+308",
    "4340000000000000": "9007199254740992",
    "4430000000000000": "295147905179352830000",
    "44b52d02c7e14af5": "9.999999999999997e+22",
    "44b52d02c7e14af6": "1e+23",
    "444b1ae4d6e2ef4e": "999999999999999700000",
    "444b1ae4d6e2ef50": "1e+21",
    "3eb0c6f7a0b5ed8c": "9.999999999999997e-7",
    "3eb0c6f7a0b5ed8d": "0.000001",
    "41b3de4355555553": "333333333.3333332",
    "becbf647612f3696": "-0.0000033333333333333333",
}


@pytest.mark.parametrize("bits", SAMPLES)
def test_the_samples_of_the_rfc_are_spelled_as_it_says(bits):
    assert canonical.dumps(float(np.frombuffer(bytes.fromhex(bits), ">f8")[0])) == SAMPLES[bits]


@pytest.mark.parametrize("value", [math.nan, math.inf, 2**53 + 1, "\ud800", {"\udfff": 1}])
def test_what_has_no_canonical_form_is_refused(value):
    with pytest.raises(ValueError, match=r".+"):
        canonical.dumps(value)


@pytest.mark.parametrize("text", ['{"a": 1, "a": 1}', "NaN", "[-Infinity]", "[" * 100_000, "{} {}", ""])
def test_what_is_no_strict_json_is_refused(text):
    with pytest.raises(ValueError, match=r".+"):
        canonical.loads(text)
