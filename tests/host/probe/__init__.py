"""Nodes for the tests only: models with random weights, and the weights that a model would compute with."""

import copy
import hashlib
import json
import os
import types

import comfy.cldm.cldm
import comfy.clip_vision
import comfy.controlnet
import comfy.lora
import comfy.model_management
import comfy.model_patcher
import comfy.sampler_helpers
import comfy.samplers
import comfy.sd
import comfy.sdxl_clip
import comfy.supported_models
import folder_paths
import torch
from comfy_api.latest import ComfyExtension, io
from safetensors.torch import save_file

COMMON = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320, "use_spatial_transformer": True,
    "use_checkpoint": False, "legacy": False, "adm_in_channels": None, "use_temporal_attention": False,
    "num_res_blocks": [2, 2, 2, 2], "channel_mult": [1, 2, 4, 4], "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_middle": 1, "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
}  # fmt: skip
FAMILIES = {
    "SD15": {"context_dim": 768, "num_heads": 8, "use_linear_in_transformer": False},
    "SD20": {"context_dim": 1024, "num_head_channels": 64, "use_linear_in_transformer": True},
}
OTHERS = {
    "SDXL": {
        "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320, "num_res_blocks": [2, 2, 2],
        "channel_mult": [1, 2, 4], "transformer_depth": [0, 0, 2, 2, 10, 10], "transformer_depth_middle": 10,
        "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10], "context_dim": 2048, "num_classes": "sequential",
        "adm_in_channels": 2816, "num_heads": -1, "num_head_channels": 64, "use_spatial_transformer": True,
        "use_linear_in_transformer": True, "legacy": False, "use_checkpoint": False, "use_temporal_attention": False,
    },
    "Flux": {
        "image_model": "flux", "in_channels": 16, "out_channels": 16, "vec_in_dim": 768, "context_in_dim": 4096,
        "hidden_size": 3072, "mlp_ratio": 4.0, "num_heads": 24, "depth": 19, "depth_single_blocks": 38,
        "axes_dim": [16, 56, 56], "theta": 10000, "patch_size": 2, "qkv_bias": True, "guidance_embed": True,
        "txt_ids_dims": [],
    },
}  # fmt: skip


class RandomModel(io.ComfyNode):
    """A full-size UNet. Only q and v get numbers, the rest is never touched and costs no memory."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Probe_RandomModel",
            inputs=[
                io.Combo.Input("family", options=list(FAMILIES)),
                io.Combo.Input("dtype", options=["float32", "float16"], optional=True),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, family, dtype="float32"):
        config = getattr(comfy.supported_models, family)({**COMMON, **FAMILIES[family]})
        config.set_inference_dtype(
            getattr(torch, dtype), torch.float32 if dtype == "float16" else None
        )
        model = config.get_model({}, "", device="cpu")
        generator = torch.Generator().manual_seed(0)
        for name, weight in model.diffusion_model.named_parameters():
            if name.endswith(("to_q.weight", "to_v.weight")):
                weight.copy_(
                    torch.randn(weight.shape, generator=generator) / weight.shape[1] ** 0.5
                )
        cpu = torch.device("cpu")
        return io.NodeOutput(
            comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)
        )


class OtherModel(io.ComfyNode):
    """A model of another family at full size, its weights without memory."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Probe_OtherModel",
            inputs=[io.Combo.Input("family", options=list(OTHERS))],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, family):
        config = getattr(comfy.supported_models, family)(dict(OTHERS[family]))
        config.set_inference_dtype(torch.float16, None)
        cpu = torch.device("cpu")
        model = config.get_model({}, "", device=torch.device("meta"))
        return io.NodeOutput(
            comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)
        )


