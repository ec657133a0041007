"""Photographs of people, inverted and painted by a running ComfyUI, as the table that `w2wpp likeness` scores.

    python benchmarks/photographs.py photographs/ --checkpoint MODEL.safetensors --space taught.safetensors \\
        -o check/
    w2wpp likeness check/table.csv --embedder auraface.onnx --space taught.safetensors -o check/likeness.json

`photographs/` holds a picture for each person, or a folder of theirs, of which the first by name is inverted and the
others only say how alike two photographs of one person are. Every person is painted in every scene (--scenes), and what
the inversion says of itself goes into the table. People whose paintings are there are left as they are, so a run that
was stopped goes on. Needs nothing but Python; the docs page is docs/photographs.md. With --avatars the model that ships
stands in for a checkpoint: a rehearsal that needs no weights.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from pathlib import Path
from typing import Any

ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
SUBFOLDER = "w2wpp-check"  # of the server's input and output folders
SCENES = (
    "{who}, portrait in a garden, daylight",
    "{who} sitting in a cafe, candid photo",
    "{who} in a suit, studio light, grey background",
    "{who} at the beach, smiling",
)
NEGATIVE = "blurry, deformed, cartoon, painting, text"
COLUMNS = ["picture", "person", "kind", "confidence"]


class Server:
    """A ComfyUI that runs."""

    def __init__(self, address: str) -> None:
        self.address = address.rstrip("/")

    def get(self, path: str) -> bytes:
        """What it answers."""
        with urllib.request.urlopen(self.address + path, timeout=600) as answer:
            return answer.read()

    def _post(self, path: str, body: bytes, kind: str) -> Any:
        request = urllib.request.Request(self.address + path, body, {"Content-Type": kind})
        try:
            with urllib.request.urlopen(request, timeout=600) as answer:
                return json.loads(answer.read())
        except urllib.error.HTTPError as refusal:
            raise SystemExit(f"The server refused: {refusal.read().decode()[:2000]}") from None

    def upload(self, picture: Path, name: str) -> str:
        """The name under which Load Image knows a picture."""
        edge = uuid.uuid4().hex
        fields = {"subfolder": SUBFOLDER, "overwrite": "true", "type": "input"}
        parts = [
            f'--{edge}\r\nContent-Disposition: form-data; name="{k}"\r\n\r\n{v}\r\n'.encode()
            for k, v in fields.items()
        ]
        head = f'--{edge}\r\nContent-Disposition: form-data; name="image"; filename="{name}"\r\n'
        parts += [f"{head}Content-Type: application/octet-stream\r\n\r\n".encode()]
        body = b"".join([*parts, picture.read_bytes(), f"\r\n--{edge}--\r\n".encode()])
        told = self._post("/upload/image", body, f"multipart/form-data; boundary={edge}")
        return f"{told['subfolder']}/{told['name']}" if told["subfolder"] else told["name"]

    def run(self, nodes: dict[str, Any]) -> dict[str, Any]:
        """The outputs of a prompt in API format, by node."""
        body = json.dumps({"prompt": nodes}).encode()
        number = self._post("/prompt", body, "application/json")["prompt_id"]
        while True:
            entry = json.loads(self.get(f"/history/{number}")).get(number)
            if entry and entry["status"]["status_str"] == "error":
                errors = [d for kind, d in entry["status"]["messages"] if kind == "execution_error"]
                raise RuntimeError(errors[0]["exception_message"] if errors else "interrupted")
            if entry and entry["status"]["completed"]:
                return entry["outputs"]
            time.sleep(0.5)


class Graph:
    """A prompt in API format."""

    def __init__(self) -> None:
        self.nodes: dict[str, Any] = {}

    def add(self, class_type: str, **inputs: Any) -> str:
        """The id of a new node."""
        name = str(len(self.nodes) + 1)
        self.nodes[name] = {"class_type": class_type, "inputs": inputs}
        return name


def prompt_of(args: argparse.Namespace, image: str, person: str) -> tuple[Graph, str, list[str]]:
    """The graph for one photograph, its node that shows the confidence, and those that save a scene each."""
    graph = Graph()
    if args.avatars:
        words = [("white", "front"), ("blue", "left"), ("green", "right"), ("red", "front")]
        loaders = [
            graph.add("W2WPP_LoadAvatarModel", background=b, smile="neutral", light=light, pictures=1)
            for b, light in words[: max(1, len(args.scenes))]
        ]  # fmt: skip
        model, vae, positive = [loaders[0], 0], [loaders[0], 3], [loaders[0], 1]
        scenes = [([n, 1], [n, 2], [n, 4]) for n in loaders]
    else:
        loader = graph.add("CheckpointLoaderSimple", ckpt_name=args.checkpoint)
        model, clip, vae = ([loader, i] for i in range(3))

        def words_of(text: str) -> list:
            return [graph.add("CLIPTextEncode", clip=clip, text=text), 0]

        size = args.size
        empty = [graph.add("EmptyLatentImage", width=size, height=size, batch_size=1), 0]
        positive, negative = words_of(f"photo of {args.who}, face"), words_of(args.negative)
        scenes = [(words_of(s.replace("{who}", args.who)), negative, empty) for s in args.scenes]
    space = [graph.add("W2WPP_LoadSpace", space=args.space), 0]
    more = {}
    if args.clip_vision:
        more["clip_vision"] = [graph.add("CLIPVisionLoader", clip_name=args.clip_vision), 0]
    found = graph.add(
        "W2WPP_InvertFromImage", model=model, vae=vae, positive=positive, space=space,
        image=[graph.add("LoadImage", image=image), 0], method=args.method, steps=args.invert_steps, seed=0,
        batch=0, learning_rate=0.0, prior=-1.0, pivotal=-1.0, resolution=0, preview_every=0, **more,
    )  # fmt: skip
    sure = graph.add("PreviewAny", source=[found, 4])
    graph.add("W2WPP_SaveIdentity", identity=[found, 0], filename_prefix=f"{SUBFOLDER}-{person}")
    painted = graph.add(
        "W2WPP_ApplyDecodedLora", model=model, identity=[found, 0], strength=args.strength
    )
    saved = []
    for number, (words, against, latent) in enumerate(scenes):
        sampled = graph.add(
            "KSampler", model=[painted, 0], positive=words, negative=against, latent_image=latent, seed=number,
            steps=args.paint_steps, cfg=args.cfg, sampler_name="dpmpp_2m", scheduler="karras", denoise=1.0,
        )  # fmt: skip
        decoded = graph.add("VAEDecode", samples=[sampled, 0], vae=vae)
        prefix = f"{SUBFOLDER}/{person}-{number}"
        saved.append(graph.add("SaveImage", images=[decoded, 0], filename_prefix=prefix))
    return graph, sure, saved


def people_in(folder: Path) -> dict[str, list[Path]]:
    """{person: their photographs}, the one that is inverted first."""
    found: dict[str, list[Path]] = {}
    for entry in sorted(folder.iterdir()):
        if entry.is_dir():
            own = sorted(p for p in entry.iterdir() if p.suffix.lower() in ENDINGS)
            if own:
                found[entry.name] = own
        elif entry.suffix.lower() in ENDINGS:
            if entry.stem in found:
                raise SystemExit(f"Two pictures are called {entry.stem}; a person has one name.")
            found[entry.stem] = [entry]
    if len(found) < 2:
        raise SystemExit(f"{folder} holds pictures of {len(found)} people; two are the least.")
    return found


def check(args: argparse.Namespace) -> Path:
    """Invert and paint everybody; the path of the table."""
    server, out = Server(args.server), args.output
    out.mkdir(parents=True, exist_ok=True)
    people = people_in(args.photographs)
    lines, failed = [], []
    for number, (person, own) in enumerate(people.items()):
        files = [out / f"{person}-{scene}.png" for scene in range(len(args.scenes))]
        note = out / f"{person}.json"
        if not (note.exists() and all(f.exists() for f in files)):
            image = server.upload(own[0], f"{person}{own[0].suffix.lower()}")
            graph, sure, saved = prompt_of(args, image, person)
            try:
                outputs = server.run(graph.nodes)
            except RuntimeError as e:
                failed.append(f"{person}: {e}")
                print(f"{person}: {e}", file=sys.stderr, flush=True)
                continue
            for file, node in zip(files, saved):
                (shown,) = outputs[node]["images"]
                names = {k: shown[k] for k in ("filename", "subfolder", "type")}
                file.write_bytes(server.get("/view?" + urllib.parse.urlencode(names)))
            note.write_text(json.dumps({"confidence": float(outputs[sure]["text"][0])}))
        confidence = json.loads(note.read_text())["confidence"]
        lines += [[str(p.resolve()), person, "photograph", ""] for p in own]
        lines += [[f.name, person, "painting", confidence] for f in files]
        print(f"{number + 1} of {len(people)}: {person}, confidence {confidence:.2f}", flush=True)
    table = out / "table.csv"
    with table.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([COLUMNS, *lines])
    if failed:
        print(f"{len(failed)} of {len(people)} people failed and are not in the table", flush=True)
    return table


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument(
        "photographs", type=Path, help="a picture or a folder of pictures for each person"
    )
    p.add_argument("-o", "--output", type=Path, default=Path("check"), help="folder")
    p.add_argument("--server", default="http://127.0.0.1:8188")
    which = p.add_mutually_exclusive_group(required=True)
    which.add_argument("--checkpoint", help="as Load Checkpoint lists it")
    which.add_argument(
        "--avatars", action="store_true", help="a rehearsal with the model that ships"
    )
    p.add_argument("--space", required=True, help="as W2W++ Load Space lists it")
    p.add_argument(
        "--clip-vision", help="as Load CLIP Vision lists it, if the start was taught with one"
    )
    p.add_argument("--who", default="sks person", help="the space's trigger words")
    p.add_argument(
        "--scenes", nargs="+", default=list(SCENES), help="prompts; {who} are the trigger words"
    )
    p.add_argument("--negative", default=NEGATIVE)
    p.add_argument("--method", default="adam")
    p.add_argument("--invert-steps", type=int, default=0, help="0 for the recipe's own")
    p.add_argument("--paint-steps", type=int, default=25)
    p.add_argument("--cfg", type=float, default=5.0)
    p.add_argument("--strength", type=float, default=1.0)
    p.add_argument("--size", type=int, default=512, help="pixels per side of a painting")
    return p


if __name__ == "__main__":
    print(check(parser().parse_args()))
