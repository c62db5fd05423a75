"""litgpt: its own files mean what it computed, fused query, key and value included; what is written, it loads."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from mutants import net
from refused import rules_of
from safetensors.numpy import load_file

import loraformat as lf
from loraformat import testing
from loraformat.layout import ReadOptions, WriteOptions
from loraformat.parts import Delta
from loraformat.plain_yaml import scalars
from loraformat.source import open_source
from loraformat.verbs.convert import save
from loraformat.verbs.retarget import retarget
from loraformat_converters.litgpt import NAMES, layout, read, write
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


GROUPS = {"query_value": 2, "all": 4, "key": 2}


def config_of(case):
    """The model's, as Hugging Face states it."""
    groups = GROUPS[case]
    return {
        "model_type": "llama",
        "num_attention_heads": 4,
        "num_key_value_heads": groups,
        "head_dim": 10,
        "hidden_size": 24,
    }


def check_rewritten(case, folder):
    """What was read of the tool's file is written with its tensors, and its texts, byte for byte."""
    save(lf.load(HERE / case), folder / "out", layout)
    for name in ("hyperparameters.yaml", "model_config.yaml"):
        assert (folder / "out" / name).read_bytes() == (HERE / case / name).read_bytes()
    before, after = open_source(HERE / case).tensors, open_source(folder / "out").tensors
    assert before.keys() == after.keys()
    assert all(after[name].tobytes() == tensor.tobytes() for name, tensor in before.items())


def check_from_torch(case, folder):
    """From the names of Hugging Face, q, k and v apart: the tensors that litgpt has under the same switches."""
    adapter = retarget(lf.load(HERE / case), "torch", config=config_of(case)).adapter
    adapter = replace(adapter, targets={k: u for k, u in adapter.items() if u.matrix().any()}, extensions={})
    there = retarget(adapter, NAMES, config=config_of(case)).adapter
    save(there, folder / "out", layout, WriteOptions(config=config_of(case)))
    before, after = open_source(HERE / case).tensors, open_source(folder / "out").tensors
    assert {n: t.shape for n, t in before.items()} == {n: t.shape for n, t in after.items()}
    said, told = (scalars((at / "hyperparameters.yaml").read_text()) for at in (folder / "out", HERE / case))
    numbers = {name: value for name, value in told.items() if name.startswith("lora_")}
    assert {name: said[name] for name in numbers} == numbers
    shutil.copy(HERE / case / "model_config.yaml", folder / "out")
    testing.check_golden(lf.load(folder / "out"), truth(case))


CHECKS = {case: lambda folder, case=case: check_deltas(case) for case in CASES}
CHECKS |= {f"{case} rewritten": lambda folder, case=case: check_rewritten(case, folder) for case in CASES}
CHECKS |= {f"{case} from torch": lambda folder, case=case: check_from_torch(case, folder) for case in CASES}


def a_and_b_swapped(patch):
    patch.setattr(read, "_ENDINGS", {".lora_A": "lora_B", ".lora_B": "lora_A"})


def key_for_value(patch):
    patch.setattr(read, "PARTS", ("lora_query", "lora_value", "lora_key"))


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


def parts_in_another_order(patch):
    real = write.apart
    patch.setattr(write, "apart", lambda a, b, sizes, enabled: real(a, b, sizes, enabled)[::-1])


def the_ranks_of_the_first_part(patch):
    real = write.apart

    def shared(a, b, sizes, enabled):
        blocks = real(a, b, sizes, enabled)
        return [(blocks[0][0], block[1]) for block in blocks]

    patch.setattr(write, "apart", shared)


def the_rank_forgotten(patch):
    patch.setattr(write, "alpha_for", lambda scale, r: scale)


test_the_goldens, test_a_mutant_turns_its_check_red = net(
    CHECKS,
    [
        (a_and_b_swapped, "all"),
        (key_for_value, "query_value"),
        (equal_parts, "query_value"),
        (alpha_as_the_scale, "key"),
        (the_rank_of_the_wide_pair, "query_value"),
        (parts_in_another_order, "query_value rewritten"),
        (parts_in_another_order, "all from torch"),
        (the_ranks_of_the_first_part, "all from torch"),
        (the_rank_forgotten, "all from torch"),
    ],
)


@pytest.mark.parametrize("case", CASES)
def test_a_golden_is_claimed_by_litgpt_alone(case):
    testing.check_claimed_alone(layout, HERE / case / "lit_model.pth.lora")


def alone(case, folder, *kept):
    for name in ("lit_model.pth.lora", *kept):
        shutil.copy(HERE / case / name, folder)
    return folder / "lit_model.pth.lora"


def test_without_the_files_beside_it_the_parts_are_not_known(tmp_path):
    path = alone("query_value", tmp_path)
    assert rules_of(lf.load, path) == {"LF-509", "LF-504"}
    path = alone("query_value", tmp_path, "hyperparameters.yaml")
    assert rules_of(lf.load, path) == {"LF-504"}
    config = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 24, "head_dim": 10}
    adapter = layout.read(open_source(path), ReadOptions(config=config)).adapter
    testing.check_golden(adapter, truth("query_value"))
    wrong = ReadOptions(config=config | {"num_key_value_heads": 4})
    assert rules_of(layout.read, open_source(path), wrong) == {"LF-507"}


