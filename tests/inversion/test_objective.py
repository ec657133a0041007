"""The denoising loss: its gradient, its random part, masks and micro batches."""

import pytest
import torch

from w2wpp.errors import ConfigError, DataError, ShapeError
from w2wpp.inversion import NoiseSchedule, Objective

P, D = 6, 3


class Linear:
    """A space in double precision: decode(z) = z A + r B."""

    latent_size = D

    def __init__(self):
        g = torch.Generator().manual_seed(0)
        self.a = torch.randn(D, P, generator=g, dtype=torch.float64)
        self.b = torch.randn(4, P, generator=g, dtype=torch.float64)

    def decode(self, z, residual=None):
        return z @ self.a + (0 if residual is None else residual @ self.b)


def toy(noisy, timestep, vectors):
    """Rows ordered by vector: row i is denoised by vector i * B // N."""
    v = vectors.repeat_interleave(len(noisy) // len(vectors), 0)
    return noisy * v[:, :1, None, None].tanh() + v[:, 1:4, None, None]


def make(pictures=None, prediction="eps", denoise=toy, **options):
    g = torch.Generator().manual_seed(1)
    pictures = torch.randn(2, 3, 4, 4, generator=g).double() if pictures is None else pictures
    schedule = NoiseSchedule(torch.linspace(0.99, 0.01, 50, dtype=torch.float64), prediction)
    return Objective(Linear(), pictures, denoise, schedule, **options)


def finite_difference(f, x, h=1e-5):
    out = torch.zeros_like(x)
    for i in range(x.numel()):
        e = torch.zeros_like(x).flatten()
        e[i] = h
        e = e.view_as(x)
        out.view(-1)[i] = (f(x + e) - f(x - e)).sum() / (2 * h)
    return out


@pytest.mark.parametrize("prediction", ["eps", "v_prediction"])
@pytest.mark.parametrize("micro", [None, 1, 3])
def test_gradient_is_that_of_finite_differences(prediction, micro):
    mask = torch.ones(1, 1, 4, 4).double()
    mask[..., :2] = 0.25
    o = make(prediction=prediction, draws=4, weighting="v", prior=0.1, mask=mask, micro_batch=micro)
    z = torch.randn(2, D, dtype=torch.float64)
    r = torch.randn(2, 4, dtype=torch.float64)
    draw = o.draw(0)
    for of_residual in (False, True):
        value, gradient = o.value_and_gradient(z, r, draw, of_residual=of_residual)
        torch.testing.assert_close(value, o.loss(z, r, draw))
        expected = finite_difference(
            (lambda x: o.loss(z, x, draw)) if of_residual else (lambda x: o.loss(x, r, draw)),
            r if of_residual else z,
        )
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-8)


def test_gradient_through_a_unet_with_loras_is_that_of_finite_differences():
    pytest.importorskip("diffusers")
    from w2wpp.avatars.world.adapters import avatar_layout
    from w2wpp.avatars.world.base import AvatarBase, AvatarConfig
    from w2wpp.lora.hooks import loras_applied

    torch.manual_seed(0)
    base = AvatarBase(AvatarConfig(channels=(32, 32), image_size=8)).double().eval()
    base.requires_grad_(False)
    layout = avatar_layout(base)

    class Space64:
        latent_size = 2
        a = torch.randn(2, layout.size, dtype=torch.float64) * 0.3
        mean = torch.randn(layout.size, dtype=torch.float64) * 0.3

        def decode(self, z, residual=None):
            return z @ self.a + self.mean

    def denoise(noisy, timestep, vectors):
        with loras_applied(base.unet, layout, vectors):
            return base(noisy, timestep, base.prompt(torch.full((len(noisy), 3), -1)))

    schedule = NoiseSchedule(base.alphas_cumprod, "v_prediction")
    pictures = torch.randn(1, 3, 8, 8, dtype=torch.float64)
    o = Objective(Space64(), pictures, denoise, schedule, draws=2, micro_batch=3)
    z, draw = torch.randn(2, 2, dtype=torch.float64), o.draw(0)
    _, gradient = o.value_and_gradient(z, None, draw)
    with torch.no_grad():
        expected = finite_difference(lambda x: o.loss(x, None, draw), z, 1e-4)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-9)
    assert all(p.grad is None and not p.requires_grad for p in base.parameters())
    assert not any(m._forward_hooks for m in base.modules())


def test_people_side_by_side_are_as_if_alone():
    pictures = torch.randn(3, 1, 3, 4, 4).double()
    together = make(pictures, draws=4)
    z = torch.randn(6, D, dtype=torch.float64)  # two rows each
    losses = together.loss(z, None, together.draw(0))
    first = make(pictures[0], draws=4)
    torch.testing.assert_close(losses[:2], first.loss(z[:2], None, first.draw(0)))
    # The second person has noise of their own.
    alone = make(pictures[1], draws=4)
    assert not torch.allclose(losses[2:4], alone.loss(z[2:4], None, alone.draw(0)))


def test_draws_are_fixed_or_fresh_and_spread_over_time():
    fixed, fresh = make(draws=10), make(draws=10, fresh=True)
    assert torch.equal(fixed.draw(0).noise, fixed.draw(7).noise)
    assert not torch.equal(fresh.draw(0).noise, fresh.draw(7).noise)
    assert torch.equal(fresh.draw(7).noise, make(draws=10, fresh=True).draw(7).noise)
    assert not torch.equal(fixed.evaluation(10).noise, fixed.draw(0).noise)
    strata = fixed.draw(0).timestep[0].sort().values // 5
    assert strata.tolist() == list(range(10))
    assert fixed.draw(0).picture[0].bincount().tolist() == [5, 5]  # both pictures, equally


