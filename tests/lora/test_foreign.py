"""The matrix: kinds of files x (what they mean, encoded, in a data set, exported again), by the formulas."""

import importlib.util
from pathlib import Path

import pytest
import torch

from w2wpp import (
    FormatError,
    LayoutMismatch,
    Space,
    W2WError,
    build_codec,
    encode_lora,
    load_lora,
    lora_of_tensors,
    save_lora,
    save_space,
)
from w2wpp.basis import Basis
from w2wpp.lora.match import match_modules
from w2wpp.lora.products import Product
from w2wpp.training.dataset import load_dataset

spec = importlib.util.spec_from_file_location("foreign", Path(__file__).with_name("foreign.py"))
foreign = importlib.util.module_from_spec(spec)
__import__("sys").modules["foreign"] = foreign
spec.loader.exec_module(foreign)

GENERAL, PERSON = foreign.cases(), foreign.cases(general=False)
REFUSED = foreign.refused()
LAYOUT = foreign.LAYOUT


def dense(delta):
    whole = delta.b.double() @ delta.a.double() if isinstance(delta, Product) else delta.d.double()
    return whole


def off(found, expected):
    missed = sum(float((found[n] - t).square().sum()) for n, t in expected.items())
    return (missed / sum(float(t.square().sum()) for t in expected.values())) ** 0.5


def base(case):
    return foreign.base_weight if case.needs_base else None


@pytest.fixture(scope="module")
def space():
    """One in which the person of the cases is somebody: the mean is another, and six directions."""
    g = foreign.generator(5)
    k, p = 6, LAYOUT.size
    vectors = [pack(foreign.person(seed)) for seed in range(k + 1)]
    mean = 0.5 * torch.randn(p, generator=g) * vectors[1].abs().mean()
    rows = torch.linalg.qr(torch.stack([v - mean for v in vectors[:k]]).T).Q.T
    basis = Basis(mean, torch.ones(p), rows.contiguous(), torch.full((k,), 10.0))
    codec = build_codec({"name": "pca", "coefficient_size": k, "latent_size": k})
    return Space(LAYOUT, basis, codec, torch.zeros(k), torch.ones(k))


def pack(lora):
    return LAYOUT.pack({n: (a, b / LAYOUT.scale) for n, (a, b) in lora.items()})


@pytest.mark.parametrize("name", GENERAL)
def test_every_kind_means_what_its_formula_says(tmp_path, name):
    case = GENERAL[name]
    file = load_lora(foreign.write(case, tmp_path))
    match = match_modules(file, LAYOUT, base=base(case))
    assert not match.missing and match.deltas.keys() == case.expected.keys()
    assert off({n: dense(d) for n, d in match.deltas.items()}, case.expected) < 5 * case.exact
    squares = sum(float(t.square().sum()) for t in case.expected.values())
    assert match.square() == pytest.approx(squares, rel=10 * case.exact)


