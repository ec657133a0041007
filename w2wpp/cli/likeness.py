"""``w2wpp likeness``: photographs against paintings, by a face embedder of one's own choice."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..files.tables import read_labels
from ..files.writing import replacing
from ..likeness.embedder import SPANS, OnnxEmbedder
from ..likeness.faces import Faces
from ..likeness.score import embed_entries, given_embeddings, score_likeness
from ..likeness.table import read_entries
from ..spacefile import load_space
from .printing import Result, log


def register(verbs: Any) -> None:
    """Add the verb to the parser."""
    p = verbs.add_parser(
        "likeness", help="how like photographs their paintings are, by any embedder"
    )
    p.add_argument(
        "table", metavar="TABLE", help="CSV with the columns picture, person, kind (photograph, painting)"
    )  # fmt: skip
    p.add_argument("--embedder", metavar="MODEL.onnx", help="faces to vectors; needs onnxruntime")
    p.add_argument(
        "--embeddings", metavar="CSV", help="instead: pictures' paths and the numbers somebody made of them"
    )  # fmt: skip
    p.add_argument(
        "--pixels", choices=list(SPANS), default="-1..1", help="what black and white are to it"
    )
    p.add_argument("--bgr", action="store_true", help="it takes blue first")
    p.add_argument(
        "--embedder-size", type=int, help="pixels per side, where the model does not say"
    )
    p.add_argument(
        "--space", metavar="SPACE", help="whose start network finds faces; else the middle is taken"
    )
    p.add_argument(
        "--margin", type=float, default=1.1, help="side of the crop, in larger sides of the face"
    )
    p.add_argument("-o", "--output", type=Path, metavar="FILE", help="JSON")
    p.set_defaults(run=run_likeness)


def run_likeness(args: argparse.Namespace) -> Result:
    """`w2wpp likeness`"""
    if (args.embedder is None) == (args.embeddings is None):
        raise ConfigError(
            "Faces are told apart by --embedder MODEL.onnx or by --embeddings CSV: name one."
        )
    if not 0.2 <= args.margin <= 5:
        raise ConfigError(f"--margin lies between 0.2 and 5. Got {args.margin:g}.")
    entries = read_entries(args.table)
    found: dict[str, Any]
    if args.embeddings is not None:
        embeddings = given_embeddings(entries, read_labels(args.embeddings))
        found = {"embedder": Path(args.embeddings).name}
    else:
        embedder = OnnxEmbedder.open(
            args.embedder, span=args.pixels, bgr=args.bgr, size=args.embedder_size
        )
        faces = Faces(None if args.space is None else load_space(args.space), args.margin)
        embeddings, ways = embed_entries(entries, embedder, faces, callback=log)
        found = {"embedder": embedder.name, "faces": ways}
    result = {**found, **score_likeness(entries, embeddings)}
    if args.output is not None:
        with replacing(args.output) as file:
            file.write((json.dumps(result, indent=1, allow_nan=False) + "\n").encode())
    return result
