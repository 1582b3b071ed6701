"""The patched AutoencoderKLCogVideoX against the unpatched one: decode and encode, whole and tiled."""

import copy

import pytest
import torch
from diffusers import AutoencoderKLCogVideoX

from tests.integrations.vae_cases import (
    COGVIDEOX,
    assert_same_gradients,
    cogvideox,
    patched,
    peak_bytes,
    relative,
    tiling,
)
from vidkern.integrations import apply_vidkern_to_cogvideox_vae, streams

EQUAL = 2e-5  # relative, in float32
SWITCHES = ("conv", "norm", "resample", "assembly")


@pytest.fixture(scope="module")
def pair():
    """The unpatched and the patched model."""
    model = cogvideox()
    return model, patched(model)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def video(frames, batch=1, height=32, width=48):
    return torch.randn(batch, 3, frames, height, width)


def latents(frames, batch=1, height=4, width=6):
    return torch.randn(batch, 4, frames, height, width)


def decoded(model, z, **options):
    return model.decode(z, **options).sample


def encoded(model, x):
    return model.encode(x).latent_dist.parameters


@torch.no_grad()
@pytest.mark.parametrize("frames", [1, 2, 3, 5, 6])  # chunks of 1; 2; 3; 3, 2; 2, 2, 2 latent frames
def test_decode(pair, frames):
    theirs, ours = pair
    z = latents(frames, batch=2)
    clip = decoded(ours, z)
    assert clip.is_contiguous()
    assert relative(clip, decoded(theirs, z)) < EQUAL


@torch.no_grad()
@pytest.mark.parametrize("frames", [1, 5, 8, 9, 17])
def test_encode(pair, frames):
    theirs, ours = pair
    x = video(frames, batch=2)
    assert relative(encoded(ours, x), encoded(theirs, x)) < EQUAL


@torch.no_grad()
@pytest.mark.parametrize("size", [1, 3, 4])
def test_other_chunks(pair, monkeypatch, size):
    for model in pair:
        monkeypatch.setattr(model, "num_latent_frames_batch_size", size)
    theirs, ours = pair
    z = latents(7)
    assert relative(decoded(ours, z), decoded(theirs, z)) < EQUAL


@torch.no_grad()
def test_float64(pair):
    theirs, ours = (copy.deepcopy(model).double() for model in pair)
    x, z = video(9).double(), latents(3).double()
    assert relative(encoded(ours, x), encoded(theirs, x)) < 1e-12
    assert relative(decoded(ours, z), decoded(theirs, z)) < 1e-12


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True], ids=["cast", "autocast"])
def test_sixteen_bits_are_no_further_from_float64(pair, dtype, autocast):
    inputs = {decoded: latents(2), encoded: video(9)}
    exact = {run: run(copy.deepcopy(pair[0]).double(), value.double()) for run, value in inputs.items()}
    errors = []
    for model in pair:
        model = copy.deepcopy(model) if autocast else copy.deepcopy(model).to(dtype)
        for run, value in inputs.items():
            with torch.autocast("cpu", dtype, enabled=autocast):
                got = run(model, value if autocast else value.to(dtype))
            assert got.dtype == dtype
            errors.append(float((got.double() - exact[run]).abs().mean()))
    theirs, ours = errors[:2], errors[2:]
    assert all(mine <= 1.25 * yours for mine, yours in zip(ours, theirs, strict=True)), errors


@torch.no_grad()
@pytest.mark.parametrize("size", [(7, 11), (5, 3), (4, 8)], ids=str)
@pytest.mark.parametrize("sample", [(32, 48), (36, 44)], ids=str)  # tiles of 36 x 44 have 4 x 5 latents
def test_decoding_in_tiles(pair, size, sample):
    z = latents(3, height=size[0], width=size[1])
    options = {"tile_overlap_factor_height": 0.3, "tile_overlap_factor_width": 0.2}
    with tiling(pair, tile_sample_min_height=sample[0], tile_sample_min_width=sample[1], **options):
        theirs, ours = (decoded(model, z) for model in pair)
    assert ours.shape == theirs.shape
    assert relative(ours, theirs) < EQUAL


