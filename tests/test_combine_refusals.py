"""What is of another model, or makes no sense, is not combined; and what is said of the result."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from combined import GIVEN, ONE, TWO, adapter

import loraformat as lf
from loraformat.axes import Placement


def placed(shape, spec):
    return replace(
        ONE, targets={k: replace(u, placement=Placement.of(shape, spec)) for k, u in ONE.items() if k == "a.weight"}
    )


@pytest.mark.parametrize(
    ("other", "rule"),
    [
        (lambda: replace(ONE, names="mlx"), "LF-507"),
        (lambda: replace(ONE, targets={f"unet:{k}": u for k, u in ONE.items()}, components=("unet",)), "LF-507"),
        (lambda: replace(ONE, base_model={"name": "other"}), "LF-607"),
        (lambda: replace(ONE, targets={k: replace(u, base_sha256="1" * 64) for k, u in ONE.items()}), "LF-607"),
        (lambda: adapter(1, keys={"a.weight": (11, 13)}), "LF-606"),
        (lambda: placed((11, 13), "in,out"), "LF-605"),
    ],
)
def test_adapters_of_different_models_are_refused(other, rule):
    first = replace(placed((13, 11), "out,in"), base_model={"name": "this"})
    first = replace(first, targets={k: replace(u, base_sha256="0" * 64) for k, u in first.items()})
    with pytest.raises(lf.LoraFormatError, match=rule):
        lf.combine([(first, 1.0), (other(), 1.0)])
    if rule == "LF-607":
        assert lf.combine([(first, 1.0), (other(), 1.0)], any_base=True).adapter


def test_the_sketch_that_tells_a_scale_is_kept():
    place = Placement.of((13, 11), "out,in")
    drawn = np.arange(64, dtype=np.float32)
    older, newer = (
        replace(ONE, targets={"a.weight": replace(ONE["a.weight"], placement=place, sketch=held)})
        for held in (drawn / np.linalg.norm(drawn), drawn)
    )
    made = lf.combine([(older, 1.0), (newer, 1.0)]).adapter
    np.testing.assert_array_equal(made["a.weight"].sketch, drawn)


def test_what_is_said_of_the_result_is_what_all_say():
    one = replace(
        ONE,
        base_model={"name": "m", "revision": "1"},
        about={"license": "mit", "title": "x", "trigger_words": ["a", "b"]},
        extensions={"peft": '{"task_type": "CAUSAL_LM", "r": 3, "inner": {"x": 1, "y": 2}}', "mlx": "{}"},
    )
    two = replace(
        TWO,
        base_model={"name": "m", "size": 2},
        about={"license": "mit", "title": "y", "trigger_words": ["b", "c"]},
        extensions={"peft": '{"task_type": "CAUSAL_LM", "r": 5, "inner": {"x": 1, "y": 3}}'},
    )
    made = lf.combine([(one, 1.0), (two, 1.0)]).adapter
    assert made.base_model == {"name": "m", "revision": "1", "size": 2}
    assert made.about == {"license": "mit", "trigger_words": ["a", "b", "c"]}
    assert made.extensions.keys() == {"peft"}
    assert json.loads(made.extensions["peft"]) == {"task_type": "CAUSAL_LM", "inner": {"x": 1}}
    components = [
        replace(a, base_model={"unet": {"name": "m"} | more}) for a, more in ((one, {}), (two, {"revision": "2"}))
    ]
    assert lf.combine([(a, 1.0) for a in components]).adapter.base_model == {"unet": {"name": "m", "revision": "2"}}
    with pytest.raises(lf.LoraFormatError, match=r"LF-607.*base_model\.unet\.name"):
        lf.combine([(components[0], 1.0), (replace(two, base_model={"unet": {"name": "n"}}), 1.0)])


def test_a_placement_that_one_adapter_knows_is_the_result_s():
    assert lf.combine([(ONE, 1.0), (placed((13, 11), "out,in"), 1.0)]).adapter["a.weight"].placement.spec == "out,in"


@pytest.mark.parametrize(
    ("method", "how"),
    [
        ("tie", {}),
        ("ties", {"rank": 2}),
        ("ties", {"density": 0.5}),
        ("ties", {"density": 0.0, "rank": 2}),
        ("ties", {"density": 1.5, "rank": 2}),
        ("cat", {"density": 0.5}),
        ("cat", {"rank": 4}),
        ("svd", {}),
        ("svd", {"rank": 0}),
        ("svd", {"rank": "full"}),
        ("slerp", {}),
        ("della", {"density": 0.1, "epsilon": 0.3, "rank": 2}),
        ("breadcrumbs", {"density": 0.5, "gamma": 1.0, "rank": 2}),
        ("peft_cat", {"rank": 3}),
    ],
)
def test_settings_that_a_method_does_not_have_are_refused(method, how):
    with pytest.raises(lf.LoraFormatError, match="LF-705"):
        lf.combine(GIVEN, method, **how)


@pytest.mark.parametrize("weight", [math.nan, math.inf, {"nowhere": 1.0}])
def test_weights_that_mean_nothing_are_refused(weight):
    with pytest.raises(lf.LoraFormatError, match="LF-705"):
        lf.combine([(ONE, weight)])


def test_nothing_is_left_where_every_weight_is_zero():
    with pytest.raises(lf.LoraFormatError, match="LF-705"):
        lf.combine([(ONE, 0.0)])
