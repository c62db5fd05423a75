"""The goldens of Megatron-Bridge: its own checkpoints of its own LoRA, CanonicalLoRA and DoRA, and its own numbers.

Run with Python ≥ 3.11 where these are installed, the two of NVIDIA with ``--no-deps``: megatron-bridge 0.6.2,
megatron-core 0.19.2, torch 2.13.0, transformers 5.23.0, nvidia-modelopt, omegaconf 2.3.0, hydra-core 1.3.2, triton,
datasets, pulp, wandb, tensorboard. ``standins`` says what of it cannot run on a CPU.

Of each case, in one process for every tensor-parallel or pipeline rank (gloo):

- ``checkpoint``: what ``save_checkpoint`` writes of a model whose adapters are random, as after training;
- ``truth.safetensors``: ΔW in the names of Hugging Face, by the wrapped modules' own forward pass of the identity. A row
  of Megatron's is the row of the HF weight that the bridge loaded there: found by equality, not by a formula;
- ``peft``: what ``export_adapter_ckpt`` makes of that very checkpoint (of LoRA, the one method that it reads).

``base`` and ``moe_base`` are the models, as Hugging Face has them.
"""

import dataclasses
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors.numpy import load_file, save_file

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
LAYERS = 3
COUNT = {"num_hidden_layers": LAYERS, "vocab_size": 66, "tie_word_embeddings": False, "max_position_embeddings": 32}
HEADS = {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 4}
# Of a row-parallel Linear every rank of DoRA divides by the norms of its own columns, each computing something else.
COLUMNS = ["linear_qkv", "linear_fc1"]
EXPERTS = ["linear_fc1_gate", "linear_fc1_up", "linear_fc2"]


@dataclasses.dataclass(frozen=True)
class Case:
    method: str
    settings: dict
    tensor: int = 1
    pipeline: int = 1
    base: str = "base"
    exports: bool = True


CASES = {
    "lora": Case("LoRA", {"dim": 5, "alpha": 8}),
    "lora_tensor_parallel": Case("LoRA", {"dim": 6, "alpha": 9}, tensor=3),
    "lora_pipeline": Case("LoRA", {"dim": 5, "alpha": 7, "target_modules": ["linear_qkv", "linear_fc2"]}, pipeline=3),
    "canonical": Case("CanonicalLoRA", {"dim": 6, "alpha": 10}, exports=False),
    "canonical_tensor_parallel": Case("CanonicalLoRA", {"dim": 6, "alpha": 10}, tensor=3, exports=False),
    "canonical_experts": Case(
        "CanonicalLoRA", {"dim": 5, "alpha": 6, "target_modules": EXPERTS}, 1, 1, "moe_base", False
    ),
    "dora": Case("DoRA", {"dim": 5, "alpha": 12}, exports=False),
    "dora_tensor_parallel": Case("DoRA", {"dim": 6, "alpha": 12, "target_modules": COLUMNS}, tensor=3, exports=False),
    "experts": Case("LoRA", {"dim": 5, "alpha": 8, "target_modules": ["linear_fc1", "linear_fc2"]}, base="moe_base"),
}


def save_bases(folder):
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(3)
    sizes = {"hidden_size": 36, "intermediate_size": 42, **HEADS, **COUNT}
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(folder / "base")
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20, "decoder_sparse_step": 1}
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **experts)).save_pretrained(folder / "moe_base")


