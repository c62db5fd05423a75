"""Strangers' models as swap and as stack: what is fed or chosen equals a merge, what is not is the base, the rest is refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
from graphs import session
from test_strangers import STRANGERS, adapter_for, distance, feeds_of, noise, path_of

from loraformat import Hints, LoraFormatError
from loraformat.base import Options
from loraformat.registry import open_base
from loraformat.verbs.graph import detach
from loraformat.verbs.merge import prepare
from loraformat_converters.onnx import tort

pytestmark = [pytest.mark.slow, pytest.mark.strangers]

# How many can be chosen by row. Every matrix that a merge can change has a slot, but for those of an LSTM.
TAKEN = {
    "ocr detection": 47, "ocr recognition": 21, "ocr direction": 42, "speech, two rates": 0, "speech, one rate": 0,
    "speech, a sequence": 0, "speech, half": 0, "speech, dynamo": 0, "file types": 1, "music": 9, "detection": 64,
    "sentences, int8": 0,
}  # fmt: skip
RECURRENT = {"speech, a sequence": 2}


def put(base, adapter, hints, out, **options):
    """Attach what can be, after what cannot is named; how many that are."""
    how = Options(out, **options)
    try:
        plan = prepare("attach", [("a", adapter)], base, how, hints)
    except LoraFormatError as error:
        assert {problem.rule for problem in error.problems} == {"LF-608"}
        gone = {problem.where for problem in error.problems}
        adapter = replace(adapter, targets={key: update for key, update in adapter.items() if key not in gone})
        hints = Hints(names={key: name for key, name in hints.names.items() if key in adapter})
        if not adapter:
            return adapter, hints
        plan = prepare("attach", [("a", adapter)], base, how, hints)
    base.apply(plan)
    onnx.checker.check_model(str(out), full_check=True)
    return adapter, hints


@pytest.mark.parametrize("mode", ["swap", "stack cpu", "stack cuda"])
@pytest.mark.parametrize("name", TAKEN)
def test_what_is_fed_or_chosen_equals_a_merge(name, mode, tmp_path):
    stranger = STRANGERS[name]
    base = open_base(path_of(stranger))
    feeds = feeds_of(stranger, base)
    whole, hints = adapter_for(base, mixed=False)
    out = tmp_path / "out.onnx"
    first = next(iter(feeds))
    more = (
        {"mode": "swap", "slots": "required"}
        if mode == "swap"
        else {"mode": "stack", "rows": (first,), "provider": mode[6:]}
    )
    adapter, hints = put(base, whole, hints, out, **more)
    assert len(adapter) == (stranger.matrices - RECURRENT.get(name, 0) if mode == "swap" else TAKEN[name])
    if not adapter:
        return
    if mode == "swap":
        tensors = tort.read(tmp_path / "out.a.onnx_adapter").tensors
        on, off = tensors, open_base(out).slots.off()
    else:
        rows = feeds[first].shape[0]
        on, off = ({"lora.index": np.full(rows, n, np.int64)} for n in (1, 0))
    base.apply(prepare("merge", [("a", adapter)], base, Options(tmp_path / "merged.onnx"), hints))
    plain, merged, running = (session(p, optimise=False) for p in (base.path, tmp_path / "merged.onnx", out))
    limit = max(2e-6, 3 * noise(merged, session(tmp_path / "merged.onnx"), feeds))
    wanted, before = merged.run(None, feeds), plain.run(None, feeds)
    assert distance(running.run(None, {**feeds, **on}), wanted) <= limit <= 5e-5
    assert distance(running.run(None, {**feeds, **off}), before) <= (0 if mode != "stack cuda" else limit)
    assert distance(wanted, before) > max(1e-4, 20 * limit)
    detach(open_base(out), tmp_path / "detached.onnx")
    assert (tmp_path / "detached.onnx").read_bytes() == base.path.read_bytes()
