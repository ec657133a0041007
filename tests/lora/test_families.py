"""Names of modules in every spelling, fused weights, and which model a LoRA is for."""

import pytest
import torch
from safetensors.torch import save_file

from w2wpp import FormatError
from w2wpp.lora.collection import collect
from w2wpp.lora.delta import Factors, inner
from w2wpp.lora.families import (
    Shape,
    blocks,
    join_key,
    lora_key,
    lora_keys,
    module_name,
    recognise,
    split,
)
from w2wpp.lora.members import fitted, member_of_tensors, open_member, read_fitted
from w2wpp.training.collection_report import cosines

IN_BLOCK = "transformer_blocks.0.attn1.to_q"


@pytest.mark.parametrize(
    "spelled, name",
    [
        ("lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q", f"down_blocks.1.attentions.0.{IN_BLOCK}"),
        ("diffusion_model.output_blocks.5.1." + IN_BLOCK, f"up_blocks.1.attentions.2.{IN_BLOCK}"),
        ("lora_unet_middle_block_1_proj_in", "mid_block.attentions.0.proj_in"),
        ("lora_unet_middle_block_2_in_layers_2", "mid_block.resnets.1.conv1"),
        ("lora_unet_input_blocks_3_0_op", "down_blocks.0.downsamplers.0.conv"),
        ("lora_unet_output_blocks_5_2_conv", "up_blocks.1.upsamplers.0.conv"),
        ("lora_unet_input_blocks_1_0_emb_layers_1", "down_blocks.0.resnets.0.time_emb_proj"),
        ("base_model.model.mid_block.attentions.0." + IN_BLOCK, f"mid_block.attentions.0.{IN_BLOCK}"),
        ("unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_out",
         "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0"),
        ("lora_unet_up_blocks_1_attentions_0_transformer_blocks_1_ff_net_0_proj",
         "up_blocks.1.attentions.0.transformer_blocks.1.ff.net.0.proj"),
        ("transformer.single_transformer_blocks.3.attn.to_q", "single_transformer_blocks.3.attn.to_q"),
        ("lora_transformer_transformer_blocks_3_ff_context_net_0_proj", "transformer_blocks.3.ff_context.net.0.proj"),
        ("diffusion_model.blocks.0.self_attn.q", "blocks.0.self_attn.q"),
        ("lora_unet_double_blocks_0_img_attn_qkv", "double_blocks_0_img_attn_qkv"),
    ],
)  # fmt: skip
def test_spellings(spelled, name):
    assert module_name(spelled) == name
    assert join_key(lora_key(name)) == join_key(name)


@pytest.mark.parametrize(
    "spelled, name, alone, beside",
    [
        (
            "lora_te_text_model_encoder_layers_11_self_attn_q_proj",
            "text_encoder.text_model.encoder.layers.11.self_attn.q_proj",
            "lora_te_text_model_encoder_layers_11_self_attn_q_proj",
            "lora_te1_text_model_encoder_layers_11_self_attn_q_proj",
        ),
        (
            "base_model.model.text_encoder.text_model.encoder.layers.0.mlp.fc2",
            "text_encoder.text_model.encoder.layers.0.mlp.fc2",
            "lora_te_text_model_encoder_layers_0_mlp_fc2",
            "lora_te1_text_model_encoder_layers_0_mlp_fc2",
        ),
        (
            "lora_te2_text_model_encoder_layers_31_self_attn_out_proj",
            "text_encoder_2.text_model.encoder.layers.31.self_attn.out_proj",
            "lora_te2_text_model_encoder_layers_31_self_attn_out_proj",
            "lora_te2_text_model_encoder_layers_31_self_attn_out_proj",
        ),
        (
            "text_encoders.clip_g.transformer.text_model.encoder.layers.3.mlp.fc1",
            "text_encoder_2.text_model.encoder.layers.3.mlp.fc1",
            "lora_te2_text_model_encoder_layers_3_mlp_fc1",
            "lora_te2_text_model_encoder_layers_3_mlp_fc1",
        ),
        (
            "lora_te3_encoder_block_0_layer_0_SelfAttention_q",
            "lora_te3_encoder_block_0_layer_0_SelfAttention_q",
            "lora_te3_encoder_block_0_layer_0_SelfAttention_q",
            "lora_te3_encoder_block_0_layer_0_SelfAttention_q",
        ),
    ],
)
def test_spellings_of_text_encoders(spelled, name, alone, beside):
    assert module_name(spelled) == name
    assert lora_keys([name])[name] == alone
    second = "text_encoder_2.text_model.encoder.layers.0.self_attn.k_proj"
    assert lora_keys([name, second])[name] == beside
    assert join_key(alone) == join_key(beside) == join_key(name)


