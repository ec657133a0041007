import json

import pytest
import safetensors.torch
import torch

from w2wpp import (
    SD15,
    ConfigError,
    FormatError,
    LayoutMismatch,
    kohya_tensors,
    load_lora,
    save_lora,
)
from w2wpp.lora.names import dotted_name

BLOCK = "down_blocks.1.attentions.0.transformer_blocks.0"
Q, OUT = f"{BLOCK}.attn1.to_q", f"{BLOCK}.attn2.to_out.0"


@pytest.fixture
def w(layout):
    return torch.randn(layout.size, generator=torch.Generator().manual_seed(0))


def save(tmp_path, tensors, metadata=None):
    safetensors.torch.save_file(tensors, tmp_path / "lora.safetensors", metadata=metadata)
    return tmp_path / "lora.safetensors"


def pair(rank=1, size=4):
    return torch.randn(rank, size), torch.randn(size, rank)


def deltas(file):
    return {n: file.alphas[n] / a.shape[0] * b @ a for n, (a, b) in file.lora.items()}


@pytest.mark.parametrize("name", ["kohya", "diffusers", "peft"])
def test_written_files_give_the_vector_back(tmp_path, layout, w, name):
    path = tmp_path / f"{name}.safetensors"
    save_lora(layout.unpack(w), path, format=name, alpha=layout.alpha, metadata={"who": "me"})
    file = load_lora(path)
    assert torch.allclose(file.vector(layout), w, rtol=1e-6, atol=0)
    assert file.metadata["who"] == "me" and file.unread == ()
    for m, a, b in layout.slices():
        expected = layout.scale * w[b].reshape(-1, layout.rank) @ w[a].reshape(layout.rank, -1)
        assert torch.allclose(deltas(file)[m.name], expected, atol=1e-5)


@pytest.mark.parametrize("name", ["kohya", "diffusers", "peft"])
def test_full_size_sd15(tmp_path, name):
    w = torch.randn(SD15.size, generator=torch.Generator().manual_seed(1))
    path = save_lora(SD15.unpack(w), tmp_path / "x", format=name, alpha=SD15.alpha)
    file = load_lora(tmp_path / "x")
    assert torch.allclose(file.vector(SD15), w, rtol=1e-6, atol=0)
    written = path / "adapter_model.safetensors" if name == "peft" else path
    keys = safetensors.torch.load_file(written).keys()
    first = SD15.modules[0].name
    assert {
        "kohya": "lora_unet_" + first.replace(".", "_") + ".lora_down.weight",
        "diffusers": f"unet.{first}.lora_A.weight",
        "peft": f"base_model.model.{first}.lora_A.weight",
    }[name] in keys


def test_diffusers_file_needs_no_alpha(tmp_path, layout, w):
    """Readers that take alpha = rank for granted get the right delta."""
    save_lora(layout.unpack(w), tmp_path / "x", format="diffusers", alpha=layout.alpha)
    t = safetensors.torch.load_file(tmp_path / "x")
    name = layout.modules[0].name
    a, b = layout.unpack(w)[name]
    got = t[f"unet.{name}.lora_B.weight"] @ t[f"unet.{name}.lora_A.weight"]
    assert torch.allclose(got, layout.scale * b @ a, atol=1e-5)


def test_peft_folder_has_its_configuration(tmp_path, layout, w):
    path = tmp_path / "adapter_model.safetensors"
    save_lora(layout.unpack(w), path, format="peft", alpha=27.0)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (layout.rank, 27.0, "LORA")
    stripped = {k: t for k, t in safetensors.torch.load_file(path).items()}
    safetensors.torch.save_file(
        stripped, path
    )  # as PEFT writes it: alpha only in the configuration
    assert set(load_lora(path).alphas.values()) == {27.0}


def test_kohya_tensors_are_what_the_host_carries():
    a, b = pair()
    t = kohya_tensors({Q: (a, b)}, 27.0)
    stem = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
    assert t.keys() == {f"{stem}.lora_down.weight", f"{stem}.lora_up.weight", f"{stem}.alpha"}
    assert t[f"{stem}.alpha"] == 27.0 and torch.equal(t[f"{stem}.lora_up.weight"], b)


SPELLINGS = {
    "kohya": ("lora_unet_{under}.lora_down.weight", "lora_unet_{under}.lora_up.weight"),
    "peft": ("base_model.model.{dot}.lora_A.weight", "base_model.model.{dot}.lora_B.weight"),
    "peft named": (
        "base_model.model.{dot}.lora_A.identity1.weight",
        "base_model.model.{dot}.lora_B.identity1.weight",
    ),
    "diffusers": ("unet.{dot}.lora_A.weight", "unet.{dot}.lora_B.weight"),
    "bare": ("{dot}.lora_A.weight", "{dot}.lora_B.weight"),
    "processor": (
        "{block}.processor.{to}_lora.down.weight",
        "{block}.processor.{to}_lora.up.weight",
    ),
    "unet processor": (
        "unet.{block}.processor.{to}_lora.down.weight",
        "unet.{block}.processor.{to}_lora.up.weight",
    ),
    "lora": ("unet.{dot}.lora.down.weight", "unet.{dot}.lora.up.weight"),
    "linear layer": (
        "unet.{dot}.lora_linear_layer.down.weight",
        "unet.{dot}.lora_linear_layer.up.weight",
    ),
}


