"""Patches, timesteps and labels: values against convolution and formula, and label dropout."""

import math

import pytest
import torch
import torch.nn.functional as F

from vidkern.nn import LabelEmbedder, PatchEmbed, TimestepEmbedder, unpatchify


@pytest.mark.parametrize("frames", [1, 2])
def test_patches_are_the_convolution_that_strides_by_its_kernel(frames):
    embed = PatchEmbed(2, 3, 16, frames)
    torch.nn.init.normal_(embed.proj.bias)
    x = torch.randn(2, 4, 3, 6, 10)
    kernel = embed.proj.weight.reshape(16, 3, frames, 2, 2)
    plain = F.conv3d(x.transpose(1, 2), kernel, embed.proj.bias, stride=(frames, 2, 2))
    tokens = embed(x)
    assert tokens.shape == (2, 4 // frames, 15, 16)
    assert tokens.is_contiguous()
    torch.testing.assert_close(tokens, plain.flatten(3).permute(0, 2, 3, 1), rtol=1e-5, atol=1e-5)


def test_patches_of_a_view_are_those_of_its_copy():
    embed, x = PatchEmbed(2, 3, 16), torch.randn(2, 6, 3, 4, 4)
    assert torch.equal(embed(x[:, 1:5]), embed(x[:, 1:5].contiguous()))


def test_patches_that_do_not_divide_the_clip_are_refused():
    with pytest.raises(ValueError, match=r"multiples of the patch \(2, 2, 2\), got \(3, 4, 4\)"):
        PatchEmbed(2, 3, 16, frames=2)(torch.randn(1, 3, 3, 4, 4))


@pytest.mark.parametrize("frames", [1, 2])
def test_unpatchify_puts_every_value_where_its_patch_lies(frames):
    channels, p, rows, columns = 3, 2, 2, 4
    tokens = torch.randn(2, 3, rows * columns, frames * p * p * channels)
    clip = unpatchify(tokens, (rows, columns), p, frames)
    assert clip.shape == (2, 3 * frames, channels, rows * p, columns * p)
    for f, c, h, w in [(0, 0, 0, 0), (2, 1, 3, 5), (3 * frames - 1, 2, 1, 6)]:
        place = ((f % frames * p + h % p) * p + w % p) * channels + c
        assert torch.equal(clip[:, f, c, h, w], tokens[:, f // frames, h // p * columns + w // p, place])


@pytest.mark.parametrize("shape", [(3,), (2, 4)])
def test_timesteps_of_any_shape_are_the_formula(shape):
    embed = TimestepEmbedder(32)
    t = torch.randint(0, 1000, shape)
    angles = t[..., None].double() * torch.exp(-math.log(10000) * torch.arange(128).double() / 128)
    frequencies = torch.cat([angles.cos(), angles.sin()], dim=-1)
    plain = embed.double().mlp(frequencies)
    torch.testing.assert_close(embed.float()(t).double(), plain, rtol=1e-4, atol=1e-5)


def test_labels_drop_whole_samples_in_training_only():
    embed = LabelEmbedder(10, 8, dropout=0.25)
    labels = torch.randint(0, 10, (4000, 3))
    null = embed.embedding_table.weight[10]
    torch.manual_seed(0)
    dropped = (embed(labels) == null).all(-1)
    assert torch.equal(dropped.any(1), dropped.all(1))
    # 5 standard deviations of a binomial
    assert abs(dropped[:, 0].float().mean() - 0.25) < 5 * math.sqrt(0.25 * 0.75 / 4000)
    torch.manual_seed(0)
    assert torch.equal(embed(labels)[~dropped], embed.embedding_table(labels)[~dropped])
    embed.eval()
    assert torch.equal(embed(labels), embed.embedding_table(labels))


def test_labels_can_be_null_on_purpose():
    embed = LabelEmbedder(10, 8).eval()
    assert torch.equal(embed(torch.tensor([10]))[0], embed.embedding_table.weight[10])
