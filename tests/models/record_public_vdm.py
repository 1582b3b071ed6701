"""Records what the public VDM code gives for our weights; run by hand, with einops_exts and rotary_embedding_torch.

python -m tests.models.record_public_vdm <clone of lucidrains/video-diffusion-pytorch>

Of the public Unet3D, what is built otherwise here is replaced first: the timestep's embedding, the linear attention in
space (by the full one that it has in its middle), the convolutions that halve and double the resolution, and the
epsilon of its norms.
"""

import argparse
import sys
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from models.unet3d.attention import ResidualAttention
from models.unet3d.residual import ResidualBlock
from models.vdm import VDM
from tests.models.public_vdm import CONFIG, RECORDED, public_inputs, public_model, public_results


def load(clone: Path) -> ModuleType:
    """Run the file up to its diffusion, without what only its training imports."""
    source = (clone / "video_diffusion_pytorch" / "video_diffusion_pytorch.py").read_text()
    for name in ("torchvision", "video_diffusion_pytorch", "video_diffusion_pytorch.text"):
        sys.modules[name] = MagicMock()
    module = ModuleType("public_vdm_code")
    exec(source.partition("# gaussian diffusion trainer class")[0], vars(module))
    module.RMSNorm.forward = _rms_norm
    return module


def _rms_norm(self: Any, x: Tensor) -> Tensor:
    return x * (x.square().mean(1, keepdim=True) + 1e-6).rsqrt() * self.gamma


def build(public: ModuleType) -> Any:
    """Return the public network with the parts replaced that are built otherwise here."""
    heads, base, multipliers = CONFIG.num_heads, CONFIG.base_channels, CONFIG.channel_multipliers
    theirs = public.Unet3D(
        base,
        cond_dim=4 * base,
        dim_mults=multipliers,
        attn_heads=heads,
        init_kernel_size=3,
        use_sparse_linear_attn=False,
    )

    def space(channels: int) -> nn.Module:
        attention = public.Attention(channels, heads=heads, dim_head=CONFIG.head_size)
        over_positions = public.EinopsToAndFrom("b c f h w", "b f (h w) c", attention)
        return public.Residual(public.PreNorm(channels, over_positions))

    channels = [base, *(base * multiplier for multiplier in multipliers)]
    last = len(multipliers) - 1
    for i, (into, out) in enumerate(pairwise(channels)):
        down, up = theirs.downs[i], theirs.ups[last - i]
        down[2], up[2] = space(out), space(into)
        if i < last:
            down[4] = nn.Conv3d(out, out, (1, 3, 3), (1, 2, 2), (0, 1, 1))
        if i > 0:
            conv = nn.Conv3d(into, into, (1, 3, 3), padding=(0, 1, 1))
            up[4] = nn.Sequential(nn.Upsample(scale_factor=(1, 2, 2)), conv)
    return theirs


def copy_weights(theirs: Any, ours: VDM) -> None:
    """Give the public network our weights; every one of its parameters gets one."""
    theirs.time_mlp = ours.t_embedder
    copied = set(ours.t_embedder.parameters())

    def put(parameter: Tensor, value: Tensor) -> None:
        parameter.data.copy_(value.data.reshape(parameter.shape))
        copied.add(parameter)

    def copy(target: nn.Module, source: nn.Module) -> None:
        for name, parameter in target.named_parameters():
            put(parameter, source.get_parameter(name))

    def residual(target: Any, source: ResidualBlock) -> None:
        if target.mlp is None:
            put(target.block1.norm.gamma, 1 + source.modulation[1].bias.chunk(2)[0])
        else:
            copy(target.mlp[1], source.modulation[1])
            put(target.block1.norm.gamma, torch.ones_like(source.weight))
        copy(target.block1.proj, source.conv1)
        copy(target.block2.proj, source.conv2)
        put(target.block2.norm.gamma, source.weight)
        copy(target.res_conv, source.skip)

    def attention(target: Any, source: ResidualAttention) -> None:
        put(target.fn.norm.gamma, 1 + source.norm_scale)
        target.fn.norm.eps = 1e-6
        put(target.fn.fn.fn.to_qkv.weight, source.qkv.weight)
        put(target.fn.fn.fn.to_out.weight, source.proj.weight)

    put(theirs.null_cond_emb, ours.text_pool.null)
    copy(theirs.time_rel_pos_bias, ours.relative_bias)
    copy(theirs.init_conv, ours.in_conv)
    attention(theirs.init_temporal_attn, ours.in_time)
    last = len(ours.downs) - 1
    for i in range(len(ours.downs)):
        for target, source in ((theirs.downs[i], ours.downs[i]), (theirs.ups[last - i], ours.ups[i])):
            residual(target[0], source.block1)
            residual(target[1], source.block2)
            attention(target[2], source.space)
            attention(target[3], source.time)
        if i < last:
            copy(theirs.downs[i][4], ours.downsamplers[i])
        if i > 0:
            copy(theirs.ups[last - i][4][1], ours.upsamplers[i - 1])
    residual(theirs.mid_block1, ours.middle.block1)
    attention(theirs.mid_spatial_attn, ours.middle.space)
    attention(theirs.mid_temporal_attn, ours.middle.time)
    residual(theirs.mid_block2, ours.middle.block2)
    residual(theirs.final_conv[0], ours.out_block)
    copy(theirs.final_conv[1], ours.out_linear)
    left = [name for name, p in theirs.named_parameters() if p not in copied and not name.endswith("freqs")]
    assert not left, left


def main() -> None:
    """Record the call into RECORDED."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("clone", type=Path)
    torch.set_num_threads(1)
    public = load(parser.parse_args().clone)
    ours, tensors = public_model(), public_inputs()
    theirs = build(public)
    copy_weights(theirs, ours)
    text = ours.text_pool(tensors["text"], torch.tensor([False])).detach()

    def call() -> Tensor:
        return theirs(tensors["x"].movedim(2, 1), tensors["t"], text).movedim(1, 2)

    bias = theirs.time_rel_pos_bias.relative_attention_bias.weight
    save_file(public_results(call, bias, theirs.init_conv.weight), RECORDED)


if __name__ == "__main__":
    main()