@pytest.mark.parametrize("name", GENERAL)
def test_the_best_of_a_rank_is_that_of_the_whole_matrix(tmp_path, name):
    case = GENERAL[name]
    match = match_modules(load_lora(foreign.write(case, tmp_path)), LAYOUT, base=base(case))
    for module in list(case.expected)[::9]:
        s = torch.linalg.svdvals(dense(match.deltas[module]))
        a, b, lost = match.deltas[module].best(1)
        assert float((b @ a).norm()) == pytest.approx(float(s[0]), rel=1e-5)
        assert lost == pytest.approx(float(s[1:].square().sum()), rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("name", PERSON)
def test_encoding_finds_the_person(tmp_path, space, name):
    case = PERSON[name]
    z = space.encode(pack(foreign.person())[None]).mean
    path = foreign.write(case, tmp_path)
    found, report = encode_lora(space, path, base=base(case))
    assert report.missing_modules == () and report.rank_energy_lost < max(1e-6, case.exact**2)
    torch.testing.assert_close(found.z, z, atol=max(2e-3, 2 * case.exact), rtol=0)
    assert report.update_error < max(2e-3, 2 * case.exact)
    assert ("a scale of 1 was assumed" in str(report)) == (name == "PEFT without its configuration")


@pytest.mark.parametrize("name", [n for n, case in PERSON.items() if not case.needs_base])
def test_data_sets_and_exports_keep_the_update(tmp_path, run, space, name):
    case = PERSON[name]
    foreign.write(case, tmp_path / "in" / "anna")
    save_space(space, "space.safetensors")
    arguments = ("--layout", "space.safetensors", "--gauge", "space.safetensors", "--heldout", 0)
    code, result, err = run("dataset", "in", *arguments, "-o", "data")
    assert code == 0, err
    data = load_dataset("data")
    lora = LAYOUT.unpack(data.vectors()[0])
    found = {n: LAYOUT.scale * (b @ a).double() for n, (a, b) in lora.items()}
    assert off(found, case.expected) < max(1e-5, 2 * case.exact)
    assert result["kept_energy"]["least"] > 0.999
    save_lora(lora, "again.safetensors", alpha=LAYOUT.alpha)
    again = match_modules(load_lora("again.safetensors"), LAYOUT)
    assert off({n: dense(d) for n, d in again.deltas.items()}, case.expected) < max(
        1e-5, 2 * case.exact
    )


@pytest.mark.parametrize("name", REFUSED)
def test_other_kinds_are_refused_by_name(tmp_path, space, name):
    case, words = REFUSED[name]
    with pytest.raises(FormatError, match=words):
        encode_lora(space, foreign.write(case, tmp_path))


@pytest.mark.parametrize("name", [n for n, case in GENERAL.items() if case.needs_base])
def test_dora_without_the_base_model_is_refused_by_name(tmp_path, space, name):
    with pytest.raises(FormatError, match="Connect that MODEL"):
        encode_lora(space, foreign.write(GENERAL[name], tmp_path))


def test_rows_say_what_they_kept_and_poor_ones_are_refused(tmp_path, run, space):
    """Rank 3 into rank 1, and a file with half of the modules."""
    foreign.write(GENERAL["kohya"], tmp_path / "in" / "a")
    half = set(list(foreign.SHAPES)[::2])
    foreign.write(
        foreign.build(foreign.kohya, foreign.low_rank, general=False, only=half.__contains__),
        tmp_path / "in" / "b",
    )
    save_space(space, "space.safetensors")
    arguments = (
        "dataset",
        "in",
        "--layout",
        "space.safetensors",
        "--gauge",
        "first",
        "--heldout",
        0,
        "-o",
        "data",
    )
    code, _, err = run(*arguments, "--max-missing", 1)
    assert (
        code == 1
        and "1 of 2 LoRAs keep less than 50% of their energy" in err
        and "--min-energy 0" in err
    )
    code, _, err = run(*arguments, "--min-energy", 0)
    assert code == 1 and "1 of 2 LoRAs lack more than 25% of the layout's modules" in err
    code, result, err = run(*arguments, "--min-energy", 0, "--max-missing", 1)
    assert code == 0, err
    kept = load_dataset("data").source.read("vectors.kept_energy")
    assert 0.3 < float(kept[0]) < 0.5 and float(kept[1]) == pytest.approx(1, abs=1e-5)
    assert result["missing_modules"]["most"] == 0.5 and "in/a" in result["worst"][0]["file"]


def test_an_empty_lora_is_no_row(tmp_path, run, space):
    case = PERSON["kohya"]
    empty = {k: t if k.endswith("alpha") else 0 * t for k, t in case.tensors.items()}
    foreign.write(case, tmp_path / "in" / "a")
    foreign.write(foreign.Case(empty, {}), tmp_path / "in" / "b")
    save_space(space, "space.safetensors")
    arguments = ("dataset", "in", "--layout", "space.safetensors", "--heldout", 0, "-o", "data")
    code, _, err = run(*arguments)
    assert code == 1 and "in/b" in err and "changes nothing" in err


def test_modules_that_the_first_lacks_take_their_sign_from_the_next(tmp_path, run, space):
    lora = foreign.person()
    names = list(lora)
    for folder, sign, chosen in (("a", 1, names[:40]), ("b", 1, names), ("c", -1, names)):
        case = foreign.Case({}, {})
        for n in chosen:
            a, b = lora[n]
            case.tensors |= {foreign.kohya(n, "down"): sign * a, foreign.kohya(n, "up"): sign * b}
        foreign.write(case, tmp_path / "in" / folder)
    save_space(space, "space.safetensors")
    code, _, err = run(
        "dataset",
        "in",
        "--layout",
        "space.safetensors",
        "--gauge",
        "first",
        "--max-missing",
        1,
        "--heldout",
        0,
        "-o",
        "data",
    )
    assert code == 0, err
    w = load_dataset("data").vectors()
    torch.testing.assert_close(w[1], w[2])


@pytest.mark.parametrize("layout", ["a/unet", "a/checkpoint-500/unet"])
def test_official_training_folders_name_the_person(tmp_path, run, space, layout):
    for person in ("17", "18"):
        case = PERSON["PEFT"]
        foreign.write(case, tmp_path / "in" / layout.replace("a", person, 1))
    save_space(space, "space.safetensors")
    Path("labels.csv").write_text("person,age\n18,1\n17,-1\n", encoding="utf-8")
    arguments = ("dataset", "in", "--layout", "space.safetensors", "--heldout", 0, "-o", "data")
    code, result, err = run(*arguments, "--labels", "labels.csv")
    assert code == 0, err
    data = load_dataset("data")
    assert result["persons"] == 2 and data.labels.tolist() == [[-1.0], [1.0]]
    text = Path("data").read_bytes()[:20000]
    assert b"checkpoint" not in text and b'"17"' not in text and b"adapter_model" not in text


def sd15_file(width, where, parts=("attn1.to_q",), context=768):
    names = {"down_blocks.1": 640, "down_blocks.2": 1280, "mid_block": 1280, "down_blocks.0": 320}
    stem = f"lora_unet_{where.replace('.', '_')}_attentions_0_transformer_blocks_0_"
    tensors = {}
    for part in parts:
        size_in = context if part in ("attn2.to_k", "attn2.to_v") else names[where]
        key = stem + part.replace(".", "_")
        tensors[f"{key}.lora_down.weight"] = torch.randn(1, size_in)
        tensors[f"{key}.lora_up.weight"] = torch.randn(width or names[where], 1)
    return tensors


FAMILIES = {
    "SD 1": (sd15_file(0, "down_blocks.1", ("attn1.to_q", "attn2.to_v")), {}, ""),
    "SD 1 by its metadata": (sd15_file(0, "mid_block"), {"ss_base_model_version": "sd_v1"}, ""),
    "SD 2": (sd15_file(0, "mid_block", ("attn2.to_v",), 1024), {}, "Stable Diffusion 2"),
    "SD 2 by its metadata": (
        sd15_file(0, "down_blocks.0"),
        {"ss_v2": "True"},
        "Stable Diffusion 2",
    ),
    "SD 2 or 1": (sd15_file(0, "down_blocks.0"), {}, "Stable Diffusion 1 and 2 apart"),
    "SDXL": (sd15_file(0, "down_blocks.2", ("attn2.to_v",), 2048), {}, "SDXL"),
    "SDXL by its metadata": (
        sd15_file(0, "mid_block"),
        {"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"},
        "SDXL",
    ),
    "SDXL by its depth": (
        {
            **sd15_file(0, "mid_block"),
            **{
                k.replace("blocks_0_attn", "blocks_3_attn"): t
                for k, t in sd15_file(0, "mid_block").items()
            },
        },
        {},
        "SDXL",
    ),
    "SDXL by its second text encoder": (
        {
            **sd15_file(0, "mid_block"),
            "lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.ones(1, 3),
        },
        {},
        "SDXL",
    ),
    "any": (sd15_file(0, "down_blocks.1"), {}, "does not tell which base model"),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_families_are_told_by_what_is_there_and_what_is_missing(tmp_path, name):
    from w2wpp import SD15

    tensors, metadata, words = FAMILIES[name]
    path = foreign.write(foreign.Case(tensors, {}, metadata), tmp_path)
    if not words:
        assert match_modules(load_lora(path), SD15).deltas
        return
    with pytest.raises(LayoutMismatch, match=words):
        match_modules(load_lora(path), SD15)
    if "does not tell" in words or "apart" in words:
        assert match_modules(load_lora(path), SD15, assume_family=True).deltas


def mutant(case, g):
    """A case with some of its tensors reshaped, retyped, dropped, renamed or spoilt."""
    tensors = dict(list(case.tensors.items())[: 40 + pick(g, 40)])
    for _ in range(1 + pick(g, 3)):
        key = list(tensors)[pick(g, len(tensors))]
        t = tensors[key]
        shape = [pick(g, 5) for _ in range(pick(g, 5))]
        change = pick(g, 8)
        if change == 0:
            del tensors[key]
        elif change == 1:
            tensors[key] = torch.randn(shape, generator=g)
        elif change == 2:
            tensors[key] = t.flatten()
        elif change == 3:
            tensors[key] = t.to(torch.int8 if pick(g, 2) else torch.float64)
        elif change == 4:
            tensors[key] = t.float() * torch.inf
        elif change == 5:
            tensors[key.rsplit(".", 1)[0] + "." + PARTS[pick(g, len(PARTS))]] = tensors.pop(key)
        elif change == 6 or not t.numel():
            tensors[key] = t[..., None] if t.ndim < 2 or pick(g, 2) else t.mT.contiguous()
        else:
            tensors[key] = t.reshape(-1)[:1].reshape([1] * pick(g, 4))
        if not tensors:
            break
    return tensors


PARTS = (
    "alpha",
    "diff",
    "dora_scale",
    "hada_w1_a",
    "lokr_w2",
    "lora_mid.weight",
    "magnitude",
    "oft_blocks",
    "scalar",
    "weight",
)


def pick(g, n):
    return int(torch.randint(n, (1,), generator=g))


def test_damaged_files_of_every_kind_end_in_success_or_in_an_error_of_ours(pytestconfig):
    """Headers that fit a safetensors file and no update."""
    g, outcomes = foreign.generator(11), {True: 0, False: 0}
    everything = list(GENERAL.values()) + [case for case, _ in REFUSED.values()]
    for i in range(max(200, pytestconfig.getoption("--mutants", default=0) or 0)):
        tensors = mutant(everything[i % len(everything)], g)
        try:
            file = lora_of_tensors(tensors)
            _ = file.family, file.kinds, file.alphas
            match_modules(file, LAYOUT, base=foreign.base_weight).balanced()
            outcomes[True] += 1
        except W2WError:
            outcomes[False] += 1
    assert min(outcomes.values()) > 10, outcomes
