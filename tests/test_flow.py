"""The map between latents and N(0, I): exact both ways, and only as bent as strangers confirm."""

import dataclasses

import pytest
import torch

import w2wpp
from w2wpp.errors import DataError, FormatError, ShapeError
from w2wpp.files.container import open_container, write_container
from w2wpp.flow import Flow, bend, unbend
from w2wpp.spacefile import VERSIONS
from w2wpp.training.fit_flow import FlowTraining, fit_flow

SIZE = 12


def people(count: int, seed: int, kinds: int = 2) -> torch.Tensor:
    """Latents [count, 12] of people who come in kinds along two hidden directions, and vary freely along the others."""
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(count, SIZE, generator=g)
    for j, share in zip(range(kinds), (0.35, 0.6)):
        worn = torch.rand(count, generator=g) < share
        z[:, j] = torch.where(worn, 1.2, -0.8) + 0.15 * z[:, j]
    return z @ hidden().T


def hidden() -> torch.Tensor:
    draws = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(99))
    return torch.linalg.qr(draws)[0]


def standardised(count: int, seed: int) -> torch.Tensor:
    z = people(4_000, seed=1)
    return (people(count, seed) - z.mean(0)) / z.std(0)


@pytest.fixture(scope="module")
def fitted() -> Flow:
    return fit_flow(standardised(800, 2))[0]


def test_both_ways_meet(fitted):
    z = 3 * standardised(200, 3)  # far beyond the outermost knots as well
    assert torch.allclose(fitted.inverse(fitted(z)), z, atol=1e-4)
    u = 2 * torch.randn(200, SIZE, generator=torch.Generator().manual_seed(4))
    assert torch.allclose(fitted(fitted.inverse(u)), u, atol=1e-4)


def test_log_determinant_is_that_of_the_jacobian(fitted):
    z = standardised(3, 5)
    jacobians = torch.stack(
        [torch.autograd.functional.jacobian(lambda v: fitted(v[None])[0], row) for row in z]
    )
    expected = torch.linalg.slogdet(jacobians.double())[1].float()
    assert torch.allclose(fitted.with_slopes(z)[1], expected, atol=1e-3)


def test_strangers_are_likelier_by_nearly_what_the_truth_allows(fitted):
    """Two kinds save each direction about ln(std / 0.15) minus the entropy of the choice: 1.3 nats together or more."""
    z = standardised(2_000, 6)
    u, bent = fitted.with_slopes(z)
    gain = (0.5 * (z.square() - u.square()).sum(1) + bent).mean()
    assert gain > 1.0


def test_sampled_people_are_of_a_kind(fitted):
    """Between the kinds there is (nearly) nobody, where a Gaussian has one in three."""

    def undecided(z: torch.Tensor) -> float:
        reference = people(4_000, seed=1)
        traits = (z * reference.std(0) + reference.mean(0)) @ hidden()[:, :2]
        return ((traits > -0.25) & (traits < 0.65)).float().mean().item()

    u = torch.randn(2_000, SIZE, generator=torch.Generator().manual_seed(7))
    assert undecided(standardised(2_000, 8)) < 0.01
    assert undecided(u) > 0.25
    assert undecided(fitted.inverse(u)) < 0.12


def test_a_gaussian_cloud_is_left_alone():
    flow, report = fit_flow(torch.randn(800, SIZE, generator=torch.Generator().manual_seed(9)))
    assert report["people"] == 800
    assert sum(step["nats"] for step in report["tried"]) < 0.15
    z = torch.randn(50, SIZE, generator=torch.Generator().manual_seed(10))
    assert (flow(z) - z @ _turned(flow, z)).abs().mean() < 0.15


def _turned(flow: Flow, z: torch.Tensor) -> torch.Tensor:
    """The best linear map of what the flow does: a cloud that is left alone is turned at most."""
    return torch.linalg.lstsq(z, flow(z)).solution


def test_splines_without_bends_are_the_identity():
    z = 5 * torch.randn(40, SIZE, generator=torch.Generator().manual_seed(11))
    flow = Flow(SIZE, 3)
    assert torch.allclose(flow(z), z, atol=1e-5) and torch.allclose(flow.inverse(z), z, atol=1e-5)


