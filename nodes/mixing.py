"""Several people as one."""

from comfy_api.latest import io

from .. import w2wpp
from ..w2wpp.mix import mix
from .host import tensors
from .types import IdentitySocket, People, same_space, schema

PLACES = 6


class Mix(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="W2WPP_Mix",
            display_name="W2W++ Mix",
            description="Makes one new person out of up to six, each with a weight.",
            search_aliases=["blend faces", "merge characters", "average face", "weights2weights"],
            inputs=[
                *(
                    IdentitySocket.Input(
                        f"identity_{i}",
                        optional=i > 1,
                        tooltip="Somebody to mix in. Several people at one input share its weight.",
                    )
                    for i in range(1, PLACES + 1)
                ),
                *(
                    io.Float.Input(
                        f"weight_{i}",
                        default=1.0,
                        min=0.0,
                        max=10.0,
                        step=0.05,
                        tooltip=f"How much of identity_{i} is in the mix, compared with the other weights: 0 is "
                        "nothing.",
                    )
                    for i in range(1, PLACES + 1)
                ),
                io.Combo.Input(
                    "mode",
                    options=["slerp", "lerp"],
                    default="slerp",
                    tooltip="slerp keeps the mix as distinctive as those that it is made of; lerp takes the plain "
                    "mean, which comes closer to the average person the more people there are.",
                ),
            ],
            outputs=[IdentitySocket.Output(display_name="identity", tooltip="The new person.")],
        )

    @classmethod
    def execute(cls, identity_1, mode: str, **inputs) -> io.NodeOutput:
        inputs["identity_1"] = identity_1
        connected = {
            name: (people, inputs[f"weight_{i}"])
            for i in range(1, PLACES + 1)
            if (people := inputs.get(name := f"identity_{i}")) is not None
        }
        for name, (people, _) in connected.items():
            same_space(identity_1, people, ("identity_1", name), "W2W++ Mix")
        if not any(weight > 0 for _, weight in connected.values()):
            raise w2wpp.ConfigError(
                f"All weights of the connected people ({', '.join(connected)}) are 0. Raise at least one."
            )
        people, weights = zip(*((p.identity, w) for p, w in connected.values()))
        with tensors.ordinary_tensors():
            return io.NodeOutput(People(mix(people, weights, mode=mode), identity_1.space))
