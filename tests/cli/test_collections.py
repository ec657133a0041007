"""From a folder of LoRAs to a space, samples and LoRA files, on the command line."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from w2wpp import load_identity, load_lora, load_space, save_lora
from w2wpp.lora.delta import Factors, gram
from w2wpp.training.collection_report import cosines


@pytest.fixture
def folder(dataset, tmp_path):
    """Ten LoRAs of rank 2, every other one in another gauge, and a file that is none."""
    g = torch.Generator().manual_seed(0)
    for i, w in enumerate(dataset.vectors()[:20:2]):
        lora = dataset.layout.unpack(w)
        if i % 2:
            m = torch.linalg.qr(torch.randn(2, 2, generator=g))[0]
            lora = {n: (m.T @ a * 2, b @ m / 2) for n, (a, b) in lora.items()}
        save_lora(lora, tmp_path / "loras" / f"{i}.safetensors", alpha=dataset.layout.alpha)
    (tmp_path / "loras" / "note.safetensors").write_text("no LoRA")
    return tmp_path / "loras"


def update(path):
    file = load_lora(path)
    return {n: Factors(a, b, file.alphas[n] / a.shape[0]) for n, (a, b) in file.lora.items()}


def test_from_a_folder_to_new_lora_files(run, folder):
    code, made, told = run(
        "space", folder, "-o", "mine.safetensors", "--rank", 20, "--licence", "mine"
    )
    assert code == 0 and made["files"] == 10 and made["latent_size"] == 9 and made["rank"] == 20
    assert made["did_not_fit"][0][0] == "note" and "writing mine.safetensors" in told
    space = load_space("mine.safetensors")
    assert (space.name, space.licence) == ("mine", "mine")
    assert run("info", "mine.safetensors")[1]["components"] == 9

    code, result, _ = run(
        "sample", "mine.safetensors", "--seed", 3, "-n", 2, "--mixture", "-o", "mix.safetensors"
    )
    assert code == 0 and load_identity("mix.safetensors").provenance["made_by"] == "sample mixtures"
    code, result, _ = run(
        "export", "mix.safetensors", "--space", "mine.safetensors", "-o", "new.safetensors"
    )
    assert code == 0 and result["kept_energy"] == pytest.approx([1.0, 1.0], abs=1e-3)
    shares = load_identity("mix.safetensors").provenance["weights"][0]
    given = [update(folder / f"{i}.safetensors") for i in range(10)]
    expected = sum(
        w * torch.cat([u[n].dense().flatten() for n in sorted(u)]) for w, u in zip(shares, given)
    )
    new = update("new-1.safetensors")
    found = torch.cat([new[n].dense().flatten() for n in sorted(new)])
    torch.testing.assert_close(found, expected, atol=2e-3 * float(expected.abs().max()), rtol=0)

    code, result, _ = run(
        "encode", "mine.safetensors", "new-1.safetensors", "-o", "back.safetensors"
    )
    assert result["loras"]["new-1.safetensors"]["explained"] == pytest.approx(1.0, abs=1e-4)
    z = load_identity("mix.safetensors").z[0]
    torch.testing.assert_close(load_identity("back.safetensors").z[0], z, atol=2e-3, rtol=0)


def test_compare_is_gauge_free_and_agrees_with_the_updates(run, folder):
    code, found, _ = run("compare", folder)
    assert code == 0 and len(found["names"]) == 10 and found["did_not_fit"][0][0] == "note"
    expected = cosines(gram([update(folder / f"{i}.safetensors") for i in range(10)]))
    for i, name in enumerate(found["names"]):
        row = torch.tensor(found["cosines"][name]).double()
        torch.testing.assert_close(row, expected[i], atol=2e-4, rtol=0)
    assert set(found["map"]) == set(found["names"])


def test_text_encoders_apart(run, folder, tmp_path):
    code, _, told = run("space", folder, "-o", "texts.safetensors", "--text-encoders")
    assert code == 1 and "changes no text encoder" in told
    g, key = torch.Generator().manual_seed(0), "lora_te_text_model_encoder_layers_0_mlp_fc1"
    ups, downs = torch.randn(3, 8, 2, generator=g), torch.randn(3, 2, 4, generator=g)
    for i in range(3):
        path = folder / f"{i}.safetensors"
        tensors = {**load_file(path), f"{key}.lora_down.weight": downs[i]}
        save_file({**tensors, f"{key}.lora_up.weight": ups[i].contiguous()}, path)
    code, made, _ = run("space", folder, "-o", "texts.safetensors", "--text-encoders")
    assert code == 0 and (made["files"], made["modules"], len(made["did_not_fit"])) == (3, 1, 8)
    code, found, _ = run("compare", folder, "--text-encoders")
    products = (ups @ downs).flatten(1)
    expected = products[0] @ products[1] / products[0].norm() / products[1].norm()
    assert code == 0 and found["cosines"]["0"][1] == pytest.approx(float(expected), abs=2e-3)


def test_weights_cut_and_names(run, folder):
    common = ("space", folder, "-o", "s.safetensors")
    code, made, _ = run(*common, "--weight", "3=5", "--cut", 1, "--keep-names", "--components", 4)
    assert code == 0 and made["rounding_error"] > 0.01 and made["latent_size"] == 4
    assert load_space("s.safetensors").provenance["members"][3] == "3"
    for wrong, said in (
        (("--weight", "x"), "NAME=W"),
        (("--weight", "nobody=1"), "nobody"),
        (("--weight", "3=nan"), "finite"),
        (("--rank", 0), "rank"),
        (("--cut", 0), "at least 1"),
        (("--components", 99), "9 components"),
    ):
        code, _, told = run(*common, *wrong)
        assert code == 1 and said in told
    assert run("compare", folder / "0.safetensors")[0] == 1
    assert run("space", folder / "nowhere", "-o", "x")[0] == 1


def test_a_vae_on_a_collection_and_identities_in_it(run, folder):
    run("space", folder, "-o", "mine.safetensors", "--rank", 20)
    train = (
        "train",
        "mine.safetensors",
        "--latent",
        4,
        "--epochs",
        30,
        "--hidden",
        8,
        "--validation",
        0,
    )
    code, result, told = run(*train, "-o", "vae.safetensors")
    assert code == 0, told
    space = load_space("vae.safetensors")
    assert space.codec.name == "vae-skip" and space.latent_size == 4
    code, result, _ = run(
        "encode", "vae.safetensors", folder / "3.safetensors", "--residual", "-o", "a.safetensors"
    )
    assert code == 0 and result["loras"]["3.safetensors"]["explained"] == pytest.approx(
        1.0, abs=1e-3
    )
    code, result, _ = run(
        "export", "a.safetensors", "--space", "vae.safetensors", "-o", "back.safetensors"
    )
    assert result["kept_energy"] == [pytest.approx(1.0, abs=1e-3)]
    given, found = update(folder / "3.safetensors"), update("back.safetensors")
    for name, f in given.items():
        scale = float(f.dense().abs().max())
        torch.testing.assert_close(found[name].dense(), f.dense(), atol=3e-3 * scale, rtol=0)
    code, result, _ = run(
        "train", "mine.safetensors", "--codec", "pca", "--latent", 3, "-o", "p.safetensors"
    )
    assert code == 0 and load_space("p.safetensors").latent_size == 3
    code, _, told = run("train", "vae.safetensors", "--codec", "pca", "-o", "q.safetensors")
    assert code == 0  # its basis still holds the LoRAs