def test_slopes_are_the_derivative():
    x = torch.tensor([[-1.0, 0.0, 2.0]]).double()
    y, slope = torch.tensor([[-2.0, 0.5, 1.0]]).double(), torch.tensor([[0.5, 2.0, 0.1]]).double()
    v = torch.linspace(-3, 4, 57).double()[:, None].requires_grad_(True)
    value, slopes = bend(v, x, y, slope)
    (derivative,) = torch.autograd.grad(value.sum(), v)
    assert torch.allclose(slopes, derivative) and bool((slopes > 0).all())
    assert torch.allclose(unbend(value, x, y, slope), v)
    assert torch.allclose(bend(x.T, x, y, slope)[0], y.T)


def test_same_seed_same_flow():
    z = standardised(300, 12)
    one, two = (fit_flow(z, FlowTraining(seed=3, rounds=4))[0].state_dict() for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(
    "z", [torch.zeros(20, 4), torch.full((100, 4), float("nan")), torch.zeros(100)]
)
def test_what_no_flow_can_be_fitted_to(z):
    with pytest.raises(DataError, match="people or more"):
        fit_flow(z)


def test_wrong_size_is_refused(fitted):
    with pytest.raises(ShapeError, match="d = 12"):
        fitted(torch.zeros(2, 5))


@pytest.fixture
def space_of(make_space) -> w2wpp.Space:
    return make_space("pca")


@pytest.fixture
def curved(space_of) -> w2wpp.Space:
    """A space whose latents go through a flow."""
    d = space_of.latent_size
    flow = Flow(d, 1)
    flow.y.mul_(1.5)
    flow.slope.mul_(1.5)
    flow.rotation.copy_(torch.eye(d).roll(1, 0))
    return dataclasses.replace(space_of, flow=flow)


def test_a_space_decodes_through_its_flow(curved, space_of):
    z = curved.sample(3, generator=torch.Generator().manual_seed(0)).z
    assert torch.allclose(curved.decode(z), space_of.decode(z.roll(-1, 1) / 1.5), atol=1e-5)
    assert torch.allclose(curved.latent_of(curved.codec_latent(z)), z, atol=1e-5)


def test_encode_and_decode_share_coordinates(curved, space_of):
    w = space_of.decode(
        torch.randn(4, space_of.latent_size, generator=torch.Generator().manual_seed(1))
    )
    plain, through = space_of.encode(w), curved.encode(w)
    assert torch.allclose(through.mean, plain.mean.roll(1, 1) * 1.5, atol=1e-4)
    assert torch.allclose(through.std, plain.std.roll(1, 1) * 1.5, rtol=1e-4)


def test_a_flow_travels_in_the_file_and_older_releases_refuse_it(curved, space_of, tmp_path):
    path = tmp_path / "curved.safetensors"
    w2wpp.save_space(curved, path)
    read = w2wpp.load_space(path)
    z = torch.randn(2, curved.latent_size, generator=torch.Generator().manual_seed(2))
    assert torch.equal(read.decode(z), curved.decode(z))
    assert read.fingerprint == curved.fingerprint != space_of.fingerprint
    assert open_container(path, versions=VERSIONS).metadata["format_version"] == "2"
    with pytest.raises(FormatError, match="version 2"):
        open_container(path, "w2wpp.space", versions=("1",))


def test_a_space_without_a_flow_is_written_as_before(space_of, tmp_path):
    path = tmp_path / "plain.safetensors"
    w2wpp.save_space(space_of, path)
    assert open_container(path).metadata["format_version"] == "1"


def test_a_damaged_flow_is_refused(curved, tmp_path):
    path, broken = tmp_path / "curved.safetensors", tmp_path / "broken.safetensors"
    w2wpp.save_space(curved, path)
    file = open_container(path, "w2wpp.space", versions=VERSIONS)
    tensors = {name: file.read(name) for name in file.entries}
    tensors["prior.flow.x"] = tensors["prior.flow.x"].flip(2)
    write_container(broken, tensors, format="w2wpp.space", version="2", config=file.config)
    with pytest.raises(FormatError, match="not increasing"):
        w2wpp.load_space(broken)