def test_weightings_mean_the_same_loss_for_both_predictions():
    """eps and v models that hold the same x0 have equal losses in a common weighting."""
    abar = torch.linspace(0.99, 0.01, 50, dtype=torch.float64)

    def predicts(kind):
        def denoise(noisy, timestep, vectors):
            a = abar[timestep].sqrt()[:, None, None, None]
            s = (1 - abar[timestep]).sqrt()[:, None, None, None]
            x0 = torch.full_like(noisy, 0.3)
            eps = (noisy - a * x0) / s
            return eps if kind == "eps" else a * eps - s * x0

        return denoise

    for weighting in ("eps", "v", "x0", "min-snr"):
        values = []
        for kind in ("eps", "v_prediction"):
            o = make(prediction=kind, denoise=predicts(kind), draws=8, weighting=weighting)
            values.append(o.loss(torch.zeros(1, D, dtype=torch.float64), None, o.draw(0)))
        torch.testing.assert_close(values[0], values[1], rtol=1e-5, atol=1e-8)


def test_what_a_mask_hides_does_not_count():
    pictures = torch.zeros(1, 3, 4, 4).double()
    mask = torch.ones(1, 1, 4, 4)
    mask[..., 0] = 0
    changed = pictures.clone()
    changed[..., 0] = 5.0
    z = torch.randn(1, D, dtype=torch.float64)
    a, b = (make(p, mask=mask) for p in (pictures, changed))
    torch.testing.assert_close(a.loss(z, None, a.draw(0)), b.loss(z, None, b.draw(0)))
    c, d = make(pictures), make(changed)
    assert not torch.allclose(c.loss(z, None, c.draw(0)), d.loss(z, None, d.draw(0)))


def test_evaluations_count_pictures_per_person():
    o = make(torch.zeros(2, 1, 3, 4, 4).double(), draws=4)
    o.value_and_gradient(torch.zeros(2, D, dtype=torch.float64), None, o.draw(0))
    assert o.evaluations == 4
    o.loss(torch.zeros(6, D, dtype=torch.float64), None, o.evaluation(5))
    assert o.evaluations == 4 + 15


@pytest.mark.parametrize(
    "options, error",
    [
        ({"draws": 0}, ConfigError),
        ({"weighting": "loud"}, ConfigError),
        ({"prior": -0.1}, ConfigError),
        ({"micro_batch": 0}, ConfigError),
        ({"mask": torch.zeros(1, 1, 4, 4)}, ConfigError),
        ({"mask": torch.ones(1, 1, 5, 4)}, ShapeError),
        ({"pictures": torch.full((1, 3, 4, 4), float("nan"))}, DataError),
        ({"pictures": torch.zeros(3, 4, 4)}, ShapeError),
        ({"prediction": "x0"}, ConfigError),
    ],
)
def test_refuses(options, error):
    with pytest.raises(error):
        make(**options)


def test_every_seed_person_and_step_has_a_noise_of_its_own():
    """Mixed as ((seed * 100,003) + person) * 100,003 + number: runs that were saved resume by it."""
    pictures = torch.zeros(2, 1, 3, 4, 4).double()
    found = {}
    for seed in (0, 1, 2):
        for step in (0, 1, 2):
            noise = make(pictures, draws=1, fresh=True, seed=seed).draw(step).noise
            for person in (0, 1):
                mixed = (seed * 100_003 + person) * 100_003 + 2 + step
                expected = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(mixed))
                assert torch.equal(noise[person], expected)
                found[seed, person, step] = tuple(noise[person].flatten().tolist())
    assert len(set(found.values())) == 18
    kept_aside = make(pictures, draws=1, seed=1).evaluation(1).noise[0]
    expected = torch.randn(
        1, 3, 4, 4, generator=torch.Generator().manual_seed(100_003 * 100_003 + 1)
    )
    assert torch.equal(kept_aside, expected)


def test_a_seed_of_any_size_is_taken():
    noise = make(draws=1, seed=2**64 - 1).draw(0).noise
    assert not torch.equal(noise, make(draws=1, seed=2**64 - 2).draw(0).noise)


def test_more_draws_than_pictures_go_round_and_timesteps_stay_inside():
    o = make(torch.zeros(3, 3, 4, 4).double(), draws=7)
    counts = o.draw(0).picture[0].bincount(minlength=3)
    assert sorted(counts.tolist()) == [2, 2, 3]
    loose = make(draws=400, stratified=False).draw(0).timestep[0]
    assert int(loose.min()) == 0 and int(loose.max()) == 49


def test_losses_are_means_of_weighted_squared_errors_and_the_prior_adds_half_its_square():
    """With a denoiser that always says zero, by hand."""
    pictures = torch.zeros(1, 3, 4, 4).double()
    o = make(pictures, denoise=lambda noisy, t, v: torch.zeros_like(noisy), draws=3, prior=0.5)
    draw, z = o.draw(0), torch.tensor([[1.0, 2.0, 0.0]], dtype=torch.float64)
    expected = (draw.noise[0].double() ** 2).mean() + 0.5 * 0.5 * 5.0
    torch.testing.assert_close(o.loss(z, None, draw)[0], expected)
