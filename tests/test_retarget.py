"""retarget: the same change under other names, by tables, by a base, by stated names, by values; or a refusal."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file
from updates import normal

import loraformat as lf
from loraformat import Adapter, Lora, Update, registry
from loraformat.naming.links import Link, Seat
from loraformat.verbs.convert import save
from loraformat_converters.spaces.families import FAMILIES

FAMILY = {family.name: family for family in FAMILIES}


def pair(out=6, in_=5, rank=2, seed=0):
    return Update((Lora(normal(rank, in_, seed=seed), normal(out, rank, seed=seed), 3.0, "alpha/r"),))


def adapter(*keys, names="kohya", out=6):
    return Adapter({key: pair(out, seed=n) for n, key in enumerate(keys)}, names)


def matched(found, *args, **more):
    return {key: list(new) for key, new in lf.retarget(found, *args, **more).matched.items()}


def refused(rule, *args, **more):
    with pytest.raises(lf.LoraFormatError) as caught:
        lf.retarget(*args, **more)
    assert {p.rule for p in caught.value.problems} == {rule}, caught.value
    return str(caught.value)


def base(tmp_path, shapes, name="base.safetensors"):
    save_file({key: normal(*shape, seed=n) for n, (key, shape) in enumerate(shapes.items())}, tmp_path / name)
    return lf.open_base(tmp_path / name)


# By the tables of image models.


@pytest.mark.parametrize(
    ("kohya", "torch"),
    [
        ("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0",
         "unet:down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0"),
        ("lora_unet_input_blocks_4_1_transformer_blocks_1_ff_net_0_proj",
         "unet:down_blocks.1.attentions.0.transformer_blocks.1.ff.net.0.proj"),
        ("lora_unet_output_blocks_2_2_conv", "unet:up_blocks.0.upsamplers.0.conv"),
        ("lora_unet_label_emb_0_2", "unet:add_embedding.linear_2"),
        ("lora_te_text_model_encoder_layers_11_mlp_fc1", "text_encoder:text_model.encoder.layers.11.mlp.fc1"),
        ("lora_te2_text_model_encoder_layers_31_self_attn_q_proj",
         "text_encoder_2:text_model.encoder.layers.31.self_attn.q_proj"),
        ("lora_te3_encoder_block_23_layer_1_DenseReluDense_wi_0",
         "text_encoder_2:encoder.block.23.layer.1.DenseReluDense.wi_0"),
        ("lora_unet_double_blocks_18_img_mlp_2", "transformer:transformer_blocks.18.ff.net.2"),
        ("lora_transformer_single_transformer_blocks_37_proj_mlp", "transformer:single_transformer_blocks.37.proj_mlp"),
        ("lora_unet_joint_blocks_37_x_block_mlp_fc2", "transformer:transformer_blocks.37.ff.net.2"),
    ],
)  # fmt: skip
def test_a_name_of_kohya_is_a_name_of_diffusers(kohya, torch):
    # T5 is the second encoder of Flux and the third of SD 3: one more name of Flux tells which
    more = ["lora_unet_double_blocks_0_img_mod_lin.weight"] if "te3" in kohya else []
    found = lf.retarget(adapter(f"{kohya}.weight", *more), "torch")
    assert found.matched[f"{kohya}.weight"] == (f"{torch}.weight",)
    assert found.adapter.names == "torch"
    assert torch.partition(":")[0] in found.adapter.components


def test_t5_alone_may_be_of_two_models():
    key = "lora_te3_encoder_block_0_layer_0_SelfAttention_q.weight"
    said = refused("LF-603", adapter(key), "torch")
    assert "text_encoder_2" in said
    assert "text_encoder_3" in said


@pytest.mark.parametrize("name", FAMILY)
def test_every_key_of_a_model_goes_to_kohya_and_back(name):
    keys = [key for key in FAMILY[name].written if ":" in key and key.endswith(".weight")]
    keys = [key for key in keys if "23.norm1_context" not in key]  # of the medium SD 3 the last, of the large one not
    whole = Adapter(
        {key: pair(24 if "proj_mlp" in key else 6) for key in keys},
        components=tuple(sorted({k.partition(":")[0] for k in keys})),
    )
    there = lf.retarget(whole, "kohya").adapter
    assert there.components == ()
    back = lf.retarget(there, "torch").adapter
    assert back.components == whole.components
    assert back.keys() == whole.keys()
    for key, update in whole.items():
        np.testing.assert_array_equal(back[key].matrix(), update.matrix(), err_msg=key)


def test_a_fused_tensor_of_flux_is_cut_where_diffusers_has_several():
    whole = adapter("lora_unet_single_blocks_0_linear1.weight", out=14)
    split = lf.retarget(whole, "torch").adapter
    matrix = whole["lora_unet_single_blocks_0_linear1.weight"].matrix()
    stem = "transformer:single_transformer_blocks.0"
    for name, rows in (("attn.to_q", (0, 2)), ("attn.to_k", (2, 4)), ("attn.to_v", (4, 6)), ("proj_mlp", (6, 14))):
        np.testing.assert_array_equal(split[f"{stem}.{name}.weight"].matrix(), matrix[slice(*rows)])
    assert lf.digest(lf.retarget(split, "kohya").adapter) == lf.digest(whole)


def test_pairs_that_were_trained_apart_are_one_for_kohya_at_the_sum_of_their_ranks():
    keys = [f"transformer:transformer_blocks.0.attn.to_{name}.weight" for name in "qk"]
    keys += ["transformer:single_transformer_blocks.0.proj_out.weight"]  # which only Flux has
    apart = Adapter({key: pair(seed=n) for n, key in enumerate(keys)}, components=("transformer",))
    fused = lf.retarget(apart, "kohya").adapter["lora_unet_double_blocks_0_img_attn_qkv.weight"]
    assert fused.rank == 4
    wanted = [*(apart[key].matrix() for key in keys[:2]), np.zeros((6, 5))]
    np.testing.assert_allclose(fused.matrix(), np.concatenate(wanted), rtol=1e-6)


FUSED = {
    "flux": ([f"transformer:single_transformer_blocks.3.{n}.weight" for n in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")],
             "lora_unet_single_blocks_3_linear1.weight"),
    "sd3": ([f"transformer:transformer_blocks.7.attn.add_{n}_proj.weight" for n in "qkv"],
            "lora_unet_joint_blocks_7_context_block_attn_qkv.weight"),
}  # fmt: skip
ONLY = {"flux": "transformer:context_embedder.weight", "sd3": "transformer:pos_embed.proj.weight"}


def apart(name, ranks):
    """Pairs of what is fused, of these ranks; and of a parameter that only such a model has."""
    sizes = {key: 24 if "proj_mlp" in key else 6 for key in FUSED[name][0]}
    pairs = [
        Update((Lora(normal(r, 5, seed=n), normal(size, r, seed=n), 1.5, "factor"),))
        for n, (size, r) in enumerate(zip(sizes.values(), ranks, strict=False))
    ]
    return Adapter({**dict(zip(sizes, pairs, strict=True)), ONLY[name]: pair(seed=9)}, components=("transformer",))


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("ranks", [(2, 2, 2, 2), (3, 1, 2, 4)], ids=str)
def test_what_was_fused_comes_back_as_the_pairs_that_it_was(name, ranks):
    before = apart(name, ranks)
    fused = lf.retarget(before, "kohya").adapter
    assert fused[FUSED[name][1]].rank == sum(ranks[: len(FUSED[name][0])])
    back = lf.retarget(fused, "torch").adapter
    for key, update in before.items():
        assert back[key].scale == update.scale
        for role in ("lora_A", "lora_B"):
            np.testing.assert_array_equal(getattr(back[key]["lora"], role), getattr(update["lora"], role), err_msg=key)


@pytest.mark.parametrize("name", FUSED)
def test_what_was_cut_is_one_pair_again_whose_a_is_stored_once(name, tmp_path):
    sizes = 42 if name == "flux" else 18
    known = {"flux": "lora_unet_txt_in.weight", "sd3": "lora_unet_x_embedder_proj.weight"}
    whole = Adapter({FUSED[name][1]: pair(sizes, rank=4), known[name]: pair(seed=9)}, "kohya")
    save(whole, tmp_path / "whole.safetensors", registry.layout("kohya"))
    lf.convert(tmp_path / "whole.safetensors", tmp_path / "cut.safetensors", to_layout="diffusers")
    assert {update.rank for update in lf.load(tmp_path / "cut.safetensors").values()} == {4, 2}
    lf.convert(tmp_path / "cut.safetensors", tmp_path / "again.safetensors", to_layout="kohya")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


def test_scale_and_shift_change_places_in_the_last_norm():
    whole = adapter("lora_unet_final_layer_adaLN_modulation_1.weight", "lora_unet_double_blocks_0_img_mod_lin.weight")
    there = lf.retarget(whole, "torch").adapter["transformer:norm_out.linear.weight"]
    matrix = whole["lora_unet_final_layer_adaLN_modulation_1.weight"].matrix()
    np.testing.assert_array_equal(there.matrix(), np.roll(matrix, 3, 0))


def test_a_name_that_no_model_has_is_refused_and_every_one_is_told():
    found = adapter("lora_unet_mid_block_resnets_0_conv1.weight", "lora_unet_nonsense.weight", "lora_te_x.weight")
    said = refused("LF-602", found, "torch")
    assert "lora_unet_nonsense.weight" in said
    assert "lora_te_x.weight" in said
    assert "mid_block_resnets_0_conv1.weight  @" not in said


def test_torch_names_that_no_table_has_do_not_go_to_kohya():
    refused("LF-602", Adapter({"model.layers.0.self_attn.q_proj.weight": pair()}), "kohya")


def test_two_models_that_have_the_names_are_told_apart_by_the_base(tmp_path):
    own = Adapter({"unet:conv_in.weight": pair()}, components=("unet",))
    assert "table: sdxl" in refused("LF-603", own, "kohya")
    known = base(tmp_path, {"conv_in.weight": (6, 5), "add_embedding.linear_1.weight": (6, 5)})
    assert matched(own, "kohya", base=known) == {"unet:conv_in.weight": ["lora_unet_input_blocks_0_0.weight"]}


# By a base.


def test_names_that_only_the_base_tells_apart(tmp_path):
    known = base(tmp_path, {"net.to_out.0.weight": (6, 5), "net.to.out.weight": (6, 5)})
    assert matched(adapter("lora_unet_net_to_out_0.weight"), base=known) == {
        "lora_unet_net_to_out_0.weight": ["net.to_out.0.weight"]
    }


def test_two_modules_of_the_base_that_kohya_spells_alike_are_refused(tmp_path):
    known = base(tmp_path, {"net.to_out.weight": (6, 5), "net.to.out.weight": (6, 5)})
    assert "net.to.out.weight" in refused("LF-603", adapter("lora_unet_net_to_out.weight"), base=known)


def test_a_published_checkpoint_takes_kohya_names_of_either_kind(tmp_path):
    home = "model.diffusion_model."
    shapes = {f"{home}double_blocks.0.img_attn.qkv.weight": (18, 5), f"{home}single_blocks.0.linear2.weight": (6, 5)}
    known = base(tmp_path, shapes)
    own = adapter("lora_unet_double_blocks_0_img_attn_qkv.weight", out=18)
    assert matched(own, base=known) == {next(iter(own)): [f"{home}double_blocks.0.img_attn.qkv.weight"]}
    others = adapter(*(f"lora_transformer_transformer_blocks_0_attn_to_{name}.weight" for name in "qkv"))
    fused = lf.retarget(others, base=known).adapter[f"{home}double_blocks.0.img_attn.qkv.weight"]
    np.testing.assert_allclose(fused.matrix(), np.concatenate([u.matrix() for u in (
        others["lora_transformer_transformer_blocks_0_attn_to_q.weight"],
        others["lora_transformer_transformer_blocks_0_attn_to_k.weight"],
        others["lora_transformer_transformer_blocks_0_attn_to_v.weight"])]), rtol=1e-6)  # fmt: skip


def test_an_adapter_of_diffusers_goes_to_the_published_checkpoint_and_back(tmp_path):
    home = "model.diffusion_model."
    known = base(tmp_path, {f"{home}input_blocks.1.0.in_layers.2.weight": (6, 5), f"{home}out.2.weight": (6, 5)})
    keys = ("unet:down_blocks.0.resnets.0.conv1.weight", "unet:conv_out.weight")
    there = lf.retarget(Adapter({k: pair(seed=i) for i, k in enumerate(keys)}, components=("unet",)), base=known)
    assert set(there.adapter) == {f"{home}input_blocks.1.0.in_layers.2.weight", f"{home}out.2.weight"}
    pipeline = base(
        tmp_path, {"down_blocks.0.resnets.0.conv1.weight": (6, 5), "conv_out.weight": (6, 5)}, "unet.safetensors"
    )
    assert set(lf.retarget(there.adapter, base=pipeline).adapter) == {k.partition(":")[2] for k in keys}


def test_a_text_encoder_of_transformers_5_has_one_module_less(tmp_path):
    known = base(tmp_path, {"encoder.layers.0.mlp.fc1.weight": (6, 5)})
    own = adapter("lora_te_text_model_encoder_layers_0_mlp_fc1.weight")
    assert set(lf.retarget(own, base=known).adapter) == {"encoder.layers.0.mlp.fc1.weight"}
    torch = Adapter({"text_encoder:text_model.encoder.layers.0.mlp.fc1.weight": pair()}, components=("text_encoder",))
    assert set(lf.retarget(torch, base=known).adapter) == {"encoder.layers.0.mlp.fc1.weight"}


def test_names_that_the_base_has_stay(tmp_path):
    known = base(tmp_path, {"a.weight": (6, 5)})
    own = Adapter({"a.weight": pair()})
    assert lf.retarget(own, base=known).adapter["a.weight"] is own["a.weight"]


# By stated names.


def test_stated_names_come_first_and_the_rest_by_the_tables(tmp_path):
    own = adapter("lora_unet_conv_in.weight", "lora_unet_mine_a.weight", "lora_unet_mine_b.weight")
    found = lf.retarget(own, "torch", names={"lora_unet_mine_*": "unet:mine.*"})
    assert found.matched["lora_unet_mine_a.weight"] == ("unet:mine.a.weight",)
    assert found.adapter.components == ("unet",)


def test_a_stated_name_that_is_taken_is_refused():
    own = adapter("lora_unet_conv_in.weight", "lora_unet_x.weight")
    refused("LF-603", own, "torch", names={"lora_unet_x.weight": "unet:conv_in.weight"})


def test_a_stated_name_of_no_target_is_refused():
    refused("LF-705", adapter("lora_unet_conv_in.weight"), "torch", names={"lora_unet_y.weight": "z"})


# By values.


def test_a_weight_is_recognised_renamed_and_transposed(tmp_path):
    w = {f"old.{n}.weight": normal(24, 16, seed=n) for n in range(3)}
    save_file(w, tmp_path / "old.safetensors")
    new = {f"new.{'cab'[n]}": np.ascontiguousarray(t.T if n == 1 else t) for n, t in enumerate(w.values())}
    save_file(new, tmp_path / "new.safetensors")
    origin, known = (lf.open_base(tmp_path / f"{name}.safetensors") for name in ("old", "new"))
    own = Adapter({key: pair(24, 16, seed=n) for n, key in enumerate(w)})
    found = lf.retarget(own, base=known, origin=origin).adapter
    assert set(found) == set(new)
    for n, (key, weight) in enumerate(w.items()):
        update = found[f"new.{'cab'[n]}"]
        wanted = weight + own[key].matrix()
        np.testing.assert_allclose(update.apply(new[f"new.{'cab'[n]}"]), wanted.T if n == 1 else wanted, rtol=1e-5)


def test_a_bound_adapter_is_recognised_without_its_base(tmp_path):
    w = normal(24, 16)
    save_file({"old.weight": w}, tmp_path / "old.safetensors")
    save_file({"new.weight": w, "other": normal(24, 16, seed=7)}, tmp_path / "new.safetensors")
    bound = lf.bind(Adapter({"old.weight": pair(24, 16)}), lf.open_base(tmp_path / "old.safetensors"))
    assert set(lf.retarget(bound, base=lf.open_base(tmp_path / "new.safetensors")).adapter) == {"new.weight"}


@pytest.mark.parametrize("bound", [False, True])
def test_a_multiple_of_a_weight_is_refused(bound, tmp_path):
    """As MaxText stores q: W / √d, beside which ΔW would have to be divided too."""
    w = normal(24, 16)
    save_file({"old.weight": w}, tmp_path / "old.safetensors")
    save_file({"new.weight": w * np.float32(64**-0.5)}, tmp_path / "new.safetensors")
    own = Adapter({"old.weight": pair(24, 16)})
    known, origin = (lf.open_base(tmp_path / f"{name}.safetensors") for name in ("new", "old"))
    given = {"base": known} if bound else {"base": known, "origin": origin}
    said = refused("LF-616", lf.bind(own, origin) if bound else own, **given)
    assert "new.weight is 0.125 times old.weight" in said


def test_two_weights_that_are_alike_are_refused(tmp_path):
    w = normal(24, 16)
    save_file({"old.weight": w}, tmp_path / "old.safetensors")
    save_file({"a.weight": w, "b.weight": w}, tmp_path / "new.safetensors")
    own = Adapter({"old.weight": pair(24, 16)})
    known, origin = (lf.open_base(tmp_path / f"{name}.safetensors") for name in ("new", "old"))
    assert "sketch" in refused("LF-603", own, base=known, origin=origin)


def test_an_unknown_weight_is_refused(tmp_path):
    known = base(tmp_path, {"a.weight": (24, 16)})
    refused("LF-602", Adapter({"old.weight": pair(24, 16)}), base=known)


# Where to.


def test_nowhere_and_unknown_spaces_are_refused():
    assert "--to SPACE" in refused("LF-705", adapter("a.weight"))
    assert "kohya" in refused("LF-705", adapter("a.weight"), "martian")
    assert "no installed name space" in refused("LF-705", adapter("a.weight", names="org.example.far"), "torch")


class Net:
    """A third party's space: another prefix, kernels [in, out]."""

    name = "org.example.net"
    describes = "Net"

    def links(self, known):
        for key in known.torch_keys(lambda own: own.removeprefix("net.") if own.startswith("net.") else None):
            yield Link(Seat(key, axes="out,in"), Seat(f"net.{key}", axes="in,out"), "rule: net.")


