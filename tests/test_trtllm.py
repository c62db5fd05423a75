"""TensorRT-LLM: what its own converter wrote of a PEFT adapter is PEFT's ΔW, and is written again byte for byte."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from mutants import net
from peft_goldens import HERE as PEFT
from peft_goldens import truth_of
from refused import faults_of
from safetensors.numpy import load_file

import loraformat as lf
from loraformat import testing
from loraformat.axes import Placement
from loraformat.layout import ReadOptions
from loraformat.parts import Lora
from loraformat.source import open_source
from loraformat.updates import Update
from loraformat.verbs.adapt import adapt
from loraformat.verbs.convert import save
from loraformat.verbs.retarget import retarget
from loraformat_converters.trtllm import CONFIG, MODULES, NAMES, WEIGHTS, layout, read, sizes
from loraformat_converters.trtllm import write as writing

HERE = Path(__file__).parent / "golden/trtllm"
CASES = ("plain-float32", "plain-float16", "dora-float32", "dora-float16", "manager-llama")
LLAMA = json.loads((PEFT / "llama/base/config.json").read_text())
# hf_lora_convert.py, hf_modules_to_trtllm_modules
TORCH = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_dense": "self_attn.o_proj", "mlp_h_to_4h": "mlp.gate_proj", "mlp_4h_to_h": "mlp.down_proj",
    "mlp_gate": "mlp.up_proj",
}  # fmt: skip
OPTIONS = ReadOptions(config=LLAMA)
MIXTRAL = {"model_type": "mixtral", "hidden_size": 24, "intermediate_size": 20, "num_local_experts": 3}


def loaded(folder):
    return layout.read(open_source(folder), OPTIONS).adapter


def check_deltas(case):
    """The change of every module is PEFT's, but for the rounding of its factors to the array's type."""
    wanted = truth_of("llama", "delta")
    found = {}
    for key, update in loaded(HERE / case).items():
        _, layer, module = key.split(".")
        found[f"model.layers.{layer}.{TORCH[module]}.weight"] = update
    testing.check_golden(lf.Adapter(found), wanted, 1e-3 if case.endswith("16") else 1e-6)


def experts():
    return layout.read(open_source(HERE / "manager-experts"), ReadOptions(config=MIXTRAL)).adapter


def check_experts():
    """One row of all experts is, expert by expert, what PEFT merges."""
    adapter = retarget(experts(), "torch", config=MIXTRAL).adapter
    testing.check_golden(adapter, load_file(HERE / "experts/truth.safetensors"))


def check_experts_written(folder):
    """Of PEFT's own folder the very rows that TensorRT-LLM makes of it for its runtime."""
    adapter = retarget(lf.load(HERE / "experts/adapter"), NAMES, config=MIXTRAL).adapter
    save(adapt(adapter, fold_scale=True).adapter, folder / "again", layout)
    assert rows_of(folder / "again") == rows_of(HERE / "manager-experts")


def rows_of(folder):
    weights, table = (np.load(folder / name)[0] for name in (WEIGHTS, CONFIG))
    return {tuple(entry[:3]): row.tobytes() for entry, row in zip(table.tolist(), weights, strict=True)}


def check_written(case, folder):
    """Two arrays with the golden's own rows, in another order."""
    save(loaded(HERE / case), folder / "again", layout)
    assert rows_of(folder / "again") == rows_of(HERE / case)


CHECKS = {
    **{case: lambda folder, case=case: check_deltas(case) for case in CASES},
    **{f"{case} written": lambda folder, case=case: check_written(case, folder) for case in CASES},
    "experts": lambda folder: check_experts(),
    "experts written": check_experts_written,
}


def sides_swapped(patch):
    patch.setattr(read, "sides", lambda config: {m: s[::-1] for m, s in sizes.sides(config).items()})


def gate_for_up(patch):
    order = list(MODULES)
    order[5], order[7] = order[7], order[5]
    patch.setattr(read, "MODULES", tuple(order))


def a_behind_b(patch):
    real = writing.np.concatenate
    patch.setattr(writing.np, "concatenate", lambda parts: real(parts[::-1]))


