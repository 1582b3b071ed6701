"""VideoFusion (Luo et al. 2023): noise decomposed into a base that a clip's frames share and each frame's residual."""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from models.conditions import resolve_dropped
from models.latte import Latte, LatteConfig, Prepared
from models.recompute import Recompute
from vidkern.diffusion import Schedule


def middle_frame(frames: int) -> int:
    """Number of the frame whose noise is the base noise."""
    return frames // 2


def frame_weights(base_weight: float, frames: int, device: torch.device | str | None = None) -> Tensor:
    """Return lambda, the base noise's share of each frame's variance: float32 (F,), 1 at the middle frame.

    Training and sampling hand it to ``vidkern.diffusion`` as ``base_weight`` with ``sharing="mixed"``.

    Args:
        base_weight: lambda of the other frames, in [0, 1].
        frames: F.
        device: where it goes.
    """
    weights = torch.full((frames,), base_weight, device=device)
    weights[middle_frame(frames)].fill_(1)
    return weights


class PreparedNetworks(NamedTuple):
    """What each network's ``prepare_sampling`` returned."""

    base: Prepared
    residual: Prepared


class VideoFusion(nn.Module):
    """The two networks: a base that sees the middle frame alone, as an image, and a residual that sees the whole clip.

    With the noise n_i = sqrt(lambda_i) b + sqrt(1 - lambda_i) r_i of frame i and lambda = 1 at the middle frame m, a
    noisy clip is z_i = alpha x_i + sigma n_i, and
        b^ = base(z_m),
        r^ = residual(z - sigma sqrt(lambda) b^),
        n^_i = sqrt(lambda_i) b^ + sqrt(1 - lambda_i) r^_i.
    No gradient goes through b^ but in the middle frame. The mean squared error of n^ is thus the paper's loss: the base
    learns from the middle frame, as an image model does, and the residual from the others. An image model's weights
    may be loaded into ``base``, the network of one frame, before training.

    Every frame's noise can have a timestep of its own. Tasks that give the middle frame leave nothing from which to
    predict the base noise; to give others (image-to-video, interpolation) is fine.
    """

    sigma: Tensor

    def __init__(self, config: LatteConfig, schedule: Schedule, base_weight: float) -> None:
        """Build both networks with the sizes of a configuration, the base for one frame.

        Args:
            config: its ``learn_sigma`` is the residual network's.
            schedule: of training; its sigma removes the base noise.
            base_weight: lambda of all frames but the middle one, in [0, 1).

        Raises:
            ValueError: tubelets, given frames, fewer than 2 frames, or a weight that leaves no residual.
        """
        super().__init__()
        if config.patch_embedding != "uniform" or config.image_condition is not None or config.num_frames < 2:
            raise ValueError(
                "VideoFusion wants patch_embedding uniform, image_condition None and num_frames of at least 2, got "
                f"{config.patch_embedding}, {config.image_condition} and {config.num_frames}"
            )
        if not 0 <= base_weight < 1:
            raise ValueError(f"base_weight must be in [0, 1), got {base_weight}")
        self.config = config
        self.base_weight = base_weight
        self.base = Latte(dataclasses.replace(config, num_frames=1, learn_sigma=False))
        self.residual = Latte(config)
        self.register_buffer("sigma", schedule.sigma.clone(), persistent=False)

    @property
    def activation_checkpointing(self) -> bool:
        """Whether both networks keep only their blocks' inputs for the backward pass."""
        return self.residual.activation_checkpointing

    @activation_checkpointing.setter
    def activation_checkpointing(self, enabled: bool) -> None:
        self.base.activation_checkpointing = self.residual.activation_checkpointing = enabled

    @property
    def recompute(self) -> Recompute:
        """What both networks' checkpointed blocks compute again."""
        return self.residual.recompute

    @recompute.setter
    def recompute(self, kind: Recompute) -> None:
        self.base.recompute = self.residual.recompute = kind

    @property
    def blocks(self) -> Iterator[nn.Module]:
        """The blocks of both networks."""
        return itertools.chain(self.base.blocks, self.residual.blocks)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor | None = None,
        *,
        text: Tensor | None = None,
        dropped: Mapping[str, Tensor] | None = None,
        prepared: PreparedNetworks | None = None,
    ) -> Tensor:
        """Predict the noise, and with ``learn_sigma`` the variance, of noisy clips.

        Args:
            x: (B, F, C, H, W) noisy by mixed noise of :func:`frame_weights`.
            t: timesteps, int64 (B,) or (B, F).
            y, text, dropped: as of :class:`models.latte.Latte`; a sample loses a condition in both networks.
            prepared: what :meth:`prepare_sampling` returned for these samples, instead of y, text and dropped.

        Returns:
            (B, F, 2C or C, H, W), as :class:`models.latte.Latte`.

        Raises:
            ValueError: as :class:`models.latte.Latte`.
        """
        batch, frames, channels = x.shape[:3]
        if prepared is None:  # one draw for both networks
            dropped = resolve_dropped(dropped, self.config.dropouts, batch, x.device, training=self.training)
        conditions: dict[str, Any] = {"y": y, "text": text, "dropped": dropped}
        of_base, of_residual = (conditions | {"prepared": vectors} for vectors in prepared or (None, None))
        middle = middle_frame(frames)
        t_middle = t if t.dim() == 1 else t[:, middle].contiguous()
        base = self.base(x[:, middle : middle + 1], t_middle, **of_base)
        weights = frame_weights(self.base_weight, frames, x.device).view(-1, 1, 1, 1)

        sigma = self.sigma[t].view(batch, -1, 1, 1, 1)
        common = weights.sqrt() * base.detach()
        residual = self.residual((x - sigma * common).to(x.dtype), t, **of_residual)
        noise, variance = residual.split([channels, residual.shape[2] - channels], dim=2)

        is_middle = (torch.arange(frames, device=x.device) == middle).view(-1, 1, 1, 1)
        noise = torch.where(is_middle, base, common + (1 - weights).sqrt() * noise)
        return torch.cat([noise, variance.to(noise.dtype)], dim=2)

    def prepare_sampling(
        self,
        times: Tensor,
        y: Tensor | None = None,
        *,
        text: Tensor | None = None,
        dropped: Mapping[str, Tensor] | None = None,
    ) -> PreparedNetworks | None:
        """Compute both networks' modulation vectors for all timesteps of a run: ``forward``'s ``prepared``.

        Arguments, memory (twice) and when it is None: :meth:`models.latte.Latte.prepare_sampling`.
        """
        if isinstance(self, FSDPModule):
            return None
        given = y if text is None else text
        batch = 1 if given is None else len(given)
        dropped = resolve_dropped(dropped, self.config.dropouts, batch, times.device, training=self.training)
        conditions: dict[str, Any] = {"text": text, "dropped": dropped}
        base = self.base.prepare_sampling(times, y, **conditions)
        residual = self.residual.prepare_sampling(times, y, **conditions)
        return None if base is None or residual is None else PreparedNetworks(base, residual)
