"""S2DM: Stable Diffusion's U-Net run frame by frame, with motion as tokens of its cross-attention and shared noise."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.clip_config import ClipConfig
from models.conditions import check_condition, resolve_dropped
from models.frame_encoder import FrameEncoder
from models.motion_adapter import MotionAdapter
from models.unet import build_unet, load_unet, unet_settings
from vidkern.diffusion.losses import per_frame

#: Channels of motion in the network's form: flow in x and y, occlusion.
MOTION_CHANNELS = 3

#: Channels of the pictures of poses that models.flow stores and models.sample reads; the network takes any.
POSE_CHANNELS = 3


@dataclass(frozen=True)
class S2DMConfig(ClipConfig):
    """What an S2DM is made of; the defaults are Stable Diffusion 1.5's U-Net on the latents of 16 frames of 128 x 128.

    Attributes:
        unet: where the U-Net's first weights come from: a local folder (its own or a pipeline's) or a name on the hub,
            owner/name[/subfolder]. None: they are drawn. The structure is always that of the fields below.
        input_size: height and width of a frame, or (height, width), in latent pixels.
        in_channels: C of the input; the output has 2C with ``learn_sigma``.
        num_frames: frames of the training clips. Other counts work too.
        learn_sigma: also predict the variance's interpolation (learned range).
        block_out_channels: channels of the U-Net's resolutions, each half the one before.
        layers_per_block: residual blocks of a resolution.
        num_heads: heads of every attention.
        cross_attention_dim: D, the width of the condition's tokens.
        norm_groups: groups of the group norms.
        text_width: width W of text embeddings (B, L, W); None is without text.
        image_width: width W of an image's embeddings (B, L, W), as CLIP's; None is without them.
        reference: whether the clip's first frame, like x, is a condition.
        motion: whether flow and occlusion are a condition.
        motion_adapter: whether motion also enters where it lies, besides its tokens: a T2I-Adapter's features (Mou et
            al. 2023) are added to those of the U-Net's way down. Not a part of the published model; see S2DM.
        pose_channels: channels P of a pose map (B, F, P, h, w); None is without pose.
        token_grid: a map (reference, motion, pose) becomes token_grid x token_grid tokens.
        encoder_channels: channels of the maps' encoders, a multiple of 4.
        text_dropout, image_dropout, reference_dropout, motion_dropout, pose_dropout: how often a sample's condition
            becomes its learned null in training, each on its own.
    """

    unet: str | None = None
    input_size: int | tuple[int, int] = 16
    in_channels: int = 4
    num_frames: int = 16
    learn_sigma: bool = False
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    num_heads: int = 8
    cross_attention_dim: int = 768
    norm_groups: int = 32
    text_width: int | None = 768
    image_width: int | None = None
    reference: bool = False
    motion: bool = True
    motion_adapter: bool = False
    pose_channels: int | None = None
    token_grid: int = 8
    encoder_channels: int = 128
    text_dropout: float = 0.1
    image_dropout: float = 0.1
    reference_dropout: float = 0.1
    motion_dropout: float = 0.1
    pose_dropout: float = 0.1

    def __post_init__(self) -> None:
        """Refuse what cannot be built."""
        groups, heads = max(self.norm_groups, 1), max(self.num_heads, 1)
        levels = self.block_out_channels
        divided = len(levels) > 0 and all(c > 0 and c % groups == 0 and c % heads == 0 for c in levels)
        rules = (
            ("input_size", min(self.frame_size) > 0, "positive"),
            ("in_channels", self.in_channels > 0, "positive"),
            ("num_frames", self.num_frames > 0, "positive"),
            ("block_out_channels", divided, f"multiples of norm_groups = {groups} and of num_heads = {heads}"),
            ("layers_per_block", self.layers_per_block > 0, "positive"),
            ("token_grid", self.token_grid > 0, "positive"),
            ("encoder_channels", self.encoder_channels > 0 and self.encoder_channels % 4 == 0, "a multiple of 4"),
            ("motion", bool(self.conditions), "True where there is no other condition: cross-attention wants tokens"),
            ("motion_adapter", self.motion or not self.motion_adapter, "False without motion"),
            *((f"{name}_dropout", 0 <= p < 1, "in [0, 1)") for name, p in self.dropouts.items()),
        )
        self.refuse_unless(rules)

    @property
    def num_classes(self) -> None:
        """No classes: a label is a text here."""
        return None

    @property
    def conditions(self) -> tuple[str, ...]:
        """Names of the conditions, in the order of their tokens."""
        sizes = (self.text_width, self.image_width, self.reference, self.motion, self.pose_channels)
        return tuple(name for name, size in zip(CONDITIONS, sizes, strict=True) if size)

    @property
    def dropouts(self) -> dict[str, float]:
        """How often each condition is dropped in training."""
        return {name: getattr(self, f"{name}_dropout") for name in self.conditions}


#: Every condition that an S2DM can have. Those before "motion" are the clip's, the others are a frame's.
CONDITIONS = ("text", "image", "reference", "motion", "pose")


class S2DM(nn.Module):
    """The network: epsilon of noisy clips, each frame on its own, all that connects them being noise and motion.

    The U-Net (Rombach et al. 2022; diffusers' UNet2DConditionModel) has no temporal module. Frames agree because they
    share one noise in training (``diffusion_loss(..., sharing="shared")``) and in sampling (``sample(...,
    sharing="shared", step_sharing="shared")``) and because each frame's tokens say how it has moved from the first.

    A frame's tokens are those of the clip (text, image, reference), then its own (motion, pose): embeddings of another
    width than D are projected, maps go through a :class:`FrameEncoder`. A dropped condition's tokens all become one
    learned token. Attention takes keys and values of every frame, so the clip's tokens are laid out once a frame.

    Motion as tokens is what was published. The U-Net's queries carry no place, and a small network trained from nothing
    does not learn to look up the token of its own place: with ``motion_adapter`` motion also goes in where it lies,
    which a dropped condition does not.

    Set ``activation_checkpointing`` to keep only the inputs of the U-Net's blocks for the backward pass.
    """

    def __init__(self, config: S2DMConfig) -> None:
        super().__init__()
        self.config = config
        width = config.cross_attention_dim
        settings = unet_settings(
            in_channels=config.in_channels,
            out_channels=config.out_channels,
            block_out_channels=config.block_out_channels,
            layers_per_block=config.layers_per_block,
            num_heads=config.num_heads,
            cross_attention_dim=width,
            norm_groups=config.norm_groups,
        )
        self.unet = build_unet(settings) if config.unet is None else load_unet(config.unet, settings)
        self.encoders = nn.ModuleDict({name: _encoder(name, config) for name in config.conditions})
        if config.motion_adapter:
            self.motion_adapter = MotionAdapter(MOTION_CHANNELS, config.block_out_channels, config.layers_per_block)
        self.nulls = nn.ParameterDict({name: nn.Parameter(torch.zeros(width)) for name in config.conditions})

    @property
    def activation_checkpointing(self) -> bool:
        """Whether the backward pass computes the blocks' activations again."""
        return self.unet.is_gradient_checkpointing

    @activation_checkpointing.setter
    def activation_checkpointing(self, enabled: bool) -> None:
        self.unet.enable_gradient_checkpointing() if enabled else self.unet.disable_gradient_checkpointing()

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        *,
        text: Tensor | None = None,
        image: Tensor | None = None,
        reference: Tensor | None = None,
        motion: Tensor | None = None,
        pose: Tensor | None = None,
        dropped: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Predict the noise, and with ``learn_sigma`` the variance, of noisy clips.

        Each condition is wanted where the configuration has it, and only there.

        Args:
            x: (B, F, C, H, W) noisy latents or pixels. F, H and W need not be those of the configuration.
            t: timesteps: (B,), or (B, F) with one for each frame.
            text: (B, L, W) text embeddings.
            image: (B, L, W) embeddings of an image.
            reference: (B, C, h, w) the clip's first frame, clean.
            motion: (B, F, 3, h, w) flow and occlusion in the network's form, see ``models.motion``.
            pose: (B, F, P, h, w) a pose map.
            dropped: bool (B,) by the condition's name: the samples whose condition becomes its null. None: drawn in
                training by the configuration's ``dropouts``.

        Returns:
            (B, F, C, H, W), or (B, F, 2C, H, W) = [epsilon, sigma] along channels with ``learn_sigma``.

        Raises:
            ValueError: a shape that does not fit, or a condition that is missing or unknown to this model.
        """
        given = {"text": text, "image": image, "reference": reference, "motion": motion, "pose": pose}
        self._check(x, t, given)
        batch, frames = x.shape[:2]
        dropped = resolve_dropped(dropped, self.config.dropouts, batch, x.device, training=self.training)
        tokens = [
            self._tokens(name, value, dropped.get(name)).expand(-1, frames, -1, -1)
            for name, value in given.items()
            if value is not None
        ]
        joined = torch.cat(tokens, dim=2).flatten(0, 1)
        (out,) = self.unet(
            x.flatten(0, 1),
            per_frame(t, frames).flatten(),
            joined,
            down_intrablock_additional_residuals=self._adapted(motion, x.shape[-2:], dropped.get("motion")),
            return_dict=False,
        )
        return out.unflatten(0, (batch, frames))

    def _adapted(self, motion: Tensor | None, size: torch.Size, dropped: Tensor | None) -> list[Tensor] | None:
        """The motion adapter's features of all frames, zero in the samples that are dropped."""
        if motion is None or not self.config.motion_adapter:
            return None
        kept = None if dropped is None else ~dropped.repeat_interleave(motion.shape[1])
        return self.motion_adapter(motion.flatten(0, 1), (size[0], size[1]), kept)

    def _tokens(self, name: str, value: Tensor, dropped: Tensor | None) -> Tensor:
        """Tokens of a condition: (B, F, L, D), with F = 1 for one of the whole clip."""
        of_frame = value.dim() == 5
        tokens = self.encoders[name](value.flatten(0, 1) if of_frame else value)
        tokens = tokens.unflatten(0, value.shape[:2]) if of_frame else tokens[:, None]
        if dropped is None:
            return tokens
        return torch.where(dropped[:, None, None, None], self.nulls[name].to(tokens.dtype), tokens)

    def _check(self, x: Tensor, t: Tensor, given: Mapping[str, Tensor | None]) -> None:
        config = self.config
        if x.dim() != 5 or x.shape[2] != config.in_channels:
            raise ValueError(f"x must be (B, F, C = {config.in_channels}, H, W), got {tuple(x.shape)}")
        batch, frames = x.shape[:2]
        if t.shape not in ((batch,), (batch, frames)):
            raise ValueError(f"t must be (B,) = {(batch,)} or (B, F) = {(batch, frames)}, got {tuple(t.shape)}")
        clip, frame = (batch,), (batch, frames)
        shapes = {
            "text": (*clip, "L", config.text_width),
            "image": (*clip, "L", config.image_width),
            "reference": (*clip, config.in_channels, "h", "w"),
            "motion": (*frame, MOTION_CHANNELS, "h", "w"),
            "pose": (*frame, config.pose_channels, "h", "w"),
        }
        for name, value in given.items():
            check_condition(name, value, shapes[name] if name in config.conditions else None)


def _encoder(name: str, config: S2DMConfig) -> nn.Module:
    """The module that turns a condition into tokens of the cross-attention's width."""
    width = config.cross_attention_dim
    embedded = {"text": config.text_width, "image": config.image_width}
    if name in embedded:
        return nn.Identity() if embedded[name] == width else nn.Linear(embedded[name] or 0, width)
    channels = {"reference": config.in_channels, "motion": MOTION_CHANNELS, "pose": config.pose_channels}
    return FrameEncoder(channels[name] or 0, config.encoder_channels, width, config.token_grid)
