"""Golden adapters written by LyCORIS itself, with the ΔW that its own forward pass computes from them.

Run ``python make.py`` (lycoris-lora, torch and safetensors at the versions in ``golden.json``) to write every folder
again; ``python make.py loha dora`` writes only those. One folder per case:

``adapter.safetensors``  what ``LycorisNetwork.save_weights`` wrote
``truth.safetensors``    ``delta.<key>``: what the module adds to the weight (or bias) while it computes its output,
                         taken where it hands it to torch; ``base.<key>``: the weight, where the change depends on it
                         (elsewhere the weight is zero, so that nothing of ΔW is rounded away)
``golden.json``          the case, the versions, and each module's scale as the LyCORIS module holds it

``get_diff_weight`` and ``merge_to`` are not asked: of LoHa and LoKr they multiply the scale twice (4.1.3). The truth is
that of modules made again out of the saved file; ``made_from`` is ``settings`` where LyCORIS cannot make them out of the
file alone (a DoRA over the inputs, a core of LoKr) and they were made as in training and then loaded.
No number comes from a formula written here: weights are drawn from a seeded generator, the rest is LyCORIS'.
"""

from __future__ import annotations

import json
import sys
import zlib
from pathlib import Path

import torch
from lycoris import LycorisNetwork, create_lycoris, create_lycoris_from_weights
from safetensors.torch import save_file
from torch import nn

HERE = Path(__file__).resolve().parent
VERSIONS = {"lycoris-lora": "4.1.3", "torch": torch.__version__}