REDUCED = {
    "SDXL": {
        "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 32, "num_res_blocks": [2, 2, 2],
        "channel_mult": [1, 2, 4], "transformer_depth": [0, 0, 2, 2, 3, 3], "transformer_depth_middle": 3,
        "transformer_depth_output": [0, 0, 0, 2, 2, 2, 3, 3, 3], "context_dim": 2048, "num_classes": "sequential",
        "adm_in_channels": 2816, "num_heads": -1, "num_head_channels": 16, "use_spatial_transformer": True,
        "use_linear_in_transformer": True, "legacy": False, "use_checkpoint": False, "use_temporal_attention": False,
    },
    "SD3": {
        "in_channels": 16, "depth": 2, "patch_size": 2, "input_size": None, "adm_in_channels": 2048,
        "context_embedder_config": {
            "target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": 128},
        },
        "qk_norm": None, "num_patches": 36864, "pos_embed_max_size": 192, "pos_embed_scaling_factor": None,
    },
    "Flux": {
        "image_model": "flux", "in_channels": 16, "out_channels": 16, "vec_in_dim": 768, "context_in_dim": 4096,
        "hidden_size": 96, "mlp_ratio": 4.0, "num_heads": 4, "depth": 2, "depth_single_blocks": 2,
        "axes_dim": [8, 8, 8], "theta": 10000, "patch_size": 2, "qkv_bias": True, "guidance_embed": True,
        "txt_ids_dims": [],
    },
    "QwenImage": {
        "image_model": "qwen_image", "in_channels": 64, "out_channels": 16, "num_layers": 2, "attention_head_dim": 32,
        "num_attention_heads": 3, "joint_attention_dim": 3584, "axes_dims_rope": (8, 12, 12),
    },
    "ZImage": {
        "image_model": "lumina2", "patch_size": 2, "in_channels": 16, "dim": 96, "cap_feat_dim": 64, "n_layers": 2,
        "qk_norm": True, "mlp_ratio": 4.0, "n_heads": 4, "n_kv_heads": 4, "axes_dims": [8, 8, 8],
        "axes_lens": [300, 512, 512], "rope_theta": 256.0, "ffn_dim_multiplier": 8.0 / 3.0,
        "z_image_modulation": True, "time_scale": 1000.0,
    },
    "WAN21_T2V": {
        "image_model": "wan2.1", "model_type": "t2v", "dim": 96, "ffn_dim": 128, "num_heads": 4, "num_layers": 2,
        "in_dim": 16, "out_dim": 16, "patch_size": (1, 2, 2), "freq_dim": 256, "window_size": (-1, -1),
        "qk_norm": True, "cross_attn_norm": True, "eps": 1e-6, "text_dim": 64,
    },
}  # fmt: skip


TOKENS = {  # numbers of each of a prompt's tokens, and of its pooled vector
    "SDXL": (2048, 1280),
    "SD3": (4096, 2048),
    "Flux": (4096, 768),
    "QwenImage": (3584, 0),
    "ZImage": (64, 0),
    "WAN21_T2V": (64, 0),
}


