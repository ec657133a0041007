"""Prompts for the server: built node by node, or read from a workflow as the front end saves it."""

from __future__ import annotations

from typing import Any

Link = list  # [node id, output index]
SAMPLER = {
    "steps": 12,
    "cfg": 2.0,
    "sampler_name": "dpmpp_2m",
    "scheduler": "normal",
    "denoise": 1.0,
}


class Graph:
    """A prompt in API format that grows by ``add``."""

    def __init__(self) -> None:
        self.nodes: dict[str, dict[str, Any]] = {}

    def add(self, class_type: str, **inputs: Any) -> str:
        """Add a node and return its id."""
        name = str(len(self.nodes) + 1)
        self.nodes[name] = {"class_type": class_type, "inputs": inputs}
        return name


class AvatarGraph(Graph):
    """Starts with the avatar model and paints from there."""

    def __init__(
        self,
        *,
        background: str = "white",
        smile: str = "neutral",
        light: str = "front",
        pictures: int = 1,
    ):
        super().__init__()
        self.loader = self.add(
            "W2WPP_LoadAvatarModel",
            background=background,
            smile=smile,
            light=light,
            pictures=pictures,
        )
        self.model: Link = [self.loader, 0]

    def sample(
        self,
        seed: int,
        *,
        count: int = 1,
        truncation: float = 1.0,
        space: str = "avatars.safetensors",
    ) -> Link:
        opened = self.add("W2WPP_LoadSpace", space=space)
        drawn = self.add(
            "W2WPP_SampleIdentity", space=[opened, 0], seed=seed, truncation=truncation, count=count
        )
        return [drawn, 0]

    def apply(self, identity: Link, strength: float = 1.0) -> str:
        return self.add(
            "W2WPP_ApplyDecodedLora", model=self.model, identity=identity, strength=strength
        )

    def paint(self, model: Link, *, seed: int = 0, prefix: str = "test") -> str:
        """KSampler, VAE Decode and Save Image; returns the id of the last."""
        sampled = self.add(
            "KSampler", model=model, positive=[self.loader, 1], negative=[self.loader, 2],
            latent_image=[self.loader, 4], seed=seed, **SAMPLER,
        )  # fmt: skip
        decoded = self.add("VAEDecode", samples=[sampled, 0], vae=[self.loader, 3])
        return self.add("SaveImage", images=[decoded, 0], filename_prefix=prefix)


def to_prompt(workflow: dict[str, Any], object_info: dict[str, Any]) -> dict[str, Any]:
    """What the front end would send for a saved workflow of plain nodes (no subgraphs, nothing muted)."""
    links = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    return {
        str(node["id"]): {
            "class_type": node["type"],
            "inputs": _inputs(node, object_info[node["type"]], links),
        }
        for node in workflow["nodes"]
        if node["type"] not in ("Note", "MarkdownNote")
    }


def _inputs(node: dict[str, Any], info: dict[str, Any], links: dict[int, Link]) -> dict[str, Any]:
    declared = {**info["input"].get("required", {}), **info["input"].get("optional", {})}
    values = iter(node.get("widgets_values", []))
    inputs: dict[str, Any] = {}
    for name, (kind, *options) in declared.items():
        if isinstance(kind, list) or kind in ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"):
            # A workflow that was saved before an input was added has no value for it.
            inputs[name] = next(values, options[0].get("default") if options else None)
            if options and options[0].get("control_after_generate"):
                next(values)  # fixed, increment, ...: the front end keeps it to itself
    for slot in node.get("inputs", []):
        if slot.get("link") is not None:
            inputs[slot["name"]] = links[slot["link"]]
    return inputs