@pytest.fixture
def net(monkeypatch):
    spaces = registry.spaces() | {"net": Net()}
    monkeypatch.setattr(registry, "spaces", lambda: spaces)


@pytest.mark.usefixtures("net")
def test_a_third_party_brings_a_space_both_ways_and_beyond_torch():
    key = "unet:down_blocks.0.attentions.0.proj_in.weight"
    own = Adapter({key: pair().placed(lf.Placement.of((6, 5), "out,in"))}, components=("unet",))
    there = lf.retarget(own, "org.example.net").adapter
    assert there[f"net.{key}"].placement.spec == "in,out"
    assert set(lf.retarget(there, "torch").adapter) == set(own)
    assert matched(there, "kohya") == {f"net.{key}": ["lora_unet_down_blocks_0_attentions_0_proj_in.weight"]}


# The commands.


def test_the_command_writes_the_file_and_says_what_became_what(run, tmp_path):
    keys = ("lora_unet_double_blocks_0_img_attn_qkv.weight", "lora_unet_single_blocks_0_linear2.weight")
    lf.save(adapter(*keys), tmp_path / "a.lora.safetensors")
    told = run(
        "retarget", tmp_path / "a.lora.safetensors", "--to", "torch", "-o", tmp_path / "b.lora.safetensors", "--json"
    )
    assert told.code == 0, told.err
    said = json.loads(told.out)
    assert (said["schema"], said["names"], said["evidence"]) == (1, "torch", ["table: flux"])
    assert len(said["matched"]["lora_unet_double_blocks_0_img_attn_qkv.weight"]) == 3
    assert lf.load(tmp_path / "b.lora.safetensors").names == "torch"
    again = run("retarget", tmp_path / "b.lora.safetensors", "--to", "kohya", "-o", tmp_path / "c.lora.safetensors")
    assert "torch → kohya · 4 targets → 2 targets by table: flux" in again.err


