"""loralib: files that it wrote itself mean what it computed, what we write it loads, and what is not known is refused."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from mutants import net
from refused import faults_of
from safetensors.numpy import load_file, save_file

import loraformat as lf
from loraformat import registry, testing
from loraformat.axes import Placement
from loraformat.layout import ReadOptions
from loraformat.parts import Lora, Magnitude
from loraformat.source import open_source
from loraformat.updates import Update
from loraformat.verbs.convert import save
from loraformat_converters.loralib import convolution, layout, merged, read
from loraformat_converters.loralib import write as writing

HERE = Path(__file__).parent / "golden/loralib"
CASES = ("linears", "merged", "convolutions")


def facts(case):
    return json.loads((HERE / case / "golden.json").read_text())["layers"]


def loaded(case):
    """Every layer of a case has a rank and an alpha of its own, so that each is read with what its code stated."""
    base, tensors = lf.open_base(HERE / case / "base.safetensors"), open_source(HERE / case / "adapter.pt").tensors
    targets, extensions = {}, {}
    for path, fact in facts(case).items():
        own = {name: t for name, t in tensors.items() if name.startswith(f"{path}.lora_")}
        config = {"enable_lora": fact["enable_lora"]} if "enable_lora" in fact else {}
        options = ReadOptions(alpha=fact["alpha"], rank=fact["r"], scale_rule="alpha/r", base=base, config=config)
        one = lf.from_tensors(own, "loralib", options=options)
        targets |= one.targets
        for kind, kept in json.loads(one.extensions.get("loralib", "{}")).items():
            extensions.setdefault(kind, {}).update(kept)
    return lf.Adapter(targets, extensions={"loralib": json.dumps(extensions)} if extensions else {})


def truth(case, what="delta"):
    found = load_file(HERE / case / "truth.safetensors")
    return {name.removeprefix(f"{what}."): t for name, t in found.items() if name.startswith(what)}


def placed(case):
    hints = lf.Hints(axes={"proj": "out,in"} if case == "linears" else {})
    return lf.bind(loaded(case), lf.open_base(HERE / case / "base.safetensors"), hints)


def check_deltas(case):
    testing.check_golden(placed(case), truth(case))


def check_written(case, folder):
    """What is written again has the golden's own tensors; a grouped convolution is not written."""
    adapter = loaded(case)
    if case == "convolutions":
        adapter = replace(adapter, targets={"plain.conv.weight": adapter["plain.conv.weight"]})
    save(adapter, folder / "again.safetensors", layout)
    before, after = open_source(HERE / case / "adapter.pt").tensors, load_file(folder / "again.safetensors")
    factors = {name for name in before if ".lora_" in name and (case != "convolutions" or "plain" in name)}
    assert after.keys() == factors
    assert all(
        after[name].tobytes() == before[name].tobytes() and after[name].shape == before[name].shape for name in factors
    )


CHECKS = {
    **{case: lambda folder, case=case: check_deltas(case) for case in CASES},
    **{f"{case} written": lambda folder, case=case: check_written(case, folder) for case in CASES},
}


def a_and_b_swapped(patch):
    real = read._Reader.pair
    patch.setattr(read._Reader, "pair", lambda self, m, a, b: real(self, m, b.T.copy(), a.T.copy()))


def parts_in_another_order(patch):
    patch.setattr(read, "whole", lambda b, enabled: merged.whole(b, enabled[::-1]))


def a_part_skipped(patch):
    patch.setattr(read, "whole", lambda b, e: merged.whole(b, e) * (np.arange(sum(e) * b.shape[1]) < b.shape[1]))


def the_rank_of_the_wide_pair(patch):
    patch.setattr(read, "_widened", lambda scale, trained, r: scale)


def alpha_as_the_scale(patch):
    patch.setattr(read.Loose, "scale", lambda self, module, r: (self.options.alpha, "factor"))


def a_kernel_of_ranks(patch):
    def wrong(a, b, shape):
        right = convolution.flattened(a, b, shape)
        return right and (right[0].reshape(right[0].shape[0], -1)[:, ::-1].copy(), right[1])

    patch.setattr(read, "flattened", wrong)


def blocks_written_whole(patch):
    patch.setattr(writing, "blocks", lambda b, enabled: None)


test_the_goldens, test_a_mutant_turns_its_check_red = net(
    CHECKS,
    [
        (a_and_b_swapped, "linears"),
        (parts_in_another_order, "merged"),
        (a_part_skipped, "merged"),
        (the_rank_of_the_wide_pair, "merged"),
        (the_rank_of_the_wide_pair, "convolutions"),
        (alpha_as_the_scale, "linears"),
        (a_kernel_of_ranks, "convolutions"),
        (blocks_written_whole, "merged written"),
    ],
)


STATED = ReadOptions(alpha=7, rank=5, scale_rule="alpha/r")


