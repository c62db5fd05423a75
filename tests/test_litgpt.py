"""litgpt: its own files mean what it computed, fused query, key and value included."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from mutants import net
from safetensors.numpy import load_file

import loraformat as lf
from loraformat import testing
from loraformat.layout import ReadOptions
from loraformat.source import open_source
from loraformat_converters.litgpt import NAMES, layout, read
from loraformat_converters.litgpt.heads import heads_of

HERE = Path(__file__).parent / "golden/litgpt"
CASES = ("query_value", "all", "key")


def truth(case):
    found = load_file(HERE / case / "truth.safetensors")
    return {name.removeprefix("delta."): t for name, t in found.items() if name.startswith("delta.")}


def check_deltas(case):
    adapter = lf.load(HERE / case / "lit_model.pth.lora")
    assert adapter.names == NAMES
    testing.check_golden(adapter, truth(case))
    assert adapter.keys() <= load_file(HERE / case / "base.safetensors").keys()


CHECKS = {case: lambda folder, case=case: check_deltas(case) for case in CASES}


def a_and_b_swapped(patch):
    patch.setattr(read, "_ENDINGS", {".lora_A": "lora_B", ".lora_B": "lora_A"})


def key_for_value(patch):
    patch.setattr(read, "_PARTS", ("lora_query", "lora_value", "lora_key"))


def equal_parts(patch):
    patch.setattr(read, "heads_of", lambda model: (sum(heads_of(model)) // 2,) * 2)


def alpha_as_the_scale(patch):
    patch.setattr(read.Loose, "scale", lambda self, module, r: (self.alpha, "factor"))


def the_rank_of_the_wide_pair(patch):
    real = read.Loose.scale

    def once(self, module, r):
        alpha, rule = real(self, module, r)
        return (alpha / 2, rule) if module.endswith("qkv") else (alpha, rule)

    patch.setattr(read.Loose, "scale", once)


test_the_goldens, test_a_mutant_turns_its_check_red = net(
    CHECKS,
    [
        (a_and_b_swapped, "all"),
        (key_for_value, "query_value"),
        (equal_parts, "query_value"),
        (alpha_as_the_scale, "key"),
        (the_rank_of_the_wide_pair, "query_value"),
    ],
)


@pytest.mark.parametrize("case", CASES)
def test_a_golden_is_claimed_by_litgpt_alone(case):
    testing.check_claimed_alone(layout, HERE / case / "lit_model.pth.lora")


def alone(case, folder, *kept):
    for name in ("lit_model.pth.lora", *kept):
        shutil.copy(HERE / case / name, folder)
    return folder / "lit_model.pth.lora"


def problems(call, *args, **kwargs):
    with pytest.raises(lf.LoraFormatError) as caught:
        call(*args, **kwargs)
    return {p.rule for p in caught.value.problems}


def test_without_the_files_beside_it_the_parts_are_not_known(tmp_path):
    path = alone("query_value", tmp_path)
    assert problems(lf.load, path) == {"LF-509", "LF-504"}
    path = alone("query_value", tmp_path, "hyperparameters.yaml")
    assert problems(lf.load, path) == {"LF-504"}
    config = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 24, "head_dim": 10}
    adapter = layout.read(open_source(path), ReadOptions(config=config)).adapter
    testing.check_golden(adapter, truth("query_value"))
    wrong = ReadOptions(config=config | {"num_key_value_heads": 4})
    assert problems(layout.read, open_source(path), wrong) == {"LF-507"}


def test_heads_that_no_model_has_are_not_allocated(tmp_path):
    path = alone("key", tmp_path, "hyperparameters.yaml")
    for heads in (10**18, 10**6, 0, -4):
        (tmp_path / "model_config.yaml").write_text(f"n_head: {heads}\nn_query_groups: 2\nhead_size: 10\n")
        assert problems(lf.load, path) == {"LF-504"}


def test_a_folder_is_read_by_the_file_in_it():
    assert lf.digest(lf.load(HERE / "all")) == lf.digest(lf.load(HERE / "all/lit_model.pth.lora"))


def test_it_is_not_written(tmp_path):
    from loraformat.verbs.convert import save

    assert problems(save, lf.load(HERE / "all/lit_model.pth.lora"), tmp_path / "out", layout) == {"LF-508"}


def test_another_rule_than_its_own_is_taken_at_the_users_word(tmp_path):
    path = alone("all", tmp_path, "model_config.yaml")
    (tmp_path / "hyperparameters.yaml").write_text("lora_query: true\nlora_key: true\nlora_value: true\n")
    options = ReadOptions(alpha=3, scale_rule="alpha/sqrt(r)")
    scales = {update.scale for update in layout.read(open_source(path), options).adapter.values()}
    assert np.allclose(sorted(scales), 3 / 5**0.5)
