import pytest
import torch

from w2wpp import AffineBasis, Basis, ConfigError, FormatError, ShapeError
from w2wpp import basis as basis_module


def orthonormal(k, p):
    return torch.linalg.qr(torch.randn(p, k, generator=torch.Generator().manual_seed(3))).Q.T


@pytest.fixture
def signed():
    """std as in the published w2w files: some negative, some zero."""
    std = torch.linspace(0.5, 2.0, 40)
    std[3], std[7] = -0.7, 0.0
    return Basis(torch.linspace(-1, 1, 40), std, orthonormal(6, 40), torch.linspace(3, 1, 6))


def test_project_inverts_lift(signed):
    signed = Basis(signed.mean, signed.std.abs().clamp_min(0.1), orthonormal(6, 40), torch.ones(6))
    c = torch.randn(5, 6)
    assert torch.allclose(
        signed.project(signed.lift(c)), c, atol=5e-3
    )  # components are stored in half


def test_formula_of_w2w_with_negative_stds(signed):
    """w = (coefficients @ V^T) * std + mean, whatever the sign of std."""
    c = torch.randn(4, 6)
    w = (c * signed.singular_values) @ signed.components.float() * signed.std + signed.mean
    assert torch.allclose(signed.lift(c), w, atol=1e-6)
    moved = w.clone()
    moved[:, 7] += 5  # a parameter that never varied says nothing
    assert torch.equal(signed.project(w), signed.project(moved))
    assert torch.isfinite(signed.project(moved)).all()
    assert (signed.lift(c)[:, 7] == signed.mean[7]).all()


def test_rounding_error_in_std_is_no_std():
    std = torch.tensor([1.0, -1e-12, 2.0])
    assert Basis(torch.zeros(3), std, torch.eye(3)[:2], torch.ones(2)).std.tolist() == [
        1.0,
        0.0,
        2.0,
    ]


def test_chunks_of_components_add_up(signed, monkeypatch):
    c, w = torch.randn(2, 6), torch.randn(2, 40)
    whole = signed.lift(c), signed.project(w)
    monkeypatch.setattr(basis_module, "KEPT_BYTES", 0)
    monkeypatch.setattr(basis_module, "BLOCK_BYTES", 2 * 4 * signed.size)
    assert len(list(signed.blocks(1))) == 3
    assert torch.allclose(signed.lift(c), whole[0], atol=1e-6)
    assert torch.allclose(signed.project(w), whole[1], atol=1e-6)


def test_components_survive_being_kept_in_single_precision(signed):
    before = signed.components.clone()
    signed.lift(torch.randn(1, 6))
    assert signed.components.dtype == torch.float16
    assert torch.equal(signed.components, before)


def test_truncated_keeps_the_first(signed):
    small = signed.truncated(2)
    w = torch.randn(3, 40)
    assert (small.n_components, small.size) == (2, 40)
    assert torch.allclose(small.project(w), signed.project(w)[:, :2], atol=1e-6)
    with pytest.raises(ConfigError, match="truncated to 7"):
        signed.truncated(7)


def test_reader_is_asked_once_and_late(signed):
    asked = []

    def read(name):
        asked.append(name)
        return signed.tensors()[name]

    lazy = Basis(reader=read, size=40, n_components=6)
    assert asked == []
    with torch.inference_mode():
        lazy.lift(torch.zeros(1, 6))
    lazy.lift(
        torch.zeros(1, 6, requires_grad=True)
    ).sum().backward()  # cached outside inference mode
    assert sorted(asked) == ["components", "mean", "singular_values", "std"]


def test_affine_basis_of_the_seed():
    b = AffineBasis(4, shift=-0.1, scale=10)
    w = torch.randn(3, 4)
    assert torch.allclose(b.project(w), (w + 0.1) * 10)
    assert torch.allclose(b.lift(b.project(w)), w, atol=1e-6)
    with pytest.raises(ConfigError):
        AffineBasis(4, scale=0)


def test_wrong_sizes_are_refused(signed):
    with pytest.raises(ShapeError, match="P = 40"):
        signed.project(torch.zeros(2, 41))
    with pytest.raises(ShapeError, match="K = 6"):
        signed.lift(torch.zeros(6))
    with pytest.raises(ShapeError):
        Basis(torch.zeros(3), torch.ones(4), torch.eye(3), torch.ones(3))
    with pytest.raises(ConfigError, match="positive"):
        Basis(torch.zeros(3), torch.ones(3), torch.eye(3), torch.zeros(3))


def test_singular_values_of_zero_are_refused_when_they_are_read():
    lazy = Basis(reader=lambda name: torch.zeros(2), size=4, n_components=2)
    with pytest.raises(FormatError, match="not all positive"):
        _ = lazy.singular_values