def test_a_refusal_writes_nothing(run, tmp_path):
    lf.save(adapter("lora_unet_nonsense.weight"), tmp_path / "a.lora.safetensors")
    told = run("retarget", tmp_path / "a.lora.safetensors", "--to", "torch", "-o", tmp_path / "b.lora.safetensors")
    assert (told.code, "LF-602" in told.err) == (1, True)
    assert not (tmp_path / "b.lora.safetensors").exists()


def test_convert_finds_the_names_of_the_layout(tmp_path):
    lf.save(
        adapter("lora_unet_conv_in.weight", "lora_te_text_model_encoder_layers_0_mlp_fc1.weight"),
        tmp_path / "a.lora.safetensors",
    )
    lf.convert(tmp_path / "a.lora.safetensors", tmp_path / "pytorch_lora_weights.safetensors")
    assert lf.load(tmp_path / "pytorch_lora_weights.safetensors").components == ("text_encoder", "unet")


def test_convert_binds_to_a_base_of_other_names(tmp_path):
    base(tmp_path, {"net.to_q.weight": (6, 5)})
    lf.save(adapter("lora_unet_net_to_q.weight"), tmp_path / "a.lora.safetensors")
    lf.convert(tmp_path / "a.lora.safetensors", tmp_path / "b.lora.safetensors", base=tmp_path / "base.safetensors")
    assert lf.load(tmp_path / "b.lora.safetensors")["net.to_q.weight"].base_sha256
