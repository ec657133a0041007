"""Modules weighed by what a model makes of them, and the space that comes of it."""

import math

import pytest
import torch

from w2wpp import encode_lora, load_space, save_space
from w2wpp.diffusion.schedule import NoiseSchedule
from w2wpp.errors import ConfigError, DataError, FormatError
from w2wpp.files.container import open_container
from w2wpp.lora.collection import collect, members_of
from w2wpp.lora.delta import Factors
from w2wpp.training.fit_delta import CollectionSettings, collection_layout, fit_delta
from w2wpp.training.module_weights import module_weights

SIZES = {"blocks.0.to_q": (6, 5), "blocks.1.to_k": (4, 8), "blocks.2.to_v": (5, 5)}
SHAPE = (2, 3, 3)
SCHEDULE = NoiseSchedule(torch.linspace(0.99, 0.01, 100), "eps")
HEARD = {"blocks.0.to_q": 3.0, "blocks.1.to_k": 0.5, "blocks.2.to_v": 0.0}


class Model:
    """Adds up its modules' updates through known matrices, some louder than others."""

    def __init__(self, layout):
        g = torch.Generator().manual_seed(1)
        self.layout = layout
        self.matrices = {
            n: HEARD[n] * torch.randn(math.prod(SHAPE), o * i, generator=g)
            for n, (o, i) in SIZES.items()
        }

    def __call__(self, noisy, timestep, vectors):
        moved = []
        for vector in vectors:
            lora = self.layout.unpack(vector)
            moved.append(sum(self.matrices[n] @ (b @ a).flatten() for n, (a, b) in lora.items()))
        return noisy + torch.stack(moved).view(-1, *SHAPE)

    def weights(self, loras):
        """|J dW|^2 over |dW|^2 of each module, one in the mean."""
        heard = torch.tensor(
            [
                [
                    float((self.matrices[n] @ u[n].dense().float().flatten()).square().sum())
                    for n in SIZES
                ]
                for u in loras.values()
            ]
        ).sum(0)
        length = torch.tensor(
            [[float(u[n].dense().square().sum()) for n in SIZES] for u in loras.values()]
        ).sum(0)
        return (heard / length / (heard.sum() / length.sum())).double()


@pytest.fixture(scope="module")
def loras():
    g = torch.Generator().manual_seed(0)
    return {
        f"file {i}": {
            n: Factors(
                torch.randn(1 + i % 3, size_in, generator=g).half(),
                torch.randn(size_out, 1 + i % 3, generator=g).half(),
                0.5,
            )
            for n, (size_out, size_in) in SIZES.items()
        }
        for i in range(6)
    }


def weigh(loras, **options):
    collection = collect(members_of(loras))
    layout = collection_layout(collection, 3)
    generator = torch.Generator().manual_seed(options.pop("seed", 0))
    pictures = torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(2))
    return module_weights(
        Model(layout), SCHEDULE, pictures, collection, layout, generator=generator, **options
    )


def test_a_weight_is_how_much_of_a_change_is_heard(loras):
    expected = Model(collection_layout(collect(members_of(loras)), 3)).weights(loras)
    found = weigh(loras, rows=3000, batch=50, damping=0.0)
    assert float(found[2]) == 0.0  # what nobody hears
    torch.testing.assert_close(found[:2], expected[:2], rtol=0.15, atol=0)
    damped = weigh(loras, rows=3000, batch=50, damping=0.25)
    torch.testing.assert_close(damped, 0.75 * found + 0.25)


def test_a_batch_changes_nothing_but_rounding(loras):
    told = []
    one = weigh(loras, rows=12, batch=12)
    other = weigh(loras, rows=12, batch=12, callback=lambda *row: told.append(row))
    assert torch.equal(one, other) and told == [(12, 12)]


def test_weights_are_what_inner_products_are_sums_with(loras, tmp_path):
    weights = torch.tensor([2.0, 0.5, 0.25], dtype=torch.float64)
    settings = CollectionSettings(rank=18)
    space, report = fit_delta(members_of(loras), settings, weigh=lambda collection: weights)
    plain, other = fit_delta(members_of(loras), settings)
    built = torch.stack(
        [
            torch.cat([w.sqrt() * u[n].dense().flatten() for w, n in zip(weights, SIZES)])
            for u in loras.values()
        ]
    )
    torch.testing.assert_close(space.basis.grams.total, built @ built.T)
    assert report.weighed and "count by how much" in str(report)
    assert not other.weighed and "module_weights" not in plain.basis.tensors()

    save_space(space, tmp_path / "weighed.safetensors")
    again = load_space(tmp_path / "weighed.safetensors")
    assert torch.equal(again.basis.module_weights, weights)
    assert again.fingerprint == space.fingerprint != plain.fingerprint
    assert torch.equal(again.basis.uncut().module_weights, weights)
    assert torch.equal(again.basis.truncated(2).module_weights, weights)

    # A LoRA from outside is explained as far as its weighted update lies in the weighted span.
    g = torch.Generator().manual_seed(9)
    stranger = {
        n: Factors(torch.randn(4, i, generator=g), torch.randn(o, 4, generator=g))
        for n, (o, i) in SIZES.items()
    }
    target = torch.cat([w.sqrt() * stranger[n].dense().flatten() for w, n in zip(weights, SIZES)])
    mean = built.mean(0)
    span = (built - mean)[:-1]
    fitted = torch.linalg.lstsq(span.T, (target - mean)[:, None]).solution
    missed = (target - mean - span.T @ fitted[:, 0]).square().sum() / target.square().sum()
    identity, told = encode_lora(again, members_of({"s": stranger})[0])
    assert told.explained == pytest.approx(1 - float(missed), abs=1e-3)
    w = identity.vectors(again)
    torch.testing.assert_close(again.encode(w).mean, identity.z, atol=1e-3, rtol=1e-3)
    assert float(again.kept_energy(identity, w)) == pytest.approx(1.0, abs=1e-4)


def test_what_can_not_be_weighed_and_files_that_lie(loras, tmp_path):
    for wrong in ({"rows": 0}, {"damping": 1.5}):
        with pytest.raises(ConfigError, match="Weighing modules"):
            weigh(loras, **wrong)
    unheard = {name: {"blocks.2.to_v": u["blocks.2.to_v"]} for name, u in loras.items()}
    with pytest.raises(DataError, match="does not change with these LoRAs"):
        weigh_only(unheard)
    bad = torch.tensor([1.0, -1.0, 1.0], dtype=torch.float64)
    good = bad.abs() * 2
    space, _ = fit_delta(members_of(loras), weigh=lambda collection: good)
    space.basis.module_weights = bad
    save_space(space, tmp_path / "bad.safetensors")
    assert "basis.module_weights" in open_container(tmp_path / "bad.safetensors")
    with pytest.raises(FormatError, match="weights of modules"):
        load_space(tmp_path / "bad.safetensors")


def weigh_only(loras):
    collection = collect(members_of(loras))
    layout = collection_layout(collection, 3)
    pictures = torch.zeros(1, *SHAPE)
    generator = torch.Generator().manual_seed(0)
    return module_weights(
        Model(layout), SCHEDULE, pictures, collection, layout, rows=4, generator=generator
    )
