"""What the server tells about the nodes: texts, help, files to choose from, and how it fails."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

import w2wpp

from .graphs import AvatarGraph, Graph
from .refresh import ENGLISH, english
from .server import PACK_FOLDER, REPO, Host, PromptFailed

NAMES = {
    "W2WPP_LoadSpace": "W2W++ Load Space",
    "W2WPP_SpaceFromLoras": "W2W++ Space from LoRAs",
    "W2WPP_ImportFiles": "W2W++ Import Files",
    "W2WPP_TrainPeople": "W2W++ Train People",
    "W2WPP_FitSpace": "W2W++ Fit Space",
    "W2WPP_CompareLoras": "W2W++ Compare LoRAs",
    "W2WPP_Explore": "W2W++ Explore",
    "W2WPP_SampleIdentity": "W2W++ Sample Identity",
    "W2WPP_TrainStartNetwork": "W2W++ Train Start Network",
    "W2WPP_EncodeLora": "W2W++ Encode LoRA",
    "W2WPP_LoadIdentity": "W2W++ Load Identity",
    "W2WPP_Interpolate": "W2W++ Interpolate",
    "W2WPP_PickIdentity": "W2W++ Pick Identity",
    "W2WPP_Mix": "W2W++ Mix",
    "W2WPP_EditIdentity": "W2W++ Edit Identity",
    "W2WPP_Sliders": "W2W++ Sliders",
    "W2WPP_IdentityHooks": "W2W++ Identity Hooks",
    "W2WPP_ApplyDecodedLora": "W2W++ Apply Decoded LoRA",
    "W2WPP_SaveIdentity": "W2W++ Save Identity",
    "W2WPP_SpaceInfo": "W2W++ Space Info",
    "W2WPP_LoadAvatarModel": "W2W++ Load Avatar Model",
    "W2WPP_InvertFromImage": "W2W++ Invert from Image",
    "W2WPP_ExamplePortrait": "W2W++ Example Portrait",
}  # saved workflows hold these ids: they never change


def declared(info: dict) -> dict[str, dict]:
    inputs = {**info["input"].get("required", {}), **info["input"].get("optional", {})}
    return {name: options for name, (_, options) in inputs.items()}


def test_ids_names_and_category_are_the_promised_ones(object_info: dict) -> None:
    ours = {name: info for name, info in object_info.items() if name.startswith("W2WPP_")}
    assert {name: info["display_name"] for name, info in ours.items()} == NAMES
    assert {info["category"] for info in ours.values()} == {"W2W++"}
    assert {info["python_module"] for info in ours.values()} == {f"custom_nodes.{PACK_FOLDER}"}


@pytest.mark.parametrize("name", NAMES)
def test_every_input_and_output_explains_itself(object_info: dict, name: str) -> None:
    info = object_info[name]
    tooltips = [options.get("tooltip") for options in declared(info).values()] + info[
        "output_tooltips"
    ]
    assert len(info["output_tooltips"]) == len(info["output"])
    assert all(tooltip and tooltip.endswith(".") for tooltip in [*tooltips, info["description"]])
    if "search_aliases" in object_info["KSampler"]:  # hosts of 2025 know none
        assert info["search_aliases"]


@pytest.mark.parametrize("name", NAMES)
def test_help_page_is_served_and_names_every_input_and_output(
    host: Host, object_info: dict, name: str
) -> None:
    folder = object_info[name]["python_module"].split(".")[1]  # as the front end finds it
    page = host.get(f"/extensions/{folder}/docs/{name}.md")
    assert page == (REPO / "web" / "docs" / f"{name}.md").read_bytes()
    info = object_info[name]
    for word in [*declared(info), *info["output_name"]]:
        assert f"| `{word}` |" in page.decode()


@pytest.mark.parametrize(
    "page",
    sorted((REPO / "web" / "docs").glob("*/*.md")),
    ids=lambda p: f"{p.parent.name}-{p.stem}",
)
def test_translated_help_is_served_and_names_every_input_and_output(
    host: Host, object_info: dict, page
) -> None:
    name, info = page.parent.name, object_info[page.parent.name]
    folder = info["python_module"].split(".")[1]
    served = host.get(f"/extensions/{folder}/docs/{name}/{page.name}")
    assert served == page.read_bytes()
    assert (REPO / "locales" / page.stem).is_dir()
    for word in [*declared(info), *info["output_name"]]:
        assert f"| `{word}` |" in served.decode()


def test_texts_are_served_in_every_language_for_every_node(host: Host, object_info: dict) -> None:
    expected = english(object_info)
    assert json.loads(ENGLISH.read_text(encoding="utf-8")) == expected, (
        "run python -m tests.host.refresh"
    )
    served = host.json("/i18n")
    for folder in (REPO / "locales").iterdir():
        texts = served[folder.name]["nodeDefs"]
        for name, english_texts in expected.items():
            assert texts[name].keys() == english_texts.keys()
            for part in ("inputs", "outputs"):
                assert texts[name][part].keys() == english_texts[part].keys()


def test_the_pack_imports_without_a_complaint_and_without_the_network(host: Host) -> None:
    log = host.log()
    assert f"custom_nodes/{PACK_FOLDER}" in log
    assert "IMPORT FAILED" not in log and "Traceback" not in log.split("To see the GUI")[0]
    assert "probe: refused to connect" not in log


def spaces(host: Host) -> list[str]:
    kind, options = host.json("/object_info/W2WPP_LoadSpace")["W2WPP_LoadSpace"]["input"][
        "required"
    ]["space"]
    return options["options"] if kind == "COMBO" else kind


def test_spaces_are_listed_from_the_pack_and_from_the_users_folder(host: Host) -> None:
    folder = host.base / "models" / "w2wpp" / "friends"
    folder.mkdir(exist_ok=True)
    space = w2wpp.load_space(REPO / "models" / "avatars.safetensors")
    w2wpp.save_space(space, folder / "copy.safetensors")
    save_file({"weight": torch.zeros(2)}, folder / "other.safetensors", {"format": "w2wpp.dataset"})
    (folder / "note.txt").write_text("not a space")
    listed = spaces(host)
    assert {"avatars.safetensors", "avatars-pca.safetensors", "friends/copy.safetensors"} <= set(
        listed
    )
    assert not {"friends/other.safetensors", "friends/note.txt", "avatar-base.safetensors"} & set(
        listed
    )


def test_a_broken_space_is_listed_and_loading_it_says_what_is_wrong(host: Host) -> None:
    whole = (REPO / "models" / "avatars.safetensors").read_bytes()
    (host.base / "models" / "w2wpp" / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    graph = Graph()
    opened = graph.add("W2WPP_LoadSpace", space="cut.safetensors")
    graph.add("PreviewAny", source=[opened, 0])
    with pytest.raises(PromptFailed, match=r"W2WPP_LoadSpace: .*FormatError.*cut\.safetensors"):
        host.run(graph.nodes)


def test_people_of_two_spaces_are_not_mixed(host: Host) -> None:
    graph = AvatarGraph()
    a, b = graph.sample(1), graph.sample(2, space="avatars-pca.safetensors")
    walk = graph.add(
        "W2WPP_Interpolate", identity_a=a, identity_b=b, steps=3, position=1.0, mode="slerp"
    )
    graph.paint([graph.apply([walk, 0]), 0])
    with pytest.raises(PromptFailed, match="SpaceMismatch"):
        host.run(graph.nodes)


def test_the_search_finds_the_pack_by_what_people_look_for(object_info: dict) -> None:
    if "search_aliases" not in object_info["KSampler"]:
        pytest.skip("hosts of 2025 know no search aliases")
    for words in ("face", "character", "consistent character", "ip adapter alternative"):
        found = {name for name in NAMES if words in object_info[name]["search_aliases"]}
        assert {"W2WPP_Explore"} < found or words == "ip adapter alternative"
        assert len(found) >= 2, words
