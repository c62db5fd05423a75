"""Configurations that nobody should have written: read, or refused by a rule; never another exception."""

import json
import random
import shutil
from dataclasses import replace

import gguf_goldens
import mlx_goldens
import pytest

import loraformat as lf
from loraformat.layout import WriteOptions
from loraformat.verbs.convert import save
from loraformat.verbs.retarget import retarget
from loraformat_converters.gguf import layout as gguf
from loraformat_converters.mlx import layout as mlx

ODD = (
    *(None, True, False, 0, 1, -1, 2, 5, 2**70, 1.5, 1e308, 5e-324, "", "x", "lora", "dora", "full", "llama", "qwen2"),
    *([], [1], ["q"], {}, {"a": 1}, {"model_type": "llama"}, [[["x"]]], "\ud800", float("nan"), float("inf")),
)


def altered(chance, value, names):
    """A copy with some members gone, of other values, or new."""
    copy = json.loads(json.dumps(value))
    for _ in range(chance.randint(1, 3)):
        inner = copy.get("lora_parameters")
        place = inner if isinstance(inner, dict) and chance.random() < 0.5 else copy
        name = chance.choice([*place, *names])
        if chance.random() < 0.25:
            place.pop(name, None)
        else:
            place[name] = chance.choice(ODD)
    return copy


@pytest.mark.parametrize("case", mlx_goldens.CASES)
def test_an_mlx_configuration(case, tmp_path):
    chance = random.Random(case)
    shutil.copytree(mlx_goldens.adapter_of(case), tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    outcomes = set()
    for _ in range(60):
        changed = altered(chance, config, ("alpha", "keys", "use_dora", "lora_layers", "other"))
        (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(changed))
        try:
            save(lf.load(tmp_path / "a"), tmp_path / "out", mlx, force=True)
            outcomes.add("read")
        except lf.LoraFormatError as error:
            outcomes.add(error.problems[0].rule)
    assert "read" in outcomes
    assert len(outcomes) > 1 or case == "full"


@pytest.mark.parametrize("case", ["llama", "mixtral", "qwen2_moe"])
def test_the_config_of_a_model(case, tmp_path):
    chance = random.Random(case)
    config = gguf_goldens.config_of(case)
    names = ("text_config", "general.architecture", "num_experts", "num_local_experts", "model_type")
    adapters = (lf.load(gguf_goldens.HERE / case / "peft"), lf.load(gguf_goldens.file_of(case)))
    outcomes = set()
    for _ in range(60):
        changed = altered(chance, {name: config[name] for name in config if "num" in name or "t" in name}, names)
        for adapter, to in ((adapters[0], "gguf"), (adapters[0], "mlx"), (adapters[1], "torch")):
            try:
                found = retarget(adapter, to, config=changed).adapter
                if to == "gguf":
                    save(found, tmp_path / "a.gguf", gguf, WriteOptions(config=changed), force=True)
                outcomes.add("done")
            except lf.LoraFormatError as error:
                outcomes.add(error.problems[0].rule)
    assert {"done", "LF-604"} <= outcomes


def test_kept_metadata(tmp_path):
    chance = random.Random(0)
    adapter = lf.load(gguf_goldens.file_of("llama"))
    kept = json.loads(adapter.extensions["gguf"])
    kinds = ("u8", "i8", "u64", "f32", "f64", "str", "bool", "[u8]", "[str]", "[[u8]]", 5, None, "[", "")
    outcomes = set()
    for _ in range(200):
        name = chance.choice([*kept, "other", "\ud800"])
        changed = kept | {name: chance.choice([chance.choice(ODD), [chance.choice(kinds), chance.choice(ODD)]])}
        try:
            extensions = {"gguf": json.dumps(changed)}
            save(replace(adapter, extensions=extensions), tmp_path / "a.gguf", gguf, force=True)
            assert lf.load(tmp_path / "a.gguf").keys() == adapter.keys()
            outcomes.add("written")
        except lf.LoraFormatError as error:
            outcomes.add(error.problems[0].rule)
    assert outcomes == {"written", "LF-508"}


@pytest.mark.parametrize("number", ["9" * 5000, "00", "4"])
def test_a_number_in_a_name_is_any_number(number):
    """Python's own int refuses five thousand digits."""
    config = {"model_type": "qwen3_moe", "num_experts": 3}
    whole = lf.load(gguf_goldens.HERE / "qwen3_moe" / "peft")
    update = whole["model.layers.0.mlp.experts.0.up_proj.weight"]
    for key in (f"model.layers.{number}.mlp.up_proj.weight", f"model.layers.0.mlp.experts.{number}.up_proj.weight"):
        try:
            retarget(lf.Adapter({key: update}), "mlx", config=config)
        except lf.LoraFormatError as error:
            assert error.problems[0].rule in ("LF-602", "LF-606")
