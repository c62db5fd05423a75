"""What we write, PEFT itself loads: the same modules, the same merged weights, the same outputs.

The adapters are made from the model alone, without a configuration that PEFT wrote.
"""

import importlib.util
import warnings
from dataclasses import replace

import numpy as np
import pytest
from peft_goldens import HERE, NOT_WRITTEN, SUPPORTED, check_merge, check_patterns, placed, truth_of
from peft_goldens import loaded as golden
from safetensors.numpy import load_file, save_file

import loraformat as lf
from loraformat import registry, testing
from loraformat.verbs.convert import save

pytestmark = pytest.mark.peer

# Module → (its kind, sizes of the base weight, rank, alpha, rule). Names that a regular expression would read
# otherwise, and paths that end alike: ``proj`` and ``a.proj``, layers 1 and 11.
TARGETS = {
    "proj": ("linear", (28, 20), 6, 9.0, "alpha/r"),
    "a.proj": ("linear", (20, 28), 3, 4.0, "alpha/sqrt(r)"),
    "layers.1.q": ("linear", (28, 20), 5, 0.37, "factor"),
    "layers.11.q": ("linear", (20, 28), 6, -2.5, "alpha/r"),
    "w+(x).q*[0]$": ("linear", (26, 20), 4, 7.0, "alpha/r"),
    "net.conv": ("conv", (7, 2, 3, 2), 4, 6.0, "alpha/sqrt(r)"),
    "tok.embed": ("embedding", (37, 20), 5, 1.5, "factor"),
}
DOTTED = [path for path in TARGETS if "." in path]
UNTOUCHED = {"b.proj": (26, 26), "layers.111.q": (26, 26)}


@pytest.fixture(scope="module")
def torch():
    torch = pytest.importorskip("torch", reason="PEFT runs on torch: pip install 'loraformat[peers]'")
    pytest.importorskip("peft", reason="pip install 'loraformat[peers]'")
    torch.set_num_threads(1)
    return torch


@pytest.fixture
def model(torch):
    """Embedding → four linears → the odd name → a convolution, and two modules that no adapter means."""
    nn = torch.nn

    class Chain(nn.Module):
        def __init__(self):
            super().__init__()
            for path, (kind, sizes, *_) in TARGETS.items():
                self.put(path, module(nn, kind, sizes))
            for path, sizes in UNTOUCHED.items():
                self.put(path, module(nn, "linear", sizes))

        def put(self, path, module):
            *above, last = path.split(".")
            parent = self
            for part in above:
                if part not in dict(parent.named_children()):
                    parent.add_module(part, nn.Module())
                parent = parent.get_submodule(part)
            parent.add_module(last, module)

        def forward(self, ids):
            x = self.get_submodule("tok.embed")(ids)
            for path in ("proj", "a.proj", "layers.1.q", "layers.11.q", "w+(x).q*[0]$", *UNTOUCHED):
                x = torch.tanh(self.get_submodule(path)(x))
            return self.get_submodule("net.conv")(x.reshape(len(ids), 2, 13, -1))

    generator = torch.Generator().manual_seed(7)
    chain = Chain().eval()
    with torch.no_grad():
        for parameter in chain.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return chain


def module(nn, kind, sizes):
    match kind:
        case "linear":
            return nn.Linear(sizes[1], sizes[0])
        case "conv":
            return nn.Conv2d(sizes[1], sizes[0], sizes[2:])
        case "embedding":
            return nn.Embedding(*sizes)


def adapter(paths=TARGETS):
    draw = np.random.default_rng(3)
    updates = {}
    for path in paths:
        kind, sizes, rank, alpha, rule = TARGETS[path]
        out, in_ = (sizes[1], sizes[0]) if kind == "embedding" else (sizes[0], int(np.prod(sizes[1:])))
        a, b = (0.4 * draw.standard_normal(shape).astype(np.float32) for shape in ((rank, in_), (out, rank)))
        spec = {"linear": "out,in", "embedding": "in,out", "conv": "out,in,in,in"}[kind]
        op = "embedding" if kind == "embedding" else None
        updates[f"{path}.weight"] = lf.Update((lf.Lora(a, b, alpha, rule),), lf.Placement.of(sizes, spec), op)
    return lf.Adapter(updates)


def loaded(model, folder, *, complete=True):
    """PEFT's own reading of the folder; a tensor missing or left over is an error."""
    import peft

    with warnings.catch_warnings():
        warnings.filterwarnings("error" if complete else "ignore", message=".*(missing|unexpected).*")
        return peft.PeftModel.from_pretrained(model, folder).eval()


