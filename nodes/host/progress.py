"""What a running node shows, and whether it was cancelled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.model_management
import comfy.utils
import latent_preview
import torch
from PIL import Image
from server import PromptServer


def announce(node: str, painted: dict[str, Any]) -> None:
    """Tell the front end which faces of a running node can be shown already."""
    server = PromptServer.instance
    server.send_sync("w2wpp.faces", {"node": node, **painted}, server.client_id)


class Watch:
    """The progress bar, the preview and the text of the running node, and whether Cancel was pressed.

    `shows_previews`: whether the user's settings ask for previews. Latents that are given are shown in any case, where
    the host knows how to without a model of its own.
    """

    def __init__(self, model: Any, node: str) -> None:
        self._node = node
        latents = model.model.latent_format
        self._previewer = latent_preview.get_previewer(model.load_device, latents)
        self.shows_previews = self._previewer is not None
        if self._previewer is None and latents.latent_rgb_factors is not None:
            self._previewer = _plain_previewer(latents)
        self._bar = comfy.utils.ProgressBar(1)

    def show(self, step: int, steps: int, text: str, latents: torch.Tensor | None = None) -> None:
        """``latents`` [1, C, H, W], as the model sees them, become the preview. Raises if Cancel was pressed."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        preview = None
        if latents is not None and self._previewer is not None:
            preview = self._previewer.decode_latent_to_preview_image("JPEG", latents)
        self._bar.update_absolute(step, steps, preview)
        self.tell(text)

    def draw(self, picture: Image.Image, step: int = 0, steps: int = 1) -> None:
        """Show a picture of one's own as the preview, whatever way of previewing latents is chosen."""
        self._bar.update_absolute(step, steps, ("JPEG", picture, max(picture.size)))

    def tell(self, text: str) -> None:
        """Write on the node."""
        tell(self._node, text)


def tell(node: str, text: str) -> None:
    """Write on a running node."""
    PromptServer.instance.send_progress_text(text, node)


def _plain_previewer(latents: Any) -> Any:
    """The host's quickest way of showing latents: three sums of their channels."""
    parts = ("latent_rgb_factors", "latent_rgb_factors_bias", "latent_rgb_factors_reshape")
    known = [getattr(latents, part) for part in parts if hasattr(latents, part)]
    return latent_preview.Latent2RGBPreviewer(*known)


def steps_shown(node: str, what: str) -> Callable[[int, int], None]:
    """A callback (done, of) for the running node: its bar and its text. It raises if Cancel was pressed."""
    bar = comfy.utils.ProgressBar(1)

    def show(done: int, of: int) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar.update_absolute(done, of)
        tell(node, f"{what} {done:,} of {of:,}")

    return show