def test_heads_that_no_model_has_are_not_allocated(tmp_path):
    path = alone("key", tmp_path, "hyperparameters.yaml")
    for heads in (10**18, 10**6, 0, -4):
        (tmp_path / "model_config.yaml").write_text(f"n_head: {heads}\nn_query_groups: 2\nhead_size: 10\n")
        assert rules_of(lf.load, path) == {"LF-504"}


def test_a_folder_is_read_by_the_file_in_it():
    assert lf.digest(lf.load(HERE / "all")) == lf.digest(lf.load(HERE / "all/lit_model.pth.lora"))


def targets(*names, case="all", change=lambda part: part):
    """Some targets of a golden, without what is kept of its files."""
    adapter = lf.load(HERE / case)
    kept = {key: replace(u, parts=(change(u["lora"]),)) for key, u in adapter.items() if key.endswith(names)}
    return replace(adapter, targets=kept, extensions={})


def test_what_a_switch_means_besides_is_zeros_that_change_nothing(tmp_path):
    adapter = targets("h.1.mlp.fc_2.weight", "h.0.attn.proj.weight")
    config = config_of("all") | {"num_hidden_layers": 2}
    options = WriteOptions(config=config)
    said = save(adapter, tmp_path / "out", layout, options)
    assert "6 more modules" in said[0].what
    again = lf.load(tmp_path / "out")
    whole = lf.load(HERE / "all")
    wanted = {key for key in whole if ".mlp." in key or key.endswith("attn.proj.weight")}
    assert again.keys() == wanted
    for key, update in again.items():
        wanted = adapter[key].matrix() if key in adapter else np.zeros_like(whole[key].matrix())
        assert update.matrix().tobytes() == wanted.tobytes()


def test_ranks_that_differ_are_padded_and_told(tmp_path):
    def shorter(part):
        return replace(part, lora_A=part.lora_A[:2], lora_B=part.lora_B[:, :2], alpha=part.scale, scale_rule="factor")

    adapter = targets("attn.proj.weight", change=lambda part: part if part.lora_A.shape[0] != 5 else shorter(part))
    longer = targets("lm_head.weight")
    scaled = {key: replace(u, parts=(replace(u["lora"]),)) for key, u in {**adapter, **longer}.items()}
    adapter = replace(adapter, targets=dict(sorted(scaled.items())))
    said = save(adapter, tmp_path / "out", layout)
    assert sum("padded" in problem.what for problem in said) == 2
    again = lf.load(tmp_path / "out")
    for key, update in adapter.items():
        assert testing.relative_error(again[key].matrix(), update.matrix()) <= 1e-7


def test_what_litgpt_has_no_place_for_is_refused(tmp_path):
    def refused(adapter, **config):
        assert rules_of(save, adapter, tmp_path / "out", layout, WriteOptions(config=config)) == {"LF-508"}
        assert not (tmp_path / "out").exists()

    refused(targets("attn.qkv.weight"))  # whose rows are not known
    refused(targets("attn.qkv.weight"), **config_of("query_value"))  # of another model
    refused(targets("mlp.proj.weight"))  # of what kind of MLP?
    refused(targets("attn.proj.weight"), num_hidden_layers=1)
    refused(targets("attn.proj.weight", change=lambda part: Delta(part.lora_B @ part.lora_A)))
    odd = targets("h.0.attn.proj.weight", change=lambda part: replace(part, alpha=1.25))
    refused(replace(odd, targets={**targets("lm_head.weight"), **odd}))  # two scales
    refused(testing.random_adapter(3))  # other names
    named = targets("lm_head.weight")
    refused(replace(named, targets={"transformer.wte.weight": named["lm_head.weight"]}))
    refused(replace(lf.load(HERE / "all"), extensions={"litgpt": "[]"}))


@pytest.mark.peer
@pytest.mark.parametrize("case", CASES)
def test_torch_and_yaml_read_what_is_written(case, tmp_path):
    torch = pytest.importorskip("torch", reason="litgpt loads by torch.load: pip install 'loraformat[peers]'")
    save(lf.load(HERE / case), tmp_path / "out", layout)
    ours, theirs = (torch.load(at / "lit_model.pth.lora", mmap=True)["model"] for at in (tmp_path / "out", HERE / case))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def test_another_rule_than_its_own_is_taken_at_the_users_word(tmp_path):
    path = alone("all", tmp_path, "model_config.yaml")
    (tmp_path / "hyperparameters.yaml").write_text("lora_query: true\nlora_key: true\nlora_value: true\n")
    options = ReadOptions(alpha=3, scale_rule="alpha/sqrt(r)")
    scales = {update.scale for update in layout.read(open_source(path), options).adapter.values()}
    assert np.allclose(sorted(scales), 3 / 5**0.5)
