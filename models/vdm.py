"""VDM (Ho et al. 2022): a 3D U-Net factorised over space and time, of clips or of motion (flow and occlusion)."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.clip_config import ClipConfig
from models.conditions import check_condition, resolve_dropped
from models.recompute import Recompute, checkpointed
from models.unet3d.attention import SpaceAttention, TimeAttention
from models.unet3d.residual import KERNEL, ResidualBlock
from models.unet3d.text_pool import TextPool
from vidkern.nn import (
    CausalConv3d,
    RelativePositionBias,
    Rope,
    TimestepEmbedder,
    UpsampleConv,
    rotary_tables,
    zero_linear,
)
from vidkern.ops.attention.op import MAX_FRAMES, TEMPORAL_HEAD_SIZES

#: Buckets of the relative bias of temporal attention, and the frames from which on they are all alike.
BUCKETS, MAX_DISTANCE = 32, 32

#: Channels are multiples of it, as the norms' kernels want them.
GRANULE = 8


@dataclass(frozen=True)
class VDMConfig(ClipConfig):
    """What a VDM is made of; the defaults diffuse 16 frames of motion at 32 x 32.

    Attributes:
        input_size: height and width of a frame, or (height, width): multiples of 2 to the number of levels less one.
        in_channels: C of the input: 3 for motion; the output has 2C with ``learn_sigma``.
        num_frames: frames of the training clips, at most 256. Other counts work too.
        base_channels: channels at the full resolution, a multiple of 8.
        channel_multipliers: of ``base_channels``, one for each level; each level has half the resolution of the last.
        num_heads: H of every attention.
        head_size: d of every attention: 32, 64, 72, 80, 96 or 128.
        spatial_from: the first level with attention over the positions of a frame, whose cost grows with the fourth
            power of the resolution; 0 is the full resolution. The middle has it too, below all levels, and attention
            over frames is everywhere.
        learn_sigma: also predict the variance's interpolation (learned range).
        text_width: W of a text's token embeddings; None is without text.
        reference_channels: channels of the reference frame; None is without one.
        text_dropout: how often a sample loses its text in training.
        reference_dropout: how often a sample loses its reference frame in training.
    """

    input_size: int | tuple[int, int] = 32
    in_channels: int = 3
    num_frames: int = 16
    base_channels: int = 64
    channel_multipliers: tuple[int, ...] = (1, 2, 4, 8)
    num_heads: int = 8
    head_size: int = 32
    spatial_from: int = 0
    learn_sigma: bool = False
    text_width: int | None = None
    reference_channels: int | None = None
    text_dropout: float = 0.1
    reference_dropout: float = 0.1

    def __post_init__(self) -> None:
        """Refuse what cannot be built."""
        sizes = ", ".join(map(str, TEMPORAL_HEAD_SIZES))
        whole = all(size > 0 and size % self.downscale == 0 for size in self.frame_size)
        rules = (
            ("channel_multipliers", min(self.channel_multipliers, default=0) > 0, "at least one, and positive"),
            ("base_channels", self.base_channels > 0 and self.base_channels % GRANULE == 0, f"a multiple of {GRANULE}"),
            ("input_size", whole, f"a multiple of {self.downscale}, which is halved at each level after the first"),
            ("in_channels", self.in_channels > 0, "positive"),
            ("num_frames", 0 < self.num_frames <= MAX_FRAMES, f"from 1 to {MAX_FRAMES}"),
            ("num_heads", self.num_heads > 0, "positive"),
            ("head_size", self.head_size in TEMPORAL_HEAD_SIZES, f"one of {sizes}"),
            ("spatial_from", self.spatial_from >= 0, "at least 0"),
            ("text_width", self.text_width is None or self.text_width > 0, "positive, or None"),
            ("reference_channels", self.reference_channels is None or self.reference_channels > 0, "positive, or None"),
            ("text_dropout", 0 <= self.text_dropout < 1, "in [0, 1)"),
            ("reference_dropout", 0 <= self.reference_dropout < 1, "in [0, 1)"),
        )
        self.refuse_unless(rules)

    @property
    def downscale(self) -> int:
        """How much smaller the last level's frames are along each side."""
        return 2 ** max(len(self.channel_multipliers) - 1, 0)

    @property
    def num_classes(self) -> None:
        """None: no class condition."""
        return None

    @property
    def conditions(self) -> tuple[str, ...]:
        """The names of the conditions that the network wants."""
        return tuple(self.dropouts)

    @property
    def dropouts(self) -> dict[str, float]:
        """How often each condition is dropped in training."""
        text = {} if self.text_width is None else {"text": self.text_dropout}
        reference = {} if self.reference_channels is None else {"reference": self.reference_dropout}
        return text | reference