class ReducedModel(io.ComfyNode):
    """A model of a family at reduced depth and width, all of its weights random, with a prompt and a VAE for it."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Probe_ReducedModel",
            inputs=[io.Combo.Input("family", options=list(REDUCED))],
            outputs=[io.Model.Output(), io.Conditioning.Output(), io.Vae.Output()],
        )

    @classmethod
    def execute(cls, family):
        generator = torch.Generator().manual_seed(1)
        width, pooled = TOKENS[family]
        options = {"pooled_output": torch.randn(1, pooled, generator=generator)} if pooled else {}
        prompt = [[torch.randn(1, 12, width, generator=generator), options]]
        model = cls.model(family)
        latents = model.model.latent_format
        return io.NodeOutput(
            model, prompt, RandomVAE(latents.latent_channels, latents.latent_dimensions == 3)
        )

    @classmethod
    def model(cls, family):
        config = getattr(comfy.supported_models, family)(copy.deepcopy(REDUCED[family]))
        config.set_inference_dtype(torch.float32, None)
        cpu = torch.device("cpu")
        model = config.get_model({}, "", device="cpu")
        fill(model.diffusion_model, torch.Generator().manual_seed(0))
        return comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)


class PlantedModel(io.ComfyNode):
    """A reduced model that is taught to denoise one picture, and from which a LoRA is then taken away.

    So that LoRA is what the model lacks, and an inversion of the picture has to find it.
    """

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Probe_PlantedModel",
            inputs=[
                io.Combo.Input("family", options=list(REDUCED)),
                io.Image.Input("image"),
                io.Custom("W2W_IDENTITY").Input("identity"),
                io.Int.Input("steps"),
            ],
            outputs=[io.Model.Output(), io.Conditioning.Output(), io.Vae.Output()],
        )

    @classmethod
    def execute(cls, family, image, identity, steps):
        model, prompt, vae = ReducedModel.execute(family).args
        with torch.inference_mode(False), torch.enable_grad():
            cls.teach(model, prompt, vae.encode(image.clone()), steps)
            space, person = identity.space, identity.identity
            with torch.no_grad():
                vectors = person.vectors(space)[0]
                weights = dict(model.model.named_parameters())
                names = comfy.lora.model_lora_keys_unet(model.model, {})
                for name, (down, up) in space.layout.unpack(vectors).items():
                    weight = weights[names["lora_unet_" + name.replace(".", "_")]]
                    weight -= (space.layout.scale * up @ down).view_as(weight)
        return io.NodeOutput(model, prompt, vae)

    @classmethod
    def teach(cls, patcher, prompt, latents, steps, rows=8):
        model, sampling = patcher.model, patcher.model.model_sampling
        clean = model.process_latent_in(latents)
        conds = {"positive": comfy.sampler_helpers.convert_cond(prompt)}
        conds = comfy.samplers.process_conds(
            model, clean, conds, torch.device("cpu"), clean, None, 0
        )
        given = {
            k: c.process_cond(batch_size=rows, area=None).cond
            for k, c in conds["positive"][0]["model_conds"].items()
        }
        network, generator = model.diffusion_model, torch.Generator().manual_seed(2)
        network.load_state_dict(
            {k: v.clone() for k, v in network.state_dict().items()}, assign=True
        )
        network.requires_grad_(True)
        # Flux adds in place to what its norms have read, which autograd wants to see again.
        norms = [m for m in network.modules() if isinstance(m, torch.nn.LayerNorm)]
        copies = [m.register_forward_pre_hook(lambda _, x: (x[0].clone(), *x[1:])) for m in norms]
        adam = torch.optim.Adam(network.parameters(), lr=1e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(adam, 2e-3, total_steps=steps)
        comfy.model_management.in_training = True
        try:
            for _ in range(steps):
                levels = (torch.rand(rows, generator=generator) * len(sampling.sigmas)).long()
                sigma = sampling.sigmas[levels].clone()
                noise = torch.randn(rows, *clean.shape[1:], generator=generator)
                x0 = clean.expand(rows, *clean.shape[1:])
                found = model.apply_model(sampling.noise_scaling(sigma, noise, x0), sigma, **given)
                error = (found - x0).square().flatten(1).mean(1)
                loss = (error / sigma.square()).mean()
                adam.zero_grad()
                loss.backward()
                adam.step()
                schedule.step()
        finally:
            comfy.model_management.in_training = False
            network.requires_grad_(False)
            for copy_made in copies:
                copy_made.remove()


class WholeSDXL(io.ComfyNode):
    """SDXL at full size with random weights: one and the same tensor of random numbers again and again."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Probe_SDXL",
            inputs=[io.Combo.Input("dtype", options=["float32", "float16"])],
            outputs=[io.Model.Output(), io.Conditioning.Output(), io.Vae.Output()],
        )

    @classmethod
    def execute(cls, dtype):
        config = comfy.supported_models.SDXL(dict(OTHERS["SDXL"]))
        stored = getattr(torch, dtype)
        config.set_inference_dtype(stored, torch.float32 if stored == torch.float16 else None)
        model = config.get_model({}, "", device="cpu")
        generator = torch.Generator().manual_seed(0)
        numbers = torch.randn(2**20, generator=generator).to(
            stored
        )  # drawing billions takes minutes
        for name, weight in model.diffusion_model.named_parameters():
            if weight.ndim > 1:
                scale = weight[0].numel() ** -0.5
                for part in weight.view(-1).split(len(numbers)):
                    torch.mul(numbers[: len(part)], scale, out=part)
            else:
                weight.fill_(float(name.endswith("weight")))
        cpu = torch.device("cpu")
        patcher = comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)
        options = {"pooled_output": torch.randn(1, 1280, generator=generator)}
        prompt = [[torch.randn(1, 77, 2048, generator=generator), options]]
        return io.NodeOutput(patcher, prompt, RandomVAE())


class Adapters(io.ComfyNode):
    """What IPAdapter packs leave in a model: a patch of the cross attention, and one of an object."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Probe_Adapters",
            inputs=[io.Model.Input("model"), io.Float.Input("weight")],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model, weight):
        patched = model.clone()
        patched.set_model_attn2_output_patch(lambda n, options: n * (1 + weight))
        sampling = model.get_model_object("model_sampling")
        patched.add_object_patch("model_sampling", copy.deepcopy(sampling))
        return io.NodeOutput(patched)


class RandomTexts(io.ComfyNode):
    """SDXL's two text encoders, small, with random weights."""

    @classmethod
    def define_schema(cls):
        return io.Schema(node_id="Probe_Texts", inputs=[], outputs=[io.Clip.Output()])

    @classmethod
    def execute(cls):
        def small(width):
            return {
                "num_hidden_layers": 3, "hidden_size": width, "num_attention_heads": 2, "intermediate_size": 2 * width,
            }  # fmt: skip

        target = types.SimpleNamespace(
            params={},
            clip=comfy.sdxl_clip.SDXLClipModel,
            tokenizer=comfy.sdxl_clip.SDXLTokenizer,
        )
        cpu = torch.device("cpu")
        options = {"clip_l_model_config": small(32), "clip_g_model_config": small(48)}
        options |= {"load_device": cpu, "offload_device": cpu, "dtype": torch.float32}
        clip = comfy.sd.CLIP(target, model_options=options)
        fill(clip.cond_stage_model, torch.Generator().manual_seed(0))
        return io.NodeOutput(clip)


