"""Adapters trained in JAX compute the same in PyTorch, and the other way round."""

import numpy as np
import pytest

import loraformat as lf
from loraformat import registry
from loraformat.adapter import Adapter
from loraformat.axes import Placement
from loraformat.base import Parameter
from loraformat.layout import ReadOptions
from loraformat.testing import relative_error
from loraformat.verbs.adapt import fold_scale
from loraformat.verbs.convert import save
from loraformat.verbs.retarget import retarget

jax = pytest.importorskip("jax", reason="needs jax: the peers extra")
nnx = pytest.importorskip("flax.nnx", reason="needs flax: the peers extra")
qwix = pytest.importorskip("qwix", reason="needs qwix: the peers extra")
torch = pytest.importorskip("torch", reason="needs torch: the peers extra")
peft = pytest.importorskip("peft", reason="needs peft: the peers extra")

from loraformat_converters import jax_live  # noqa: E402

pytestmark = pytest.mark.peer
SIZES = (7, 11, 5)
X = np.random.default_rng(1).standard_normal((6, SIZES[0])).astype(np.float32)
Y = np.random.default_rng(2).standard_normal((6, SIZES[2])).astype(np.float32)


class Plain(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(SIZES[0], SIZES[1], rngs=rngs)
        self.down = nnx.Linear(SIZES[1], SIZES[2], rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.relu(self.up(x)))


class Twin(torch.nn.Module):
    """The same model in torch, with the weights of ``module``."""

    def __init__(self, module):
        super().__init__()
        self.up, self.down = torch.nn.Linear(*SIZES[:2]), torch.nn.Linear(*SIZES[1:])
        for name in ("up", "down"):
            layer, weights = getattr(self, name), getattr(module, name)
            layer.weight.data = torch.tensor(np.asarray(weights.kernel[...]).T.copy())
            layer.bias.data = torch.tensor(np.asarray(weights.bias[...]))

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


def trained(module, only):
    """A few steps of gradient descent on the factors alone."""
    graph, factors, rest = nnx.split(module, only, ...)

    @jax.jit
    def step(factors):
        def loss(factors):
            return ((nnx.merge(graph, factors, rest)(X) - Y) ** 2).mean()

        value, slope = jax.value_and_grad(loss)(factors)
        return value, jax.tree_util.tree_map(lambda f, g: f - 0.05 * g, factors, slope)

    losses = []
    for _ in range(30):
        loss, factors = step(factors)
        losses.append(float(loss))
    assert losses[-1] < 0.95 * losses[0]
    return nnx.merge(graph, factors, rest)


def with_lora(module):
    """Every Linear inside an nnx.LoRA."""
    for name, rank in (("up", 3), ("down", 2)):
        base = getattr(module, name)
        inner = nnx.LoRA(base.in_features, rank, base.out_features, base_module=base, rngs=nnx.Rngs(5))
        setattr(module, name, inner)
    return module


def by_peft(adapter, module, folder):
    """What PEFT computes with the adapter on the torch twin."""
    save(adapter, folder, registry.layout("peft"))
    with torch.no_grad():
        model = peft.PeftModel.from_pretrained(Twin(module), folder)
        return model(torch.tensor(X)).numpy()


def test_trained_in_nnx_and_run_by_peft(tmp_path):
    base, module = Plain(nnx.Rngs(0)), trained(with_lora(Plain(nnx.Rngs(0))), nnx.LoRAParam)
    adapter = jax_live.from_pytree(nnx.state(module, nnx.LoRAParam))
    wanted = np.asarray(module(X))
    assert relative_error(by_peft(retarget(adapter, "torch").adapter, base, tmp_path / "peft"), wanted) < 1e-6
    assert relative_error(np.asarray(jax_live.branch(base, adapter)(lambda m, x: m(x), X)), wanted) < 1e-6
    assert relative_error(np.asarray(base(X)), wanted) > 0.05


def test_trained_in_qwix_and_run_by_peft(tmp_path):
    base = Plain(nnx.Rngs(0))
    provider = qwix.LoraProvider(module_path=".*", rank=3, alpha=7.0)
    module = trained(qwix.apply_lora_to_model(Plain(nnx.Rngs(0)), provider, X, rngs=nnx.Rngs(1)), nnx.LoRAParam)
    options = ReadOptions(alpha=7.0, rank=3, base=Shapes(base))
    adapter = jax_live.from_pytree(nnx.state(module, nnx.LoRAParam), options=options)
    wanted = np.asarray(module(X))
    assert relative_error(by_peft(retarget(adapter, "torch").adapter, base, tmp_path / "peft"), wanted) < 1e-6
    assert relative_error(np.asarray(base(X)), wanted) > 0.05
    tree = jax_live.to_pytree(adapter, "qwix")
    again = qwix.apply_lora_to_model(Plain(nnx.Rngs(0)), provider, X, rngs=nnx.Rngs(9))
    nnx.update(again, nnx.State(tree))
    assert relative_error(np.asarray(again(X)), wanted) < 1e-6


class Shapes:
    """A live module as a base that is asked for shapes."""

    def __init__(self, module):
        self.module = module

    def parameters(self):
        state = nnx.to_flat_state(nnx.state(self.module))
        return {"/".join(map(str, path)): Parameter("", leaf.shape, "F32") for path, leaf in state}


def test_trained_by_peft_and_run_in_nnx(tmp_path):
    base = Plain(nnx.Rngs(0))
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=["up", "down"], rank_pattern={"down": 2}, use_rslora=True
    )
    model = peft.get_peft_model(Twin(base), config)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.3)
    for _ in range(20):
        optimiser.zero_grad()
        loss = ((model(torch.tensor(X)) - torch.tensor(Y)) ** 2).mean()
        loss.backward()
        optimiser.step()
    model.save_pretrained(tmp_path / "peft")
    wanted = model(torch.tensor(X)).detach().numpy()
    adapter = retarget(lf.load(tmp_path / "peft"), "flax").adapter
    folded = fold_scale(adapter).adapter
    module = with_lora(Plain(nnx.Rngs(0)))
    nnx.update(module, nnx.State(jax_live.to_pytree(_as_wrapped(folded), "nnx")))
    assert relative_error(np.asarray(module(X)), wanted) < 1e-6
    assert relative_error(np.asarray(base(X)), wanted) > 0.01


def _as_wrapped(adapter):
    """Factors that lie in an nnx.LoRA around the kernel, not in an nnx.LoRALinear."""
    return Adapter(adapter.targets, names="flax", extensions={"nnx": '{"inner": [], "value": false}'})


def test_a_pytree_of_another_kind_is_refused():
    with pytest.raises(lf.LoraFormatError, match="LF-501"):
        jax_live.from_pytree({"up": {"kernel": np.ones((7, 5), np.float32)}})
    pair = lf.Lora(np.ones((2, 7), np.float32), np.ones((5, 2), np.float32), 2.0, "factor")
    adapter = Adapter({"up/kernel": lf.Update((pair,), Placement((7, 5), (1,), (0,)))}, names="flax")
    with pytest.raises(lf.LoraFormatError, match="LF-508"):
        jax_live.to_pytree(adapter, "nnx")
    with pytest.raises(lf.LoraFormatError, match="LF-705"):
        jax_live.to_pytree(adapter, "odd")