def normal(*shape):
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def tensors(r=5, out=28, in_=20, name="proj"):
    return {f"{name}.lora_A": normal(r, in_), f"{name}.lora_B": normal(out, r)}


@pytest.mark.parametrize("case", CASES)
def test_a_golden_is_claimed_by_loralib_alone(case):
    testing.check_claimed_alone(layout, HERE / case / "adapter.pt")


def test_without_alpha_nothing_is_read():
    with pytest.raises(lf.LoraFormatError, match="--alpha A --scale-rule alpha/r") as caught:
        lf.load(HERE / "linears/adapter.pt")
    assert {p.rule for p in caught.value.problems} == {"LF-509"}


def test_without_a_base_the_rank_tells_a_linear_from_a_convolution():
    options = ReadOptions(alpha=7, scale_rule="alpha/r")
    assert faults_of(lf.from_tensors, tensors(), "loralib", options=options) == {("LF-509", "proj.weight")}
    assert lf.from_tensors(tensors(), "loralib", options=STATED)["proj.weight"].scale == 7 / 5
    assert faults_of(lf.from_tensors, tensors(r=15), "loralib", options=STATED) == {("LF-507", "proj")}
    itself = ReadOptions(alpha=0.5, scale_rule="factor")
    assert lf.from_tensors(tensors(), "loralib", options=itself)["proj.weight"].scale == 0.5


def test_parts_of_a_fused_projection_are_stated_or_known_by_the_base(tmp_path):
    fused = {"c_attn.lora_A": normal(10, 20), "c_attn.lora_B": normal(22, 5)}
    assert faults_of(lf.from_tensors, fused, "loralib", options=STATED) == {("LF-504", "c_attn")}
    for stated in ([True, False, True], {"c_attn": [True, False, True]}):
        options = replace(STATED, config={"enable_lora": stated})
        found = lf.from_tensors(fused, "loralib", options=options)["c_attn.weight"]
        assert found.matrix_shape() == (33, 20)
        assert not found.matrix()[11:22].any()
        assert found.scale == 7 / 5
    for wrong in ([True, True, True], [True, False, False]):
        options = replace(STATED, config={"enable_lora": wrong})
        assert faults_of(lf.from_tensors, fused, "loralib", options=options) == {("LF-507", "c_attn")}
    save_file({"c_attn.weight": normal(22, 20)}, tmp_path / "base.safetensors")
    options = replace(STATED, base=lf.open_base(tmp_path / "base.safetensors"))
    assert lf.from_tensors(fused, "loralib", options=options)["c_attn.weight"].matrix_shape() == (22, 20)


def test_an_embedding_is_known_by_a_base_whose_linears_lie_the_other_way(tmp_path):
    (tmp_path / "base").mkdir()
    save_file({"embed.weight": normal(37, 20), "proj.weight": normal(28, 20)}, tmp_path / "base/model.safetensors")
    both = tensors(out=20, in_=37, name="embed") | tensors()
    for model, op in (("roberta", "embedding"), ("gpt2", "embedding")):
        (tmp_path / "base/config.json").write_text(json.dumps({"model_type": model}))
        base = lf.open_base(tmp_path / "base")
        found = lf.from_tensors(both, "loralib", options=replace(STATED, base=base, config=base.config))
        assert (found["embed.weight"].op, found["embed.weight"].placement.spec) == (op, "in,out")
        assert found["proj.weight"].op is None
        lf.merge(found, base, tmp_path / model)
        merged_weight = load_file(tmp_path / model / "model.safetensors")["embed.weight"]
        assert np.allclose(merged_weight - normal(37, 20), found["embed.weight"].matrix().T, atol=1e-5)


def test_a_base_that_does_not_fit_is_refused(tmp_path):
    save_file({"proj.weight": normal(27, 20), "k.conv.weight": normal(6, 4, 3, 2)}, tmp_path / "base.safetensors")
    options = replace(STATED, base=lf.open_base(tmp_path / "base.safetensors"))
    both = tensors() | tensors(name="k")
    assert faults_of(lf.from_tensors, both, "loralib", options=options) == {("LF-606", "proj.weight"), ("LF-309", "k.conv.weight")}  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "wanted"),
    [
        ({"stray.tensor": normal(3)}, {("LF-506", "stray.tensor")}),
        ({"b.lora_A": normal(3, 4)}, {("LF-303", "b")}),
        ({"b.lora_A": normal(3, 4, 5), "b.lora_B": normal(6, 3)}, {("LF-309", "b")}),
        ({"b.lora_A": normal(3, 4), "b.lora_B": normal(6, 2)}, {("LF-309", "b")}),
        ({"b.lora_A": normal(3, 0), "b.lora_B": normal(6, 3)}, {("LF-311", "b")}),
        ({"b.lora_A": np.ones((3, 4), np.int32), "b.lora_B": normal(6, 3)}, {("LF-314", "b")}),
    ],
)
def test_what_is_no_file_of_loralib_is_refused_with_every_reason(changed, wanted):
    assert faults_of(lf.from_tensors, tensors() | changed, "loralib", options=STATED) == wanted