@pytest.mark.parametrize("paths", [TARGETS, DOTTED], ids=["all", "dotted"])
def test_an_adapter_written_from_the_model_alone_is_what_peft_loads_and_merges(torch, model, paths, tmp_path):
    base = {name: tensor.numpy().copy() for name, tensor in model.state_dict().items()}
    ids = torch.arange(12).reshape(2, 6) * 3
    ours = adapter(paths)
    save(ours, tmp_path / "peft", registry.layout("peft"))

    found = loaded(model, tmp_path / "peft")
    with torch.no_grad():
        output = found(ids)
    theirs = {name: tensor.numpy() for name, tensor in found.merge_and_unload().state_dict().items()}

    changed = {name for name in base if not np.array_equal(base[name], theirs[name])}
    assert changed == set(ours)
    assert all(testing.relative_error(ours[k].apply(base[k]), theirs[k]) <= 1e-6 for k in ours)

    save_file(base, tmp_path / "base.safetensors")
    lf.merge(ours, lf.open_base(tmp_path / "base.safetensors"), tmp_path / "merged.safetensors")
    merged = {name: torch.from_numpy(t) for name, t in load_file(tmp_path / "merged.safetensors").items()}
    model.load_state_dict(merged)
    with torch.no_grad():
        assert testing.relative_error(model(ids).numpy(), output.numpy()) <= 1e-5


@pytest.mark.parametrize("paths", [TARGETS, DOTTED], ids=["all", "dotted"])
def test_peft_puts_an_adapter_on_every_target_and_on_nothing_else(torch, model, paths, tmp_path):
    from peft.tuners.tuners_utils import BaseTunerLayer

    save(adapter(paths), tmp_path / "peft", registry.layout("peft"))
    found = loaded(model, tmp_path / "peft").base_model.model
    assert {path for path, layer in found.named_modules() if isinstance(layer, BaseTunerLayer)} == set(paths)


def test_peft_reads_the_ranks_and_scales_that_the_model_has(torch, model, tmp_path):
    ours = adapter()
    save(ours, tmp_path / "peft", registry.layout("peft"))
    found = loaded(model, tmp_path / "peft").base_model.model
    for path, (*_, rank, _, _) in TARGETS.items():
        layer = found.get_submodule(path)
        assert layer.r["default"] == rank
        assert layer.scaling["default"] == pytest.approx(ours[f"{path}.weight"].scale, rel=1e-15)


@pytest.fixture(scope="module")
def made(torch):
    """Case → how its golden was made; the model it was trained on, filled again with the same numbers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(HERE)
        models, made_of = importlib.import_module("models"), importlib.import_module("cases")
    cases = {case.name: case for case in made_of.CASES}

    def model(name):
        whole = cases[name].model()
        models.fill_base(whole, models.Rng(name))
        return whole.to(cases[name].dtype).eval()

    return model


@pytest.mark.parametrize("case", [case for case in SUPPORTED if case not in (*NOT_WRITTEN, "legacy_fused")])
def test_a_golden_written_again_is_what_peft_loads_and_merges(made, case, tmp_path):
    # AdaLoRA stores a convolution as it stores a Linear; which it is only the base knows.
    adapter = placed(case) if case == "adalora_pruned" else golden(case)
    if not case.startswith("lokr"):  # whose factors PEFT shapes by settings that only the configuration has
        adapter = replace(adapter, extensions={})
    save(adapter, tmp_path / "peft", registry.layout("peft"))
    # PEFT takes every base weight with lora_ in its name for one of the adapter's, and warns that it is missing.
    merged = loaded(made(case), tmp_path / "peft", complete=case != "dotted").merge_and_unload().state_dict()
    for name, wanted in truth_of(case, "merged").items():
        found = merged[name].float().numpy()
        assert testing.relative_error(found, wanted) <= (2.0**-8 if case.startswith("bf16") else 1e-6), name


def test_what_an_attention_computes_is_what_we_merge(torch, made, tmp_path):
    """PEFT adds the change of out_proj twice, in its forward pass as in its merge (golden.json's note)."""
    model, case = made("multihead_attention"), "multihead_attention"
    truth = load_file(HERE / case / "truth.safetensors")
    model.load_state_dict({n: torch.from_numpy(t) for n, t in load_file(check_merge(case, tmp_path)).items()})
    with torch.no_grad():
        assert testing.relative_error(model(torch.from_numpy(truth["x"])).numpy(), truth["y"]) <= 1e-6


def test_the_table_of_patterns_is_what_pefts_own_function_says(torch):
    from peft.utils.other import get_pattern_key

    check_patterns(lambda pattern, module: get_pattern_key([pattern], module) == pattern)
