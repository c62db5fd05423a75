"""The tables of image models: every name of the real classes, and published tensors where diffusers puts them."""

import numpy as np
import pytest

from loraformat_converters.spaces.families import FAMILIES

FAMILY = {family.name: family for family in FAMILIES}


def rows_of(family, component):
    (found,) = (c for c in FAMILY[family].components if c.name == component)
    return list(found.rows())


# The tables against the classes themselves.


def unet(**config):
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(**config)


def xl():
    return unet(
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )


def flux():
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(guidance_embeds=True)


def sd3(layers, **config):
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(num_layers=layers, caption_projection_dim=1152, **config)


def clip(kind, layers):
    import transformers

    config = transformers.CLIPTextConfig(num_hidden_layers=layers, projection_dim=1280)
    return getattr(transformers, kind)(config)


def t5():
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(num_layers=24, feed_forward_proj="gated-gelu"))


CLASSES = {
    ("sd1", "unet"): lambda: unet(cross_attention_dim=768),
    ("sd2", "unet"): lambda: unet(
        cross_attention_dim=1024, use_linear_projection=True, attention_head_dim=(5, 10, 20, 20)
    ),
    ("sdxl", "unet"): xl,
    ("flux", "transformer"): flux,
    ("sd3-medium", "transformer"): lambda: sd3(24),
    ("sd3.5-medium", "transformer"): lambda: sd3(24, dual_attention_layers=tuple(range(13)), qk_norm="rms_norm"),
    ("sd3.5-large", "transformer"): lambda: sd3(38, qk_norm="rms_norm"),
    ("sd1", "text_encoder"): lambda: clip("CLIPTextModel", 12),
    ("sd2", "text_encoder"): lambda: clip("CLIPTextModel", 23),
    ("sdxl", "text_encoder_2"): lambda: clip("CLIPTextModelWithProjection", 32),
    ("flux", "text_encoder_2"): t5,
}


@pytest.mark.peer
@pytest.mark.parametrize(("family", "component"), CLASSES, ids="-".join)
def test_the_table_has_every_parameter_of_the_class_and_no_other(family, component):
    import torch

    with torch.device("meta"):
        real = {name for name, _ in CLASSES[family, component]().named_parameters()}
    table = {row.torch for row in rows_of(family, component)}
    if component == "text_encoder":  # transformers 5 has no text_model in it; the files of its weights do
        table = {name.removeprefix("text_model.") for name in table}
    assert table == real


# The published names: diffusers' own converters put the tensors where the rows say.


def published_tensors(family, component):
    """Random values under the published names, of the sizes that the rows divide."""
    import torch

    units = {}
    for row in rows_of(family, component):
        units[row.published] = row.rows.of if row.rows else 1
    rows = {1: 2, 2: 2, 3: 3, 7: 7 * 3072}  # the last is what diffusers' converter of Flux splits
    return {name: torch.randn(rows[of], 2) for name, of in units.items()}


def converted(family, component, tensors):
    from diffusers.loaders import single_file_utils as tool

    if component == "unet":
        config = {"layers_per_block": 2, "addition_embed_type": "text_time" if family == "sdxl" else None}
        return tool.convert_ldm_unet_checkpoint({f"model.diffusion_model.{k}": v for k, v in tensors.items()}, config)
    if family == "flux":
        return tool.convert_flux_transformer_checkpoint_to_diffusers(dict(tensors))
    return tool.convert_sd3_transformer_checkpoint_to_diffusers(
        {"pos_embed": tensors["x_embedder.proj.bias"], **tensors}
    )


@pytest.mark.peer
@pytest.mark.parametrize(
    ("family", "component"),
    [("sd1", "unet"), ("sdxl", "unet"), ("flux", "transformer"), ("sd3-medium", "transformer"),
     ("sd3.5-medium", "transformer"), ("sd3.5-large", "transformer")],
    ids="-".join,
)  # fmt: skip
def test_the_published_tensors_lie_where_the_diffusers_converter_puts_them(family, component):
    tensors = published_tensors(family, component)
    wanted = converted(family, component, tensors)
    wanted.pop("pos_embed.pos_embed", None)
    found = {}
    for row in rows_of(family, component):
        source = tensors[row.published].numpy()
        part = source[row.rows.indices(len(source))] if row.rows else source
        if row.own:  # a half of it
            whole = found.setdefault(row.torch, np.full_like(source, np.nan))
            whole[row.own.indices(len(whole))] = part
        else:
            found[row.torch] = part
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        np.testing.assert_array_equal(found[name], tensor.numpy(), err_msg=name)


@pytest.mark.peer
def test_the_second_encoder_of_xl_lies_where_the_diffusers_converter_puts_it():
    import torch
    from diffusers.loaders import single_file_utils as tool

    from loraformat_converters.spaces.encoders import open_clip

    rows = list(open_clip(2))
    tensors = {row.published: torch.randn(6, 2) for row in rows}
    prefix = "conditioner.embedders.1.model."
    model = clip("CLIPTextModelWithProjection", 2)
    stored = {f"{prefix}{name}": tensor for name, tensor in tensors.items()} | {
        f"{prefix}text_projection": torch.randn(2, 2)
    }
    wanted = tool.convert_open_clip_checkpoint(model, stored, prefix=prefix)
    for row in rows:
        source = tensors[row.published]
        part = source[row.rows.indices(6)] if row.rows else source
        assert torch.equal(part, wanted[row.torch]), row.torch
