"""From an identity to the user's model: decode its LoRA and patch it in."""

from comfy_api.latest import io

from ..w2wpp.errors import ConfigError
from ..w2wpp.lora.write import kohya_tensors
from .host import patches, tensors
from .host.model import changes_texts
from .types import IdentitySocket, LoraSocket, schema


class ApplyDecodedLora(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="W2WPP_ApplyDecodedLora",
            display_name="W2W++ Apply Decoded LoRA",
            description="Makes a model paint a person: decodes the identity to LoRA weights and adds them to a copy "
            "of the model. Several people give a list of models; the nodes that follow run once for each.",
            search_aliases=[
                "consistent character",
                "apply identity",
                "identity lora",
                "load lora",
                "weights2weights",
            ],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="The model that the identity's space was learned on (an SD 1.5 model, or W2W++ Load "
                    "Avatar Model). It stays as it is.",
                ),
                IdentitySocket.Input("identity", tooltip="Who to paint: one person or several."),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-4.0,
                    max=4.0,
                    step=0.05,
                    tooltip="How much of the LoRA is added: 1 is the identity, 0 leaves the model as it was.",
                ),
                io.Float.Input(
                    "start_percent",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    optional=True,
                    tooltip="The point in sampling from which the LoRA acts: 0 is from the start, 1 is never. A "
                    "later start leaves the composition to the model and changes only the face. Identities of text "
                    "encoders have no start: a CLIP is asked before the sampling.",
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="The text encoders, for an identity of a space of text encoders. Other identities leave "
                    "it as it is.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    display_name="model",
                    is_output_list=True,
                    tooltip="The model with the identity in it, one for each person.",
                ),
                LoraSocket.Output(
                    display_name="lora",
                    is_output_list=True,
                    tooltip="The same identity as a LoRA at full strength, for ComfyUI's own Load LoRA Model and "
                    "Save LoRA Weights; one for each person.",
                ),
                io.Clip.Output(
                    display_name="clip",
                    is_output_list=True,
                    tooltip="The text encoders that came in, with the identity in them if its space is of text "
                    "encoders; one for each person.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls, model, identity, strength: float, start_percent: float = 0.0, clip=None
    ) -> io.NodeOutput:
        layout = identity.space.layout
        with tensors.ordinary_tensors():
            vectors = identity.identity.vectors(identity.space)  # [B, P], all in one pass
            loras = [kohya_tensors(layout.unpack(vector), layout.alpha) for vector in vectors]
            if clip is not None and changes_texts(layout):
                if start_percent > 0:
                    raise ConfigError(
                        f"start_percent is {start_percent:g}, and this identity's space is of text encoders: they are "
                        "asked once, before the sampling, so no start can hold for them. Set start_percent to 0."
                    )
                models = [model] * len(loras)
                clips = patches.patched_texts_each(clip, layout, loras, strength)
            else:
                models = patches.patched_each(model, layout, loras, strength, start_percent)
                clips = [clip] * len(loras)
        return io.NodeOutput(models, loras, clips)
