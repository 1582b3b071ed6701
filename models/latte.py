"""Latte (Ma et al. 2024): a video diffusion transformer of divided space-time attention; also FVDM's network."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from models.clip_config import ClipConfig
from models.conditions import check_condition, resolve_dropped
from models.recompute import Recompute, checkpointed
from vidkern.nn import (
    DividedSpaceTimeBlock,
    FinalLayer,
    LabelEmbedder,
    PatchEmbed,
    PerFrameModulation,
    TimestepEmbedder,
    rotary_tables,
    sincos_1d,
    sincos_2d,
    unpatchify,
    xavier_linear,
)

#: (depth, hidden size, heads) of the published sizes; depth counts spatial and temporal blocks together.
SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
PATCH_SIZES = (2, 4, 8)

#: Frames in a patch of the tubelet embedding.
TUBELET_FRAMES = 2


@dataclass(frozen=True)
class LatteConfig(ClipConfig):
    """What a Latte is made of; the defaults are Latte-XL/2 on 16 frames of 32 x 32 latents.

    Attributes:
        input_size: height and width of a frame, or (height, width), in latent pixels.
        patch_size: height and width of a patch.
        in_channels: C of the input; the output has 2C with ``learn_sigma``.
        hidden_size: D, a multiple of 8.
        depth: number of blocks, even for variants 1 and 2. A block of variant 3 has two attentions: 23 of them at XL's
            width have as many parameters (676M) as 28 of the others (674M).
        num_heads: H, a divisor of D, even for variant 4.
        mlp_ratio: the MLP's inner width over D.
        num_frames: frames of the training clips. Other counts work too: positions are computed for them.
        num_classes: number of classes; None is unconditional.
        learn_sigma: also predict the variance's interpolation (learned range).
        variant: the paper's four ways to divide space and time. 1: spatial and temporal blocks in turn. 2: all spatial
            blocks, then all temporal ones. 3: spatial, then temporal attention inside every block, one MLP. 4: in every
            block half of the heads attends in space and half in time.
        patch_embedding: "uniform" embeds each frame; "tubelet" embeds pairs of frames and so halves the token frames.
        temporal_position: "absolute" adds a sine-cosine table where time is first attended to; "rope" rotates temporal
            queries and keys instead.
        class_dropout: how often a sample's labels become the null class in training.
        text_size: length of a flattened text embedding (77 * 768 for CLIP's); None is without text.
        text_dropout: how often a sample's text becomes the null text, all zeros, in training. The projection's bias is
            what a network then sees of the text, so that the null is learned without a parameter of its own.
        image_condition: how the network is given frames (image-to-video); None: it is not. Either way given frames come
            in clean and at timestep 0, as FVDM has them, whatever x and t say there (ConsistI2V leaves them the clip's
            timestep). "replace": that is all (ConsistI2V, Ren et al. 2024, replaces the first frame's noise so).
            "concat": the patch embedding also takes the given frames, zero elsewhere, and their mask, 2C + 1 channels
            in all (SEINE, Chen et al. 2023; Wan 2.1).
    """

    input_size: int | tuple[int, int] = 32
    patch_size: int = 2
    in_channels: int = 4
    hidden_size: int = 1152
    depth: int = 28
    num_heads: int = 16
    mlp_ratio: float = 4.0
    num_frames: int = 16
    num_classes: int | None = None
    learn_sigma: bool = True
    variant: int = 1
    patch_embedding: str = "uniform"
    temporal_position: str = "absolute"
    class_dropout: float = 0.1
    text_size: int | None = None
    text_dropout: float = 0.0
    image_condition: str | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be built."""
        patch, heads = max(self.patch_size, 1), max(self.num_heads, 1)
        whole_patches = all(size > 0 and size % patch == 0 for size in self.frame_size)
        whole_tubelets = self.num_frames > 0 and self.num_frames % self.patch_frames == 0
        paired = self.depth > 0 and (self.variant > 2 or self.depth % 2 == 0)
        divided = self.num_heads > 0 and self.hidden_size % heads == 0
        rules = (
            ("variant", self.variant in (1, 2, 3, 4), "1, 2, 3 or 4"),
            ("patch_embedding", self.patch_embedding in ("uniform", "tubelet"), "uniform or tubelet"),
            ("temporal_position", self.temporal_position in ("absolute", "rope"), "absolute or rope"),
            ("patch_size", self.patch_size > 0, "positive"),
            ("input_size", whole_patches, f"a multiple of the patch's {patch}"),
            ("num_frames", whole_tubelets, f"a multiple of the patch's {self.patch_frames}"),
            ("depth", paired, "positive, and even in variants 1 and 2"),
            ("num_heads", divided, f"a divisor of hidden_size = {self.hidden_size}"),
            ("text_size", self.num_classes is None or self.text_size is None, "None where num_classes is given"),
            ("class_dropout", 0 <= self.class_dropout < 1, "in [0, 1)"),
            ("image_condition", self.image_condition in (None, "concat", "replace"), "None, concat or replace"),
            ("text_dropout", 0 <= self.text_dropout < 1, "in [0, 1)"),
        )
        self.refuse_unless(rules)

    @property
    def patch_frames(self) -> int:
        """Frames in a patch."""
        return TUBELET_FRAMES if self.patch_embedding == "tubelet" else 1

    @property
    def embedded_channels(self) -> int:
        """Channels that the patch embedding takes."""
        return 2 * self.in_channels + 1 if self.image_condition == "concat" else self.in_channels

    @property
    def conditions(self) -> tuple[str, ...]:
        """Names of the conditions that ``forward`` wants."""
        images = self.image_condition is not None
        wanted = {
            "y": self.num_classes is not None,
            "text": self.text_size is not None,
            "known": images,
            "given": images,
        }
        return tuple(name for name, given in wanted.items() if given)

    @property
    def dropouts(self) -> dict[str, float]:
        """How often training drops each condition that can be dropped."""
        probability = {"y": self.class_dropout, "text": self.text_dropout}
        return {name: probability[name] for name in self.conditions if name in probability}

    @property
    def attentions(self) -> tuple[str, ...]:
        """The kind of attention of every block."""
        half = self.depth // 2
        return {
            1: ("spatial", "temporal") * half,
            2: ("spatial",) * half + ("temporal",) * half,
            3: ("space_then_time",) * self.depth,
            4: ("split_heads",) * self.depth,
        }[self.variant]


def latte(name: str, **overrides: Any) -> "Latte":
    """Build a published size, e.g. ``latte("Latte-XL/2", num_classes=101)``.

    Args:
        name: "Latte-<S, B, L or XL>/<patch size 2, 4 or 8>".
        overrides: other fields of :class:`LatteConfig`.
    """
    return Latte(published_config("Latte", name, **overrides))


def published_config(family: str, name: str, **overrides: Any) -> LatteConfig:
    """Return the configuration of "<family>-<size>/<patch>", with the fields given replaced."""
    known = {f"{family}-{size}/{patch}": (size, patch) for size in SIZES for patch in PATCH_SIZES}
    if name not in known:
        raise ValueError(f"name must be one of {', '.join(known)}, got {name!r}")
    size, patch = known[name]
    depth, hidden_size, num_heads = SIZES[size]
    published = {"patch_size": patch, "depth": depth, "hidden_size": hidden_size, "num_heads": num_heads}
    return LatteConfig(**{**published, **overrides})


class Prepared(NamedTuple):
    """What a run's timesteps and conditions become in every block, so that no step computes it again.

    Attributes:
        times: int64 (T,), ascending: every timestep that may be asked for.
        vectors: (T, B, 6D for each block and 2D for the final layer), or (T, 1, ...) where all samples are alike.
    """

    times: Tensor
    vectors: Tensor

    def at(self, t: Tensor) -> Tensor:
        """Return the vectors (B, F, ...) at timesteps t (B, F), which must be among ``times``."""
        rows = torch.searchsorted(self.times, t)
        if self.vectors.shape[1] == 1:
            return self.vectors[:, 0][rows]
        return self.vectors[rows, torch.arange(len(t), device=t.device)[:, None]]


class Latte(nn.Module):
    """The network: epsilon and, with ``learn_sigma``, the variance of noisy clips at given timesteps.

    Initialised as DiT: every gate and the output layer are zero, so a fresh model predicts exactly 0.

    Tokens are (B, F, N, D) from the patch embedding to the final layer. Between blocks goes the residual stream and the
    branch still to be added to it, so that each norm, modulation and gated addition is one pass over the tokens.

    The residual stream has the dtype in which the patch embedding's product comes out: bfloat16 under autocast. That
    halves the traffic and the saved activations of all that lies between the products, against a float32 stream, and
    doubles the rounding error: measured over 28 blocks with random weights, 1.2% against 0.5% of the output, 1.5%
    against 0.7% of the gradient.

    Set ``activation_checkpointing`` to keep only the blocks' inputs for the backward pass and compute the rest again,
    or, with ``recompute`` "cheap", to keep the results of products and attention too.
    """

    def __init__(self, config: LatteConfig) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        self.recompute: Recompute = "all"
        size = config.hidden_size
        self.x_embedder = PatchEmbed(config.patch_size, config.embedded_channels, size, config.patch_frames)
        self.t_embedder = TimestepEmbedder(size)
        if config.num_classes is not None:
            self.y_embedder = LabelEmbedder(config.num_classes, size, dropout=0.0)  # forward drops
        if config.text_size is not None:
            self.text_embedding_projection = nn.Sequential(nn.SiLU(), xavier_linear(config.text_size, size))
        self.blocks = nn.ModuleList(
            DividedSpaceTimeBlock(size, config.num_heads, attention, config.mlp_ratio)
            for attention in config.attentions
        )
        patch_values = config.patch_frames * config.patch_size**2 * config.out_channels
        self.final_layer = FinalLayer(size, patch_values)
        height, width = config.frame_size
        grid = height // config.patch_size, width // config.patch_size
        self.pos_embed = nn.Parameter(sincos_2d(*grid, size)[None], requires_grad=False)
        if config.temporal_position == "absolute":
            frames = torch.arange(config.num_frames // config.patch_frames)
            self.temp_embed = nn.Parameter(sincos_1d(frames, size)[None], requires_grad=False)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor | None = None,
        *,
        text: Tensor | None = None,
        num_images: int = 0,
        image_labels: Tensor | None = None,
        known: Tensor | None = None,
        given: Tensor | None = None,
        dropped: Mapping[str, Tensor] | None = None,
        prepared: Prepared | None = None,
    ) -> Tensor:
        """Predict the noise, and with ``learn_sigma`` the variance, of noisy clips.

        Args:
            x: (B, F, C, H, W) noisy latents or pixels. F, H and W need not be those of the configuration.
            t: timesteps: (B,), or (B, F) with one for each frame (FVDM). A tubelet takes the mean of its frames'
                embeddings.
            y: (B,) int64 class labels; ``num_classes`` is the null class. Wanted by a class-conditional model only.
            text: (B, ...) text embeddings with ``text_size`` values each. Wanted by a text-conditional model only.
            num_images: joint training on images: so many of x's last frames are single images, which no attention over
                frames connects to anything.
            image_labels: (B, num_images) int64 labels of the images, for a class-conditional model.
            known: (B, F, C, H, W), clean clips of which the given frames are read, in the form of x. Wanted by an
                image-conditioned model only.
            given: bool (B, F), true for the given frames; the prediction of these means nothing.
            dropped: bool (B,) for "y" or "text": the samples whose labels, those of the images among them, become the
                null class, or whose text becomes zeros. None: drawn in training by the configuration's ``dropouts``.
            prepared: what :meth:`prepare_sampling` returned for these samples, instead of y, text and dropped.

        Returns:
            (B, F, 2C, H, W) = [epsilon, sigma] along channels with ``learn_sigma``, else (B, F, C, H, W); in the dtype
            of the final linear layer (autocast's, under autocast).

        Raises:
            ValueError: a shape that does not fit, or a condition that is missing or unknown to this model.
        """
        self._check(x, t, num_images, image_labels)
        self._check_given(x, num_images, known, given)
        if known is not None and given is not None:
            x, t = self._with_given(x, t, known, given)
        t = t if t.dim() == 2 else t[:, None]  # (B, 1 or F)
        if prepared is not None:
            self._check_prepared(x, y, text, num_images, dropped, prepared)
            return self._denoise(x, self._split(prepared.at(t)))
        self._check_conditions(len(x), y, text)
        dropped = resolve_dropped(dropped, self.config.dropouts, len(x), x.device, training=self.training)
        image_labels = _masked(image_labels, dropped.get("y"), self.config.num_classes)
        time = self.t_embedder(t)  # (B, 1 or F, D)
        label, prompt = self._embed(y, text, dropped)
        if not num_images:
            return self._denoise(x, self._conditions(time, label, prompt))
        frames = x.shape[1] - num_images
        video = self._denoise(x[:, :frames], self._conditions(time[:, :frames], label, prompt))
        image_time = time.expand(-1, x.shape[1], -1)[:, frames:]
        image_label = self.y_embedder(image_labels) if image_labels is not None else None
        return torch.cat([video, self._denoise_images(x[:, frames:], image_time, image_label)], dim=1)

    def prepare_sampling(
        self,
        times: Tensor,
        y: Tensor | None = None,
        *,
        text: Tensor | None = None,
        dropped: Mapping[str, Tensor] | None = None,
    ) -> Prepared | None:
        """Compute every block's modulation vectors for all timesteps of a sampling run: ``forward``'s ``prepared``.

        The weights that make them, a third of all, are read once instead of once a step. T timesteps and B samples keep
        T * B * (6 * depth + 2) * D numbers in the dtype of the linear layers (autocast's, under autocast): 156 MB for
        Latte-XL, 50 steps and 4 clips with guidance in bfloat16.

        Args:
            times: int64 (T,), the timesteps that ``forward`` will be asked for, in any order.
            y, text, dropped: as in ``forward``, for the samples of its batch.

        Returns:
            None where it cannot be: tubelets, whose timesteps are means, and weights sharded by FSDP2, which are whole
            only inside ``forward``.
        """
        if self.config.patch_frames > 1 or isinstance(self, FSDPModule):
            return None
        given = [value for value in (y, text) if value is not None]
        batch = len(given[0]) if given else 1
        self._check_conditions(batch, y, text)
        dropped = resolve_dropped(dropped, self.config.dropouts, batch, times.device, training=self.training)
        if self.config.image_condition is not None:
            times = torch.cat([times, times.new_zeros(1)])  # the timestep of given frames
        times = times.unique()
        label, prompt = self._embed(y, text, dropped)
        conditions = self._conditions(self.t_embedder(times)[None], label, prompt)  # (B or 1, T, D)
        vectors = [m.vectors(c, activated=True) for m, c in zip(self._modulations, conditions, strict=True)]
        return Prepared(times, torch.cat(vectors, dim=-1).transpose(0, 1))

    def forward_with_cfg(
        self, x: Tensor, t: Tensor, y: Tensor | None = None, cfg_scale: float = 7.0, *, text: Tensor | None = None
    ) -> Tensor:
        """Predict with classifier-free guidance: epsilon = uncond + cfg_scale * (cond - uncond).

        Args:
            x: (2B, F, C, H, W); the first half is used for both halves.
            t: (2B,) or (2B, F).
            y: (2B,): the classes, then the null class.
            cfg_scale: 1 is no guidance.
            text: (2B, ...): the texts, then the empty ones.

        Returns:
            (2B, F, 2C, H, W): the guided epsilon in both halves; each half keeps its own variance channels.
        """
        half = x[: len(x) // 2]
        out = self(torch.cat([half, half]), t, y, text=text)
        epsilon, rest = out.split([self.config.in_channels, out.shape[2] - self.config.in_channels], dim=2)
        cond, uncond = epsilon.chunk(2)
        guided = uncond + cfg_scale * (cond - uncond)
        return torch.cat([torch.cat([guided, guided]), rest], dim=2)

    def _with_given(self, x: Tensor, t: Tensor, known: Tensor, given: Tensor) -> tuple[Tensor, Tensor]:
        """Put clean frames and timestep 0 where frames are given; with "concat", append these frames and the mask."""
        t = (t if t.dim() == 2 else t[:, None]).masked_fill(given, 0)
        mask = given[:, :, None, None, None]
        x = torch.where(mask, known, x)
        if self.config.image_condition == "concat":
            x = torch.cat([x, x.masked_fill(~mask, 0), mask.to(x.dtype).expand_as(x[:, :, :1])], dim=2)
        return x, t

    def _denoise(self, x: Tensor, conditions: Sequence[Tensor], in_time: bool = True) -> Tensor:
        """Run the network on clips, or, with ``in_time`` False, without its temporal blocks and positions.

        ``conditions``: for each block, then for the final layer, SiLU of the condition or the vectors made of it.
        """
        tokens = self.x_embedder(x)  # (B, F', N, D)
        grid = x.shape[3] // self.config.patch_size, x.shape[4] // self.config.patch_size
        tokens = tokens + self._space_positions(grid).to(tokens.dtype)
        rope = self._rope(tokens)
        branch = None
        for i, (block, attention) in enumerate(zip(self.blocks, self.config.attentions, strict=True)):
            if attention == "temporal" and not in_time:
                continue
            if i == self._first_in_time and in_time and self.config.temporal_position == "absolute":
                tokens = tokens + self._time_positions(tokens.shape[1]).to(tokens.dtype)
            if self.activation_checkpointing and torch.is_grad_enabled():
                tokens, branch = checkpointed(
                    block, tokens, conditions[i], branch, rope, activated=True, recompute=self.recompute
                )
            else:
                tokens, branch = block(tokens, conditions[i], branch, rope, activated=True)
        patches = self.final_layer(tokens, conditions[-1], branch, activated=True)
        return unpatchify(patches, grid, self.config.patch_size, self.config.patch_frames)

    def _denoise_images(self, x: Tensor, time: Tensor, label: Tensor | None) -> Tensor:
        """Run (B, I) images as B * I clips of one frame: (B, I, C, H, W) -> (B, I, C_out, H, W)."""
        x_clips, time_clips = x.flatten(0, 1)[:, None], time.flatten(0, 1)[:, None]
        label_clips = None if label is None else label.flatten(0, 1)[:, None]
        conditions = self._conditions(time_clips, label_clips, None)
        return self._denoise(x_clips, conditions, in_time=False).unflatten(0, x.shape[:2]).squeeze(2)

    def _embed(
        self, y: Tensor | None, text: Tensor | None, dropped: Mapping[str, Tensor]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the embeddings (B, 1, D) of the labels and of the texts, null where they are dropped."""
        y, text = _masked(y, dropped.get("y"), self.config.num_classes), _masked(text, dropped.get("text"), 0)
        label = self.y_embedder(y)[:, None] if y is not None else None
        prompt = self.text_embedding_projection(text.flatten(1))[:, None] if text is not None else None
        return label, prompt

    def _conditions(self, time: Tensor, label: Tensor | None, prompt: Tensor | None) -> list[Tensor]:
        """Return SiLU of the condition of each block, then of the final layer, which never sees the text."""
        if self.config.patch_frames > 1 and time.shape[1] > 1:
            time = time.unflatten(1, (-1, self.config.patch_frames)).mean(2)
        if prompt is not None:
            return [F.silu(time + prompt)] * len(self.blocks) + [F.silu(time).expand(len(prompt), -1, -1)]
        return [F.silu(time if label is None else time + label)] * (len(self.blocks) + 1)

    @property
    def _modulations(self) -> list[PerFrameModulation]:
        """What makes each block's vectors, then the final layer's."""
        return [module.adaLN_modulation for module in (*self.blocks, self.final_layer)]

    def _split(self, vectors: Tensor) -> tuple[Tensor, ...]:
        """Return the vectors of each block and of the final layer, views of (B, F, all of them)."""
        return vectors.split([modulation.size for modulation in self._modulations], dim=-1)

    @property
    def _first_in_time(self) -> int:
        """The first block that attends over frames, which is where time's positions are added."""
        return next(i for i, attention in enumerate(self.config.attentions) if attention != "spatial")

    def _space_positions(self, grid: tuple[int, int]) -> Tensor:
        """(N, D) for a frame of this grid: the stored table, or another grid's, computed."""
        height, width = self.config.frame_size
        if grid == (height // self.config.patch_size, width // self.config.patch_size):
            return self.pos_embed[0]
        return sincos_2d(*grid, self.config.hidden_size, device=self.pos_embed.device)

    def _time_positions(self, frames: int) -> Tensor:
        """(F, 1, D): the first rows of the stored table, or a longer one, computed."""
        if frames <= self.temp_embed.shape[1]:
            return self.temp_embed[0, :frames, None]
        positions = torch.arange(frames, device=self.temp_embed.device)
        return sincos_1d(positions, self.config.hidden_size)[:, None]

    def _rope(self, tokens: Tensor) -> tuple[Tensor, Tensor] | None:
        """(cos, sin) of the tokens' frames, in float32 or wider."""
        if self.config.temporal_position != "rope":
            return None
        cos, sin = rotary_tables(tokens.shape[1], self.config.hidden_size // self.config.num_heads, tokens.device)
        dtype = torch.promote_types(tokens.dtype, torch.float32)
        return cos.to(dtype), sin.to(dtype)

    def _check(self, x: Tensor, t: Tensor, num_images: int, image_labels: Tensor | None) -> None:
        config = self.config
        if x.dim() != 5 or x.shape[2] != config.in_channels:
            raise ValueError(f"x must be (B, F, C = {config.in_channels}, H, W), got {tuple(x.shape)}")
        batch, frames = x.shape[:2]
        if t.shape not in ((batch,), (batch, frames)):
            raise ValueError(f"t must be (B,) = {(batch,)} or (B, F) = {(batch, frames)}, got {tuple(t.shape)}")
        if not 0 <= num_images < frames:
            raise ValueError(f"num_images must be at least 0 and below x's {frames} frames, got {num_images}")
        if num_images and (config.patch_frames > 1 or config.text_size is not None):
            raise ValueError(f"num_images must be 0 with tubelets or with text, got {num_images}")
        labelled = config.num_classes is not None and num_images > 0
        check_condition("image_labels", image_labels, (batch, num_images) if labelled else None)

    def _check_conditions(self, batch: int, y: Tensor | None, text: Tensor | None) -> None:
        config = self.config
        check_condition("y", y, (batch,) if config.num_classes is not None else None)
        if (text is None) != (config.text_size is None):
            raise ValueError(f"text must be {'None' if text is not None else 'given'}: text_size is {config.text_size}")

    def _check_prepared(
        self,
        x: Tensor,
        y: Tensor | None,
        text: Tensor | None,
        num_images: int,
        dropped: Mapping[str, Tensor] | None,
        prepared: Prepared,
    ) -> None:
        others = {"y": y, "text": text, "dropped": dropped, "num_images": num_images or None}
        for name, value in others.items():
            if value is not None:
                raise ValueError(f"{name} must be left out with prepared, got {type(value).__name__}")
        sizes = prepared.vectors.shape[1], prepared.vectors.shape[2]
        channels = sum(modulation.size for modulation in self._modulations)
        if sizes[0] not in (1, len(x)) or sizes[1] != channels:
            raise ValueError(f"prepared must be of {len(x)} samples and {channels} channels, got {sizes}")

    def _check_given(self, x: Tensor, num_images: int, known: Tensor | None, given: Tensor | None) -> None:
        wanted = self.config.image_condition is not None
        if wanted and num_images:
            raise ValueError(f"num_images must be 0 with image_condition, got {num_images}")
        check_condition("known", known, tuple(x.shape) if wanted else None)
        check_condition("given", given, tuple(x.shape[:2]) if wanted else None)
        if given is not None and given.dtype != torch.bool:
            raise ValueError(f"given must be torch.bool, got {given.dtype}")


def _masked(condition: Tensor | None, dropped: Tensor | None, null: int | None) -> Tensor | None:
    """Return the condition (B, ...) with ``null`` in the samples where ``dropped`` (B,) is true."""
    if condition is None or dropped is None or null is None:
        return condition
    return condition.masked_fill(dropped.view(-1, *[1] * (condition.dim() - 1)), null)
