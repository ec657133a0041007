"""The official files: what comes out is what their own formula says, at the true size."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from w2wpp import SD15, Space, encode_lora, load_identity, load_space, save_lora
from w2wpp.errors import ConfigError
from w2wpp.imports.w2w import open_w2w
from w2wpp.imports.w2w_space import w2w_basis, w2w_directions

from .conftest import PEOPLE, K, dimensions, generator

ROOT = Path(__file__).resolve().parents[2]


def official_vector(official, k):
    """w = (k V^T) * std + mean, as the official code writes it."""
    v = official["V.pt"][:, : k.shape[1]]
    return (k @ v.T) * official["std.pt"] + official["mean.pt"]


def test_the_space_says_what_the_official_formula_says(run, folder, official):
    code, result, _ = run("import-w2w", folder, "-o", "space.safetensors")
    assert code == 0 and (result["components"], result["parameters"]) == (K, 99_648)
    assert result["negative_stds"] == 2
    space = load_space("space.safetensors")
    assert "non-commercial, academic" in space.licence and space.trigger_prompt == "sks person"
    k = official["proj_1000pc.pt"][:4]
    torch.save(k, "w2wmodel.pt")
    code, result, _ = run(
        "import-identity", "w2wmodel.pt", "--space", "space.safetensors", "-o", "id.safetensors"
    )
    assert code == 0 and (result["count"], result["energy_beyond_the_space"]) == (4, 0)
    identity, expected = load_identity("id.safetensors"), official_vector(official, k)
    # V in half precision: 3e-4 of a std
    torch.testing.assert_close(identity.vectors(space), expected, atol=2e-4, rtol=0)
    back = space.encode(expected).mean
    torch.testing.assert_close(back, identity.z, atol=5e-3, rtol=0)


def test_the_fingerprint_written_is_the_spaces_own(run, folder):
    _, result, _ = run("import-w2w", folder, "-o", "space.safetensors")
    space = load_space("space.safetensors")
    assert space.fingerprint == result["fingerprint"]
    space.codec.materialise()
    parts = (space.layout, space.basis, space.codec, space.prior_mean, space.prior_std)
    assert Space(*parts).fingerprint == result["fingerprint"]
    assert sorted(p.name for p in Path().iterdir()) == ["space.safetensors", "w2w"]


def test_the_prior_is_that_of_the_real_identities(run, folder, official):
    _, result, _ = run("import-w2w", folder, "-o", "space.safetensors")
    assert f"{PEOPLE} real identities" in result["prior"]
    space, k = load_space("space.safetensors"), official["proj_1000pc.pt"]
    z = space.encode(official_vector(official, k)).mean
    torch.testing.assert_close(z.mean(0), torch.zeros(K), atol=2e-3, rtol=0)
    torch.testing.assert_close(z.std(0), torch.ones(K), atol=2e-3, rtol=0)
    (folder / "proj_1000pc.pt").unlink()
    _, result, _ = run("import-w2w", folder, "-o", "assumed.safetensors")
    assert result["prior"].startswith("assumed: proj_1000pc.pt was not there")
    scale = load_space("assumed.safetensors").basis.singular_values
    assert float(scale.square().sum()) == pytest.approx(99_648, rel=1e-4)


def test_components_can_be_cut_and_coefficients_may_be_fewer(run, folder, official):
    run("import-w2w", folder, "--components", 4, "-o", "four.safetensors")
    assert load_space("four.safetensors").latent_size == 4
    torch.save(official["proj_1000pc.pt"][:, :3].clone(), folder / "proj_1000pc.pt")
    _, result, _ = run("import-w2w", folder, "-o", "space.safetensors")
    assert "beyond component 3 the variance is assumed" in result["prior"]
    scale = load_space("space.safetensors").basis.singular_values
    assert scale[5] / scale[2] == pytest.approx((3 / 6) ** 0.5, rel=1e-3)
    torch.save(official["proj_1000pc.pt"][:1], "w2wmodel.pt")
    arguments = ("import-identity", "w2wmodel.pt", "--space", "four.safetensors", "-o", "id")
    code, result, _ = run(*arguments)
    assert code == 0 and 0 < result["energy_beyond_the_space"] < 0.1


@pytest.mark.parametrize("spelling", ["peft", "adapter", "kohya", "slashes", "run together"])
def test_any_spelling_of_the_dimensions(folder, spelling):
    torch.save(dimensions(spelling), folder / "weight_dimensions.pt")
    assert open_w2w(folder).order is None


def test_fewer_components_need_no_second_opening(folder):
    source = open_w2w(folder)
    for k in (1, 3, source.known):
        few, again = source.first(k), open_w2w(folder, components=k)
        assert few.v is source.v and few.coefficients is source.coefficients
        assert few.prior == again.prior and few.components == k
        torch.testing.assert_close(few.scale, again.scale)
        torch.testing.assert_close(few.center, again.center)
    for k in (0, source.v.shape[1] + 1):
        with pytest.raises(ConfigError, match="name a number from 1 to"):
            source.first(k)


def test_names_that_say_nothing_are_refused(run, folder):
    """Sizes alone do not tell to_q from to_v."""
    table = dimensions("own")
    torch.save(table, folder / "weight_dimensions.pt")
    code, _, err = run("import-w2w", folder, "-o", "space.safetensors")
    assert code == 1 and "do not say which weight each is" in err and "remove" in err
    (folder / "weight_dimensions.pt").unlink()
    assert open_w2w(folder).order is None


def test_odd_spellings_in_another_order_are_not_taken_by_their_sizes(folder, official):
    """to_q and to_v swapped, in a spelling of nobody's."""
    table = dimensions("slashes")
    keys = [k.replace("to_q", "?").replace("to_v", "to_q").replace("?", "to_v") for k in table]
    swapped = {key: table[key] for key in keys}
    torch.save(swapped, folder / "weight_dimensions.pt")
    order = open_w2w(folder).order
    assert order is not None
    places = dict(zip(table, _starts(table)))
    for key, place in zip(swapped, _starts(swapped)):
        assert int(order[places[key]]) == place


