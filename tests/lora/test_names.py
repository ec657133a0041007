"""Names of modules: whatever a trainer calls one, it is read as the same; files tell how blocks are counted."""

import pytest
import torch

from w2wpp import encode_lora, load_space, shipped
from w2wpp.lora.names import OTHER, TEXT, UNET, layers_of, module_name, parse_key

Q = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.mark.parametrize(
    "key",
    [
        f"unet.base_model.model.{Q}.lora_A.weight",
        f"base_model.model.unet.{Q}.lora_A.default.weight",
        f"module._orig_mod.{Q}.lora_A.weight",
        f"base_model.model._orig_mod.{Q}.lora_A.weight",
        f"lora_unet_{Q.replace('.', '_')}.lora_A.weight",
        f"lora_unet.{Q}.lora_down.weight",
        f"lycoris_{Q.replace('.', '_')}.lora_down.weight",
        f"unet.{Q.replace('.to_q', '.processor.to_q')}.lora_A.weight",
        f"{Q.replace('.to_q', '.processor.to_q')}_lora.down.weight",
        "diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q.lora_down.weight",
        "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q.lora_down.weight",
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.lora_down.weight",
    ],
)
def test_one_module_by_any_name(key):
    assert parse_key(key) == (UNET, Q, "down")


def test_text_encoders_and_strangers_are_no_modules_of_the_unet():
    for key in (
        "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight",
        "text_encoder.x.lora_A.weight",
    ):
        assert parse_key(key)[0] == TEXT
    assert parse_key("bundle_emb") == (OTHER, "", "")


def test_blocks_of_one_layer_are_counted_as_the_file_shows():
    keys = ["diffusion_model.input_blocks.2.0.op.lora_up.weight"]
    assert layers_of(keys) == 1 and layers_of(["diffusion_model.input_blocks.3.0.op.alpha"]) == 2
    assert (
        module_name("diffusion_model.output_blocks.1.1.norm", 1)[1]
        == "up_blocks.0.attentions.1.norm"
    )


def test_the_hosts_trainer_on_the_avatar_model(tmp_path):
    """Its names count blocks of one layer, which a file of attention alone does not show: the space does."""
    space = load_space(shipped("avatars-pca.safetensors"))
    assert space.layout.layers == 1
    where = {
        "down_blocks.1.attentions.0": "input_blocks.3.1",
        "mid_block.attentions.0": "middle_block.1",
        "up_blocks.0.attentions.0": "output_blocks.0.1",
        "up_blocks.0.attentions.1": "output_blocks.1.1",
    }
    person = space.sample(1, generator=torch.Generator().manual_seed(1))
    tensors = {}
    for name, (a, b) in space.layout.unpack(person.vectors(space)[0]).items():
        block = next(block for block in where if name.startswith(block))
        stem = f"diffusion_model.{where[block]}{name.removeprefix(block)}"
        tensors[f"{stem}.lora_down.weight"], tensors[f"{stem}.lora_up.weight"] = a, b
        tensors[f"{stem}.alpha"] = torch.tensor(space.layout.alpha)
    found, report = encode_lora(space, tensors)
    assert report.missing_modules == ()
    torch.testing.assert_close(found.z, person.z, atol=5e-3, rtol=0)
