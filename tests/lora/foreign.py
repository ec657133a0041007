"""LoRA files as others write them, in miniature: SD 1.5's UNet with a tenth of its width.

Every case holds a file's tensors and metadata, and what they mean by the formula of their kind,
computed here from the factors and never through the reader. The same cases run against the host's
own loader, in `tests/host/test_loader.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from w2wpp import transformer_layout

WIDTHS, CONTEXT, ALPHA = (32, 64, 128), 24, 27.0
CONV = "down_blocks.0.resnets.0.conv1"
BLOCKS = [
    *((f"down_blocks.{i}.attentions.{j}", WIDTHS[i]) for i in range(3) for j in range(2)),
    ("mid_block.attentions.0", WIDTHS[2]),
    *((f"up_blocks.{i}.attentions.{j}", WIDTHS[3 - i]) for i in (1, 2, 3) for j in range(3)),
]
LAYOUT = transformer_layout(
    "narrow",
    "sd15",
    [(f"{name}.transformer_blocks.0", width) for name, width in BLOCKS],
    context_dim=CONTEXT,
    alpha=ALPHA,
)
SHAPES = {m.name: (m.out_features, m.in_features) for m in LAYOUT.modules}
# Blocks of diffusers and of the original checkpoints.
LDM = {
    **{f"down_blocks.{i}.attentions.{j}": f"input_blocks.{1 + 3 * i + j}.1" for i in range(3) for j in range(2)},
    "mid_block.attentions.0": "middle_block.1",
    **{f"up_blocks.{i}.attentions.{j}": f"output_blocks.{3 * i + j}.1" for i in (1, 2, 3) for j in range(3)},
}  # fmt: skip


@dataclass
class Case:
    tensors: dict[str, Tensor]
    expected: dict[str, Tensor]  # {module: update [out, in]}, in double precision
    metadata: dict[str, str] = field(default_factory=dict)
    config: dict | None = None  # adapter_config.json beside it
    name: str = "lora.safetensors"
    host_loads: bool = True  # whether ComfyUI knows the spelling
    needs_base: bool = False
    exact: float = 1e-6  # relative error of the storage


Parts = tuple[dict[str, Tensor], Tensor]  # tensors by part, and the update that they mean


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def base_weight(module: str) -> Tensor:
    """The base model's weight [out, in]."""
    g = generator(sum(map(ord, module)))
    return 0.2 * torch.randn(SHAPES[module], generator=g)


def person(seed: int = 0) -> dict[str, tuple[Tensor, Tensor]]:
    """A rank-1 LoRA whose update is B A: {module: (A [1, in], B [out, 1])}."""
    g = generator(seed)
    return {
        n: (0.3 * torch.randn(1, i, generator=g), 0.3 * torch.randn(o, 1, generator=g))
        for n, (o, i) in SHAPES.items()
    }


# Kinds. Each has a form that means any rank-1 update exactly, and a general one.


def low_rank(a: Tensor, b: Tensor, g: torch.Generator | None, rank=3, alpha=2.0) -> Parts:
    if g is None:
        return {"down": a, "up": b / ALPHA, "alpha": torch.tensor(ALPHA)}, (b @ a).double()
    down = 0.2 * torch.randn(rank, a.shape[1], generator=g)
    up = 0.2 * torch.randn(len(b), rank, generator=g)
    parts = {"down": down, "up": up, "alpha": torch.tensor(alpha)}
    return parts, alpha / rank * up.double() @ down.double()