@torch.no_grad()
def test_encoding_in_tiles(pair):
    with tiling(pair, tile_sample_min_height=32, tile_sample_min_width=48):
        theirs, ours = (encoded(model, x) for x in [video(9, height=48, width=72)] for model in pair)
    assert relative(ours, theirs) < EQUAL


@torch.no_grad()
def test_slices_and_tuples(pair, monkeypatch):
    theirs, ours = pair
    z = latents(2, batch=2)
    for model in pair:
        monkeypatch.setattr(model, "use_slicing", True)
    assert relative(decoded(ours, z), decoded(theirs, z)) < EQUAL
    assert relative(ours.decode(z, return_dict=False)[0], decoded(theirs, z)) < EQUAL


@torch.no_grad()
@pytest.mark.parametrize("switch", SWITCHES)
def test_each_switch_alone_and_left_out(pair, switch):
    theirs = pair[0]
    z, x = latents(5), video(9)
    clip, parameters = decoded(theirs, z), encoded(theirs, x)
    for switches in ({name: name == switch for name in SWITCHES}, {switch: False}):
        ours = patched(theirs, **switches)
        assert relative(decoded(ours, z), clip) < EQUAL
        assert relative(encoded(ours, x), parameters) < EQUAL


def test_gradients(pair):
    def loss(model, x, z):
        return encoded(model, x).square().mean() + decoded(model, z).square().mean()

    assert_same_gradients(*pair, loss, video(9), latents(3), EQUAL)


def test_what_is_padded_for_cudnn(pair, monkeypatch):
    monkeypatch.setattr(streams, "_by_cudnn", lambda *_: True)

    def loss(model, x, z):
        return encoded(model, x).square().mean() + decoded(model, z).square().mean()

    x, z = video(9), latents(3)
    with torch.no_grad():
        assert relative(decoded(pair[1], z), decoded(pair[0], z)) < EQUAL
    assert_same_gradients(*pair, loss, x, z, EQUAL)


def test_gradients_through_checkpoints_and_tiles():
    theirs = cogvideox().train()
    theirs.enable_gradient_checkpointing()
    theirs.enable_tiling(32, 48, 0.25, 0.5)
    z = latents(3, height=4, width=9)
    assert_same_gradients(theirs, patched(theirs), lambda model, z: decoded(model, z).square().mean(), z, EQUAL)


@torch.no_grad()
def test_compile(pair):
    theirs, ours = pair
    z = latents(3)
    decode = torch.compile(ours.decode, backend="aot_eager", fullgraph=True)
    assert relative(decode(z).sample, decoded(theirs, z)) < EQUAL


def test_another_activation_is_refused():
    model = AutoencoderKLCogVideoX(**COGVIDEOX, act_fn="relu")
    with pytest.raises(ValueError, match=r"nonlinearity must be a torch\S*SiLU itself, got another class: \S*ReLU"):
        apply_vidkern_to_cogvideox_vae(model)
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_a_subclass_is_refused():
    class Another(AutoencoderKLCogVideoX):
        pass

    with pytest.raises(ValueError, match="got a subclass of it"):
        apply_vidkern_to_cogvideox_vae(Another(**COGVIDEOX))


@torch.no_grad()
@pytest.mark.parametrize("tiled", [False, True], ids=["whole", "tiled"])
def test_decoding_needs_less_memory(pair, tiled):
    z = latents(6, height=8, width=8)
    with tiling(pair, tile_sample_min_height=32 if tiled else 64, tile_sample_min_width=64):
        theirs, ours = (peak_bytes(lambda model=model: decoded(model, z)) for model in pair)
    assert ours < 0.7 * theirs