def _starts(table):
    """Where each weight of a table begins."""
    return torch.tensor([0, *(shape[0] for shape, _ in table.values())]).cumsum(0).tolist()[:-1]


def test_coefficients_may_be_flat_and_weights_raw(run, folder, official):
    run("import-w2w", folder, "-o", "space.safetensors")
    space = load_space("space.safetensors")
    k = official["proj_1000pc.pt"][:1]
    torch.save(k[0], "flat.pt")
    torch.save(official_vector(official, k), "raw.pt")
    found = {}
    for name, kind in (("flat", "coefficients"), ("raw", "raw weights")):
        arguments = ("import-identity", f"{name}.pt", "--space", "space.safetensors", "-o", name)
        code, result, _ = run(*arguments)
        assert code == 0 and result["numbers"] == kind
        found[name] = load_identity(name).z
    torch.testing.assert_close(found["flat"], found["raw"], atol=5e-3, rtol=0)
    torch.testing.assert_close(found["raw"], space.encode(official_vector(official, k)).mean)
    torch.save(torch.ones(1, 99_000), "odd.pt")
    code, _, err = run("import-identity", "odd.pt", "--space", "space.safetensors", "-o", "x")
    assert code == 1 and "99,000 numbers per identity" in err


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_any_storage(folder, official, dtype):
    for name in ("mean.pt", "std.pt", "V.pt", "proj_1000pc.pt"):
        value = official[name]
        if dtype == torch.float8_e4m3fn and name == "V.pt":
            continue  # columns of such numbers are no longer of unit length
        torch.save(value.to(dtype), folder / name)
    source = open_w2w(folder)
    torch.testing.assert_close(source.mean, official["mean.pt"].to(dtype).float())
    torch.testing.assert_close(
        torch.cat(list(source.chunks())), official["V.pt"].T.half(), atol=1e-3, rtol=0
    )


def test_another_order_is_undone(folder, official):
    """Files whose modules stand in reverse give the same basis."""
    table = dict(reversed(dimensions("kohya").items()))
    ends = torch.tensor([shape[0] for shape, _ in dimensions("kohya").values()]).cumsum(0)
    starts = torch.cat([torch.zeros(1).long(), ends[:-1]])
    order = torch.cat([torch.arange(a, b) for a, b in zip(starts, ends)][::-1])
    torch.save(table, folder / "weight_dimensions.pt")
    for name in ("mean.pt", "std.pt", "V.pt"):
        torch.save(official[name][order], folder / name)
    basis = w2w_basis(open_w2w(folder))
    torch.testing.assert_close(basis.mean, official["mean.pt"])
    torch.testing.assert_close(basis.std, official["std.pt"])
    assert torch.equal(basis.components, official["V.pt"].T.half())


