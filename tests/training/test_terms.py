"""Terms beside reconstruction and KL: what the model does, and what a discriminator says."""

import dataclasses

import pytest
import torch

from w2wpp import AffineBasis, ConfigError, ShapeError
from w2wpp.diffusion.schedule import NoiseSchedule
from w2wpp.training.adversary import Adversary
from w2wpp.training.coefficients import project_dataset
from w2wpp.training.config import VaeTraining
from w2wpp.training.dataset import VectorDataset
from w2wpp.training.fit_basis import fit_basis
from w2wpp.training.fit_vae import fit_vae
from w2wpp.training.output_term import OutputTerm
from w2wpp.training.ranks import Ranks
from w2wpp.training.run import Run

SCHEDULE = NoiseSchedule(torch.linspace(0.99, 0.01, 100), "eps")
SHORT = VaeTraining(latent=4, hidden=(16,), epochs=6, batch=16, validation=0.2)


class Model:
    """Outputs [B, 1, 2, 2] that move with four numbers of a LoRA's vector and with no other."""

    def __init__(self, seen):
        self.seen, self.calls = seen, 0

    def __call__(self, noisy, timestep, vectors):
        self.calls += len(noisy)
        moved = vectors[:, self.seen].reshape(-1, 1, 2, 2)
        return noisy + moved.repeat_interleave(len(noisy) // len(vectors), 0)


@pytest.fixture(scope="module")
def people(layout):
    """Six large ways to differ that the model does not see, and four small ones that it does."""
    g = torch.Generator().manual_seed(3)
    w = torch.zeros(200, layout.size)
    w[:, :6] = torch.randn(200, 6, generator=g)
    w[:, -4:] = 0.5 * torch.randn(200, 4, generator=g)
    w += 0.03 * torch.randn(w.shape, generator=g)
    ids = torch.arange(200)
    return VectorDataset(layout, w, ids, ids % 5 == 0)


def term(data, basis, **options):
    model = Model(slice(-4, None))
    pictures = torch.randn(5, 1, 2, 2, generator=torch.Generator().manual_seed(1))
    return OutputTerm(model, SCHEDULE, pictures, basis, data.vectors(data.training_rows), **options)


def test_nothing_learned_costs_one_and_everything_nothing(people):
    basis = fit_basis(people, 10, metric="raw")
    c = project_dataset(people, basis).values[people.training_rows]
    g = torch.Generator().manual_seed(0)
    rows, judge = torch.arange(160), term(people, basis, rows=160, weight=2.0)
    mean = float(judge(torch.zeros_like(c), rows, g))
    assert mean == pytest.approx(2.0, rel=0.25)
    assert float(judge(c, rows, g)) < 1e-3
    assert judge.denoise.calls == 2 * 64 + 4 * 160


def test_the_term_brings_what_the_model_sees(people):
    """PCA of raw numbers spends six latents on what no output depends on; the term finds the rest."""
    basis = fit_basis(people, 10, metric="raw")
    settings = VaeTraining(
        latent=6, hidden=(), epochs=60, batch=32, lr=2e-2, beta=1e-6, validation=0
    )
    held, missed = people.vectors(people.heldout_rows), {}
    for name, outputs in {"plain": None, "term": term(people, basis, rows=16, weight=3.0)}.items():
        space = fit_vae(people, basis, settings, outputs=outputs)
        again = space.decode(space.encode(held).mean)
        missed[name] = float((again - held)[:, -4:].square().mean() / held[:, -4:].var())
    assert missed["term"] < 0.5 * missed["plain"]


def test_reports_and_checkpoints_know_of_the_term(people, tmp_path):
    basis = fit_basis(people, 10, metric="raw")
    path = tmp_path / "run.ckpt"
    space = fit_vae(people, basis, SHORT, outputs=term(people, basis), checkpoint=path)
    assert space.training_report["outputs"] == {"weight": 1.0, "rows": 4, "pictures": 5}
    with pytest.raises(ConfigError):
        fit_vae(people, basis, SHORT, checkpoint=path)


def test_a_functional_basis_counts_every_unit_by_its_energy(people):
    """The loss of a codec is the share of the metric's energy that is lost, whatever the basis."""
    basis = fit_basis(people, 10, metric="update")
    data = project_dataset(people, basis)
    rows = people.training_rows
    run = Run(
        "final",
        dataclasses.replace(SHORT, latent=3),
        data.values[rows],
        basis.singular_values,
        seed=0,
    )
    c = data.values[rows]
    cut = torch.cat([c[:, :3], torch.zeros(len(c), 7)], 1)
    w = basis.lift(c)
    lost = basis.energy(w - basis.lift(cut)).sum() / basis.energy(w - basis.mean).sum()
    assert float(run._reconstruction(c, cut, len(c))) == pytest.approx(float(lost), rel=2e-3)


def test_an_adversary_tells_true_rows_from_made_ones_and_says_which_way(people):
    torch.manual_seed(0)
    c = torch.randn(400, 6)
    judge = Adversary(c, lr=3e-3)
    for _ in range(150):
        judge.learn(c, 0.3 * torch.randn(400, 6))
    made = (0.3 * torch.randn(200, 6)).requires_grad_(True)
    assert judge(torch.randn(200, 6)).mean() > 0.5 > -0.5 > judge(made).mean()
    judge.cost(made).backward()
    outwards = (-made.grad * made).sum(1)
    assert (outwards > 0).float().mean() > 0.9


def test_an_adversarial_training_widens_what_is_drawn(people):
    """A VAE that is held back draws people who are all alike; its discriminator objects."""
    basis, spread = AffineBasis(people.layout.size), {}
    for weight in (0.0, 0.02):
        settings = VaeTraining(
            codec="original-residual", latent=8, hidden=(64, 64), epochs=150, batch=32, lr=1e-3, beta=0.03,
            validation=0, adversarial=weight,
        )  # fmt: skip
        space = fit_vae(people, basis, settings)
        drawn = space.sample(300, generator=torch.Generator().manual_seed(0)).vectors(space)
        real = people.vectors(people.training_rows)
        spread[weight] = float(drawn.var(0).sum() / real.var(0).sum())
    assert spread[0.0] + 0.05 < spread[0.02] < 1.1


def test_an_adversarial_training_resumes_where_it_was(people, tmp_path):
    basis = fit_basis(people, 10, metric="raw")
    settings = dataclasses.replace(SHORT, adversarial=0.1, epochs=30, validation=0)
    whole = fit_vae(people, basis, settings)

    class Stop(Exception):
        pass

    def stop(progress):
        if progress.epoch == 27:
            raise Stop

    with pytest.raises(Stop):
        fit_vae(people, basis, settings, checkpoint=tmp_path / "c", callback=stop)
    again = fit_vae(people, basis, settings, checkpoint=tmp_path / "c")
    assert again.fingerprint == whole.fingerprint


def test_tokens_train_on_vectors_and_not_on_coefficients(people):
    settings = dataclasses.replace(SHORT, codec="tokens", hidden=(8,), beta=1e-5, lr=1e-3)
    space = fit_vae(people, AffineBasis(people.layout.size), settings)
    assert len(space.codec.segments) == len(people.layout.modules)
    assert space.training_report["weight_r2"]["heldout"] > 0.5
    with pytest.raises(ConfigError, match="raw vectors"):
        fit_vae(people, fit_basis(people, 10), settings)


def test_what_does_not_fit_is_refused(people):
    basis = fit_basis(people, 10, metric="raw")
    outputs = term(people, basis)
    with pytest.raises(ConfigError, match="weight, rows and pictures"):
        term(people, basis, weight=0.0)
    outputs.vectors = outputs.vectors[:7]
    with pytest.raises(ShapeError, match="for 160 rows"):
        fit_vae(people, basis, SHORT, outputs=outputs)
    with pytest.raises(ConfigError, match="without torchrun"):
        Run(
            "final",
            dataclasses.replace(SHORT, adversarial=0.1),
            torch.zeros(9, 10),
            basis.singular_values,
            seed=0,
            ranks=Ranks(0, 2),
        )
