"""Edits and the directions that they follow: units, what de-biasing leaves alone, and what a file keeps."""

import json

import pytest
import torch

from w2wpp import ConfigError, DataError, SpaceMismatch, edit, load_space, save_space
from w2wpp.cli import main
from w2wpp.files.container import open_container, write_container
from w2wpp.spacefile import save_directions
from w2wpp.training.dataset import write_dataset
from w2wpp.training.directions import CHUNK, Moments, fit_directions, fit_from_moments

NAMES = ("age", "smile", "hat")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def people(count=4000):
    """Latents [N, 6] and three attributes read from them; age and smile go together."""
    g = generator(1)
    z = torch.randn(count, 6, generator=g)
    reading = torch.tensor([[2.0, 0, 0, 0, 0, 0], [1.5, 2.0, 0, 0, 0, 0], [0, 0, 0.5, 0.5, 0, 0]])
    labels = z @ reading.T + 0.2 * torch.randn(count, 3, generator=g) + 7
    return z, labels, reading


def test_one_step_is_one_std_of_the_attribute_and_nothing_of_the_others():
    z, labels, reading = people()
    found = fit_directions(z, labels, NAMES)
    effect = found.vectors @ reading.T / labels.std(0)  # [direction, attribute]
    torch.testing.assert_close(effect, torch.eye(3), atol=0.03, rtol=0)
    assert bool((found.r2 > 0.85).all())
    assert found.own[0] == pytest.approx(1 - 0.6**2, abs=0.05)  # cosine of age and smile is 0.6


def test_the_naive_direction_takes_the_others_along():
    z, labels, reading = people()
    found = fit_directions(z, labels, NAMES, debias=False)
    effect = found.vectors @ reading.T / labels.std(0)
    assert effect[0, 0] == pytest.approx(1, abs=0.05)
    assert effect[0, 1] == pytest.approx(0.6, abs=0.05)
    chosen = fit_directions(z, labels, NAMES, against=["hat"])
    torch.testing.assert_close(chosen.vectors[0], found.vectors[0], atol=0.02, rtol=0)


def test_it_is_the_shortest_such_step():
    z, labels, _ = people()
    found = fit_directions(z, labels, NAMES)
    span = torch.linalg.svd(found.vectors, full_matrices=False).Vh
    beta = torch.linalg.lstsq(z - z.mean(0), labels - labels.mean(0)).solution.T
    rest = beta - beta @ span.T @ span  # a shortest step lies in the span of the readings
    assert rest.norm() < 0.02 * beta.norm()


def test_sums_in_parts_are_the_sums_of_all():
    z, labels, _ = people(CHUNK + 100)
    whole = fit_directions(z, labels, NAMES)
    sums = Moments(6, 3)
    for rows in torch.arange(len(z)).split(57):
        sums.add(z[rows], labels[rows])
    parts = fit_from_moments(sums, NAMES)
    torch.testing.assert_close(whole.vectors, parts.vectors)
    torch.testing.assert_close(sums.mean[:6].float(), z.mean(0))


def test_scoring_on_others_is_no_flattery():
    g = generator(2)
    z, labels = torch.randn(30, 20, generator=g), torch.randn(30, 1, generator=g)
    test = torch.randn(500, 20, generator=g), torch.randn(500, 1, generator=g)
    own = fit_directions(z, labels, ["noise"]).r2
    other = fit_directions(z, labels, ["noise"], test=test).r2
    assert own > 0.4 and other < 0


def test_labels_that_cannot_work_are_refused():
    z, labels, _ = people(100)
    same = torch.cat([labels[:, :1], 3 * labels[:, :1] + 1, labels[:, 2:]], 1)
    with pytest.raises(DataError, match="'age' can't be told apart"):
        fit_directions(z, same, NAMES)
    labels[:, 1] = 4
    with pytest.raises(DataError, match="Everybody has the same 'smile'"):
        fit_directions(z, labels, NAMES)
    labels[3, 1] = float("nan")
    with pytest.raises(DataError, match="NaN or infinite"):
        fit_directions(z, labels, NAMES)
    with pytest.raises(DataError, match=r"Got \[100, 6\] and \[100, 3\]"):
        fit_directions(z, labels, NAMES[:2])
    with pytest.raises(ConfigError, match="no labels for 'beard'"):
        fit_directions(*people(50)[:2], NAMES, against=["beard"])


