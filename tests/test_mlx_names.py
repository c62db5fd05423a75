"""The table of mlx-lm's names, held against mlx-lm's own models and the checkpoints of transformers."""

import sys

import gguf_goldens
import numpy as np
import pytest
from safetensors.numpy import load_file

import loraformat as lf
from loraformat import Adapter, Lora, Update
from loraformat.verbs.retarget import retarget
from loraformat_converters.mlx import names as table

pytestmark = pytest.mark.peer
mx = pytest.importorskip("mlx.core", reason="needs the peers: mlx, mlx-lm")
from mlx.utils import tree_flatten  # noqa: E402
from mlx_lm.utils import _get_classes  # noqa: E402

sys.path.insert(0, str(gguf_goldens.HERE))
from gguf_models import _MOE, _SIZES  # noqa: E402

MORE = {
    "mixtral": {"num_local_experts": 3},
    "qwen2_moe": {**_MOE, "shared_expert_intermediate_size": 10},
    "qwen3_moe": {**_MOE, "head_dim": 8},
    "phi": {"num_key_value_heads": 4, "hidden_size": 32},
}
# What mlx-lm wants of a configuration and transformers 5 writes under another name, or not at all.
WANTED = {"rope_theta": 10000.0, "num_experts": 3, "norm_topk_prob": True}


@pytest.mark.parametrize("model_type", sorted(table._TABLE))
def test_every_weight_of_a_checkpoint_has_its_name_in_mlx(model_type, tmp_path):
    transformers = pytest.importorskip("transformers")
    transformers.logging.disable_progress_bar()
    config = transformers.AutoConfig.for_model(model_type, **{**_SIZES, **MORE.get(model_type, {})})
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    stored = {name: t.shape for name, t in load_file(tmp_path / "model.safetensors").items() if t.ndim == 2}
    value = {**WANTED, **config.to_dict()}
    model, args = _get_classes(value)
    theirs = {name: p.shape for name, p in tree_flatten(model(args.from_dict(value)).parameters()) if p.ndim > 1}
    if "lm_head.weight" not in theirs:  # mlx-lm ties it whatever the configuration says
        stored.pop("lm_head.weight")

    def pair(shape):
        return Update((Lora(np.ones((1, shape[1]), np.float32), np.ones((shape[0], 1), np.float32), 1.0, "factor"),))

    ours = Adapter({name: pair(shape) for name, shape in stored.items()})
    found = retarget(ours, "mlx", config=value).adapter
    assert {key: update.matrix_shape() for key, update in found.items()} == theirs
    base = lf.open_base(tmp_path / "model.safetensors")
    assert retarget(found, "torch", base=base, config=value).adapter.keys() == ours.keys()
