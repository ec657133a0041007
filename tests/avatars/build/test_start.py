"""Start networks of the miniature world that learn from rendered people."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("diffusers", reason="the miniature world needs diffusers")

from w2wpp.avatars.build import start
from w2wpp.errors import ConfigError


def test_a_reader_is_made_once_and_one_of_other_settings_is_refused(tmp_path, monkeypatch):
    quick = replace(start.TRAINING, steps=1, batch=4, width=8, features=8)
    monkeypatch.setattr(start, "TRAINING", quick)
    monkeypatch.setattr(start, "PICTURES", 8)
    first = start.reader(tmp_path, print)
    with monkeypatch.context() as patch:
        patch.setattr(start, "train_reader", None)  # not asked again
        again = start.reader(tmp_path, print)
    for one, two in zip(first.state_dict().values(), again.state_dict().values()):
        assert torch.equal(one, two)
    for name, other in (("TRAINING", replace(quick, augmented=0.0)), ("PICTURES", 9)):
        with monkeypatch.context() as patch, pytest.raises(ConfigError, match="other settings"):
            patch.setattr(start, name, other)
            start.reader(tmp_path, print)