def loha(a: Tensor, b: Tensor, g: torch.Generator | None) -> Parts:
    o, i = len(b), a.shape[1]
    if g is None:
        w = {
            "hada_w1_a": b,
            "hada_w1_b": a,
            "hada_w2_a": torch.ones(o, 1),
            "hada_w2_b": torch.ones(1, i),
        }
        return {**w, "alpha": torch.tensor(1.0)}, (b @ a).double()
    sizes = {"hada_w1_a": (o, 2), "hada_w1_b": (2, i), "hada_w2_a": (o, 2), "hada_w2_b": (2, i)}
    w = {name: 0.4 * torch.randn(size, generator=g) for name, size in sizes.items()}
    x, y, u, v = (t.double() for t in w.values())
    return {**w, "alpha": torch.tensor(1.0)}, 1.0 / 2 * (x @ y) * (u @ v)


def loha_of_high_rank(a: Tensor, b: Tensor, g: torch.Generator | None) -> Parts:
    if g is None:
        return loha(a, b, g)
    o, i = len(b), a.shape[1]
    sizes = {"hada_w1_a": (o, 8), "hada_w1_b": (8, i), "hada_w2_a": (o, 8), "hada_w2_b": (8, i)}
    w = {name: 0.2 * torch.randn(size, generator=g) for name, size in sizes.items()}
    x, y, u, v = (t.double() for t in w.values())
    return w, (x @ y) * (u @ v)  # no alpha: a scale of 1


def lokr(a: Tensor, b: Tensor, g: torch.Generator | None) -> Parts:
    if g is None:
        w = {"lokr_w1": torch.ones(1, 1), "lokr_w2_a": b, "lokr_w2_b": a}
        return {**w, "alpha": torch.tensor(1.0)}, (b @ a).double()
    o, i = len(b) // 4, a.shape[1] // 4
    w = {
        "lokr_w1": torch.randn(4, 4, generator=g),
        "lokr_w2_a": 0.2 * torch.randn(o, 2, generator=g),
        "lokr_w2_b": 0.2 * torch.randn(2, i, generator=g),
    }
    product = w["lokr_w2_a"].double() @ w["lokr_w2_b"].double()
    return {**w, "alpha": torch.tensor(1.0)}, 0.5 * torch.kron(w["lokr_w1"].double(), product)


def lokr_of_pairs(a: Tensor, b: Tensor, g: torch.Generator | None) -> Parts:
    """Both factors of low rank: the second's counts."""
    if g is None:
        return lokr(a, b, g)
    o, i = len(b) // 4, a.shape[1] // 4
    sizes = {"lokr_w1_a": (4, 3), "lokr_w1_b": (3, 4), "lokr_w2_a": (o, 2), "lokr_w2_b": (2, i)}
    w = {name: 0.4 * torch.randn(size, generator=g) for name, size in sizes.items()}
    p, q, x, y = (t.double() for t in w.values())
    return {**w, "alpha": torch.tensor(1.0)}, 0.5 * torch.kron(p @ q, x @ y)


