"""Two and four processes give what one gives: bases by every route, coefficients, a VAE, a whole command."""

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from w2wpp.training import by_gram as module
from w2wpp.training import dataset as dataset_module
from w2wpp.training.compute import Compute
from w2wpp.training.config import VaeTraining
from w2wpp.training.dataset import load_dataset, write_dataset
from w2wpp.training.fit_basis import fit_coefficients
from w2wpp.training.fit_vae import fit_vae
from w2wpp.training.ranks import Ranks, current_ranks

TRAINING = VaeTraining(
    latent=4, hidden=(16,), epochs=4, batch=24, lr=3e-3, free_bits=0.3, input_noise=0.05, patience=0
)
ROUTES = {"gram": 8192, "iteration": 8}


def compute_all(path):
    """Everything that is compared, as tensors."""
    dataset_module.CHUNK_BYTES, module.BLOCK_BYTES = 40_000, 40_000
    data, found = load_dataset(path), {}
    for route, limit in ROUTES.items():
        fitted = fit_coefficients(data, 8, exact_limit=limit, tolerance=1e-6)
        assert fitted.report["route"] == route
        found[f"{route}.values"] = fitted.basis.singular_values
        found[f"{route}.lifted"] = fitted.basis.lift(fitted.coefficients.values[:5])
        found[f"{route}.outside"] = fitted.coefficients.outside
    tall = dataclasses.replace(
        data,
        source=data.vectors().repeat(6, 1) + torch.linspace(0, 1, 618)[:, None],
        identity=torch.arange(618),
        heldout=torch.arange(618) % 5 == 0,
    )
    square = fit_coefficients(tall, 8)
    assert square.report["route"] == "covariance"
    found["covariance.values"] = square.basis.singular_values
    found["covariance.lifted"] = square.basis.lift(square.coefficients.values[:5])
    space = fit_vae(fitted.coefficients, fitted.basis, TRAINING)
    found["vae"] = space.decode(space.encode(data.vectors([0, 1, 2])).mean)
    found["r2"] = torch.tensor(list(space.training_report["weight_r2"].values()))
    return found


def work(rank, size, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/group{size}", rank=rank, world_size=size
    )
    assert current_ranks() == Ranks(rank, size)
    found = compute_all(f"{folder}/data")
    torch.save(found, f"{folder}/{size}-{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, layout):
    folder = tmp_path_factory.mktemp("ranks")
    g = torch.Generator().manual_seed(1)
    w = torch.randn(103, 12, generator=g) @ torch.randn(12, layout.size, generator=g)
    w = w + 0.3 * torch.randn(w.shape, generator=g) + 1.0
    identity = torch.arange(103) // 2
    write_dataset(folder / "data", w, layout, identity, heldout=identity % 6 == 0)
    return folder


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_give_the_result_of_one(folder, size, monkeypatch):
    monkeypatch.setattr(dataset_module, "CHUNK_BYTES", dataset_module.CHUNK_BYTES)
    monkeypatch.setattr(module, "BLOCK_BYTES", module.BLOCK_BYTES)
    alone = compute_all(folder / "data")
    monkeypatch.syspath_prepend(Path(__file__).parents[2])  # where new processes find this module
    multiprocessing.spawn(work, (size, str(folder)), nprocs=size)
    for rank in range(size):
        together = torch.load(folder / f"{size}-{rank}.pt")
        for name, t in alone.items():
            tolerance = 2e-3 if name in ("vae", "r2") else 1e-3
            assert torch.allclose(t, together[name], rtol=tolerance, atol=tolerance), (name, rank)


def test_parts_of_ranks_are_everything_once():
    for size in (1, 2, 3, 4, 7):
        parts = [Ranks(r, size).mine(torch.arange(5)) for r in range(size)]
        assert torch.equal(torch.cat(parts), torch.arange(5))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_without_torchrun_there_is_one(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert current_ranks() == Ranks(0, 1)


def test_ranks_share_the_people_whose_loras_are_built(tmp_path, monkeypatch):
    from w2wpp.avatars.build import loras

    trained = []
    monkeypatch.setattr(loras, "_work", lambda worker, shares, *rest: trained.extend(shares[0]))
    monkeypatch.setattr(Ranks, "wait", lambda self: None)
    config = loras.LoraSet(people=7, group=2)
    for rank in range(3):
        args = (tmp_path, None, config, torch.zeros(7, 3), None, tmp_path, 1)
        files = loras._train_groups(*args, Compute(), Ranks(rank, 3), print)
    assert sorted(file for file, _ in trained) == files
    assert torch.equal(torch.cat([rows for _, rows in trained]).sort().values, torch.arange(7))
