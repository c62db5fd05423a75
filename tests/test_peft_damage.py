"""PEFT folders that are wrong in ways nobody thought of: read or refused, never a traceback."""

import json
from pathlib import Path

import numpy as np
import pytest
from peft_goldens import SUPPORTED, adapter_of, base_of

import loraformat as lf
from loraformat import file
from loraformat.layout import ReadOptions
from loraformat.source import open_source
from loraformat_converters.peft import config as configs
from loraformat_converters.peft import write
from loraformat_converters.peft.read import read_tensors

VALUES = [
    *(None, True, False, 0, 1, -1, 2.5, "x", "all", "(", 10**9, [], ["a"], [1], [None], [[1]], [True, False, True]),
    *({}, {"a": 1}, {"a": [1]}, {"nblocks": "x"}, {"": 1}, {"x.lora_E": [True]}),
]
KEYS = ["use_bdlora", "enable_lora", "token_indices", "init_r", "alpha", "save_projection", "target_parameters", "bias"]
NAMES = [
    lambda name: f"{name}.x",
    lambda name: f"base_model.model.{name}",
    lambda name: name.replace("base_model.model.", ""),
    lambda name: name.replace("lora_A", "lora_B"),
    lambda name: name.replace("lora_", "base_layer.lora_"),
    lambda name: name.replace(".weight", ".bias"),
    lambda name: name.rpartition(".")[2],
    lambda name: "",
]


def other_shape(draw, tensor):
    sizes = list(tensor.shape)
    match draw.integers(5):
        case 0:
            sizes[draw.integers(len(sizes))] += 1
        case 1:
            sizes[draw.integers(len(sizes))] = 0
        case 2:
            sizes = sizes[:-1]
        case 3:
            sizes = [*sizes, 1]
        case 4:
            sizes = []
    return np.ones(sizes, tensor.dtype)


def damage(draw, tensors, config):
    """One or two changes of a key, a tensor's shape, type or name, or a tensor that is gone."""
    for _ in range(1 + draw.integers(2)):
        name = draw.choice(list(tensors))
        match draw.integers(6):
            case 0 | 1:
                config[draw.choice([*config, *KEYS])] = VALUES[draw.integers(len(VALUES))]
            case 2 if len(tensors) > 1:
                del tensors[name]
            case 3 if tensors[name].ndim:
                tensors[name] = other_shape(draw, tensors[name])
            case 4:
                tensors[name] = tensors[name].astype([np.int64, np.float16, np.bool_][draw.integers(3)])
            case _:
                tensors[NAMES[draw.integers(len(NAMES))](name)] = tensors[name]


@pytest.mark.parametrize("case", SUPPORTED)
def test_a_damaged_adapter_is_read_and_written_again_or_refused(case):
    folder: Path = adapter_of(case)
    whole = dict(open_source(folder).tensors)
    settings = json.loads((folder / configs.FILE).read_text())
    shapes = {name: p.shape for name, p in lf.open_base(base_of(case)).parameters().items()}
    refused = 0
    for seed in range(30):
        draw = np.random.default_rng(seed)
        tensors, config = dict(whole), dict(settings)
        damage(draw, tensors, config)
        try:
            parsed, _ = configs.parse(json.dumps(config))
            adapter = read_tensors(tensors, parsed, ReadOptions(), "here", shapes if seed % 3 else None).adapter
            file.check(adapter)
            write.write(adapter)
        except lf.LoraFormatError:
            refused += 1
    assert refused


@pytest.mark.parametrize("case", SUPPORTED)
def test_no_tensor_of_a_golden_is_ignored(case):
    whole = dict(open_source(adapter_of(case)).tensors)
    config, _ = configs.parse((adapter_of(case) / configs.FILE).read_text())
    shapes = {name: p.shape for name, p in lf.open_base(base_of(case)).parameters().items()}

    def digest(tensors):
        return lf.digest(read_tensors(tensors, config, ReadOptions(), "here", shapes).adapter)

    untouched = digest(whole)
    for name, tensor in whole.items():
        if tensor.size:  # AdaLoRA's budget may leave a module no rank at all
            assert digest(whole | {name: tensor + tensor.dtype.type(1)}) != untouched, name