class TextWeights(io.ComfyNode):
    """Loads the text encoders as a prompt would, then writes their weights to a file."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Probe_TextWeights",
            inputs=[io.Clip.Input("clip"), io.String.Input("file")],
            outputs=[],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, clip, file):
        clip.load_model()
        weights = clip.cond_stage_model.state_dict()
        kept = {k: v.detach().cpu().clone() for k, v in weights.items() if k.endswith("weight")}
        save_file(kept, os.path.join(folder_paths.get_output_directory(), file))
        return io.NodeOutput()


class Weights(io.ComfyNode):
    """Loads the model as a sampler would, then writes the UNet weights whose names end so to a file."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Probe_Weights",
            inputs=[
                io.Model.Input("model"),
                io.String.Input("file"),
                io.String.Input("endings", default="weight bias"),
            ],
            outputs=[],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model, file, endings):
        comfy.model_management.load_models_gpu([model])
        unet = model.model.diffusion_model.state_dict()
        kept = {
            k: v.detach().cpu().contiguous()
            for k, v in unet.items()
            if k.endswith(tuple(endings.split()))
        }
        save_file(kept, os.path.join(folder_paths.get_output_directory(), file))
        return io.NodeOutput()


class State(io.ComfyNode):
    """What a node could have left behind in a model and in the process, as JSON; runs every time."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Probe_State",
            inputs=[io.Model.Input("model"), io.String.Input("file")],
            outputs=[io.Model.Output()],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs):
        return float("nan")

    @classmethod
    def execute(cls, model, file):
        comfy.model_management.load_models_gpu([model])
        unet = model.model.diffusion_model
        digest = hashlib.sha256()
        for weight in unet.state_dict().values():
            digest.update(
                weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
            )
        state = {
            "weights": digest.hexdigest(),
            "hooks": sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in unet.modules()),
            "forwards": sum("forward" in vars(m) for m in unet.modules()),
            "require_grad": sum(p.requires_grad for p in unet.parameters()),
            "have_grad": sum(p.grad is not None for p in unet.parameters()),
            "training": sum(m.training for m in unet.modules()),
            "patches": len(model.patches),
            "options": sorted(map(str, model.model_options.get("transformer_options", {}))),
            "threads": torch.get_num_threads(),
            "grad_mode": torch.is_grad_enabled(),
            "inference_mode": torch.is_inference_mode_enabled(),
            "in_training": getattr(comfy.model_management, "in_training", False),
            "saved_tensor_hooks": torch._C._autograd._top_saved_tensors_default_hooks(True)
            is not None,
        }
        with open(os.path.join(folder_paths.get_output_directory(), file), "w") as out:
            json.dump(state, out)
        return io.NodeOutput(model)


class FailingSpace(io.ComfyNode):
    """A space whose decoder fails after some calls, as it would when memory runs out."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Probe_FailingSpace",
            inputs=[
                io.Custom("W2W_SPACE").Input("space"),
                io.Int.Input("calls", default=3),
                io.Combo.Input("error", options=["decoder", "memory"]),
            ],
            outputs=[io.Custom("W2W_SPACE").Output()],
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs):
        return float("nan")

    @classmethod
    def execute(cls, space, calls, error):
        class Failing(type(space)):
            def decode(self, *args, **kwargs):
                counter["calls"] += 1
                if counter["calls"] > calls:
                    if error == "memory":
                        raise torch.OutOfMemoryError("probe: out of memory")
                    raise ValueError("probe: the decoder fails")
                return super().decode(*args, **kwargs)

        counter = {"calls": 0}
        fields = {name: getattr(space, name) for name in space.__dataclass_fields__}
        return io.NodeOutput(Failing(**fields))