def test_an_edit_moves_along_its_directions(space):
    identity = space.sample(3, generator=generator(3))
    moved = edit(identity, space, {"smile": 1.5})
    torch.testing.assert_close(moved.z, identity.z + 1.5 * space.directions["smile"])
    assert moved.provenance["made_by"] == "edit" and moved.provenance["strengths"] == {"smile": 1.5}
    assert moved.provenance["parents"] == [dict(identity.provenance)]
    back = edit(moved, space, {"smile": -1.5})
    torch.testing.assert_close(back.z, identity.z)
    json.dumps(dict(back.provenance), allow_nan=False)


def test_an_edit_keeps_the_residual_and_refuses_what_it_does_not_know(make_space):
    space = make_space("vae-skip")
    identity = space.sample(1, generator=generator(3))
    rest = torch.randn(1, space.basis.n_components, generator=generator(4))
    own = type(identity)(identity.z, identity.space_fingerprint, rest)
    assert torch.equal(edit(own, space, {"smile": 1.0}).residual, rest)
    with pytest.raises(ConfigError, match="no direction 'beard'; it has smile"):
        edit(identity, space, {"beard": 1.0})
    with pytest.raises(ConfigError, match="must be finite"):
        edit(identity, space, {"smile": float("nan")})
    with pytest.raises(SpaceMismatch):
        edit(identity, make_space("vae-mlp"), {"smile": 1.0})


def test_directions_are_added_and_everything_else_stays(make_space, tmp_path):
    """Also what this release does not know, and in place."""
    space, path = make_space("vae-skip", version="3"), tmp_path / "space.safetensors"
    save_space(space, path)
    file = open_container(path)
    tensors = {n: file.read(n) for n in file.entries}
    tensors.update({"later.weights": torch.ones(3, 2).half(), "later.number": torch.tensor(4)})
    config = {**json.loads(file.metadata["config"]), "later": {"kind": "net"}}
    write_container(path, tensors, format="w2wpp.space", config=config, metadata={"remark": "kept"})
    new = {"age": torch.arange(5.0) / 3, "smile": torch.ones(5)}
    save_directions(path, path, new, {"method": "test"})
    after, loaded = open_container(path, "w2wpp.space"), load_space(path)
    for name, t in tensors.items():
        if name != "direction.smile":
            assert torch.equal(after.read(name), t) and after.entries[name].dtype == t.dtype
    assert after.config["later"] == {"kind": "net"} and after.metadata["remark"] == "kept"
    assert loaded.fingerprint == space.fingerprint and loaded.version == "3"
    assert loaded.provenance["directions"] == {"method": "test"}
    assert sorted(loaded.directions) == ["age", "smile"]
    torch.testing.assert_close(loaded.directions["age"], new["age"])
    with pytest.raises(ConfigError, match=r"are \[5\]"):
        save_directions(path, path, {"age": torch.ones(4)}, {})


def test_the_verb(make_space, dataset, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    space = make_space("pca")
    save_space(space, "space.safetensors")
    z = space.encode(dataset.vectors()).mean
    labels = torch.stack([z[:, 0], z[:, 0] + z[:, 1]], 1)
    facts = {"heldout": dataset.heldout, "labels": labels, "label_names": ("age", "smile")}
    write_dataset("data", dataset.vectors(), dataset.layout, dataset.identity, **facts)
    command = ["directions", "space.safetensors", "data", "-o", "new.safetensors", "--json"]
    assert main(command) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["fingerprint"] == space.fingerprint
    assert result["directions"]["method"] == "least squares, de-biased"
    assert min(result["directions"]["reading_r2"].values()) > 0.9
    age = load_space("new.safetensors").directions["age"]
    assert abs(float(age[0] + age[1])) < 0.05 * float(age[0])
    assert main([*command, "--naive", "--only", "age"]) == 0
    capsys.readouterr()
    naive = load_space("new.safetensors").directions["age"]
    assert float(naive[0]) == pytest.approx(float(z[:, 0].std()), rel=0.2)
    assert main([*command, "--only", "beard"]) == 1
    assert "no labels for 'beard'" in capsys.readouterr().err