class Level(nn.Module):
    """What one resolution does on the way down or up: two residual blocks, attention in space, then in time."""

    def __init__(self, config: VDMConfig, level: int, in_channels: int, out_channels: int, condition_size: int) -> None:
        super().__init__()
        heads = config.num_heads, config.head_size
        self.block1 = ResidualBlock(in_channels, out_channels, condition_size)
        self.block2 = ResidualBlock(out_channels, out_channels, condition_size)
        self.space = SpaceAttention(out_channels, *heads) if level >= config.spatial_from else None
        self.time = TimeAttention(out_channels, *heads)

    def forward(self, x: Tensor, condition: Tensor, rope: Rope, bias: Tensor) -> Tensor:
        """(B, F, H, W, C) -> (B, F, H, W, C')."""
        x = self.block2(self.block1(x, condition), condition)
        if self.space is not None:
            x = self.space(x, rope, bias)
        return self.time(x, rope, bias)


class Middle(nn.Module):
    """The end of the way down: both attentions between two residual blocks."""

    def __init__(self, config: VDMConfig, channels: int, condition_size: int) -> None:
        super().__init__()
        heads = config.num_heads, config.head_size
        self.block1 = ResidualBlock(channels, channels, condition_size)
        self.space = SpaceAttention(channels, *heads)
        self.time = TimeAttention(channels, *heads)
        self.block2 = ResidualBlock(channels, channels, condition_size)

    def forward(self, x: Tensor, condition: Tensor, rope: Rope, bias: Tensor) -> Tensor:
        """(B, F, H, W, C) -> (B, F, H, W, C)."""
        x = self.space(self.block1(x, condition), rope, bias)
        return self.block2(self.time(x, rope, bias), condition)


