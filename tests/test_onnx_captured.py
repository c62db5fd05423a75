"""Fixed buffers: every adapter changes the output. By CUDA graphs where onnxruntime has CUDA; else nothing is captured."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnxruntime
import pytest
from graphs import adapter, lora, model, save, session
from test_onnx_runtime import CHOICES, GIVEN, KEY, TEXT, X, attached, truth  # noqa: F401  (a fixture)

from loraformat import LoraFormatError
from loraformat.base import Options
from loraformat.registry import open_base
from loraformat.testing import relative_error
from loraformat.verbs.merge import merge, prepare
from loraformat_converters.onnx.running import captured
from loraformat_converters.onnx.runtime import Session

CUDA = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
PROVIDERS = [("CUDAExecutionProvider", {"use_tf32": "0"})] if CUDA else ["CPUExecutionProvider"]


def opened(folder, **options):
    running = Session(
        attached(folder, "swap", ["both"], pad_rank=6, **options), providers=PROVIDERS, captured=True, resident=3
    )
    for name, one in GIVEN.items():
        running.load(name, one)
    return running


@pytest.mark.parametrize("slots", ["optional", "required"])
def test_what_is_chosen_acts_in_buffers_that_stay(slots, truth, tmp_path):  # noqa: F811
    running = opened(tmp_path, slots=slots)
    runs = running._runs
    addresses = set()
    for choice in [*CHOICES, *CHOICES[::-1]]:
        assert relative_error(running.use(choice).run(X)["y"], truth(choice)) <= 3e-6
        addresses.add(
            (runs._buffer.data_ptr(), *(v.data_ptr() for c in runs._captures.values() for v in c.inputs.values()))
        )
    assert len(addresses) == 1
    assert len(runs._captures) == 1
    assert relative_error(running.run(X)["y"], truth(None)) <= 1e-6


def test_every_shape_has_buffers_of_its_own(truth, tmp_path):  # noqa: F811
    running = opened(tmp_path)
    for rows in (1, 3, 2, 1, 3):
        for choice in ("q", "v"):
            found = running.use(choice).run({"x": X["x"][:rows]})["y"]
            assert relative_error(found, truth(choice)[:rows]) <= 3e-6
    assert len(running._runs._captures) == 3
    assert {c.options.get_run_config_entry("gpu_graph_id") for c in running._runs._captures.values()} == {"1", "2", "3"}


def test_what_was_given_out_does_not_change(truth, tmp_path):  # noqa: F811
    running = opened(tmp_path)
    first = running.use("q").run(X)["y"]
    kept = first.copy()
    running.use("v").run(X)
    assert np.array_equal(first, kept)


def test_threads_take_turns(truth, tmp_path):  # noqa: F811
    running = opened(tmp_path)
    choices = [None, "both", "q", "v", {"both": 0.5, "q": -2.0}]
    wanted = [truth(choice) for choice in choices]

    def work(n):
        return relative_error(running.use(choices[n % 5]).run(X)["y"], wanted[n % 5])

    with ThreadPoolExecutor(8) as pool:
        assert max(pool.map(work, range(200))) <= 3e-6


def test_where_values_are_not_copied_on_the_device_arrays_are(truth, monkeypatch, tmp_path):  # noqa: F811
    monkeypatch.setattr(captured, "_copies", lambda one, other: False)
    running = opened(tmp_path)
    for choice in CHOICES:
        assert relative_error(running.use(choice).run(X)["y"], truth(choice)) <= 3e-6


def test_a_stack_and_a_strength_are_fed_in_place(truth, tmp_path):  # noqa: F811
    running = Session(attached(tmp_path, "stack", ["both", "q", "v"], rows=("x",)), providers=PROVIDERS, captured=True)
    for rows in (["v", None, "both"], [None, "q", "v"]):
        wanted = np.stack([truth(choice)[row] for row, choice in enumerate(rows)])
        assert relative_error(running.use(rows).run(X)["y"], wanted) <= 3e-6
    (tmp_path / "live").mkdir()
    running = Session(
        attached(tmp_path / "live", "branch", ["q", "v"], live_scale=True), providers=PROVIDERS, captured=True
    )
    for choice in ("q", {"q": 0.5, "v": -1.5}):
        assert relative_error(running.use(choice).run(X)["y"], truth(choice)) <= 3e-6


@pytest.mark.parametrize("dtype", ["float16", "double"])
def test_other_dtypes_lie_in_the_buffer(dtype, tmp_path):
    base = open_base(save(model(TEXT.replace("float", dtype)), tmp_path / "base.onnx"))
    base.apply(prepare("attach", [("both", GIVEN["both"])], base, Options(tmp_path / "swap.onnx", "swap", pad_rank=5)))
    running = Session(tmp_path / "swap.onnx", providers=PROVIDERS, captured=True)
    running.load("both", GIVEN["both"])
    x = {"x": X["x"].astype(np.float16 if dtype == "float16" else np.float64)}
    merge(GIVEN["both"], base, tmp_path / "merged.onnx")
    for choice, path in ((None, base.path), ("both", tmp_path / "merged.onnx"), (None, base.path)):
        wanted = session(path).run(None, x)[0].astype(np.float64)
        assert relative_error(running.use(choice).run(x)["y"].astype(np.float64), wanted) <= 5e-3


def test_slots_of_any_rank_have_no_buffer_that_stays(tmp_path):
    with pytest.raises(LoraFormatError, match=r"LF-705.*any rank[\s\S]*--pad-rank"):
        Session(attached(tmp_path, "swap", ["q"]), providers=PROVIDERS, captured=True)
    (tmp_path / "padded").mkdir()
    running = opened(tmp_path / "padded")
    with pytest.raises(LoraFormatError, match="LF-606"):
        running.load("wide", adapter({KEY: lora(7, 5, rank=7)}))


# No test that cannot fail: what CUDA graphs would do to a runtime that binds anew.


def the_buffer_keeps_its_first_adapter(patch):
    patch.setattr(captured.Captured, "run", _stale(captured.Captured.run))


def _stale(whole):
    def run(self, chosen, feeds, outputs):
        if self._acts is not None:
            self._acts = chosen  # bound, it believes
        return whole(self, chosen, feeds, outputs)

    return run


def the_slots_lie_over_each_other(patch):
    patch.setattr(captured, "_ALIGNMENT", 1 << 40)
    patch.setattr(captured, "_laid", _overlapping(captured._laid))


def _overlapping(whole):
    def laid(slots):
        patched = {
            name: captured._Place(0, p.shape, p.dtype) for name, p in whole(None if slots is None else slots)[0].items()
        }
        return patched, 1 << 12

    return laid


@pytest.mark.parametrize("mutant", [the_buffer_keeps_its_first_adapter, the_slots_lie_over_each_other])
def test_a_runtime_that_does_not_copy_is_red(mutant, monkeypatch, truth, tmp_path):  # noqa: F811
    mutant(monkeypatch)
    with pytest.raises(AssertionError):
        test_what_is_chosen_acts_in_buffers_that_stay("optional", truth, tmp_path)
