"""The goldens that PEFT itself wrote, and the checks that an adapter read from them must pass.

The checks are plain functions, so that ``test_mutants`` can run the very same ones on code that is made wrong.
"""

import json
import shutil
from pathlib import Path

import numpy as np
from safetensors import deserialize
from safetensors.numpy import load_file

import loraformat as lf
from loraformat import registry, testing
from loraformat.source import open_source

HERE = Path(__file__).parent / "golden" / "peft"

# Case → the axes that its base does not show: bare tensors without a config.json say nothing of square weights.
SUPPORTED = {
    "linear": {},
    "bin": {},
    "linear_square": {"*": "out,in"},
    "rslora": {},
    "patterns": {},
    "rslora_patterns": {},
    "embedding": {},
    "conv": {},
    "gpt2": {},
    "llama": {},
    "bf16": {},
    "bf16_upcast": {},
    "mixed_conv1d_linear": {"c_proj": "in,out", "q_proj": "out,in"},
    "dotted": {},
    "dora": {},
    "dora_embedding_resized": {},
    "lora_bias": {},
    "lora_bias_and_bias": {},
    "bias_all": {},
    "bias_lora_only": {},
    "modules_to_save": {},
    "seq_cls": {},
    "embedding_saved": {},
    "vocabulary_resized": {},
    "trainable_tokens": {},
    "trainable_tokens_tied": {},
    "tokens_resized": {},
    "tokens_alone": {},
    "multihead_attention": {},
    "multihead_attention_patterns": {},
    "target_parameters": {},
    "target_parameters_transposed": {},
    "target_parameters_one": {},
    "bdlora": {},
    "legacy_fused": {},
    "pissa_converted": {},
    "adalora": {},
    "adalora_pruned": {},
    "loha": {},
    "loha_kernels": {},
    "loha_flat": {},
    "lokr": {},
    "lokr_whole": {},
    "lokr_core": {},
    "vera": {},
}
# Exactly a LoRA, and written as one: other tensors, the same change.
WRITTEN_AS_LORA = ("adalora", "adalora_pruned", "bdlora", "legacy_fused", "vera")
# Several parameters of one module: PEFT nests them in an order that no file states.
NOT_WRITTEN = ("target_parameters", "target_parameters_transposed")
# The layers hold other numbers: the rank before a conversion, that of one fused part, AdaLoRA's alpha, no scale of VeRA,
# half of what MultiheadAttention does.
OTHER_SCALES = (
    "pissa_converted",
    "legacy_fused",
    "adalora",
    "adalora_pruned",
    "vera",
    "multihead_attention",
    "multihead_attention_patterns",
)
# A checkpoint stores one of two tied tensors, and so does the adapter; merging unties nothing.
TIED = {"trainable_tokens_tied": ("lm_head.weight", "model.embed_tokens.weight")}


def adapter_of(case):
    return HERE / case / "adapter"


def base_of(case):
    folder = HERE / case
    return folder / "base" if (folder / "base").is_dir() else folder / "base.safetensors"


def base_file(case):
    base = base_of(case)
    return base / "model.safetensors" if base.is_dir() else base


def facts_of(case):
    return json.loads((HERE / case / "golden.json").read_text())


def truth_of(case, what, file="truth"):
    """Parameter → tensor, as PEFT computed it: ``delta`` or ``merged``."""
    tensors = load_file(HERE / case / f"{file}.safetensors")
    found = {name.removeprefix(f"{what}."): t for name, t in tensors.items() if name.startswith(f"{what}.")}
    assert found or case == "tokens_resized", f"{case} has no {what}"
    if case in TIED:
        twin, name = TIED[case]
        assert np.array_equal(found.pop(twin), found[name])
    if what == "delta" and case.startswith("multihead_attention"):
        # get_delta_weight of out_proj is what PEFT adds twice (golden.json's note), in every forward pass.
        found |= {name: 2 * t for name, t in found.items() if name.endswith("out_proj.weight")}
    return found


# (pattern, module, whether peft 0.21.2's get_pattern_key takes it; held against PEFT itself in test_peft_loads)
PATTERNS = [
    ("q_proj", "m.layers.1.q_proj", True),
    ("q_proj", "q_proj", True),
    ("proj", "m.layers.1.q_proj", False),
    ("layers.1", "m.layers.11", False),
    ("layers.1.q", "m.layersx1.q", True),
    (r"layers\.1\.q", "m.layersx1.q", False),
    ("layers", "m.layers.1", False),
    (r"layers\.\d+\.q", "m.layers.12.q", True),
    ("^m.q", "a.m.q", False),
    ("^m.q", "m.q", True),
    ("(q|k)", "m.k", True),
    ("q|k", "m.k", True),
    (".*", "m.k", True),
    ("(?:a.)*q", "a.a.q", True),
    ("(?!q)[a-z]+", "m.q", False),
    ("Q", "m.q", False),
    ("(?i:Q)", "m.q", True),
]


