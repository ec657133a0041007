"""From a LoRA of any origin to a point in a space."""

from comfy_api.latest import io, ui

from .. import w2wpp
from .host import folders, tensors
from .host.model import base_weights
from .types import IdentitySocket, LoraSocket, People, SpaceSocket, schema

NO_FILE = "none"


class EncodeLora(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="W2WPP_EncodeLora",
            display_name="W2W++ Encode LoRA",
            description="Finds the person in a space who is closest to a LoRA, and reports how close. From there "
            "they can be edited and mixed with others.",
            search_aliases=["lora to identity", "project lora", "invert lora", "weights2weights"],
            inputs=[
                SpaceSocket.Input(
                    "space", tooltip="The space to encode into, from W2W++ Load Space."
                ),
                io.Combo.Input(
                    "file",
                    options=[NO_FILE, *folders.lora_names()],
                    default=NO_FILE,
                    tooltip="A LoRA file from models/loras/, of the base model that the space was learned on. 'none' "
                    "if one is connected to 'lora'.",
                ),
                io.Boolean.Input(
                    "keep_residual",
                    default=False,
                    tooltip="Also keep what the space's latents can't express, as far as its components reach. The "
                    "person is nearer to the LoRA, and edits still work.",
                ),
                LoraSocket.Input(
                    "lora",
                    optional=True,
                    tooltip="A LoRA from another node, instead of a file.",
                ),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="The base model that the LoRA was trained on. Needed for DoRA, whose changes depend on the "
                    "base model's weights, and for LoRAs that do not tell which base model they are for.",
                ),
            ],
            outputs=[
                IdentitySocket.Output(
                    display_name="identity", tooltip="The person, together with their space."
                ),
                io.String.Output(
                    display_name="report",
                    tooltip="What was kept, ignored and missing, as a sentence.",
                ),
                io.Float.Output(
                    display_name="error",
                    tooltip="The relative error of the change to the model's weights: 0 is exact, 1 is as far "
                    "off as using no LoRA at all.",
                ),
            ],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, file: str | None = None):
        return file in (None, NO_FILE) or folders.refusal(folders.lora_path, file)

    @classmethod
    def fingerprint_inputs(
        cls, space=None, file: str = NO_FILE, keep_residual: bool = False, lora=None, model=None
    ):
        return NO_FILE if file == NO_FILE else folders.file_stamp(folders.lora_path(file))

    @classmethod
    def execute(cls, space, file: str, keep_residual: bool, lora=None, model=None) -> io.NodeOutput:
        if (lora is None) == (file == NO_FILE):
            raise w2wpp.ConfigError(
                "Encode LoRA takes one LoRA: either choose a file, or connect 'lora' and set the file to 'none'."
            )
        with tensors.ordinary_tensors():
            source = folders.lora_path(file) if lora is None else lora
            identity, report = w2wpp.encode_lora(
                space,
                source,
                residual=keep_residual,
                base=None if model is None else base_weights(model, space.layout),
                assume_family=model is not None,
            )
        people = People(identity, space)
        return io.NodeOutput(
            people, str(report), report.update_error, ui=ui.PreviewText(str(report))
        )
