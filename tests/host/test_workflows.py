"""The example workflows, run through the server as they are shipped."""

from __future__ import annotations

from itertools import pairwise
from urllib.parse import quote

import numpy as np
import pytest
from PIL import Image

from .conftest import named, read_workflow, runnable_names, title, workflow_names
from .graphs import to_prompt
from .server import PACK_FOLDER, REPO, Host, PromptFailed

# Rows and columns of faces in the saved picture, and the gap between them.
FACES = {
    "Choose a face by looking": (1, 1, 0),
    "Put two people into one picture": (1, 2, 0),
    "Draw a person who does not exist": (1, 1, 0),
    "Draw four people at once": (2, 2, 4),
    "Walk from one person to another": (1, 7, 2),
    "Change a face with sliders": (1, 2, 24),
    "Find the person of a portrait": (1, 4, 4),
    "Edit that person and mix in another": (1, 6, 4),
    "Make a space of my LoRAs": (2, 2, 4),
    "Make a space of my pictures": (2, 2, 4),
    "Find a person in a picture that is not cropped": (2, 4, 4),
    "Give several pictures of a person": (2, 4, 4),
    "Choose a face.app": (1, 1, 0),
    "Turn a portrait into a character.app": (1, 1, 0),
}


def cells(picture: np.ndarray, rows: int, columns: int, gap: int) -> list[np.ndarray]:
    height = (picture.shape[0] - gap * (rows - 1)) // rows
    width = (picture.shape[1] - gap * (columns - 1)) // columns
    corners = [(r * (height + gap), c * (width + gap)) for r in range(rows) for c in range(columns)]
    return [picture[y : y + height, x : x + width].astype(int) for y, x in corners]


@pytest.mark.parametrize("name", runnable_names())
def test_workflow_runs_to_a_saved_picture(host: Host, object_info: dict, name: str) -> None:
    (picture,) = host.run(to_prompt(read_workflow(name), object_info)).pictures()
    faces = cells(picture, *FACES[title(name)])
    assert all(face.std() > 10 for face in faces)
    for i, face in enumerate(faces):
        assert all(np.abs(face - other).mean() > 1 for other in faces[i + 1 :])


def test_a_walk_changes_the_face_little_by_little(host: Host, object_info: dict) -> None:
    name = named("Walk from one person to another")
    (picture,) = host.run(to_prompt(read_workflow(name), object_info)).pictures()
    walk = cells(picture, *FACES[title(name)])
    whole = np.abs(walk[0] - walk[-1]).mean()
    assert all(np.abs(a - b).mean() < 0.6 * whole for a, b in pairwise(walk))


def test_without_its_files_the_sd15_workflow_is_refused_with_where_to_get_them(
    host: Host, object_info: dict
) -> None:
    with pytest.raises(PromptFailed) as failure:
        host.run(
            to_prompt(read_workflow(named("Draw a person for Stable Diffusion 1.5")), object_info)
        )
    message = str(failure.value)
    assert "There is no space 'w2w.safetensors'" in message
    assert "https://huggingface.co/snap-research/weights2weights" in message
    assert "choose 'w2w (official files)'" in message


def test_with_a_space_in_place_the_sd15_workflow_asks_for_the_checkpoint_only(
    host: Host, object_info: dict
) -> None:
    installed = host.base / "models" / "w2wpp" / "w2w.safetensors"
    installed.write_bytes((REPO / "models" / "avatars-pca.safetensors").read_bytes())
    try:
        with pytest.raises(PromptFailed, match="ckpt_name") as failure:
            host.run(
                to_prompt(
                    read_workflow(named("Draw a person for Stable Diffusion 1.5")), object_info
                )
            )
    finally:
        installed.unlink()
    assert "There is no space" not in str(failure.value)


def test_each_workflow_has_a_thumbnail_where_the_gallery_looks(host: Host) -> None:
    assert set(map(title, runnable_names())) == set(FACES)
    assert sorted(host.json("/workflow_templates")[PACK_FOLDER]) == workflow_names()
    for name in workflow_names():
        thumbnail = REPO / "example_workflows" / f"{name}.jpg"
        assert (
            host.get(f"/api/workflow_templates/{PACK_FOLDER}/{quote(name)}.jpg")
            == thumbnail.read_bytes()
        )
        assert Image.open(thumbnail).width >= 800


def test_workflows_use_only_this_pack_and_the_hosts_own_nodes(object_info: dict) -> None:
    for name in workflow_names():
        for node in to_prompt(read_workflow(name), object_info).values():
            origin = object_info[node["class_type"]]["python_module"]
            assert origin == f"custom_nodes.{PACK_FOLDER}" or not origin.startswith("custom_nodes.")
