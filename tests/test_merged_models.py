"""Checkpoints that were merged give, loaded again, the outputs of PEFT's unmerged model, and PEFT's merged weights."""

from __future__ import annotations

import warnings

import pytest
from safetensors.numpy import load_file

import loraformat as lf
from loraformat import testing

torch = pytest.importorskip("torch", reason="PEFT runs on torch: pip install 'loraformat[peers]'")
peft = pytest.importorskip("peft", reason="pip install 'loraformat[peers]'")
models = pytest.importorskip("merged_models", reason="needs the peers: torch, transformers, peft")

pytestmark = [pytest.mark.peer, pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")]


def outputs(model, inputs):
    with torch.no_grad():
        out = model(**inputs)
    return (out if isinstance(out, torch.Tensor) else out.logits).numpy()


def save_base(model, folder):
    """As transformers does it, in shards; a plain module as its state dict."""
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(folder, max_shard_size="30KB")
    else:
        from safetensors.torch import save_file

        folder.mkdir()
        save_file(model.state_dict(), folder / "model.safetensors")


def load_base(case, folder):
    if hasattr(model := case.model(), "from_pretrained"):
        return type(model).from_pretrained(folder).eval()
    model.load_state_dict({n: torch.from_numpy(t) for n, t in load_file(folder / "model.safetensors").items()})
    return model.eval()


def adapted(case, folder):
    """(inputs, the base's outputs, PEFT's model after some training), with base and adapter saved."""
    torch.manual_seed(3)
    model, inputs = case.model().eval(), case.inputs()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape))  # no bias is zero
    save_base(model, folder / "base")
    before = outputs(model, inputs)
    if case.vocabulary:
        model.resize_token_embeddings(case.vocabulary, mean_resizing=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trained = peft.get_peft_model(model, case.kind(**case.options)).eval()
        with torch.no_grad():
            for name, parameter in trained.named_parameters():
                if parameter.requires_grad:
                    noise = 0.3 * torch.randn(parameter.shape)
                    parameter.copy_(parameter * (1 + noise) if "magnitude" in name else noise)
        trained.save_pretrained(folder / "adapter")
    return inputs, before, trained


@pytest.mark.parametrize("name", models.CASES)
def test_a_merged_checkpoint_gives_the_outputs_of_peft(name, tmp_path):
    case = models.CASES[name]
    inputs, before, trained = adapted(case, tmp_path)
    wanted = outputs(trained, inputs)
    base = lf.open_base(tmp_path / "base")
    adapter = lf.load(tmp_path / "adapter", base=base)
    lf.merge(adapter, base, tmp_path / "out")
    assert lf.verify(base, adapter, lf.open_base(tmp_path / "out")).problems == []
    found = load_base(case, tmp_path / "out")
    assert testing.relative_error(outputs(found, inputs), wanted) <= 1e-5
    if before.shape == wanted.shape:
        assert testing.relative_error(before, wanted) > 1e-3
    merged = trained.merge_and_unload()
    if name in models.MERGED_OTHERWISE:
        assert testing.relative_error(outputs(merged, inputs), wanted) > 0.1
        return
    ours, theirs = found.state_dict(), merged.state_dict()
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        if not tensor.is_floating_point():
            assert torch.equal(ours[key], tensor), key
        else:
            assert testing.relative_error(ours[key].numpy(), tensor.detach().numpy()) <= 1e-6, key


@pytest.mark.parametrize("name", models.REFUSED)
def test_what_has_no_right_merge_is_refused_by_name(name, tmp_path):
    case, rule, words = models.REFUSED[name]
    adapted(case, tmp_path)
    base = lf.open_base(tmp_path / "base")
    with pytest.raises(lf.LoraFormatError) as caught:
        lf.merge(lf.load(tmp_path / "adapter", base=base), base, tmp_path / "out")
    assert {p.rule for p in caught.value.problems} == {rule}
    assert any(words in problem.what for problem in caught.value.problems)
    assert not (tmp_path / "out").exists()