class VDM(nn.Module):
    """The network: epsilon (or what else the process wants) of noisy clips at given timesteps.

    Convolutions see one frame, (1, 3, 3); attention over a frame's positions is followed by attention over the frames
    of each position, with rotary positions and one learned bias of T5's buckets that all layers share. Frames meet
    nowhere else: norms are taken of one position. The output layer is zero to begin with.

    Text is pooled into one vector, which goes beside the timestep's into every block. The reference frame is resized
    and joined to every frame's channels.

    Inside, clips are (B, F, H, W, C): memory in which convolutions read channels_last_3d and attention reads tokens
    (B, F, H * W, C). So neither is copied for the other; what is copied is the input (joined to the reference frame),
    the two sides of each skip connection (a concatenation) and the output.

    Set ``activation_checkpointing`` to keep only the levels' inputs for the backward pass and compute the rest again,
    or, with ``recompute`` "cheap", to keep the results of products, convolutions and attention too.
    """

    def __init__(self, config: VDMConfig) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        self.recompute: Recompute = "all"
        base = config.base_channels
        size = 4 * base
        self.t_embedder = TimestepEmbedder(size)
        if config.text_width is not None:
            self.text_pool = TextPool(config.text_width, size)
            size += size
        self.relative_bias = RelativePositionBias(config.num_heads, BUCKETS, MAX_DISTANCE)
        self.in_conv = CausalConv3d(config.in_channels + (config.reference_channels or 0), base, KERNEL)
        self.in_time = TimeAttention(base, config.num_heads, config.head_size)
        widths = list(pairwise([base, *(base * multiplier for multiplier in config.channel_multipliers)]))
        deepest = widths[-1][1]
        self.downs = nn.ModuleList(Level(config, i, *pair, size) for i, pair in enumerate(widths))
        self.downsamplers = nn.ModuleList(CausalConv3d(out, out, KERNEL, stride=(1, 2, 2)) for _, out in widths[:-1])
        self.middle = Middle(config, deepest, size)
        self.ups = nn.ModuleList(Level(config, i, 2 * out, into, size) for i, (into, out) in enumerate(widths))
        self.upsamplers = nn.ModuleList(UpsampleConv(into, into) for into, _ in widths[1:])
        self.out_block = ResidualBlock(2 * base, base, size)
        self.out_linear = zero_linear(base, config.out_channels)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        *,
        text: Tensor | None = None,
        reference: Tensor | None = None,
        num_images: int = 0,
        dropped: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Predict the noise, and with ``learn_sigma`` the variance, of noisy clips.

        Args:
            x: (B, F, C, H, W) noisy motion, pixels or latents. F at most 256; H and W multiples of the configuration's
                ``downscale``; none need be those of the configuration.
            t: timesteps: (B,), or (B, F) with one for each frame.
            text: (B, L, W) token embeddings, of any L. Wanted by a model with ``text_width`` only.
            reference: (B, C', H', W') the reference frame, of any size: it is resized to x's by area. Wanted by a
                model with ``reference_channels`` only.
            num_images: joint training on images: so many of x's last frames are single images, each a clip of one frame
                with null conditions: attention over frames gives it its own value (VDM's mask).
            dropped: condition name -> bool (B,), the samples without it: a learned null vector in the text's place,
                zeros in the reference frame's. None draws them in training by the configuration's dropouts.

        Returns:
            (B, F, C, H, W), or (B, F, 2C, H, W) = [epsilon, sigma] along channels with ``learn_sigma``; in the dtype of
            the last linear layer (autocast's, under autocast).

        Raises:
            ValueError: a shape that does not fit, or a condition that is missing or unknown to this model.
        """
        self._check(x, t, text, reference, num_images)
        drops = resolve_dropped(dropped, self.config.dropouts, len(x), x.device, training=self.training)
        frames = x.shape[1] - num_images
        time = self.t_embedder(t if t.dim() == 2 else t[:, None])  # (B, 1 or F, D)
        none = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        prompt = None if text is None else self.text_pool(text, drops.get("text", none))
        if reference is not None and "reference" in drops:
            reference = reference.masked_fill(drops["reference"][:, None, None, None], 0)
        if not num_images:
            return self._denoise(x, time, prompt, reference)
        clips = self._denoise(x[:, :frames], time[:, :frames], prompt, reference)
        image_time = time.expand(-1, x.shape[1], -1)[:, frames:]
        return torch.cat([clips, self._denoise_images(x[:, frames:], image_time)], dim=1)

    def _denoise_images(self, x: Tensor, time: Tensor) -> Tensor:
        """Run (B, I) images as B * I clips of one frame, with null conditions: (B, I, C, H, W) -> the same."""
        images, count = x.flatten(0, 1)[:, None], x.shape[0] * x.shape[1]
        prompt = None if self.config.text_width is None else self.text_pool.null.expand(count, -1)
        channels = self.config.reference_channels
        reference = None if channels is None else x.new_zeros(count, channels, *x.shape[3:])
        return self._denoise(images, time.flatten(0, 1)[:, None], prompt, reference).view(
            *x.shape[:2], -1, *x.shape[3:]
        )

    def _denoise(self, x: Tensor, time: Tensor, prompt: Tensor | None, reference: Tensor | None) -> Tensor:
        """Run the network: x (B, F, C, H, W), time (B, 1 or F, D), prompt (B, D) and reference (B, C, h, w) or None."""
        condition = time
        if prompt is not None:
            condition = torch.cat([time, prompt[:, None].expand(-1, time.shape[1], -1)], dim=-1)
        bias = self.relative_bias(x.shape[1])
        h = self.in_conv(_join_reference(x, reference).movedim(-1, 1)).movedim(1, -1)
        context = condition, self._rope(h), bias
        first = h = self.in_time(h, *context[1:])
        skips = []
        for i, level in enumerate(self.downs):
            h = self._run(level, h, *context)
            skips.append(h)
            if i < len(self.downsamplers):
                h = self.downsamplers[i](h.movedim(-1, 1)).movedim(1, -1)
        h = self._run(self.middle, h, *context)
        for i in reversed(range(len(self.ups))):
            h = self._run(self.ups[i], torch.cat([h, skips.pop()], dim=-1), *context)
            if i > 0:
                h = self.upsamplers[i - 1](h.movedim(-1, 1)).movedim(1, -1)
        h = self.out_block(torch.cat([h, first], dim=-1), condition)
        return self.out_linear(h).movedim(-1, 2).contiguous()

    def _run(self, part: nn.Module, *inputs: Any) -> Tensor:
        if self.activation_checkpointing and torch.is_grad_enabled():
            return checkpointed(part, *inputs, recompute=self.recompute)
        return part(*inputs)

    def _rope(self, h: Tensor) -> Rope:
        """(cos, sin) of h's frames, in float32 or wider."""
        cos, sin = rotary_tables(h.shape[1], self.config.head_size, h.device)
        dtype = torch.promote_types(h.dtype, torch.float32)
        return cos.to(dtype), sin.to(dtype)

    def _check(self, x: Tensor, t: Tensor, text: Tensor | None, reference: Tensor | None, num_images: int) -> None:
        config = self.config
        if x.dim() != 5 or x.shape[2] != config.in_channels:
            raise ValueError(f"x must be (B, F, C = {config.in_channels}, H, W), got {tuple(x.shape)}")
        batch, frames = x.shape[:2]
        if any(size % config.downscale for size in x.shape[3:]):
            raise ValueError(f"x must have H and W multiples of {config.downscale}, got {tuple(x.shape[3:])}")
        if t.shape not in ((batch,), (batch, frames)):
            raise ValueError(f"t must be (B,) = {(batch,)} or (B, F) = {(batch, frames)}, got {tuple(t.shape)}")
        if not 0 <= num_images < frames:
            raise ValueError(f"num_images must be at least 0 and below x's {frames} frames, got {num_images}")
        if frames - num_images > MAX_FRAMES:
            raise ValueError(f"x must have at most {MAX_FRAMES} frames, got F = {frames - num_images}")
        width, channels = config.text_width, config.reference_channels
        check_condition("text", text, None if width is None else (batch, "L", width))
        check_condition("reference", reference, None if channels is None else (batch, channels, "H", "W"))


def _join_reference(x: Tensor, reference: Tensor | None) -> Tensor:
    """Return x (B, F, C, H, W) as (B, F, H, W, C + C'), with the reference frame resized by area in every frame."""
    x = x.movedim(2, -1)
    if reference is None:
        return x.contiguous()
    resized = F.interpolate(reference, size=x.shape[2:4], mode="area").movedim(1, -1)
    return torch.cat([x, resized[:, None].expand(-1, x.shape[1], -1, -1, -1).to(x.dtype)], dim=-1)