def check_patterns(meant):
    """A pattern means the modules that PEFT takes it for."""
    assert [(p, m, meant(p, m)) for p, m, _ in PATTERNS] == PATTERNS


def raw(path):
    """Tensor → (dtype, shape, bytes), by safetensors' own reader."""
    return {name: (e["dtype"], e["shape"], bytes(e["data"])) for name, e in deserialize(path.read_bytes())}


def stored(folder):
    """Tensor → (dtype, shape, bytes) of an adapter folder, whatever holds them."""
    tensors = open_source(folder).tensors
    return {name: (t.dtype, t.shape, np.ascontiguousarray(t).tobytes()) for name, t in tensors.items()}


def hints_of(case):
    return lf.Hints(axes=SUPPORTED.get(case, {}))


def loaded(case):
    """The adapter of a case, which may ask its base for shapes."""
    return lf.load(adapter_of(case), base=lf.open_base(base_of(case)))


def placed(case):
    """The adapter of a case, every target placed by the evidence of its base."""
    return lf.bind(loaded(case), lf.open_base(base_of(case)), hints_of(case))


def check_deltas(case, file="truth"):
    """The parameters are those that PEFT changes, and ΔW is PEFT's."""
    deltas, adapter, base = truth_of(case, "delta", file), placed(case), lf.open_base(base_of(case))
    differences = {key for key, source in facts_of(case)["delta_from"].items() if source == "merged minus base"}
    linear = {key: update for key, update in adapter.items() if update.linear and key not in differences}
    if case != "bf16":
        testing.check_golden(lf.Adapter(linear), {key: t for key, t in deltas.items() if key in linear})
        assert adapter.keys() == truth_of(case, "merged", file).keys()
        for key in deltas.keys() - linear.keys():
            # merged minus base, of which float32 has lost the digits that both share
            off = np.abs(adapter[key].delta(base.read(key)) - deltas[key])
            assert off.max() <= 1e-6 * np.abs(base.read(key)).max(), f"{key}: off by {off.max()}"
        return
    # PEFT multiplies in float32 and rounds the product to bf16, by 2^-8 of it at most (peft 0.21.2 get_delta_weight).
    assert sorted(adapter) == sorted(deltas)
    for key, wanted in deltas.items():
        off = np.abs(adapter[key].delta() - wanted)
        assert (off <= 2.0**-8 * np.abs(wanted) + 1e-9).all(), f"{key}: off by {off.max()}"


def check_numbers(case, entry="targets"):
    """Rank and scale of every target are those that the PEFT layers hold."""
    factors = {k: u for k, u in loaded(case).items() if {p.kind for p in u.parts} & {"lora", "loha", "lokr"}}
    found = {key: {"r": update.rank, "scaling": update.scale} for key, update in factors.items()}
    assert found == facts_of(case)[entry]


def check_merge(case, tmp_path):
    """The merged checkpoint is PEFT's, every other tensor is the base's byte for byte; returns its path."""
    out = tmp_path / f"{case}.safetensors"
    adapter, base = loaded(case), lf.open_base(base_of(case))
    lf.merge(adapter, base, out, hints_of(case))
    wanted, before, after = truth_of(case, "merged"), raw(base_file(case)), raw(out)
    assert {name: after[name] for name in before.keys() - wanted} == {n: before[n] for n in before.keys() - wanted}
    assert after.keys() == before.keys() | wanted.keys()
    merged = lf.open_base(out)
    for name, value in wanted.items():
        found = np.asarray(merged.read(name), np.float32)
        if name in before:
            assert after[name][0] == before[name][0], f"{name} has another dtype"
        assert found.shape == value.shape, f"{name} has another shape"
        if case == "bf16":  # PEFT rounds ΔW and then the sum, each by 2^-8 at most; we round the sum alone
            most = 2.0**-8 * (np.abs(truth_of(case, "delta")[name]) + np.abs(value) + np.abs(found))
            assert (np.abs(found - value) <= most).all(), name
        elif case == "bf16_upcast":  # PEFT rounds once, as we do
            assert np.array_equal(found, value), name
        else:
            assert testing.relative_error(found, value) <= 1e-6, name
    return out


def check_round_trip(case, tmp_path):
    """PEFT → native → PEFT gives the same tensors and the same configuration, both byte for byte."""
    options = registry.ReadOptions(base=lf.open_base(base_of(case)))
    lf.convert(adapter_of(case), tmp_path / "native.safetensors", options=options)
    lf.convert(tmp_path / "native.safetensors", tmp_path / "peft")
    assert stored(tmp_path / "peft") == stored(adapter_of(case))
    texts = [(folder / "adapter_config.json").read_text() for folder in (tmp_path / "peft", adapter_of(case))]
    assert texts[0] == texts[1]


def edited(case, folder, **changes):
    """A copy of a golden adapter with other values in its configuration."""
    shutil.copytree(adapter_of(case), folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | changes))
    return folder
