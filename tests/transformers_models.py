"""Small random models of transformers whose files hold other tensors than they have in memory."""

TEXT = {
    "vocab_size": 31, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "intermediate_size": 24,
}  # fmt: skip
EXPERTS = {"moe_intermediate_size": 20, "n_routed_experts": 3, "num_experts_per_tok": 2}
VISION = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 20, "patch_size": 4}


def ernie():
    """Two gates that lie transposed, and one list of experts that is two stacks."""
    from transformers import Ernie4_5_VLMoeConfig, Ernie4_5_VLMoeForConditionalGeneration

    more = {"moe_intermediate_size": [20, 14], "moe_num_experts": 3, "moe_k": 2, "moe_num_shared_experts": 1}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    text = {**TEXT, **more, "mlp_layer_types": ["dense", "sparse"], "rope_parameters": rope}
    vision = {"depth": 1, "hidden_size": 12, "num_heads": 2, "intermediate_size": 18, "patch_size": 4}
    return Ernie4_5_VLMoeForConditionalGeneration(Ernie4_5_VLMoeConfig(text_config=text, vision_config=vision))


def molmo2():
    """q, k and v in one tensor, of different sizes."""
    from transformers import Molmo2Config, Molmo2ForConditionalGeneration

    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 6}
    text = {**TEXT, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6}
    vision = {**VISION, **heads, "image_size": [8, 8]}
    adapter = {"vision_feature_layer": [1, 0], "hidden_size": 12, "intermediate_size": 18, "text_hidden_size": 16}
    config = Molmo2Config(
        text_config=text, vision_config=vision, adapter_config={**adapter, "num_attention_heads": 2, "head_dim": 6}
    )
    return Molmo2ForConditionalGeneration(config)


def step3p7():
    """q, k and v in one, q and k in another order of rows; gate and input of stacks that are two in the file."""
    from transformers import Step3p7Config, Step3p7ForConditionalGeneration

    text = {**TEXT, **EXPERTS, "head_dim": 8, "share_expert_dim": 18}
    config = Step3p7Config(text_config=text, vision_config={**VISION, "image_size": 8})
    return Step3p7ForConditionalGeneration(config)


def kimi_k25():
    """q, k and v in one, q and k in another order of rows; names that a group of rules gives."""
    from transformers import Kimi_K25Config, Kimi_K25ForConditionalGeneration

    latent = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
    experts = {**EXPERTS, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
    text = {**TEXT, **experts, **latent, "num_key_value_heads": 2}
    config = Kimi_K25Config(text_config=text, vision_config=VISION, projection_hidden_size=12)
    return Kimi_K25ForConditionalGeneration(config)


def gradium_phonon_tts():
    """The same order of rows, of a model without a part for vision."""
    from transformers import GradiumPhononTTSConfig, GradiumPhononTTSForConditionalGeneration

    head = {
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "latent_dim": 6,
        "condition_dim": 12,
        "frequency_embedding_size": 10,
    }
    heads = {"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 4}
    text = {**TEXT, **heads, "hidden_size": 12, "latent_dim": 6}
    return GradiumPhononTTSForConditionalGeneration(GradiumPhononTTSConfig(**text, flow_head_config=head))


def qwen3_vl_moe():
    """Experts that older files have transposed."""
    from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

    text = {**TEXT, "moe_intermediate_size": 20, "num_experts": 3, "num_experts_per_tok": 2, "head_dim": 8}
    vision = {"depth": 1, "hidden_size": 12, "num_heads": 2, "intermediate_size": 18, "patch_size": 4}
    config = Qwen3VLMoeConfig(
        text_config=text, vision_config={**vision, "out_hidden_size": 16, "deepstack_visual_indexes": [0]}
    )
    return Qwen3VLMoeForConditionalGeneration(config)


def siglip_vision():
    from transformers import SiglipVisionConfig, SiglipVisionModel

    return SiglipVisionModel(SiglipVisionConfig(**{**VISION, "num_attention_heads": 2, "image_size": 8}))


def qwen2_5_vl():
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    vision = {"depth": 1, "hidden_size": 12, "num_heads": 2, "intermediate_size": 20, "patch_size": 4}
    vision |= {"out_hidden_size": 16, "fullatt_block_indexes": [0]}
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config={**TEXT, "rope_parameters": rope}, vision_config=vision)
    )


PREFIXED = {
    siglip_vision: lambda name: name if name.startswith("vision_model.") else f"vision_model.{name}",
    qwen2_5_vl: lambda name: name.replace("model.language_model.", "model.").replace("model.visual.", "visual."),
}
"""Models whose published files have another prefix than they have in memory, and what the files call a tensor."""

CONVERTED = (ernie, molmo2, step3p7, kimi_k25, gradium_phonon_tts)
"""Those whose files transformers writes as it reads them."""
