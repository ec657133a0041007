"""Written LoRAs in the hands of others: diffusers' loaders and PEFT apply the very update that the layout means."""

import pytest
import torch

from w2wpp import SD15, load_lora, save_lora, transformer_layout

pytest.importorskip("diffusers", reason="diffusers is not installed")
pytest.importorskip("peft", reason="PEFT is not installed; diffusers loads LoRAs through it too")

from diffusers import UNet2DConditionModel
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from peft import PeftModel

CONTEXT, ALPHA = 24, 27.0


def full_unet():
    """SD 1.5's, with memory that nobody touches for its weights."""
    with torch.device("meta"):
        return UNet2DConditionModel(cross_attention_dim=768).to_empty(device="cpu")


def narrow_unet():
    """SD 1.5's UNet, narrow: every module has the name that it has there."""
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64, 64, 64),
        norm_num_groups=8,
        attention_head_dim=8,
        cross_attention_dim=CONTEXT,
    ).requires_grad_(False)


def narrow_layout():
    found = [
        (name.removesuffix(".attn1.to_q"), module.in_features)
        for name, module in narrow_unet().named_modules()
        if name.endswith(".attn1.to_q")
    ]
    return transformer_layout("narrow", "sd15", found, context_dim=CONTEXT, rank=4, alpha=ALPHA)


@pytest.fixture(scope="module", params=["SD 1.5", "narrow, rank 4"])
def family(request):
    """(makes the UNet, its layout, how exact): products of more than one rank add up in another order."""
    if request.param == "SD 1.5":
        return full_unet, SD15, {"rtol": 1e-6, "atol": 1e-9}
    return narrow_unet, narrow_layout(), {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture(scope="module")
def layout(family):
    return family[1]


@pytest.fixture
def unet(family):
    return family[0]()


@pytest.fixture(scope="module")
def exact(family):
    return family[2]


@pytest.fixture(scope="module")
def lora(layout):
    g = torch.Generator().manual_seed(0)
    return layout.unpack(0.1 * torch.randn(layout.size, generator=g))


def deltas(model):
    """{module: its update} of every adapted layer."""
    found = {}
    for name, module in model.named_modules():
        if hasattr(module, "get_delta_weight"):
            adapter = next(iter(module.lora_A))
            found[name.removeprefix("base_model.model.")] = module.get_delta_weight(adapter)
    return found


def assert_the_same(found, lora, layout, exact):
    assert len(found) == len(layout.modules) == 64
    for name, (a, b) in lora.items():
        torch.testing.assert_close(found[name], layout.scale * b @ a, **exact)


@pytest.mark.parametrize("format", ["kohya", "diffusers"])
def test_the_pipelines_loader(tmp_path, unet, layout, lora, exact, format):
    """What `pipe.load_lora_weights(file)` does, without a pipeline, at a scale of 1."""
    path = tmp_path / "face.safetensors"
    save_lora(lora, path, format=format, alpha=ALPHA, metadata={"w2wpp.space": "test"})
    state, alphas, metadata = StableDiffusionLoraLoaderMixin.lora_state_dict(
        str(path), local_files_only=True, return_lora_metadata=True
    )
    assert (metadata is not None) == (format == "diffusers")
    StableDiffusionLoraLoaderMixin.load_lora_into_unet(
        state, network_alphas=alphas, unet=unet, metadata=metadata
    )
    assert_the_same(deltas(unet), lora, layout, exact)


def test_ranks_of_their_own(tmp_path):
    """Every module with another rank: kohya, diffusers and PEFT mean alpha / its own rank."""
    layout, g = narrow_layout(), torch.Generator().manual_seed(1)
    lora = {}
    for i, m in enumerate(layout.modules):
        r = 1 + i % 3
        a = 0.1 * torch.randn(r, m.in_features, generator=g)
        lora[m.name] = (a, 0.1 * torch.randn(m.out_features, r, generator=g))
    for format in ("kohya", "diffusers", "peft"):
        path = save_lora(lora, tmp_path / format / "x", format=format, alpha=ALPHA)
        unet = narrow_unet()
        if format == "peft":
            model = PeftModel.from_pretrained(unet, str(path))
            found = deltas(model)
        else:
            state, alphas, metadata = StableDiffusionLoraLoaderMixin.lora_state_dict(
                str(path), local_files_only=True, return_lora_metadata=True
            )
            StableDiffusionLoraLoaderMixin.load_lora_into_unet(
                state, network_alphas=alphas, unet=unet, metadata=metadata
            )
            found = deltas(unet)
        updates = load_lora(path).updates
        for name, (a, b) in lora.items():
            expected = ALPHA / len(a) * b @ a
            torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-6)
            delta = updates[name].delta()
            torch.testing.assert_close(delta.b @ delta.a, expected, rtol=1e-5, atol=1e-6)


def test_the_models_own_loader(tmp_path, unet, layout, lora, exact):
    path = tmp_path / "face.safetensors"
    save_lora(lora, path, format="diffusers", alpha=ALPHA)
    unet.load_lora_adapter(str(path), prefix="unet", local_files_only=True)
    assert_the_same(deltas(unet), lora, layout, exact)


@pytest.mark.parametrize("how", ["the folder", "PEFT's file"])
def test_a_peft_folder_in_the_models_own_loader(tmp_path, unet, layout, lora, exact, how):
    save_lora(lora, tmp_path / "anna", format="peft", alpha=ALPHA)
    options = {"prefix": None, "use_safetensors": True}
    if how == "PEFT's file":
        options = {"prefix": "base_model.model", "weight_name": "adapter_model.safetensors"}
    unet.load_lora_adapter(str(tmp_path / "anna"), **options)
    assert_the_same(deltas(unet), lora, layout, exact)


def test_peft_takes_the_folder(tmp_path, unet, layout, lora, exact):
    folder = save_lora(lora, tmp_path / "anna", format="peft", alpha=ALPHA)
    assert folder == tmp_path / "anna"
    assert_the_same(deltas(PeftModel.from_pretrained(unet, str(folder))), lora, layout, exact)