@pytest.mark.parametrize("module", [Q, OUT])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_is_read_as_the_same_module(tmp_path, spelling, module):
    block, to = module.removesuffix(".0").rsplit(".", 1)
    names = {"dot": module, "under": module.replace(".", "_"), "block": block, "to": to}
    a, b = pair(rank=2)
    down, up = (key.format(**names) for key in SPELLINGS[spelling])
    file = load_lora(save(tmp_path, {down: a.half(), up: b.half()}))
    assert file.lora.keys() == {module}
    assert torch.equal(file.lora[module][0], a.half().float())
    assert torch.equal(file.lora[module][1], b.half().float())
    assert file.alphas == {module: 2.0} and file.unread == ()  # no alpha stated: the rank


def test_every_sd15_name_survives_kohyas_underscores():
    assert all(dotted_name(m.name.replace(".", "_")) == m.name for m in SD15.modules)
    for name in (OUT, "mid_block.resnets.0.time_emb_proj", "up_blocks.1.upsamplers.0.conv"):
        assert dotted_name(name.replace(".", "_")) == name


def test_other_scales_go_into_b(tmp_path, layout, w):
    save_lora(layout.unpack(w), tmp_path / "x", alpha=1.0)
    got = layout.unpack(load_lora(tmp_path / "x").vector(layout))
    a, b = layout.unpack(w)[layout.modules[0].name]
    got_a, got_b = got[layout.modules[0].name]
    assert torch.equal(got_a, a)
    assert torch.allclose(layout.scale * got_b @ got_a, 1.0 / layout.rank * b @ a, atol=1e-6)


def test_what_is_no_update_of_the_unet_is_listed(tmp_path):
    a, b = pair()
    extra = {
        "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": a.clone(),
        "diffusion_model.input_blocks.1.0.in_layers.2.diff_b": a[0].clone(),
        "somebody's own": a[0].clone(),
    }
    tensors = {f"unet.{Q}.lora_A.weight": a, f"unet.{Q}.lora_B.weight": b, **extra}
    file = load_lora(save(tmp_path, tensors))
    assert set(file.unread) == set(extra) and file.updates.keys() == {Q}


def test_what_lies_outside_is_not_read(tmp_path):
    """Infinities and ranks of zero in modules that nobody asks for cost nothing."""
    a, b = pair()
    stem = "lora_unet_down_blocks_0_resnets_0_conv1"
    tensors = {
        f"unet.{Q}.lora_A.weight": a,
        f"unet.{Q}.lora_B.weight": b,
        f"{stem}.lora_down.weight": torch.full((2, 4, 3, 3), torch.inf),
        f"{stem}.lora_up.weight": torch.ones(4, 2, 1, 1),
        "unet.conv_in.lora_A.weight": torch.zeros(0, 4),
        "unet.conv_in.lora_B.weight": torch.zeros(4, 0),
    }
    file = load_lora(save(tmp_path, tensors))
    torch.testing.assert_close(file.updates[Q].delta().square(), float((b @ a).square().sum()))
    assert file.updates["down_blocks.0.resnets.0.conv1"].shape == (4, 4, 3, 3)
    with pytest.raises(FormatError, match="NaN or infinite"):
        file.updates["down_blocks.0.resnets.0.conv1"].delta()


def test_one_by_one_convolutions_are_matrices(tmp_path):
    a, b = pair()
    stem = "lora_unet_down_blocks_1_attentions_0_proj_in"
    tensors = {
        f"{stem}.lora_down.weight": a[..., None, None],
        f"{stem}.lora_up.weight": b[..., None, None],
    }
    file = load_lora(save(tmp_path, tensors))
    assert torch.equal(file.lora["down_blocks.1.attentions.0.proj_in"][0], a)


def test_bad_files_are_refused(tmp_path, layout):
    a, b = pair()
    cases = [
        ({f"{Q}.lora_A.weight": a}, "only one of its two matrices"),
        ({f"{Q}.lora_A.weight": a, f"{Q}.lora_B.weight": torch.randn(4, 2)}, "ranks"),
        ({f"{Q}.lora_A.weight": a, f"{Q}.lora_A.two.weight": a.clone()}, "appears twice"),
        ({"model.weight": a}, "holds no LoRA"),
    ]
    for tensors, message in cases:
        with pytest.raises(FormatError, match=message):
            load_lora(save(tmp_path, tensors))
    good = {f"{Q}.lora_A.weight": a, f"{Q}.lora_B.weight": b}
    for stated in ("much", "nan", "0"):
        with pytest.raises(FormatError, match="not a number"):
            load_lora(save(tmp_path, good, {"lora_alpha": stated}))
    stem = f"lora_unet_{Q.replace('.', '_')}"
    kohya = {
        f"{stem}.lora_down.weight": a,
        f"{stem}.lora_up.weight": b,
        f"{stem}.alpha": torch.ones(2),
    }
    with pytest.raises(FormatError, match="must be one number"):
        load_lora(save(tmp_path, kohya))
    path = save(tmp_path, {f"{Q}.lora_A.weight": a, f"{Q}.lora_B.weight": b})
    with pytest.raises(LayoutMismatch, match=r"lora\.safetensors: .* lacks 7 of them"):
        load_lora(path).vector(layout)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(FormatError, match="truncated"):
        load_lora(path)


def test_bad_requests_are_refused(tmp_path, layout, w):
    lora = layout.unpack(w)
    with pytest.raises(ConfigError, match="'onnx'"):
        save_lora(lora, tmp_path / "x", format="onnx", alpha=1.0)
    with pytest.raises(ConfigError, match="pick one of the batch"):
        save_lora(layout.unpack(w[None]), tmp_path / "x", alpha=1.0)
    with pytest.raises(FormatError, match="not written"):
        save_lora(layout.unpack(w / 0), tmp_path / "x", alpha=1.0)
    assert list(tmp_path.iterdir()) == []
