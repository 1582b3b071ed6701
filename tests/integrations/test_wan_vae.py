"""The patched AutoencoderKLWan against the unpatched one: Wan 2.1 and 2.2, decode and encode, whole and tiled."""

import copy

import pytest
import torch

from tests.integrations.vae_cases import WAN21, WAN22, assert_same_gradients, patched, peak_bytes, relative, tiling, wan
from vidkern.integrations import streams

CONFIGS = {"2.1": WAN21, "2.2": WAN22}
EQUAL = 2e-5  # relative, in float32
SWITCHES = ("conv", "norm", "resample", "shortcut", "attention", "assembly")


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request):
    """The unpatched and the patched model."""
    model = wan(CONFIGS[request.param])
    return model, patched(model)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def video(model, frames, batch=1, height=32, width=48):
    patch = model.config.patch_size or 1
    return torch.randn(batch, 3, frames, height * patch, width * patch)


def latents(frames, batch=1, height=4, width=6):
    return torch.randn(batch, 4, frames, height, width)


def decoded(model, z, **options):
    return model.decode(z, **options).sample


def encoded(model, x):
    return model.encode(x).latent_dist.parameters


@torch.no_grad()
@pytest.mark.parametrize("frames", [1, 2, 4])
def test_decode(pair, frames):
    theirs, ours = pair
    z = latents(frames, batch=2)
    clip = decoded(ours, z)
    assert clip.shape[2] == 4 * frames - 3
    assert clip.is_contiguous()
    assert relative(clip, decoded(theirs, z)) < EQUAL


@torch.no_grad()
@pytest.mark.parametrize("frames", [1, 5, 9, 11])  # of 11, diffusers leaves out the last two
def test_encode(pair, frames):
    theirs, ours = pair
    x = video(theirs, frames, batch=2)
    assert relative(encoded(ours, x), encoded(theirs, x)) < EQUAL


@torch.no_grad()
def test_float64(pair):
    theirs, ours = (copy.deepcopy(model).double() for model in pair)
    x, z = video(theirs, 5).double(), latents(3).double()
    assert relative(encoded(ours, x), encoded(theirs, x)) < 1e-12
    assert relative(decoded(ours, z), decoded(theirs, z)) < 1e-6  # diffusers upsamples in float32


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True], ids=["cast", "autocast"])
def test_sixteen_bits_are_no_further_from_float64(pair, dtype, autocast):
    inputs = {decoded: latents(2), encoded: video(pair[0], 9)}
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


def tiles(pair, height, width, stride_height, stride_width):
    """Let the models work in tiles of so many positions before unpatchifying."""
    patch = pair[0].config.patch_size or 1
    names = "tile_sample_min_height", "tile_sample_min_width", "tile_sample_stride_height", "tile_sample_stride_width"
    sizes = (size * patch for size in (height, width, stride_height, stride_width))
    return tiling(pair, **dict(zip(names, sizes, strict=True)))


@torch.no_grad()
@pytest.mark.parametrize("size", [(7, 11), (4, 9), (9, 5)], ids=str)
def test_tiles(pair, size):
    theirs, ours = pair
    z = latents(2, height=size[0], width=size[1])
    x = video(theirs, 5, height=8 * size[0], width=8 * size[1])
    with tiles(pair, 32, 48, 24, 32):
        assert relative(decoded(ours, z), decoded(theirs, z)) < EQUAL
        assert relative(encoded(ours, x), encoded(theirs, x)) < EQUAL


@torch.no_grad()
def test_slices_and_tuples(pair, monkeypatch):
    theirs, ours = pair
    z = latents(2, batch=2)
    for model in pair:
        monkeypatch.setattr(model, "use_slicing", True)
    assert relative(decoded(ours, z), decoded(theirs, z)) < EQUAL
    assert relative(ours.decode(z, return_dict=False)[0], decoded(theirs, z)) < EQUAL


@torch.no_grad()
def test_parts_without_caches(pair):
    theirs, ours = (model.decoder.mid_block for model in pair)
    x = torch.randn(1, theirs.dim, 3, 4, 5)
    assert relative(ours(x), theirs(x)) < EQUAL
    if pair[0].config.patch_size is None:  # without caches Wan 2.2's shortcuts do not fit
        theirs, ours = pair
        x, z = video(theirs, 4), latents(3)
        assert relative(ours.encoder(x), theirs.encoder(x)) < EQUAL
        assert relative(ours.decoder(z), theirs.decoder(z)) < EQUAL


@torch.no_grad()
@pytest.mark.parametrize("switch", SWITCHES)
def test_each_switch_alone_and_left_out(pair, switch):
    theirs = pair[0]
    z, x = latents(3), video(theirs, 9)
    clip, parameters = decoded(theirs, z), encoded(theirs, x)
    for switches in ({name: name == switch for name in SWITCHES}, {switch: False}):
        ours = patched(theirs, **switches)
        assert relative(decoded(ours, z), clip) < EQUAL
        assert relative(encoded(ours, x), parameters) < EQUAL


def test_gradients(pair):
    theirs, ours = pair
    x, z = video(theirs, 5), latents(2)

    def loss(model, x, z):
        return encoded(model, x).square().mean() + decoded(model, z).square().mean()

    assert_same_gradients(theirs, ours, loss, x, z, EQUAL)


def test_what_is_padded_for_cudnn(pair, monkeypatch):
    monkeypatch.setattr(streams, "_by_cudnn", lambda *_: True)

    def loss(model, x, z):
        return encoded(model, x).square().mean() + decoded(model, z).square().mean()

    x, z = video(pair[0], 5), latents(2)
    with torch.no_grad():
        assert relative(decoded(pair[1], z), decoded(pair[0], z)) < EQUAL
    assert_same_gradients(*pair, loss, x, z, EQUAL)


def test_gradients_through_tiles(pair):
    z = latents(2, height=4, width=9)
    with tiles(pair, 32, 48, 24, 32):
        assert_same_gradients(*pair, lambda model, z: decoded(model, z).square().mean(), z, EQUAL)


def test_dropout_drops_in_training_only():
    theirs = wan(dropout=0.5)
    ours = patched(theirs)
    z = latents(2)
    with torch.no_grad():
        assert relative(decoded(ours, z), decoded(theirs, z)) < EQUAL
        ours.train()
        dropped = decoded(ours, z)
        assert relative(dropped, decoded(theirs, z)) > 0.01
        assert not torch.equal(dropped, decoded(ours, z))


@torch.no_grad()
def test_compile(pair):
    theirs, ours = pair
    z = latents(2)
    decode = torch.compile(ours.decode, backend="aot_eager", fullgraph=True)
    assert relative(decode(z).sample, decoded(theirs, z)) < EQUAL


@torch.no_grad()
@pytest.mark.parametrize("tiled", [False, True], ids=["whole", "tiled"])
def test_decoding_needs_less_memory(pair, tiled):
    z = latents(4, height=8, width=8)
    with tiles(pair, 32 if tiled else 64, 64, 24 if tiled else 48, 48):
        theirs, ours = (peak_bytes(lambda model=model: decoded(model, z)) for model in pair)
    assert ours < 0.6 * theirs