class SmallSD15(io.ComfyNode):
    """An SD 1.5 UNet of full width with random weights, as from a checkpoint in a given precision, and its prompt."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Probe_SD15",
            inputs=[
                io.Combo.Input("dtype", options=["float32", "float16"]),
                io.Boolean.Input("inpaint", default=False),
            ],
            outputs=[io.Model.Output(), io.Conditioning.Output(), io.Vae.Output()],
        )

    @classmethod
    def execute(cls, dtype, inpaint):
        channels = {"in_channels": 9} if inpaint else {}
        config = comfy.supported_models.SD15({**COMMON, **FAMILIES["SD15"], **channels})
        stored = getattr(torch, dtype)
        config.set_inference_dtype(stored, torch.float32 if stored == torch.float16 else None)
        model = config.get_model({}, "", device="cpu")
        if inpaint:
            model.set_inpaint()
        generator = torch.Generator().manual_seed(0)
        fill(model.diffusion_model, generator)
        cpu = torch.device("cpu")
        patcher = comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)
        prompt = [[torch.randn(1, 77, 768, generator=generator), {}]]
        return io.NodeOutput(patcher, prompt, RandomVAE())


class RandomVision(io.ComfyNode):
    """A small CLIP vision model with random weights, other ones for every seed."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Probe_ClipVision",
            inputs=[io.Int.Input("seed"), io.Int.Input("width", default=32)],
            outputs=[io.ClipVision.Output()],
        )

    @classmethod
    def execute(cls, seed, width):
        config = {
            "model_type": "clip_vision_model", "hidden_size": width, "num_hidden_layers": 3, "num_attention_heads": 4,
            "intermediate_size": 2 * width, "hidden_act": "gelu", "num_channels": 3, "image_size": 64,
            "patch_size": 16, "projection_dim": 24, "layer_norm_eps": 1e-5,
        }  # fmt: skip
        file = os.path.join(folder_paths.get_temp_directory(), f"vision{width}.json")
        os.makedirs(os.path.dirname(file), exist_ok=True)
        with open(file, "w") as out:  # hosts of 2025 take nothing but a file
            json.dump(config, out)
        vision = comfy.clip_vision.ClipVisionModel(file)
        fill(vision.model, torch.Generator().manual_seed(seed))
        return io.NodeOutput(vision)


class RandomControl(io.ComfyNode):
    """A full-size SD 1.5 ControlNet with random weights."""

    @classmethod
    def define_schema(cls):
        return io.Schema(node_id="Probe_ControlNet", inputs=[], outputs=[io.ControlNet.Output()])

    @classmethod
    def execute(cls):
        config = {**COMMON, **FAMILIES["SD15"], "hint_channels": 3, "dtype": torch.float32}
        del config["out_channels"]
        net = comfy.cldm.cldm.ControlNet(**config)
        fill(net, torch.Generator().manual_seed(1))
        return io.NodeOutput(comfy.controlnet.ControlNet(net, load_device=torch.device("cpu")))


def fill(module, generator):
    """Random weights under which signals keep their size."""
    for name, weight in module.named_parameters():
        if weight.ndim > 1:
            weight.copy_(torch.randn(weight.shape, generator=generator) * weight[0].numel() ** -0.5)
        else:
            weight.fill_(float(name.endswith("weight")))


class RandomVAE:
    """Stands in for a VAE: every 8x8 pixels to some numbers, the first three of which tell the colour, and back."""

    def __init__(self, channels=4, frames=False):
        self.channels, self.frames = channels, frames

    def encode(self, pixels):
        small = torch.nn.functional.avg_pool2d(pixels[..., :3].movedim(-1, 1) * 2 - 1, 8)
        more = small.mean(1, keepdim=True).expand(-1, self.channels - 3, -1, -1)
        found = torch.cat([small, more], 1) * 5
        return found.unsqueeze(2) if self.frames else found

    def decode(self, latents):
        latents = latents[:, :, 0] if latents.ndim == 5 else latents
        return (latents[:, :3] / 5).repeat_interleave(8, 2).repeat_interleave(8, 3).movedim(
            1, -1
        ) / 2 + 0.5


class ProbeExtension(ComfyExtension):
    async def get_node_list(self):
        return [
            RandomModel, OtherModel, ReducedModel, PlantedModel, WholeSDXL, Adapters, Weights, State, FailingSpace,
            SmallSD15, RandomControl, RandomTexts, TextWeights, RandomVision,
        ]  # fmt: skip


async def comfy_entrypoint():
    return ProbeExtension()