def lokr_whole(a: Tensor, b: Tensor, g: torch.Generator | None) -> Parts:
    """Both factors whole: alpha means nothing."""
    if g is None:
        return {"lokr_w1": torch.ones(1, 1), "lokr_w2": b @ a}, (b @ a).double()
    w = {
        "lokr_w1": 0.3 * torch.randn(2, 2, generator=g),
        "lokr_w2": 0.3 * torch.randn(len(b) // 2, a.shape[1] // 2, generator=g),
    }
    product = torch.kron(w["lokr_w1"].double(), w["lokr_w2"].double())
    return {**w, "alpha": torch.tensor(5.0)}, product


def difference(a: Tensor, b: Tensor, g: torch.Generator | None) -> Parts:
    d = b @ a if g is None else 0.1 * torch.randn(len(b), a.shape[1], generator=g)
    return {"diff": d}, d.double()


def dora(axis: str) -> Callable[..., Parts]:
    """DoRA whose lengths are those of the changed weight, times random factors in the general form."""

    def make(a: Tensor, b: Tensor, g: torch.Generator | None, module: str) -> Parts:
        parts, dw = low_rank(a, b, g)
        w = base_weight(module).double()
        changed = w + dw
        if axis == "in":
            length, of = changed.norm(dim=0, keepdim=True), changed.norm(dim=0, keepdim=True)
        elif axis == "out":  # ComfyUI divides by the base weight's
            length, of = changed.norm(dim=1, keepdim=True), w.norm(dim=1, keepdim=True)
        else:
            length, of = changed.norm(dim=1, keepdim=True), changed.norm(dim=1, keepdim=True)
        if g is not None:
            length = length * (0.5 + torch.rand(length.shape, generator=g, dtype=torch.float64))
        elif axis == "out":
            length = of  # the change of length is the base's own: nothing is rescaled
        name = "dora_scale" if axis in ("in", "out") else axis
        stored = length if name == "dora_scale" else length.flatten()
        parts[name] = stored.float()
        return parts, changed * (length / of) - w

    make.of_module = True  # type: ignore[attr-defined]
    return make


# Spellings: (module, part) -> key.


def kohya(module: str, part: str) -> str:
    name = {"down": "lora_down.weight", "up": "lora_up.weight"}.get(part, part)
    return f"lora_unet_{module.replace('.', '_')}.{name}"


def kohya_ldm(module: str, part: str) -> str:
    return kohya(ldm(module), part)


def kohya_peft(module: str, part: str) -> str:
    name = {"down": "lora_A.weight", "up": "lora_B.weight"}.get(part, part)
    return f"lora_unet_{module.replace('.', '_')}.{name}"


def lycoris(module: str, part: str) -> str:
    return kohya(module, part).replace("lora_unet_", "lycoris_")


def trainer(module: str, part: str) -> str:
    """ComfyUI's own Train LoRA, Extract and Save Lora."""
    name = {"down": "lora_down.weight", "up": "lora_up.weight"}.get(part, part)
    return f"diffusion_model.{ldm(module)}.{name}"


def onetrainer(module: str, part: str) -> str:
    name = {"down": "lora_down.weight", "up": "lora_up.weight"}.get(part, part)
    return f"lora_unet.{module}.{name}"


def peft(module: str, part: str) -> str:
    name = {
        "down": "lora_A.weight",
        "up": "lora_B.weight",
        "lora_magnitude_vector": "lora_magnitude_vector",
    }.get(part, part)
    return f"base_model.model.{module}.{name}"


def peft_named(module: str, part: str) -> str:
    name = {"down": "lora_A.identity1.weight", "up": "lora_B.identity1.weight"}.get(part, part)
    return f"base_model.model.{module}.{name}"


def peft_wrapped(module: str, part: str) -> str:
    return "unet." + peft(module, part)


def diffusers(module: str, part: str) -> str:
    return peft(module, part).replace("base_model.model.", "unet.")


def compiled(module: str, part: str) -> str:
    return diffusers(module, part).replace("unet.", "unet._orig_mod.")


def linear_layer(module: str, part: str) -> str:
    name = {"down": "lora_linear_layer.down.weight", "up": "lora_linear_layer.up.weight"}.get(
        part, part
    )
    return f"unet.{processed(module)}.{name}"


def processor(module: str, part: str) -> str:
    name = {"down": "_lora.down.weight", "up": "_lora.up.weight"}.get(part, f".{part}")
    return processed(module) + name


def processor_peft(module: str, part: str) -> str:
    name = {"down": "lora_A.weight", "up": "lora_B.weight"}.get(part, part)
    return f"unet.{processed(module)}.{name}"


def processed(module: str) -> str:
    return module.replace(".to_", ".processor.to_")


def ldm(module: str) -> str:
    block = next(name for name in LDM if module.startswith(name + "."))
    return LDM[block] + module.removeprefix(block)


def build(spell, kind, *, general: bool = True, seed: int = 0, drop=(), only=None) -> Case:
    """All 64 modules in one spelling, of one kind or of several in turns."""
    kinds = kind if isinstance(kind, (list, tuple)) else (kind,)
    g = generator(seed + 1) if general else None
    tensors, expected = {}, {}
    for i, (module, (a, b)) in enumerate(person(seed).items()):
        if only is not None and not only(module):
            continue
        make = kinds[i % len(kinds)]
        parts, update = make(a, b, g, *([module] if hasattr(make, "of_module") else ()))
        for part in drop:
            parts.pop(part, None)
        tensors |= {spell(module, part): t.contiguous() for part, t in parts.items()}
        expected[module] = update
    return Case(tensors, expected)


def stated(case: Case, factor: float, keep: bool = False, **changes) -> Case:
    """A file whose modules say no alpha, so that something else gives its scale; or the same update by it."""
    tensors = {k: t for k, t in case.tensors.items() if not k.endswith(".alpha")}
    if keep:
        tensors = {k: t / factor if "lora_B" in k else t for k, t in tensors.items()}
        factor = 1.0
    updates = {n: u * factor for n, u in case.expected.items()}
    return Case(tensors, updates, **{"host_loads": False, **changes})


def with_convolutions(case: Case, spell) -> Case:
    """3 x 3 convolutions and whatever else trainers put beside attention: outside of every layout here."""
    g = generator(9)
    more = {
        spell(CONV, "down"): torch.randn(2, 32, 3, 3, generator=g),
        spell(CONV, "up"): torch.randn(32, 2, 1, 1, generator=g),
        spell(CONV, "alpha"): torch.tensor(1.0),
        "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.ones(1, 3),
    }
    return Case({**case.tensors, **more}, case.expected, case.metadata)


def cases(general: bool = True) -> dict[str, Case]:
    """Every file that comes in, by name."""

    def of(spell, kind=low_rank, **options) -> Case:
        return build(spell, kind, general=general, **options)

    a3 = 2.0 / 3 if general else ALPHA  # the scale inside `low_rank`
    found = {
        "kohya": of(kohya),
        "kohya with LDM names": of(kohya_ldm),
        "kohya, PEFT's matrices": of(kohya_peft),
        "LoCon": with_convolutions(of(kohya), kohya),
        "the host's trainer": of(trainer),
        "the host's trainer, biases too": of(trainer),
        "the host's full difference": of(trainer, difference),
        "OneTrainer": of(onetrainer),
        "older diffusers": of(processor),
        "older diffusers, PEFT's matrices": of(processor_peft),
        "older diffusers, linear layers": of(linear_layer),
        "LyCORIS LoRA": of(lycoris),
        "LoHa": of(kohya, loha),
        "LoHa of a high rank": of(kohya, loha_of_high_rank),
        "LoKr": of(lycoris, lokr),
        "LoKr of two pairs": of(kohya, lokr_of_pairs),
        "LoKr of whole matrices": of(kohya, lokr_whole),
        "several kinds": of(kohya, (low_rank, loha, lokr, difference)),
        "DoRA by rows": of(kohya, dora("out")),
        "DoRA by columns": of(kohya, dora("in")),
        "DoRA of PEFT": of(diffusers, dora("lora_magnitude_vector")),
        "DoRA of ai-toolkit": of(diffusers, dora("magnitude")),
    }
    bias = "diffusion_model.input_blocks.1.0.in_layers.2.diff_b"
    found["the host's trainer, biases too"].tensors[bias] = torch.ones(32)
    for name in ("OneTrainer", "DoRA of PEFT", "DoRA of ai-toolkit"):
        found[name].host_loads = False
    for name in found:
        found[name].needs_base = name.startswith("DoRA")
    plain = build(peft, low_rank, general=general)
    by_rank = 1 / a3  # B A itself
    config = {"peft_type": "LORA", "r": 3 if general else 1, "lora_alpha": 6.0}
    root = 3**0.5 if general else 1.0
    rank = 3 if general else 1
    adapter = "adapter_model.safetensors"
    some = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    keep = not general
    patterned = {**config, "alpha_pattern": {some: 12.0}}
    pattern = stated(plain, by_rank * 6 / rank, keep, config=patterned, name=adapter)
    if general:
        pattern.expected[some] = pattern.expected[some] * 2
    else:
        pattern.tensors[peft(some, "up")] = pattern.tensors[peft(some, "up")] / 2
    found |= {
        "PEFT": stated(plain, by_rank * 6 / rank, keep, config=config, name=adapter),
        "PEFT, rank-stabilised": stated(
            plain, by_rank * 6 / root, keep, config={**config, "use_rslora": True}, name=adapter
        ),
        "PEFT with an alpha pattern": pattern,
        "PEFT with an adapter's name": stated(
            of(peft_named), by_rank * 6 / rank, keep, config=config, name=adapter
        ),
        "PEFT without its configuration": stated(plain, by_rank, keep, name="other.safetensors"),
        "PEFT, wrapped": stated(of(peft_wrapped), by_rank, keep, name="other.safetensors"),
        "PEFT as .bin": stated(
            plain, by_rank * 6 / rank, keep, config=config, name="adapter_model.bin"
        ),
        "diffusers": stated(of(diffusers), by_rank, keep),
        "diffusers with metadata": stated(
            of(diffusers),
            by_rank * 6 / root,
            keep,
            metadata={
                "lora_adapter_metadata": json.dumps(
                    {"unet.r": rank, "unet.lora_alpha": 6.0, "unet.use_rslora": True}
                )
            },
        ),
        "diffusers, compiled": stated(of(compiled), by_rank, keep),
    }
    for dtype, exact in ((torch.float16, 2e-3), (torch.bfloat16, 2e-2), (torch.float8_e4m3fn, 0.2)):
        case = of(kohya)
        tensors = {k: t if k.endswith("alpha") else t.to(dtype) for k, t in case.tensors.items()}
        name = str(dtype).removeprefix("torch.")
        found[f"kohya in {name}"] = Case(tensors, case.expected, exact=exact)
    found["kohya as .pt"] = Case(of(kohya).tensors, of(kohya).expected, name="lora.pt")
    return found


def refused() -> dict[str, tuple[Case, str]]:
    """Files that are refused, and the words that say why."""
    kinds = {
        "OFT": ({"oft_blocks": torch.zeros(4, 8, 8)}, "OFT"),
        "BOFT": ({"oft_blocks": torch.zeros(2, 4, 8, 8)}, "OFT"),
        "(IA)^3": ({"weight": torch.ones(8), "on_input": torch.ones(1)}, "in one file|base model"),
        "GLoRA": ({f"{x}{i}.weight": torch.ones(2, 2) for x in "ab" for i in (1, 2)}, "GLoRA"),
        "a set weight": ({"set_weight": torch.ones(4, 4)}, "replaces the base model's"),
        "a scalar": ({"down": torch.ones(1, 4), "up": torch.ones(4, 1), "scalar": torch.ones(1)}, "scalar|not known"),
        "two kinds": ({"down": torch.ones(1, 4), "up": torch.ones(4, 1), "diff": torch.ones(4, 4)}, "only one of them"),
    }  # fmt: skip
    found = {}
    for name, (parts, words) in kinds.items():
        case = build(kohya, low_rank)
        module = LAYOUT.modules[7].name
        rest = {k: t for k, t in case.tensors.items() if not k.startswith(kohya(module, ""))}
        rest |= {kohya(module, part): t for part, t in parts.items()}
        found[name] = Case(rest, {}), words
    return found


def write(case: Case, folder: Path) -> Path:
    """The file of a case, with its configuration beside it."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / case.name
    if path.suffix == ".safetensors":
        save_file(case.tensors, path, metadata=case.metadata or None)
    else:
        torch.save({"state_dict": case.tensors}, path)
    if case.config is not None:
        (folder / "adapter_config.json").write_text(json.dumps(case.config), encoding="utf-8")
    return path