def the_last_expert_first(patch):
    real = read.Lora
    patch.setattr(read, "Lora", lambda a, b, *scale: real(a[::-1] if a.ndim == 3 else a, b, *scale))


def pair_by_pair(patch):
    """A and B of one expert, then those of the next."""
    real = writing._for_each
    patch.setattr(writing, "_for_each", lambda part: [f for pair in zip(*real(part), strict=True) for f in pair])


test_the_goldens, test_a_mutant_turns_its_check_red = net(
    CHECKS,
    [
        (sides_swapped, "plain-float32"),
        (gate_for_up, "plain-float32"),
        (a_behind_b, "dora-float32 written"),
        (the_last_expert_first, "experts"),
        (pair_by_pair, "experts written"),
    ],
)


def test_the_numbers_of_the_modules_are_those_of_the_repository():
    assert {name: i for i, name in enumerate(MODULES)} == json.loads((HERE / "golden.json").read_text())["modules"]


@pytest.mark.parametrize("case", CASES)
def test_a_golden_is_claimed_by_trtllm_alone(case):
    testing.check_claimed_alone(layout, HERE / case)
    testing.check_claimed_alone(layout, HERE / case / WEIGHTS)


def test_without_the_sizes_of_the_model_a_row_is_not_cut(tmp_path):
    found = faults_of(lf.load, HERE / "plain-float32")
    assert {rule for rule, _ in found} == {"LF-504"}
    assert len(found) == 14
    other = ReadOptions(config=LLAMA | {"intermediate_size": 41})
    found = faults_of(layout.read, open_source(HERE / "plain-float32"), other)
    assert {rule for rule, _ in found} == {"LF-309"}


def arrays(folder, weights, table):
    folder.mkdir(exist_ok=True)
    np.save(folder / WEIGHTS, weights)
    np.save(folder / CONFIG, table)
    return open_source(folder)


def test_the_manager_of_the_runtime_has_the_rows_of_the_converter():
    assert rows_of(HERE / "manager-llama") == rows_of(HERE / "dora-float32")


def test_experts_of_another_number_or_of_one_axis_are_refused(tmp_path):
    other = ReadOptions(config=MIXTRAL | {"num_local_experts": 4})
    assert {rule for rule, _ in faults_of(layout.read, open_source(HERE / "manager-experts"), other)} == {"LF-309"}
    flat = {"layers.0.moe_gate": Update((Lora(normal(3, 24), normal(20, 3), 1, "factor"),))}
    assert faults_of(save, lf.Adapter(flat, NAMES), tmp_path / "x", layout) == {("LF-508", "layers.0.moe_gate")}


def test_a_factor_that_experts_share_is_written_for_each(tmp_path):
    shared = Lora(normal(1, 3, 24), normal(3, 20, 3), 1, "factor")
    save(lf.Adapter({"layers.1.moe_gate": Update((shared,))}, NAMES), tmp_path / "out", layout)
    again = layout.read(open_source(tmp_path / "out"), ReadOptions(config=MIXTRAL)).adapter["layers.1.moe_gate"]
    assert np.array_equal(again.matrix(), Update((shared,)).matrix())


def test_rows_that_say_something_else_are_refused_each(tmp_path):
    weights = np.load(HERE / "dora-float32" / WEIGHTS)
    table = np.load(HERE / "dora-float32" / CONFIG).copy()
    table[0, 0, 3], table[0, 1, 0], table[0, 2, 2], table[0, 3] = 1, 99, 0, table[0, 4]
    source = arrays(tmp_path / "bad", weights, table)
    found = {rule for rule, _ in faults_of(layout.read, source, OPTIONS)}
    assert found == {"LF-504", "LF-603"}
    table = np.load(HERE / "dora-float32" / CONFIG).copy()
    table[0, :, 2] = 4
    assert {r for r, _ in faults_of(layout.read, arrays(tmp_path / "rank", weights, table), OPTIONS)} == {"LF-309"}


