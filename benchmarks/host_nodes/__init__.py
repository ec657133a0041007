"""Nodes for the benchmarks only: SD 1.5 at full size with random weights, and a random prompt for it."""

import comfy.model_patcher
import comfy.supported_models
import torch
from comfy_api.latest import ComfyExtension, io

SD15 = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320, "use_spatial_transformer": True,
    "use_checkpoint": False, "legacy": False, "adm_in_channels": None, "use_temporal_attention": False,
    "num_res_blocks": [2, 2, 2, 2], "channel_mult": [1, 2, 4, 4], "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_middle": 1, "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    "context_dim": 768, "num_heads": 8, "use_linear_in_transformer": False,
}  # fmt: skip


class RandomSD15(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="Bench_RandomSD15",
            inputs=[],
            outputs=[io.Model.Output(), io.Conditioning.Output()],
        )

    @classmethod
    def execute(cls):
        config = comfy.supported_models.SD15(dict(SD15))
        config.set_inference_dtype(torch.float32, None)
        model = config.get_model({}, "", device="cpu")
        generator = torch.Generator().manual_seed(0)
        for name, weight in model.diffusion_model.named_parameters():
            if weight.ndim > 1:
                scale = weight[0].numel() ** -0.5
                weight.copy_(torch.randn(weight.shape, generator=generator) * scale)
            else:
                weight.fill_(float(name.endswith("weight")))
        cpu = torch.device("cpu")
        patcher = comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)
        return io.NodeOutput(patcher, [[torch.randn(1, 77, 768, generator=generator), {}]])


class Benchmarks(ComfyExtension):
    async def get_node_list(self):
        return [RandomSD15]


async def comfy_entrypoint():
    return Benchmarks()
