"""Half precision is used on processors that multiply it, and on no others."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

from w2wpp import precision
from w2wpp.training import compute
from w2wpp.training.compute import Compute

ROOT = Path(__file__).resolve().parents[1]
INSTRUCTIONS = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")


@pytest.fixture
def processor(monkeypatch):
    """Gives the processor the instructions that are named, and no others."""

    def has(*names: str) -> None:
        for name in INSTRUCTIONS:
            monkeypatch.setattr(torch.cpu, name, lambda name=name: name in names, raising=False)
        precision.cpu_has_bf16.cache_clear()

    yield has
    precision.cpu_has_bf16.cache_clear()


@pytest.mark.parametrize("names", [(), *((name,) for name in INSTRUCTIONS)])
def test_products_are_halved_where_the_processor_does_so(processor, names):
    processor(*names)
    assert precision.cpu_has_bf16() == bool(names)
    with precision.quick_products():
        product = torch.nn.Linear(4, 4)(torch.ones(2, 4))
    assert product.dtype == (torch.bfloat16 if names else torch.float32)
    assert Compute.mixed("cpu").precision == ("bf16" if names else "fp32")


def test_an_older_pytorch_that_cannot_tell_computes_in_single_precision(monkeypatch):
    for name in INSTRUCTIONS:
        monkeypatch.delattr(torch.cpu, name, raising=False)
    precision.cpu_has_bf16.cache_clear()
    assert not precision.cpu_has_bf16()
    precision.cpu_has_bf16.cache_clear()


def test_whoever_asks_for_it_elsewhere_is_told(processor):
    processor()
    with pytest.warns(UserWarning, match="many times slower"):
        assert Compute.pick("cpu", "bf16").precision == "bf16"
    processor(INSTRUCTIONS[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Compute.pick("cpu", "bf16")


def test_nobody_else_decides_about_it():
    deciding = {Path(precision.__file__), Path(compute.__file__)}
    for folder in ("w2wpp", "nodes"):
        for path in (ROOT / folder).rglob("*.py"):
            found = "autocast(" in path.read_text(encoding="utf-8")
            assert found == (path in deciding), path
