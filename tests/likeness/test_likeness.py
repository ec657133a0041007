"""ID scores of photographs and paintings: tables, faces and figures that are known."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from w2wpp.errors import DataError, FormatError
from w2wpp.likeness.faces import Faces
from w2wpp.likeness.score import score_likeness
from w2wpp.likeness.table import PAINTING, PHOTOGRAPH, Entry, read_entries
from w2wpp.placement import Sighting


def entry(person, kind, confidence=math.nan):
    return Entry(f"{person}.png", None, person, kind, confidence)


def test_figures_are_those_of_three_people_by_hand():
    """Photographs along the axes; paintings turned away from them by 60, 0 and 90 degrees."""
    axes = torch.eye(4)
    painted = [
        0.5 * axes[0] + 0.75**0.5 * axes[3],
        axes[1],
        axes[0],
    ]
    entries = [entry(n, PHOTOGRAPH) for n in "abc"] + [
        entry(n, PAINTING, sure) for n, sure in zip("abc", (0.5, 0.9, 0.1))
    ]
    found = score_likeness(entries, torch.cat([axes[:3], torch.stack(painted)]))
    assert found["id_score"]["mean"] == pytest.approx((0.5 + 1 + 0) / 3)
    # a meets the paintings of b and c (0, 1), b those of a and c (0, 0), c those of a and b (0, 0).
    assert found["strangers"]["mean"] == pytest.approx(0.5 / 3)
    assert found["above_strangers"]["mean"] == pytest.approx(0.5 - 0.5 / 3)
    # Of paintings those of c look most like the photograph of a.
    assert found["recognised"] == pytest.approx(2 / 3, abs=1e-4)
    assert found["by_person"] == {"a": 0.5, "b": 1.0, "c": 0.0}
    assert found["confidence_rank"] == 1.0
    assert found["photographs"] is None and found["share"] is None
    json.dumps(found, allow_nan=False)


def test_two_photographs_of_one_person_say_what_could_be_reached():
    """Photographs 90 degrees apart with the painting between them: cosines of 1/sqrt(2) to each, 0 to each other."""
    axes = torch.eye(4)
    between = F.normalize(axes[:2].sum(0), dim=0)
    other = torch.stack([axes[2], F.normalize(axes[2] + axes[3], dim=0)])
    entries = [entry("a", PHOTOGRAPH)] * 2 + [entry("a", PAINTING)]
    entries += [entry("b", PHOTOGRAPH)] * 2 + [entry("b", PAINTING)]
    found = score_likeness(entries, torch.cat([axes[:2], between[None], other, axes[2:3]]))
    assert found["by_person"]["a"] == pytest.approx(0.5**0.5, abs=1e-4)
    assert found["photographs"]["mean"] == pytest.approx((0 + 0.5**0.5) / 2, abs=1e-6)
    own = (0.5**0.5 + (1 + 0.5**0.5) / 2) / 2
    assert found["share"]["mean"] == pytest.approx(own / (0.5**0.5 / 2), abs=1e-6)


def test_confidences_that_say_nothing_make_no_rank():
    axes = torch.eye(3)
    entries = [entry(n, PHOTOGRAPH) for n in "abc"] + [entry(n, PAINTING, -1.0) for n in "abc"]
    assert score_likeness(entries, torch.cat([axes, axes]))["confidence_rank"] is None
    with pytest.raises(DataError, match="two people at least"):
        score_likeness([entries[0], entries[3]], axes[:2])
    with pytest.raises(DataError, match="6 pictures and 3"):
        score_likeness(entries, axes)


@pytest.fixture
def folder(tmp_path):
    """Two people as plain colours, photographed in a corner of a wider picture and painted whole."""
    for name, colour in (("red", (220, 40, 40)), ("blue", (40, 40, 220))):
        wide = np.full((40, 60, 3), 128, np.uint8)
        wide[8:24, 36:52] = colour
        Image.fromarray(wide).save(tmp_path / f"{name}.png")
        Image.fromarray(np.full((20, 20, 3), colour, np.uint8)).save(
            tmp_path / f"{name}-painted.png"
        )
    return tmp_path


TABLE = """picture,person,kind,confidence,left,top,right,bottom
red.png,r,photograph,,36,8,52,24
red-painted.png,r,painting,0.9,,,,
blue.png,b,photograph,,36,8,52,24
blue-painted.png,b,painting,0.8,,,,
"""


def write(folder, text=TABLE):
    (folder / "table.csv").write_text(text)
    return folder / "table.csv"


def test_tables_are_read_and_wrong_ones_named(folder):
    entries = read_entries(write(folder))
    assert [e.kind for e in entries] == [PHOTOGRAPH, PAINTING] * 2
    assert entries[0].box == (36, 8, 52, 24) and entries[1].box is None
    assert entries[1].confidence == 0.9 and math.isnan(entries[0].confidence)
    assert entries[0].key == "red.png"
    for change, error, said in (
        (("kind", "sort"), FormatError, "picture,person,kind"),
        (("confidence", "sureness"), FormatError, "the columns beside"),
        ((",left", ",confidence"), FormatError, "each once"),
        ((",bottom\n", "\n"), FormatError, "fields, the header has"),
        (("r,painting", "r,drawing"), DataError, "line 3: a picture has a person"),
        (("r,painting", ",painting"), DataError, "line 3: a picture has a person"),
        (("b,painting", "r,painting"), DataError, "'b' has no painting"),
        (("36,8,52,24", "36,8,,24"), DataError, "line 2: a box has four sides"),
        (("36,8,52,24", "36,8,30,24"), DataError, "line 2: the box of a face is empty"),
        (("0.9", "often"), FormatError, "line 3"),
        (("red.png", "green.png"), DataError, "there is no picture 'green.png'"),
    ):
        with pytest.raises(error, match=said):
            read_entries(write(folder, TABLE.replace(*change)))


def test_faces_are_cut_by_their_box_or_where_a_start_network_finds_them(folder):
    faces = Faces(margin=1.0)
    cut, how = faces(folder / "red.png", 8, (36, 8, 52, 24))
    assert how == "box" and cut.shape == (1, 3, 8, 8)
    assert (cut[0, 0] - (220 / 127.5 - 1)).abs().max() < 0.01  # all of it is the person
    whole, how = faces(folder / "red.png", 8)
    assert how == "whole" and float(whole[0, 0].std()) > 0.1
    with pytest.raises(DataError, match="outside of the picture"):
        faces(folder / "red.png", 8, (60, 8, 90, 24))

    class Finder:
        """Says that the frame is where the person is, if there is red in the middle."""

        locates = True

        def locate(self, pictures):
            red = (pictures[:, 0, 24:40, 24:40] - pictures[:, 2, 24:40, 24:40]).mean((1, 2))
            return Sighting(torch.zeros(len(pictures), 4), red.clamp(0, 1))

    class Somewhere:
        frame, start = None, Finder()

    cut, how = Faces(Somewhere(), margin=1.0)(folder / "red.png", 8)
    assert how == "found"
    assert float((cut[0, 0] - cut[0, 2])[2:6, 2:6].mean()) > 1


def test_the_verb_scores_a_table(folder, run, monkeypatch):
    """Embeddings that somebody made, and an embedder whose vectors are mean colours."""
    (folder / "numbers.csv").write_text(
        f"picture,a,b\nred.png,1,0\nred-painted.png,3,4\n{folder / 'blue.png'},0,2\nblue-painted.png,0,1\n"
    )
    table = str(write(folder))
    output = folder / "result.json"
    code, found, said = run(
        "likeness", table, "--embeddings", str(folder / "numbers.csv"), "-o", str(output)
    )
    assert code == 0, said
    assert found["by_person"] == {"r": 0.6, "b": 1.0} and found["embedder"] == "numbers.csv"
    assert json.loads(output.read_text()) == found
    (folder / "numbers.csv").write_text("picture,a,b\nred.png,1,0\n")
    code, _, said = run("likeness", table, "--embeddings", str(folder / "numbers.csv"))
    assert code == 1 and "has no line for red-painted.png" in said

    class Colours:
        name, size = "colours", 8

        def embed(self, faces):
            return F.normalize(faces.mean((2, 3)), dim=1)

    monkeypatch.setattr("w2wpp.cli.likeness.OnnxEmbedder.open", lambda path, **settings: Colours())
    code, found, said = run("likeness", table, "--embedder", "colours.onnx", "--margin", "1")
    assert code == 0, said
    assert found["faces"] == {"box": 2, "found": 0, "whole": 2}
    assert found["id_score"]["mean"] > 0.99 and found["recognised"] == 1.0
    for options in ((), ("--embedder", "a.onnx", "--embeddings", "b.csv")):
        code, _, said = run("likeness", table, *options)
        assert code == 1 and "name one" in said
    code, _, said = run("likeness", table, "--embedder", "colours.onnx", "--margin", "9")
    assert code == 1 and "--margin" in said


def test_without_onnxruntime_the_verb_says_what_to_install(folder, run, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    code, result, said = run("likeness", str(write(folder)), "--embedder", str(folder / "red.png"))
    assert code == 1 and result is None
    assert "needs onnxruntime" in said and "[likeness]" in said