def test_labels_give_directions(run, folder, official):
    """Two correlated attributes: the de-biased direction of one leaves the other alone."""
    g = generator(5)
    c = official["proj_1000pc.pt"]
    c = (c - c.mean(0)) / c.std(0)
    labels = torch.stack([c[:, 0] + 0.1 * c[:, 3], 0.7 * c[:, 0] + 0.7 * c[:, 1]], 1)
    labels += 0.05 * torch.randn(labels.shape, generator=g)
    lines = [f"{i},{a},{b}" for i, (a, b) in enumerate(labels.tolist())]
    Path("labels.csv").write_text("\n".join(["name,Age,Smile", *lines]), encoding="utf-8")
    code, result, _ = run("import-w2w", folder, "--labels", "labels.csv", "-o", "s.safetensors")
    assert code == 0 and result["directions"] == ["Age", "Smile"]
    space = load_space("s.safetensors")
    std = labels.std(0)
    age = space.directions["Age"]
    assert float(age[0] + 0.1 * age[3]) == pytest.approx(float(std[0]), rel=0.1)
    assert abs(float(0.7 * age[0] + 0.7 * age[1])) < 0.1
    naive = w2w_directions(open_w2w(folder), "labels.csv", against=[]).vectors[0]
    assert abs(float(0.7 * naive[0] + 0.7 * naive[1])) > 0.4
    code, _, err = run("import-w2w", folder, "--labels", "identity_df.pt", "-o", "x.safetensors")
    assert code == 1 and "pandas.read_pickle('identity_df.pt').to_csv(" in err
    Path("labels.csv").write_text("\n".join(["name,Age,Smile", *lines[1:]]), encoding="utf-8")
    code, _, err = run("import-w2w", folder, "--labels", "labels.csv", "-o", "x.safetensors")
    assert code == 1 and "49 lines, proj_1000pc.pt 50 rows" in err
    assert not Path("x.safetensors").exists()


def test_a_folder_is_enough_to_train_on(run, folder):
    train = ("train", folder, "--latent", 3, "--epochs", 3, "--hidden", 8)
    code, result, _ = run(*train, "--validation", 0, "-o", "vae.safetensors")
    assert code == 0 and result["training"]["codec"]["name"] == "vae-skip"
    space = load_space("vae.safetensors")
    assert (space.latent_size, space.basis.n_components, space.layout) == (3, K, SD15)
    assert "academic" in space.licence and space.trigger_prompt == "sks person"
    (folder / "proj_1000pc.pt").unlink()
    code, _, err = run(*train, "-o", "x.safetensors")
    assert code == 1 and "has no proj_1000pc.pt" in err