def test_what_loralib_has_no_layer_for_is_refused_and_nothing_is_written(tmp_path):
    place = Placement((6, 4, 3, 2), (0,), (1, 2, 3))
    one = lf.Adapter(
        {
            "oblong.weight": Update((Lora(normal(2, 24), normal(6, 2), 1, "factor"),), place),
            "experts.gate": Update((Lora(normal(3, 2, 8), normal(3, 5, 2), 1, "factor"),)),
            "tucker.weight": Update((Lora(normal(3, 5), normal(7, 3), 1, "factor", mid=normal(3, 3, 2, 2)),)),
        }
    )
    assert faults_of(save, one, tmp_path / "a.safetensors", layout) == {("LF-508", key) for key in one}
    dora = lf.Adapter({"a.weight": Update((Lora(normal(2, 4), normal(6, 2), 1, "factor"), Magnitude(normal(6))))})
    assert faults_of(save, dora, tmp_path / "a.safetensors", layout) == {("LF-508", "")}
    assert faults_of(save, replace(one, names="mlx"), tmp_path / "a.safetensors", layout) == {("LF-508", "")}
    assert not list(tmp_path.iterdir())


def test_any_kernel_is_exactly_one_of_loralib(tmp_path):
    place = Placement((6, 4, 3, 3), (0,), (1, 2, 3))
    update = Update((Lora(normal(2, 36), normal(6, 2), 3, "alpha/r"),), place)
    warnings = save(lf.Adapter({"k.weight": update}), tmp_path / "a.safetensors", layout)
    assert [w.what for w in warnings] == ["loralib stores no scale: build the layers with r=2, lora_alpha=3"]
    found = load_file(tmp_path / "a.safetensors")
    assert {n: t.shape for n, t in found.items()} == {"k.lora_A": (6, 12), "k.lora_B": (18, 6)}
    view = (found["k.lora_B"] @ found["k.lora_A"]).reshape(place.shape) * np.float32(1.5)
    assert testing.relative_error(view, update.delta()) <= 1e-6


@pytest.mark.peer
@pytest.mark.parametrize("case", CASES)
def test_what_we_write_loralib_loads_and_computes_with(case, tmp_path):
    torch = pytest.importorskip("torch", reason="loralib runs on torch: pip install 'loraformat[peers]'")
    make = golden_maker()
    adapter = loaded(case)
    if case == "convolutions":
        adapter = replace(adapter, targets={"plain.conv.weight": adapter["plain.conv.weight"]})
    save(adapter, tmp_path / "a.safetensors", layout)
    model = make["CASES"][case][0]().train()
    base = {n: torch.from_numpy(t) for n, t in load_file(HERE / case / "base.safetensors").items()}
    written = {n: torch.from_numpy(t) for n, t in load_file(tmp_path / "a.safetensors").items()}
    rest = open_source(HERE / case / "adapter.pt").tensors
    kept = {n: torch.from_numpy(np.array(t)) for n, t in rest.items() if n not in written}
    model.load_state_dict(base | kept | written)
    found = load_file(HERE / case / "truth.safetensors")
    with torch.no_grad():
        assert testing.relative_error(model(torch.from_numpy(found["x"])).numpy(), found["y"]) <= 1e-6


@pytest.mark.peer
@pytest.mark.parametrize("case", CASES)
def test_the_adapter_of_a_live_model_of_loralib_is_that_of_its_file(case):
    torch = pytest.importorskip("torch", reason="loralib runs on torch: pip install 'loraformat[peers]'")
    from loraformat_converters import torch_live

    model = golden_maker()["CASES"][case][0]().train()
    base = {n: torch.from_numpy(t) for n, t in load_file(HERE / case / "base.safetensors").items()}
    factors = {n: torch.from_numpy(np.array(t)) for n, t in open_source(HERE / case / "adapter.pt").tensors.items()}
    model.load_state_dict(base | factors)
    found = torch_live.from_module(model)
    testing.check_golden(found, truth(case))
    with_biases = torch_live.from_module(model, bias="all")
    assert set(with_biases) - set(found) == {n for n in base if "bias" in n}
    first = next(m for m in model.modules() if hasattr(m, "scaling"))
    first.scaling *= 0.5
    changed = torch_live.from_module(model)
    assert sum(changed[key].scale != update.scale for key, update in found.items()) == 1


def golden_maker():
    import runpy

    pytest.importorskip("loralib", reason="pip install 'loraformat[peers]'")
    return runpy.run_path(str(HERE / "make.py"))


def test_it_is_among_the_layouts():
    assert registry.layout("loralib") is layout
