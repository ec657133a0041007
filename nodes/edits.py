"""A person made older, or anything else that a space knows a direction for."""

from comfy_api.latest import io

from .. import w2wpp
from .host import attributes, folders, tensors
from .types import IdentitySocket, People, schema

NO_ATTRIBUTE = "no installed space has attributes"


class EditIdentity(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="W2WPP_EditIdentity",
            display_name="W2W++ Edit Identity",
            description="Changes one attribute of people and leaves the rest of them. Several of these nodes in a row "
            "change several attributes.",
            search_aliases=["attribute slider", "age slider", "edit face", "weights2weights"],
            inputs=[
                IdentitySocket.Input("identity", tooltip="Who to edit: one person or several."),
                io.Combo.Input(
                    "attribute",
                    options=attributes.attribute_names() or [NO_ATTRIBUTE],
                    tooltip="What to change. The list holds the attributes of all installed spaces; W2W++ Space Info "
                    "tells which of them the identity's space has.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.1,
                    tooltip="How far, in standard deviations of the attribute among the people that the space was "
                    "learned from: 1 to 3 is more of it, -1 to -3 less, 0 leaves the person as they are.",
                ),
            ],
            outputs=[
                IdentitySocket.Output(display_name="identity", tooltip="The same people, changed.")
            ],
        )

    @classmethod
    def validate_inputs(cls, attribute: str | None = None):
        return folders.refusal(_require_known, attribute)

    @classmethod
    def execute(cls, identity, attribute: str, strength: float) -> io.NodeOutput:
        with tensors.ordinary_tensors():
            edited = w2wpp.edit(identity.identity, identity.space, {attribute: strength})
        return io.NodeOutput(People(edited, identity.space))


def _require_known(attribute: str) -> None:
    known = attributes.attribute_names()
    if attribute not in known:
        raise w2wpp.ConfigError(
            f"None of the installed spaces has the attribute {attribute!r}. They have: "
            f"{', '.join(known) or 'none at all'}."
        )