def on_the_cpu(provider):
    """A provider of the bridge's, with Megatron-Core's local layers in place of transformer_engine's."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    kind = {"normalization": "RMSNorm", "qk_layernorm": provider.qk_layernorm}
    if provider.num_moe_experts:
        kind |= {"num_experts": provider.num_moe_experts, "moe_grouped_gemm": False}
    provider.transformer_layer_spec = lambda config, *_, **__: get_gpt_layer_local_spec(**kind)
    off = ("apply_rope_fusion", "gradient_accumulation_fusion", "masked_softmax_fusion", "bias_dropout_fusion")
    for name in (*off, "bias_activation_fusion", "persist_layer_norm", "moe_grouped_gemm", "moe_permute_fusion"):
        setattr(provider, name, False)
    provider.moe_token_dispatcher_type = "allgather"  # the default needs streams of CUDA
    provider.params_dtype = provider.pipeline_dtype = torch.float32
    provider.bf16 = provider.fp16 = False
    provider.use_cpu_initialization = True
    return provider


def build(case):
    """(the bridge's method, its model with that method's adapters, random)."""
    from megatron.bridge import AutoBridge
    from megatron.bridge.peft.canonical_lora import CanonicalLoRA
    from megatron.bridge.peft.dora import DoRA
    from megatron.bridge.peft.lora import LoRA

    bridge = AutoBridge.from_hf_pretrained(case.base, torch_dtype=torch.float32)
    provider = on_the_cpu(bridge.to_megatron_provider(load_weights=True))
    provider.tensor_model_parallel_size, provider.pipeline_model_parallel_size = case.tensor, case.pipeline
    provider.finalize()
    method = {"LoRA": LoRA, "CanonicalLoRA": CanonicalLoRA, "DoRA": DoRA}[case.method](**case.settings)
    provider.register_pre_wrap_hook(lambda chunks: method(chunks, training=True))
    model = provider.provide_distributed_model(wrap_with_ddp=False, use_cpu_initialization=True)
    generator = torch.Generator().manual_seed(11 + dist.get_rank())
    for name, parameter in model[0].named_parameters():
        if name.endswith("weight_magnitude"):
            parameter.data *= 0.6 + 0.8 * torch.rand(parameter.shape, generator=generator)
        elif ".adapter." in name:
            parameter.data = torch.randn(parameter.shape, generator=generator)
    return method, model


def save(model, method, folder):
    """As the training loop of Megatron-Bridge saves it."""
    from megatron.bridge.training.checkpointing import save_checkpoint
    from megatron.bridge.training.config import CheckpointConfig, ConfigContainer, LoggerConfig, OptimizerConfig
    from megatron.bridge.training.state import GlobalState
    from megatron.core.utils import get_model_config

    state = GlobalState()
    where = CheckpointConfig(save=folder, async_save=False, save_optim=False, save_rng=False, ckpt_format="torch_dist")
    where.dist_ckpt_optim_fully_reshardable = True
    absent = dict.fromkeys(("train", "ddp", "scheduler", "dataset", "tokenizer", "dist"))
    state.cfg = ConfigContainer(
        model=get_model_config(model[0]), optimizer=OptimizerConfig(use_distributed_optimizer=False),
        logger=LoggerConfig(), checkpoint=where, peft=method, **absent,
    )  # fmt: skip
    method.set_params_to_save(model)
    save_checkpoint(state, model, None, None, 0)


def forward(module, width):
    """The matrix [out, in] that a module of Megatron's computes; of a column-parallel one, the rank's own rows."""
    from megatron.core.parallel_state import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size

    inner = getattr(module, "to_wrap", module)
    x = torch.eye(width)
    if getattr(inner, "input_is_parallel", False):
        x = x.chunk(get_tensor_model_parallel_world_size(), dim=1)[get_tensor_model_parallel_rank()]
    with torch.no_grad():
        return module(x[:, None, :].contiguous())[0][:, 0].T.numpy()


def wrapped(model):
    """(name in its pipeline stage, module) of every module that has an adapter."""
    for name, module in model[0].named_modules():
        if hasattr(module, "to_wrap"):
            yield name, module


def measured(model, weights):
    """HF name → row → that row of ΔW, of the rows that this rank computes."""
    rows = {
        w.tobytes(): (name, i) for name, matrix in weights.items() if matrix.ndim == 2 for i, w in enumerate(matrix)
    }
    found = {}
    for _, module in wrapped(model):
        width = module.to_wrap.input_size
        base, tuned = forward(module.to_wrap, width), forward(module, width)
        for before, after in zip(base, tuned, strict=True):
            name, i = rows[before.tobytes()]
            found.setdefault(name, {})[i] = after - before
    return found


def one_rank(name, out):
    import standins

    standins.install()
    case = CASES[name]
    dist.init_process_group("gloo")
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(case.tensor, case.pipeline)
    method, model = build(case)
    save(model, method, "run")
    weights = {}
    for file in Path(case.base).glob("*.safetensors"):
        weights |= load_file(file)
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, measured(model, weights))
    if dist.get_rank() == 0:
        found = {}
        for part in parts:
            for key, rows in part.items():
                found.setdefault(key, {}).update(rows)
        truth = {key: np.stack([rows[i] for i in range(len(rows))]) for key, rows in sorted(found.items())}
        save_file(truth, out / "truth.safetensors")
    dist.barrier()
    dist.destroy_process_group()


def export(name, out):
    """In a process of its own: the checkpoint is all that it sees."""
    import standins

    standins.install()
    from megatron.bridge import AutoBridge

    real = AutoBridge.to_megatron_provider
    AutoBridge.to_megatron_provider = lambda self, **options: on_the_cpu(real(self, **options))
    bridge = AutoBridge.from_hf_pretrained(CASES[name].base, torch_dtype=torch.float32)
    bridge.export_adapter_ckpt("run/iter_0000000", out / "peft")


def run(step, name, out, rank=0, size=1):
    rendezvous = {"MASTER_ADDR": "localhost", "MASTER_PORT": "29533", "RANK": str(rank), "WORLD_SIZE": str(size)}
    return subprocess.Popen([sys.executable, __file__, step, name, str(out)], env={**os.environ, **rendezvous})


def main():
    names = sys.argv[1:] or list(CASES)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        save_bases(Path(folder))
        for base in ("base", "moe_base"):
            shutil.rmtree(HERE / base, ignore_errors=True)
            shutil.copytree(base, HERE / base)
        for name in names:
            out = HERE / name
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir()
            size = CASES[name].tensor * CASES[name].pipeline
            ranks = [run("rank", name, out, rank, size) for rank in range(size)]
            if any(process.wait() for process in ranks):
                raise SystemExit(f"{name}: a rank failed")
            if CASES[name].exports and run("export", name, out).wait():
                raise SystemExit(f"{name}: the export failed")
            shutil.move("run/iter_0000000", out / "checkpoint")
            shutil.rmtree("run")
            config = out / "checkpoint/run_config.yaml"
            config.write_text(config.read_text().replace(folder, "."))


if __name__ == "__main__":
    if sys.argv[1:2] == ["rank"]:
        one_rank(sys.argv[2], Path(sys.argv[3]))
    elif sys.argv[1:2] == ["export"]:
        export(sys.argv[2], Path(sys.argv[3]))
    else:
        main()
