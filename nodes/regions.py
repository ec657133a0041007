"""An identity for a part of the picture."""

from comfy_api.latest import io

from ..w2wpp.lora.write import kohya_tensors
from .host import hooks, tensors
from .types import HooksSocket, IdentitySocket, schema


class IdentityHooks(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="W2WPP_IdentityHooks",
            display_name="W2W++ Identity Hooks",
            description="Makes a part of the picture show a person: ComfyUI's nodes Cond Pair Set Props take the "
            "hooks with a mask, so that several people can be in one picture, each in their own place.",
            search_aliases=[
                "two people",
                "regional lora",
                "masked identity",
                "several characters",
                "weights2weights",
            ],
            inputs=[
                IdentitySocket.Input("identity", tooltip="Who to paint there."),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-4.0,
                    max=4.0,
                    step=0.05,
                    tooltip="How much of the LoRA is added: 1 is the identity, 0 leaves the model as it was.",
                ),
            ],
            outputs=[
                HooksSocket.Output(
                    display_name="hooks",
                    is_output_list=True,
                    tooltip="For Cond Pair Set Props and Cond Pair Set Props Combine, with a mask; Set Hook "
                    "Keyframes gives them a schedule. One for each person.",
                )
            ],
        )

    @classmethod
    def execute(cls, identity, strength: float) -> io.NodeOutput:
        layout = identity.space.layout
        with tensors.ordinary_tensors():
            vectors = identity.identity.vectors(identity.space)  # [B, P]
            loras = [kohya_tensors(layout.unpack(vector), layout.alpha) for vector in vectors]
        return io.NodeOutput([hooks.person_hooks(layout, lora, strength) for lora in loras])