def test_blocks_of_text_encoders():
    layers = [f"text_encoder_2.text_model.encoder.layers.{i}.mlp.fc1" for i in range(32)]
    found = blocks(["text_encoder.text_model.encoder.layers.3.mlp.fc1", *layers])
    assert found[layers[9]] == "text_encoder_2.text_model.encoder.layers.8-15"
    assert len(set(found.values())) == 5


def shapes(*rows):
    return {name: Shape(*size) for name, *size in rows}


@pytest.mark.parametrize(
    "family, found",
    [
        ("sd15", shapes(("down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v", 768, 320))),
        ("sd2", shapes(("down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k", 1024, 320))),
        ("sdxl", shapes(("down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k", 2048, 640))),
        ("sdxl", shapes(("mid_block.attentions.0.transformer_blocks.7.attn1.to_q", 1280, 1280))),
        ("sd15 or sd2", shapes(("up_blocks.3.attentions.0.transformer_blocks.0.attn1.to_q", 320, 320))),
        ("sd15", shapes(("down_blocks.0.attentions.0.proj_in", 320, 320, (1, 1)))),
        ("sdxl", shapes(("text_encoder_2.text_model.encoder.layers.3.mlp.fc1", 1280, 5120))),
        ("sd2", shapes(("text_encoder.text_model.encoder.layers.3.self_attn.q_proj", 1024, 1024))),
        ("unknown", shapes(("text_encoder.text_model.encoder.layers.3.self_attn.q_proj", 768, 768))),
        ("sd3", shapes(("joint_blocks_0_x_block_attn_qkv", 1536, 4608))),
        ("sd3", shapes(("transformer_blocks.3.attn.to_q", 2432, 2432))),
        ("flux", shapes(("double_blocks_0_img_attn_qkv", 3072, 9216))),
        ("flux", shapes(("single_transformer_blocks.37.attn.to_q", 3072, 3072))),
        ("flux", shapes(("transformer_blocks.3.attn.to_q", 3072, 3072))),
        ("hunyuan-video", shapes(("double_blocks.19.img_attn.qkv", 3072, 9216))),
        ("qwen-image", shapes(("transformer_blocks.59.attn.to_q", 3072, 3072))),
        ("qwen-image", shapes(("transformer_blocks.0.img_mlp.net.2", 12288, 3072))),
        ("wan", shapes(("blocks.0.self_attn.q", 1536, 1536))),
        ("z-image", shapes(("layers.0.attention.to_q", 3840, 3840))),
        ("unknown", shapes(("encoder.0.to_q", 64, 64))),
        ("unknown", shapes(("down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k", 6, 8))),
    ],
)  # fmt: skip
def test_families_by_names_and_shapes(family, found):
    assert recognise(found) == family


def random_factors(size_in, size_out, rank, seed):
    g = torch.Generator().manual_seed(seed)
    return Factors(
        torch.randn(rank, size_in, generator=g).half().float(),
        torch.randn(size_out, rank, generator=g).half().float(),
        0.5,
    )