class Block(nn.Module):
    """Sizes are pairwise different; 30, 42, 20, 35, … have factors for LoKr."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(30, 42)
        self.to_out = nn.ModuleList([nn.Linear(12, 12, bias=False)])  # square: only the tensors tell out from in
        self.conv = nn.Conv2d(20, 35, (3, 2))
        self.conv_1x1 = nn.Conv2d(8, 15, 1)
        self.lora_down = nn.Conv1d(9, 28, 3)  # a module's own name may be a role's
        self.volume = nn.Conv3d(6, 10, (2, 1, 3))
        self.norm = nn.LayerNorm(17)
        self.groups = nn.GroupNorm(3, 27)


INPUTS = {
    "to_q": (2, 30), "to_out.0": (2, 12), "conv": (1, 20, 5, 4), "conv_1x1": (1, 8, 2, 3), "lora_down": (1, 9, 5),
    "volume": (1, 6, 3, 2, 4), "norm": (2, 17), "groups": (2, 27, 3),
}  # fmt: skip

FACTORED = ["to_q", "conv", "lora_down", "volume"]
# Case → (settings of create_lycoris, what else: dtype, header, modules that are left, module settings)
CASES: dict[str, tuple[dict, dict]] = {
    "locon": ({"algo": "lora", "linear_dim": 3, "linear_alpha": 4.5, "conv_dim": 2, "conv_alpha": 7.3}, {}),
    "locon_bf16": ({"algo": "lora", "linear_dim": 3, "linear_alpha": 7.3, "conv_dim": 2}, {"dtype": torch.bfloat16}),
    "locon_tucker": ({"algo": "lora", "linear_dim": 3, "linear_alpha": 2, "use_tucker": True}, {"only": ["conv", "lora_down", "volume"]}),
    "locon_scalar": ({"algo": "lora", "linear_dim": 3, "linear_alpha": 2, "use_scalar": True}, {"only": ["to_q"]}),
    "locon_rslora": ({"algo": "lora", "linear_dim": 5, "linear_alpha": 6}, {"only": ["to_q", "conv"], "module": {"rs_lora": True}}),
    "dora": ({"algo": "lora", "linear_dim": 3, "linear_alpha": 4.5, "dora_wd": True}, {}),
    "dora_in": ({"algo": "lora", "linear_dim": 3, "linear_alpha": 4.5, "dora_wd": True, "wd_on_output": False}, {"made_from": "settings"}),
    "loha": ({"algo": "loha", "linear_dim": 3, "linear_alpha": 2}, {}),
    "loha_tucker": ({"algo": "loha", "linear_dim": 3, "linear_alpha": 2, "use_tucker": True}, {"only": ["conv", "lora_down"]}),
    "loha_dora": ({"algo": "loha", "linear_dim": 3, "linear_alpha": 2, "dora_wd": True}, {"only": ["to_q", "to_out.0", "conv"]}),
    "loha_dora_in": (
        {"algo": "loha", "linear_dim": 3, "linear_alpha": 2, "dora_wd": True, "wd_on_output": False},
        {"only": ["to_out.0", "lora_down", "conv_1x1"], "made_from": "settings"},
    ),
    "lokr": ({"algo": "lokr", "linear_dim": 2, "linear_alpha": 3}, {"only": FACTORED}),
    "lokr_both": ({"algo": "lokr", "linear_dim": 2, "linear_alpha": 3, "decompose_both": True}, {"only": ["to_q", "conv"]}),
    "lokr_whole": ({"algo": "lokr", "linear_dim": 10000, "linear_alpha": 3}, {"only": FACTORED}),
    "lokr_tucker": ({"algo": "lokr", "linear_dim": 2, "linear_alpha": 3, "use_tucker": True}, {"only": ["conv", "lora_down"], "made_from": "settings"}),
    "lokr_dora": ({"algo": "lokr", "linear_dim": 2, "linear_alpha": 3, "dora_wd": True}, {"only": ["to_q"]}),
    "full": ({"algo": "full", "linear_dim": 3}, {}),
    "norm": ({"algo": "lora", "linear_dim": 3, "linear_alpha": 2, "train_norm": True}, {"only": ["to_q", "norm", "groups"]}),
    "mixed": ({"algo": "lora", "linear_dim": 3, "linear_alpha": 2}, {"mix": {"conv": "loha", "volume": "full", "lora_down": "lokr"}}),
    "glora": ({"algo": "glora", "linear_dim": 3}, {"only": ["to_q", "conv"]}),
    "ia3": ({"algo": "ia3"}, {"only": ["to_q", "conv"]}),
    "diag_oft": ({"algo": "diag-oft", "linear_dim": 3, "constraint": 0.5, "rescaled": True}, {"only": ["to_q", "conv"]}),
    "boft": ({"algo": "boft", "linear_dim": 6}, {"only": ["to_out.0"]}),
    "tlora": ({"algo": "tlora", "linear_dim": 3}, {"only": ["to_q"]}),
}  # fmt: skip
REFUSED = ("glora", "ia3", "diag_oft", "boft", "tlora")


def model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    net = nn.Module()
    net.blocks = nn.ModuleList([nn.Identity(), Block()])
    for parameter in net.parameters():
        parameter.data.normal_()
    return net


def network(net: nn.Module, settings: dict, more: dict) -> LycorisNetwork:
    """As in training; only the wanted modules stay, and some get an algorithm or a setting of their own."""
    every = ["Linear", "Conv1d", "Conv2d", "Conv3d", "GroupNorm", "LayerNorm"]
    named = [f"blocks.1.{name}" for name in more.get("only", ())]
    LycorisNetwork.apply_preset({"target_module": [] if named else every, "target_name": named, "use_fnmatch": True})
    made = create_lycoris(net, 1.0, **settings)
    if mix := more.get("mix"):
        others = {algo: create_lycoris(net, 1.0, **{**settings, "algo": algo}) for algo in mix.values()}
        by_name = {algo: {lora.lora_name: lora for lora in other.loras} for algo, other in others.items()}
        chosen = {f"lycoris_blocks_1_{name}": algo for name, algo in mix.items()}
        made.loras = [by_name[chosen[m.lora_name]][m.lora_name] if m.lora_name in chosen else m for m in made.loras]
    if module := more.get("module"):
        same = {"multiplier": 1.0, "lora_dim": settings["linear_dim"], "alpha": settings["linear_alpha"]}
        made.loras = [type(m)(m.lora_name, m.org_module[0], **same, **module) for m in made.loras]
    return made


@torch.no_grad()
def fill(made: LycorisNetwork) -> None:
    """Stand in for training: every parameter becomes normal, a magnitude drifts from its start value."""
    for lora in made.loras:
        for name, parameter in lora.named_parameters(remove_duplicate=False):
            if "dora_scale" in name:
                continue
            parameter.normal_().mul_(0.4)
        if getattr(lora, "wd", False):
            lora.dora_scale.mul_(1 + 0.3 * torch.randn_like(lora.dora_scale))


@torch.no_grad()
def added(lora: nn.Module, module: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """What one module adds while it runs: the tensors that it hands to torch's own function beside the base's."""
    seen: dict[str, torch.Tensor] = {}
    op = lora.op

    def spy(*args: torch.Tensor, **words: torch.Tensor) -> torch.Tensor:
        for name, position in (("weight", 1), ("bias", 2)):
            tensor = words.get(name, args[position] if len(args) > position else None)
            if tensor is not None:
                seen[name] = tensor
        return op(*args, **words)

    lora.op = spy
    before = module(x)
    difference = lora(x) - before
    assert seen, lora.lora_name
    again = op(x, **{"weight": None, "bias": None, **lora.kw_dict, **seen})
    assert torch.allclose(again, difference, rtol=1e-3, atol=1e-4), lora.lora_name
    return {name: tensor.detach().float().contiguous().clone() for name, tensor in seen.items()}


def make(case: str) -> None:
    settings, more = CASES[case]
    seed = zlib.crc32(case.encode())
    made = network(model(seed), settings, more)
    torch.manual_seed(seed + 1)
    fill(made)
    folder = HERE / case
    folder.mkdir(exist_ok=True)
    file = folder / "adapter.safetensors"
    made.apply_to()
    header = {
        "ss_network_module": "lycoris.kohya",
        "ss_network_dim": str(settings.get("linear_dim")),
        "ss_network_args": json.dumps({"algo": settings["algo"]}),
    }
    made.save_weights(str(file), more.get("dtype"), header)
    facts = {"case": case, "settings": settings, "versions": VERSIONS, "refused": case in REFUSED}
    if case not in REFUSED:
        facts |= truth(case, file, seed)
    (folder / "golden.json").write_text(json.dumps(facts, indent=2) + "\n")


def truth(case: str, file: Path, seed: int) -> dict:
    settings, more = CASES[case]
    base = model(seed)  # the same again: training changed none of it
    if not settings.get("dora_wd"):  # W + ΔW − W would round ΔW to the bits of W
        for parameter in base.parameters():
            parameter.data.zero_()
    if more.get("made_from") == "settings":
        made = network(base, settings, more)
        for lora in made.loras:
            made.add_module(lora.lora_name, lora)
        info = made.load_weights(str(file))
        assert not info.get("unexpected keys"), info
    else:
        made, _ = create_lycoris_from_weights(1.0, str(file), base)
    tensors, scales = {}, {}
    modules = {f"lycoris_{name.replace('.', '_')}": name for name, _ in base.named_modules()}
    torch.manual_seed(seed + 2)
    for lora in made.loras:
        path = modules[lora.lora_name].removeprefix("blocks.1.")
        module = base.get_submodule(modules[lora.lora_name])
        for leaf, delta in added(lora, module, torch.randn(INPUTS[path])).items():
            tensors[f"delta.{lora.lora_name}.{leaf}"] = delta
        if getattr(lora, "wd", False):
            tensors[f"base.{lora.lora_name}.weight"] = module.weight.detach().clone()
        if hasattr(lora, "scale"):
            scales[lora.lora_name] = float(lora.scale)
    save_file(tensors, HERE / case / "truth.safetensors")
    return {"made_from": more.get("made_from", "file"), "scales": scales}


if __name__ == "__main__":
    for case in sys.argv[1:] or CASES:
        print(case)
        make(case)
