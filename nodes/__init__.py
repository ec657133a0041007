"""The nodes that this pack adds to ComfyUI, in the order in which a workflow uses them."""

from comfy_api.latest import ComfyExtension, io

from .apply import ApplyDecodedLora
from .avatars import ExamplePortrait, LoadAvatarModel
from .collections import CompareLoras, SpaceFromLoras
from .edits import EditIdentity
from .encoding import EncodeLora
from .explore import Explore
from .fitting import FitSpace
from .host import folders, gallery
from .identities import Interpolate, PickIdentity, SampleIdentity
from .identity_files import LoadIdentity, SaveIdentity
from .imports import ImportFiles
from .inversion import InvertFromImage
from .mixing import Mix
from .people import TrainPeople
from .regions import IdentityHooks
from .sliders import Sliders
from .spaces import LoadSpace, SpaceInfo
from .start_training import TrainStartNetwork

NODES: list[type[io.ComfyNode]] = [
    LoadSpace,
    Explore,
    SpaceFromLoras,
    ImportFiles,
    TrainPeople,
    FitSpace,
    SampleIdentity,
    InvertFromImage,
    TrainStartNetwork,
    EncodeLora,
    LoadIdentity,
    Interpolate,
    PickIdentity,
    Mix,
    EditIdentity,
    Sliders,
    ApplyDecodedLora,
    IdentityHooks,
    SaveIdentity,
    SpaceInfo,
    CompareLoras,
    LoadAvatarModel,
    ExamplePortrait,
]


class W2WExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        folders.register_folders()  # before the first schema lists the spaces
        folders.register_help()
        gallery.register_routes()
        return NODES