@pytest.mark.parametrize(
    ("weights", "table"),
    [
        (np.zeros((1, 2, 5), np.float64), np.zeros((1, 2, 3), np.int32)),
        (np.zeros((1, 2, 5), np.float32), np.zeros((1, 2, 3), np.int64)),
        (np.zeros((1, 2, 5), np.float32), np.zeros((1, 3, 3), np.int32)),
        (np.zeros((1, 2, 5), np.float32), np.zeros((1, 2, 5), np.int32)),
        (np.zeros((2, 5), np.float32), np.zeros((2, 3), np.int32)),
        (np.array({"a": 1}, object), np.zeros((1, 2, 3), np.int32)),
    ],
)
def test_arrays_of_another_form_are_refused(weights, table, tmp_path):
    assert {rule for rule, _ in faults_of(layout.read, arrays(tmp_path / "x", weights, table), OPTIONS)} == {"LF-701"}


@pytest.mark.parametrize(
    "damage",
    [b"", b"\x93NUMPY\x01\x00\xff\xff{", b"PK\x03\x04", b"\x80\x04N.", b"\x93NUMPY\x01\x00\x0a\x00c'a': (1, }\n"],
)
def test_a_file_that_is_no_array_is_refused(damage, tmp_path):
    shutil.copytree(HERE / "plain-float32", tmp_path / "x")
    (tmp_path / "x" / WEIGHTS).write_bytes(damage)
    assert {rule for rule, _ in faults_of(layout.read, open_source(tmp_path / "x"), OPTIONS)} == {"LF-701"}
    whole = (HERE / "plain-float32" / CONFIG).read_bytes()
    shutil.copy(HERE / "plain-float32" / WEIGHTS, tmp_path / "x")
    (tmp_path / "x" / CONFIG).write_bytes(whole[:-5])
    assert {rule for rule, _ in faults_of(layout.read, open_source(tmp_path / "x"), OPTIONS)} == {"LF-701"}


def normal(*shape):
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def test_a_scale_is_folded_only_when_asked_and_every_reason_is_told(tmp_path):
    pair = Update((Lora(normal(3, 24), normal(12, 3), 6, "alpha/r"),), Placement((12, 24), (0,), (1,)))
    adapter = lf.Adapter({"layers.1.attn_k": pair}, NAMES)
    with pytest.raises(lf.LoraFormatError, match="--fold-scale"):
        save(adapter, tmp_path / "out", layout)
    save(adapt(adapter, fold_scale=True).adapter, tmp_path / "out", layout)
    again = loaded(tmp_path / "out")["layers.1.attn_k"]
    assert testing.relative_error(again.matrix(), pair.matrix()) <= 1e-6
    ones = {key: Update((Lora(normal(3, 24), normal(12, 3), 1, "factor"),)) for key in ("layers.0.attn", "h.0.attn_q")}
    double = {"layers.0.attn_q": Update((Lora(normal(3, 24).astype(np.float64), normal(24, 3), 1, "factor"),))}
    assert faults_of(save, lf.Adapter(ones, NAMES), tmp_path / "x", layout) == {("LF-508", key) for key in ones}
    assert faults_of(save, lf.Adapter(double, NAMES), tmp_path / "x", layout) == {("LF-508", "")}
    assert faults_of(save, testing.random_adapter(), tmp_path / "x", layout) == {("LF-508", "")}
    for kind in testing.KINDS[1:]:
        other = replace(testing.random_adapter(3, (kind,)), names=NAMES)
        assert {rule for rule, _ in faults_of(save, other, tmp_path / "x", layout)} == {"LF-508"}
    assert not (tmp_path / "x").exists()


def test_bfloat16_goes_as_two_bytes_without_a_type(tmp_path):
    a, b = (t.astype(ml_dtypes.bfloat16) for t in (normal(3, 24), normal(12, 3)))
    adapter = lf.Adapter({"layers.1.attn_k": Update((Lora(a, b, 1, "factor"),))}, NAMES)
    save(adapter, tmp_path / "out", layout)
    assert np.load(tmp_path / "out" / WEIGHTS).dtype == np.dtype("V2")
    again = loaded(tmp_path / "out")["layers.1.attn_k"]["lora"]
    assert again.lora_A.tobytes() == a.tobytes()
    assert again.lora_B.dtype == b.dtype
