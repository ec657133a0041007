"""Several people patched into a model, on a stand-in for the host that counts what it is asked for."""

import importlib
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from w2wpp import Layout, Module
from w2wpp.lora.write import kohya_tensors

REPO = Path(__file__).resolve().parents[2]

LAYOUT = Layout("toy", "toy", (Module("a.b", 3, 2), Module("a_c.d", 2, 4)), rank=1, alpha=2.0)
KEYS = {"lora_unet_a_b": "a.b.weight", "lora_unet_a_c_d": "a_c.d.weight"}


class Model:
    """What `patched_each` needs of the host's model patcher."""

    def __init__(self, shapes):
        weights = {key: torch.zeros(shape) for key, shape in shapes.items()}
        self.shapes, self.patches = shapes, {}
        self.model = SimpleNamespace(model_config=None, state_dict=lambda: weights)

    def clone(self):
        copy = Model(self.shapes)
        copy.patches = dict(self.patches)
        return copy

    def add_patches(self, patches, strength):
        self.patches |= {key: (strength, patch) for key, patch in patches.items()}
        return list(patches)


@pytest.fixture
def host(monkeypatch):
    """(patches.py with the stand-in in place of `comfy`, how often the key map was built)."""
    built = []

    def model_lora_keys_unet(model, keys):
        built.append(model)
        return {**KEYS, "lora_unet_another": "another.weight"}

    def load_lora(lora, keys):
        assert set(keys) == set(KEYS)  # the layout's own and no others
        return {key: lora[f"{name}.lora_up.weight"] for name, key in keys.items()}

    parts = {
        "comfy": {},
        "comfy.ldm": {},
        "comfy.ldm.modules": {},
        "comfy.ldm.modules.attention": {"SpatialTransformer": torch.nn.Identity},
        "comfy.ldm.modules.diffusionmodules": {},
        "comfy.ldm.modules.diffusionmodules.openaimodel": dict.fromkeys(
            ("ResBlock", "UNetModel"), torch.nn.Identity
        ),
        "comfy.lora": {"model_lora_keys_unet": model_lora_keys_unet, "load_lora": load_lora},
        "comfy.model_sampling": {},
        "comfy.patcher_extension": {},
    }
    for name, contents in parts.items():
        module = ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, child = name.rpartition(".")
        if parent:
            vars(sys.modules[parent])[child] = module
    for name, folder in (("pack", REPO), ("pack.nodes", REPO / "nodes")):
        package = ModuleType(name)  # the tables of contents would import every node
        package.__path__ = [str(folder)]
        monkeypatch.setitem(sys.modules, name, package)
    yield importlib.import_module("pack.nodes.host.patches"), built
    for name in [n for n in sys.modules if n.startswith("pack.")]:
        del sys.modules[name]


def people(count):
    vectors = torch.randn(count, LAYOUT.size, generator=torch.Generator().manual_seed(0))
    return [kohya_tensors(LAYOUT.unpack(w), LAYOUT.alpha) for w in vectors]


def model(**changes):
    return Model({"a.b.weight": (2, 3), "a_c.d.weight": (4, 2)} | changes)


def test_the_key_map_is_built_once_for_all_people(host):
    patches, built = host
    base, loras = model(), people(5)
    copies = patches.patched_each(base, LAYOUT, loras, 0.5)
    assert len(built) == 1 and base.patches == {}
    for copy, lora in zip(copies, loras):
        for name, key in KEYS.items():
            strength, up = copy.patches[key]
            assert strength == 0.5 and torch.equal(up, lora[f"{name}.lora_up.weight"])


def test_strength_zero_is_the_bare_model_and_a_misfit_is_refused_before_anything(host):
    patches, _ = host
    assert [m.patches for m in patches.patched_each(model(), LAYOUT, people(2), 0.0)] == [{}, {}]
    misfit = model(**{"a.b.weight": (2, 9)})
    with pytest.raises(
        patches.LayoutMismatch, match="0 of them are missing and 1 have another shape"
    ):
        patches.patched_each(misfit, LAYOUT, people(2), 1.0)
