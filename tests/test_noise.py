import hashlib
import subprocess
import sys

import pytest
import scipy.stats
import torch

from w2wpp import ConfigError
from w2wpp.noise import standard_normal

# standard_normal(2, 3) with seed 7; scipy.stats.norm.ppf of the same integers gives the same numbers, see below.
GOLDEN = [
    [0.1478283, 0.11906338, 0.59532213],
    [-0.48630106, 1.0154686, 0.46515775],
]
DIGEST = "a997981ed00ae21e"  # of 5,000 x 4 numbers, to the bit


def draw(rows, columns, seed=7):
    return standard_normal(rows, columns, generator=torch.Generator().manual_seed(seed))


def test_golden_numbers():
    assert torch.allclose(draw(2, 3), torch.tensor(GOLDEN), atol=0, rtol=1e-6)


def test_bits_do_not_change():
    assert hashlib.sha256(draw(5000, 4).numpy().tobytes()).hexdigest()[:16] == DIGEST


def test_same_bits_in_a_fresh_process():
    code = (
        "import torch, hashlib; from w2wpp.noise import standard_normal as n;"
        "t = n(5000, 4, generator=torch.Generator().manual_seed(7));"
        "print(hashlib.sha256(t.numpy().tobytes()).hexdigest()[:16])"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert out.stdout.strip() == DIGEST


def test_inverse_distribution_function_is_scipys():
    g = torch.Generator().manual_seed(3)
    k = torch.randint(1 << 52, (100, 1), generator=g, dtype=torch.int64)
    expected = scipy.stats.norm.ppf((k.double().numpy() + 0.5) / 2**52)
    got = standard_normal(100, 1, generator=torch.Generator().manual_seed(3))
    assert torch.allclose(got, torch.from_numpy(expected).float(), atol=0, rtol=1e-6)


def test_a_longer_draw_starts_with_the_shorter():
    assert torch.equal(draw(1000, 5)[:10], draw(10, 5))


def test_it_is_standard_normal():
    x = draw(20_000, 5)
    assert torch.isfinite(x).all()
    assert scipy.stats.kstest(x.flatten().numpy(), "norm").pvalue > 0.01


def test_other_devices_are_refused():
    class Elsewhere:
        device = torch.device("cuda")

    with pytest.raises(ConfigError, match="CPU generator"):
        standard_normal(1, 1, generator=Elsewhere())
