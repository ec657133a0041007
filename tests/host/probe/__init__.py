"""Nodes for the tests only: models with random weights, and the weights that a model would compute with."""

import os

import comfy.model_management
import comfy.model_patcher
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


class RandomModel(io.ComfyNode):
    """A full-size UNet. Only q and v get numbers, the rest is never touched and costs no memory."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Probe_RandomModel",
            inputs=[io.Combo.Input("family", options=list(FAMILIES))],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, family):
        config = getattr(comfy.supported_models, family)({**COMMON, **FAMILIES[family]})
        config.set_inference_dtype(torch.float32, None)
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


class ProbeExtension(ComfyExtension):
    async def get_node_list(self):
        return [RandomModel, Weights]


async def comfy_entrypoint():
    return ProbeExtension()
