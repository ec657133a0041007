"""Embedders as ONNX files: one that is built here and run, and sessions that only look like one."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from w2wpp.errors import ConfigError, DataError, FormatError
from w2wpp.likeness.embedder import OnnxEmbedder


class Fake:
    """A session whose embedding is the mean colour of each quarter of a picture."""

    def __init__(self, shape=("n", 3, 8, 8), kind="tensor(float)", answer=None):
        self.inputs = [SimpleNamespace(name="faces", shape=list(shape), type=kind)]
        self.answer, self.fed = answer, []

    def get_inputs(self):
        return self.inputs

    def run(self, outputs, feed):
        pictures = feed["faces"]
        self.fed.append(pictures)
        if self.answer is not None:
            return [self.answer(pictures)]
        channels = self.inputs[0].shape[3] == 3
        first = np.moveaxis(pictures, -1, 1) if channels else pictures
        small = F.adaptive_avg_pool2d(torch.from_numpy(first.astype(np.float32)), 2)
        return [small.flatten(1).numpy(), "something else"]


def faces(count=5, size=8):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_an_onnx_file_is_run(tmp_path):
    """A linear embedder of 4 x 4 pictures: what it gives is known."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    weights = np.random.default_rng(0).normal(size=(48, 6)).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("Flatten", ["faces"], ["flat"]),
            helper.make_node("MatMul", ["flat", "weights"], ["embedding"]),
        ],
        "embedder",
        [helper.make_tensor_value_info("faces", kind, ["n", 3, 4, 4])],
        [helper.make_tensor_value_info("embedding", kind, ["n", 6])],
        [onnx.numpy_helper.from_array(weights, "weights")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.save(model, tmp_path / "linear.onnx")
    embedder = OnnxEmbedder.open(tmp_path / "linear.onnx")
    assert (embedder.name, embedder.size) == ("linear", 4)
    shown = faces(40, 4)
    expected = F.normalize(shown.flatten(1) @ torch.from_numpy(weights), dim=1)
    torch.testing.assert_close(embedder.embed(shown), expected, atol=1e-5, rtol=1e-5)
    assert embedder.embed(shown[:0]).shape[0] == 0


@pytest.mark.parametrize("span, low, high", [("-1..1", -1, 1), ("0..1", 0, 1), ("0..255", 0, 255)])
def test_pixels_lie_where_the_model_wants_them(span, low, high):
    session = Fake(answer=lambda pictures: np.ones((len(pictures), 4), np.float32))
    black_and_white = torch.ones(2, 3, 8, 8)
    black_and_white[0] = -1
    OnnxEmbedder(session, "fake", span=span).embed(black_and_white)
    (fed,) = session.fed
    assert fed[0].max() == low and fed[1].min() == high


def test_channels_last_blue_first_and_batches_of_one():
    shown = faces()
    plain = OnnxEmbedder(Fake(), "a").embed(shown)
    torch.testing.assert_close(plain.norm(dim=1), torch.ones(5))
    last = Fake(("n", 8, 8, 3))
    torch.testing.assert_close(OnnxEmbedder(last, "b").embed(shown), plain)
    assert last.fed[0].shape == (5, 8, 8, 3)
    ones = Fake((1, 3, 8, 8), "tensor(float16)")
    torch.testing.assert_close(OnnxEmbedder(ones, "c").embed(shown), plain, atol=1e-3, rtol=1e-2)
    assert [len(f) for f in ones.fed] == [1] * 5 and ones.fed[0].dtype == np.float16
    three = Fake((3, 3, 8, 8))
    torch.testing.assert_close(OnnxEmbedder(three, "d").embed(shown), plain)
    assert [len(f) for f in three.fed] == [3, 3]  # the last one is filled up
    blue = Fake()
    OnnxEmbedder(blue, "e", bgr=True).embed(shown)
    assert np.array_equal(blue.fed[0], shown.flip(1).numpy())


def test_the_size_comes_from_the_model_or_from_the_caller():
    assert OnnxEmbedder(Fake(("n", 3, "h", "w")), "a", size=12).size == 12
    assert OnnxEmbedder(Fake(("n", 3, None, 16)), "a").size == 16
    with pytest.raises(ConfigError, match="--embedder-size"):
        OnnxEmbedder(Fake(("n", 3, "h", "w")), "a")
    with pytest.raises(ConfigError, match="8 pixels per side, not 12"):
        OnnxEmbedder(Fake(), "a", size=12)
    with pytest.raises(ConfigError, match="square"):
        OnnxEmbedder(Fake(("n", 3, 8, 9)), "a")


def test_models_of_another_kind_are_refused():
    for session in (Fake(("n", 5)), Fake(kind="tensor(int64)")):
        with pytest.raises(ConfigError, match="one input"):
            OnnxEmbedder(session, "a")
    with pytest.raises(ConfigError, match="Pixels lie in"):
        OnnxEmbedder(Fake(), "a", span="1..2")
    for answer in (
        lambda p: np.zeros((len(p), 4), np.float32),
        lambda p: np.full((len(p), 4), np.nan, np.float32),
        lambda p: np.ones((1, 4), np.float32),
    ):
        with pytest.raises(DataError):
            OnnxEmbedder(Fake(answer=answer), "a").embed(faces())


def test_what_is_no_model_is_named(tmp_path):
    pytest.importorskip("onnxruntime")
    (tmp_path / "odd.onnx").write_bytes(b"<html>" * 40)
    with pytest.raises(FormatError, match="no ONNX model"):
        OnnxEmbedder.open(tmp_path / "odd.onnx")
    with pytest.raises(FormatError):
        OnnxEmbedder.open(tmp_path / "nothing.onnx")
    with pytest.raises(FormatError):
        OnnxEmbedder.open(tmp_path)
