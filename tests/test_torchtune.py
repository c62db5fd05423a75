"""torchtune: its own files mean what it computed, in its own names, and are written again to the last bit."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from mutants import net
from refused import faults_of
from safetensors.numpy import load_file, save_file

import loraformat as lf
from loraformat import testing
from loraformat.layout import ReadOptions
from loraformat.parts import Lora
from loraformat.source import open_source
from loraformat.updates import Update
from loraformat.verbs.convert import save
from loraformat_converters.torchtune import NAMES, layout, read

HERE = Path(__file__).parent / "golden/torchtune"
CASES = ("lora", "dora", "qwen2")


def golden(case):
    return json.loads((HERE / case / "golden.json").read_text())


def adapter_of(case, folder):
    """The files that make an adapter, alone in a folder."""
    path = folder / f"{case}-adapter"
    path.mkdir()
    for name in ("adapter_model.pt", "adapter_config.json"):
        if (HERE / case / name).exists():
            shutil.copy(HERE / case / name, path)
    return path / "adapter_model.pt"


def options(case):
    fact = golden(case)
    return ReadOptions(alpha=fact["lora_alpha"], rank=fact["lora_rank"], scale_rule="alpha/r")


def loaded(case):
    return layout.read(open_source(HERE / case / "adapter_model.pt"), options(case)).adapter


def truth(case, what):
    found = load_file(HERE / case / "truth.safetensors")
    return {name.removeprefix(f"{what}."): t for name, t in found.items() if name.startswith(f"{what}.")}


def check_merged(case):
    """W' of every target is torchtune's."""
    adapter, merged, base = loaded(case), truth(case, "merged"), load_file(HERE / case / "base.safetensors")
    assert adapter.names == NAMES
    assert adapter.keys() == merged.keys()
    for key, update in adapter.items():
        assert testing.relative_error(update.apply(base[key]), merged[key]) <= 1e-6, key


CHECKS = {case: lambda folder, case=case: check_merged(case) for case in CASES}


def a_and_b_swapped(patch):
    patch.setattr(read, "_ENDINGS", {".lora_a.weight": "lora_b", ".lora_b.weight": "lora_a", ".magnitude": "magnitude"})


def alpha_as_the_scale(patch):
    patch.setattr(read.Loose, "scale", lambda self, module, r: (self.options.alpha, "factor"))


def the_magnitude_skipped(patch):
    real = read.Loose.add
    patch.setattr(
        read.Loose, "add", lambda self, key, part, place=None: part.kind == "magnitude" or real(self, key, part, place)
    )


def turned(patch):
    real = read.Placement
    patch.setattr(read, "Placement", lambda shape, out, in_: real(shape, in_, out))


test_the_goldens, test_a_mutant_turns_its_check_red = net(
    CHECKS,
    [
        (a_and_b_swapped, "lora"),
        (alpha_as_the_scale, "lora"),
        (the_magnitude_skipped, "dora"),
        (turned, "lora"),
    ],
)


@pytest.mark.parametrize("case", CASES)
def test_a_golden_is_claimed_by_torchtune_alone_and_written_again_to_the_last_bit(case, tmp_path):
    testing.check_claimed_alone(layout, adapter_of(case, tmp_path))
    save(loaded(case), tmp_path / "again", layout)
    before = open_source(HERE / case / "adapter_model.pt").tensors
    after = load_file(tmp_path / "again/adapter_model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert (after[name].dtype, after[name].shape) == (tensor.dtype, tensor.shape)
        assert after[name].tobytes() == np.ascontiguousarray(tensor).tobytes()
    testing.check_claimed_alone(layout, tmp_path / "again")
    assert lf.digest(lf.load(tmp_path / "again")) == lf.digest(loaded(case))


def test_a_configuration_beside_the_file_states_the_scale(tmp_path):
    adapter = lf.load(adapter_of("lora", tmp_path))
    assert {update.scale for update in adapter.values()} == {9 / 5}
    path = adapter_of("dora", tmp_path)
    assert {rule for rule, _ in faults_of(lf.load, path)} == {"LF-509"}
    for text in (
        "{",
        "[1]",
        '{"r": 3}',
        '{"r": 0, "lora_alpha": 8}',
        '{"r": 3, "lora_alpha": "8"}',
        f'{{"r": 3, "lora_alpha": {10**400}}}',
        '{"r": true, "lora_alpha": 8}',
    ):
        (path.parent / "adapter_config.json").write_text(text)
        assert faults_of(lf.load, path) == {("LF-503", "adapter_config.json")}
    (path.parent / "adapter_config.json").write_text('{"r": 4, "lora_alpha": 8}')
    assert {rule for rule, _ in faults_of(lf.load, path)} == {"LF-507"}


def normal(*shape):
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def test_beside_the_folder_that_torchtune_exports_for_peft_its_own_file_is_its_own(tmp_path):
    path = adapter_of("lora", tmp_path)
    config = json.loads((path.parent / "adapter_config.json").read_text())
    (path.parent / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "LORA"}))
    testing.check_claimed_alone(layout, path)
    assert {update.scale for update in lf.load(path).values()} == {9 / 5}


def test_what_is_no_tensor_of_an_adapter_is_refused(tmp_path):
    tensors = {f"layers.0.mlp.w1.lora_{r}.weight": t for r, t in (("a", normal(3, 7)), ("b", normal(11, 3)))}
    stated = ReadOptions(alpha=6, scale_rule="alpha/r")
    assert lf.from_tensors(tensors, "torchtune", options=stated)["layers.0.mlp.w1.weight"].scale == 2
    for name, tensor, rule in (
        ("layers.0.sa_norm.scale", normal(7), "LF-506"),
        ("layers.0.mlp.w2.lora_a.weight", normal(3, 7), "LF-303"),
        ("layers.0.mlp.w1.magnitude", normal(11, 1), "LF-309"),
    ):
        assert {found for found, _ in faults_of(lf.from_tensors, tensors | {name: tensor}, "torchtune", options=stated)} == {rule}  # fmt: skip
    bad = tensors | {"layers.0.mlp.w1.magnitude": normal(7)}
    assert faults_of(lf.from_tensors, bad, "torchtune", options=stated) == {("LF-404", 'targets["layers.0.mlp.w1.weight"]')}  # fmt: skip


def test_one_rank_and_one_alpha_or_the_way_to_have_them(tmp_path):
    one = Update((Lora(normal(3, 7), normal(11, 3), 6, "alpha/r"),))
    two = Update((Lora(normal(2, 5), normal(13, 2), 0.7, "factor"),))
    adapter = lf.Adapter({"layers.0.mlp.w1.weight": one, "layers.0.mlp.w2.weight": two}, NAMES)
    with pytest.raises(lf.LoraFormatError) as caught:
        save(adapter, tmp_path / "out", layout)
    assert [(p.rule, p.fix) for p in caught.value.problems] == [("LF-508", "--pad-rank"), ("LF-508", "--fold-scale")]
    from loraformat.verbs.adapt import adapt

    save(adapt(adapter, pad_rank=True, fold_scale=True).adapter, tmp_path / "out", layout)
    again = lf.load(tmp_path / "out")
    assert all(testing.relative_error(again[key].matrix(), update.matrix()) <= 1e-6 for key, update in adapter.items())
    assert json.loads((tmp_path / "out/adapter_config.json").read_text()) == {"r": 3, "lora_alpha": 3, "target_modules": ["w1", "w2"]}  # fmt: skip


def test_what_torchtune_has_no_place_for_is_refused(tmp_path):
    for kinds in testing.KINDS[1:]:
        adapter = replace(testing.random_adapter(3, (kinds,)), names=NAMES)
        if kinds != "dora":
            assert {rule for rule, _ in faults_of(save, adapter, tmp_path / "out", layout)} == {"LF-508"}
    mixed = replace(testing.random_adapter(3, ("lora", "dora")), names=NAMES)
    assert faults_of(save, mixed, tmp_path / "out", layout) == {("LF-508", "")}
    with pytest.raises(lf.LoraFormatError, match=r"retarget --to org\.pytorch\.torchtune"):
        save(testing.random_adapter(3), tmp_path / "out", layout)
    assert not list(tmp_path.iterdir())


def test_a_pt_file_under_torch_names_of_another_tool_is_not_claimed(tmp_path):
    save_file({"layers.0.attn.q_proj.lora_a": normal(3, 7)}, tmp_path / "mlx.safetensors")
    assert layout.detect(open_source(tmp_path / "mlx.safetensors")) is None