def test_a_folder_holds_people_out_by_identity_where_a_table_says_who_is_who(run, folder):
    train = ("train", folder, "--latent", 3, "--epochs", 3, "--hidden", 8, "--validation", 0)
    n = len(torch.load(folder / "proj_1000pc.pt"))
    code, result, err = run(*train, "--heldout", 0.25, "-o", "rows.safetensors")
    assert code == 0 and "rows are all that is known" in err
    training = result["training"]
    assert training["rows"]["heldout"] == round(0.25 * n)
    assert (
        set(training["weight_r2"]) == set(training["weight_r2_of_pca"]) == {"training", "heldout"}
    )
    with open("people.csv", "w") as f:
        f.write("folder,smile,identity\n" + "".join(f"{i},1,{i // 3}\n" for i in range(n)))
    code, result, err = run(
        *train, "--heldout", 0.25, "--labels", "people.csv", "-o", "p.safetensors"
    )
    assert code == 0 and "rows are all" not in err
    persons = -(-n // 3)
    assert abs(result["training"]["rows"]["heldout"] - 3 * round(0.25 * persons)) <= 2
    facts = load_space("p.safetensors").provenance["data"]["heldout"]
    assert facts["by"] == "identity"
    code, _, err = run(*train, "--heldout", 0, "-o", "all.safetensors")
    assert code == 0


def test_the_diffusers_export_is_encoded(run, folder, official, tmp_path):
    run("import-w2w", folder, "-o", "space.safetensors")
    space = load_space("space.safetensors")
    w = official_vector(official, official["proj_1000pc.pt"][:1])
    exported = tmp_path / "export" / "unet" / "adapter_model.safetensors"
    save_lora(SD15.unpack(w[0]), exported, format="peft", alpha=27.0)
    rename(exported, ".weight", ".identity1.weight")
    code, result, _ = run(
        "import-identity", "export", "--space", "space.safetensors", "-o", "id.safetensors"
    )
    assert code == 0 and result["update_error"] < 1e-3 and result["gauge"] == "kept"
    z = load_identity("id.safetensors").z
    torch.testing.assert_close(z, space.encode(w).mean)
    assert torch.equal(encode_lora(space, tmp_path / "export")[0].z, z)


def rename(path, old, new):
    from w2wpp.files.container import open_container, write_container

    file = open_container(path)
    tensors = {name.replace(old, new): file.read(name) for name in file.entries}
    write_container(path, tensors)


BAD = {
    "pickled": (lambda f: torch.save({"a": Path("x")}, f / "mean.pt"), "pickled Python objects"),
    "missing": (lambda f: (f / "V.pt").unlink(), "V.pt: no such file"),
    "size": (lambda f: torch.save(torch.ones(99_647), f / "std.pt"), "std.pt has 99,647 numbers"),
    "truncated": (lambda f: cut(f / "V.pt"), "truncated or no PyTorch file"),
    "nan": (
        lambda f: torch.save(torch.full((99_648,), torch.nan), f / "mean.pt"),
        "NaN or infinite",
    ),
    "std": (lambda f: torch.save(torch.zeros(99_648), f / "std.pt"), "zero everywhere"),
    "nan in V": (lambda f: spoil(f / "V.pt", float("nan")), "NaN or infinite"),
    "lengths": (lambda f: spoil(f / "V.pt", 3.0), "no orthonormal basis"),
    "shape": (lambda f: torch.save(torch.ones(99_648), f / "V.pt"), "in 2 dimensions"),
    "coefficients": (lambda f: spoil(f / "proj_1000pc.pt", float("inf")), "NaN or infinite"),
    "dimensions": (
        lambda f: torch.save({"a": ((3,), (1, 3))}, f / "weight_dimensions.pt"),
        "1 weights of 3",
    ),
    "table": (
        lambda f: torch.save(torch.ones(3), f / "weight_dimensions.pt"),
        "a table of weights",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_one_sentence_and_nothing_is_written(run, folder, case):
    damage, message = BAD[case]
    damage(folder)
    code, result, err = run("import-w2w", folder, "-o", "out/space.safetensors")
    assert code == 1 and result is None
    assert err.startswith("w2wpp: ") and err.count("\n") == 1 and message in err, err
    assert not Path("out").exists() or not list(Path("out").iterdir())


def test_bad_settings_and_identities(run, folder, tmp_path):
    cases = [
        (("import-w2w", folder, "--components", 7, "-o", "x"), "V.pt holds 6 components"),
        (("import-w2w", folder, "--components", 0, "-o", "x"), "whole numbers from 1"),
        (("import-w2w", "nowhere", "-o", "x"), "no such folder"),
    ]
    run("import-w2w", folder, "-o", "space.safetensors")
    torch.save({"z": torch.ones(2)}, "dict.pt")
    torch.save(torch.ones(1, 1, 6), "deep.pt")
    for name in ("dict.pt", "deep.pt", "missing.pt"):
        message = {
            "dict.pt": "holds a dict",
            "deep.pt": "2 dimensions",
            "missing.pt": "no such file",
        }
        arguments = ("import-identity", name, "--space", "space.safetensors", "-o", "x")
        cases.append((arguments, message[name]))
    for arguments, message in cases:
        code, result, err = run(*arguments)
        assert code == 1 and result is None and err.count("\n") == 1 and message in err, err
        assert not Path("x").exists()


def cut(path):
    path.write_bytes(path.read_bytes()[:-1000])


def spoil(path, value):
    t = torch.load(path, weights_only=True)
    t[len(t) // 2, 1] = value
    torch.save(t, path)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from Linux")
def test_memory_does_not_grow_with_the_components(tmp_path):
    """V of 800 components is 319 MB; importing it takes no more than that of 200.

    Buffers are made smaller than either, because up to their size memory does grow.
    """
    script = textwrap.dedent(
        """
        import re, sys
        from w2wpp.cli import main
        from w2wpp import spacefile
        from w2wpp.files import torchfile
        from w2wpp.imports import w2w
        if sys.argv[2] == "small":
            torchfile.MAPPED_BYTES = spacefile.COPY_BYTES = 8 * 2**20
            w2w.COLUMNS = 50
        assert main(["import-w2w", "w2w", "--components", sys.argv[1], "-o", "s.safetensors"]) == 0
        # The kernel's own mark: that of getrusage starts with the memory of the process that started this one.
        peak = re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]
        print(int(peak) // 1024, file=sys.stderr)
        """
    )
    folder = tmp_path / "w2w"
    folder.mkdir()
    p = SD15.size
    torch.save(torch.zeros(p), folder / "mean.pt")
    torch.save(torch.ones(p), folder / "std.pt")
    v = torch.zeros(p, 800)
    v[torch.arange(800), torch.arange(800)] = 1
    torch.save(v, folder / "V.pt")
    del v
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    peaks = {}
    for k, buffers in (("200", "small"), ("800", "small"), ("800", "usual")):
        done = subprocess.run(
            [sys.executable, "-c", script, k, buffers],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        peaks[k, buffers] = int(done.stderr.split()[-1])
    assert peaks["800", "usual"] < 1000, peaks
    assert peaks["800", "small"] < peaks["200", "small"] + 40, peaks