def test_fused_weights_are_split_by_rows():
    f = random_factors(8, 7 * 8, 2, 0)
    parts = split("single_blocks_4_linear1", f)
    where = "single_transformer_blocks.4."
    assert list(parts) == [where + n for n in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")]
    assert torch.equal(torch.cat([p.dense() for p in parts.values()]), f.dense())
    assert [p.up.shape[0] for p in parts.values()] == [8, 8, 8, 32]


def flux_pair():
    """One update in kohya's fused spelling, and in diffusers' split one."""
    h, fused, split_up = 6, {}, {}
    for i, name in enumerate(
        ("double_blocks_0_img_attn_qkv", "double_blocks_0_txt_mlp_0", "single_blocks_1_linear1")
    ):
        f = random_factors(h, {0: 3 * h, 1: 4 * h, 2: 7 * h}[i], 2, i)
        fused[f"lora_unet_{name}.lora_down.weight"] = f.down
        fused[f"lora_unet_{name}.lora_up.weight"] = f.up
        fused[f"lora_unet_{name}.alpha"] = torch.tensor(1.0)
        for part, p in split(name, f).items():
            split_up[f"transformer.{part}.lora_A.weight"] = p.down
            split_up[f"transformer.{part}.lora_B.weight"] = p.up * p.scale
    return fused, split_up


def test_fused_and_split_files_of_one_update_are_one():
    members = [member_of_tensors(t, n) for t, n in zip(flux_pair(), ("fused", "split"))]
    assert {m.family for m in members} == {"flux"}
    together = collect(members)
    assert "transformer_blocks.0.attn.to_k" in together.shapes
    total = sum(inner(together.stack(i)) for i in range(len(together.names)))
    torch.testing.assert_close(cosines(total), torch.ones(2, 2).double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(total, total[0, 0].expand(2, 2), rtol=1e-3, atol=0)


@pytest.mark.parametrize("of_space", [0, 1])
def test_a_file_meets_modules_in_the_other_spelling(of_space):
    members = [member_of_tensors(t, n) for t, n in zip(flux_pair(), ("fused", "split"))]
    space, other = members[of_space], members[1 - of_space]
    wanted = {n: s.shape for n, s in space.modules.items()}
    other, found, rest = fitted(other, wanted)
    assert not rest and set(found) == set(wanted)
    for name, modules in found.items():
        got = read_fitted(other, name, wanted[name], modules)
        torch.testing.assert_close(got.dense(), space.read(name).dense(), atol=1e-3, rtol=1e-3)


def test_alphas_convolutions_and_what_is_no_lora(tmp_path):
    key = "lora_unet_down_blocks_0_resnets_0_conv1"
    tensors = {
        f"{key}.lora_down.weight": torch.ones(4, 3, 3, 3),
        f"{key}.lora_up.weight": torch.ones(5, 4, 1, 1),
        f"{key}.alpha": torch.tensor(2.0),
        "lora_unet_conv_in.diff_b": torch.ones(3),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    member = open_member(tmp_path / "a.safetensors")
    (source,) = member.modules.values()
    assert source.shape == Shape(27, 5, (3, 3)) and source.scale == 0.5
    assert member.unread == ("lora_unet_conv_in.diff_b",)
    f = member.read("down_blocks.0.resnets.0.conv1")
    assert torch.equal(f.dense(), torch.full((5, 27), 2.0).double())
    for name, odd in {
        "lacks its part 'hada_w1_b'": {"x.hada_w1_a": torch.ones(1)},
        "DoRA": {**tensors, f"{key}.dora_scale": torch.ones(5)},
        "only one of its two": {f"{key}.lora_down.weight": torch.ones(1, 2)},
        "ranks of": {f"{key}.lora_down.weight": torch.ones(1, 2), f"{key}.lora_up.weight": torch.ones(2, 3)},
        "no LoRA of a diffusion model": {"lora_te_x.lora_down.weight": torch.ones(1, 1)},
    }.items():  # fmt: skip
        with pytest.raises(FormatError, match=name):
            member_of_tensors(odd)


def test_blocks_are_few():
    names = [f"transformer_blocks.{i}.attn.to_q" for i in range(57)]
    assert len(set(blocks(names).values())) == 4
    unet = ["down_blocks.1.x", "mid_block.attentions.0.y", "up_blocks.3.z", "conv_in"]
    assert blocks(unet) == {
        unet[0]: "down_blocks.1", unet[1]: "mid_block.attentions.0", unet[2]: "up_blocks.3", unet[3]: "conv_in",
    }  # fmt: skip
