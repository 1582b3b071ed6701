"""Image-to-video with given frames: which frames training gives, how sampling hands them over, FrameInit's noise."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vidkern.diffusion import Schedule

#: How often training gives which frames. "first": frame 0. "prefix": the first k, k uniform from 1 to F - 1. "ends":
#: first and last. "random": each frame on the toss of a coin. "none": no frame, so that the network still draws whole
#: clips. A draw that would give every frame, which leaves nothing to learn, gives the first one alone.
GIVEN_MIX: Mapping[str, float] = {"first": 0.5, "prefix": 0.2, "ends": 0.1, "random": 0.1, "none": 0.1}

#: FrameInit's defaults (Ren et al. 2024): the still clip's timestep as a share of the schedule, and the standard
#: deviation of the Gaussian low-pass filter over the highest frequency.
FRAME_INIT_LEVEL = 0.85
FRAME_INIT_CUTOFF = 0.25


def draw_given(
    batch: int,
    frames: int,
    *,
    mix: Mapping[str, float] = GIVEN_MIX,
    generator: torch.Generator | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Draw the frames that each clip of a training batch is given, bool (batch, frames). Never waits for the device.

    A training step hands them to the network as ``given``, beside the clean clips as ``known``, and to
    ``vidkern.diffusion.diffusion_loss`` as ``hold``: given frames come in clean and do not count.

    Args:
        batch, frames: B and F, at least 2 frames.
        mix: probabilities of the kinds of :data:`GIVEN_MIX`, which sum to 1.
        generator: of the same device.
        device: where the draws are made; the generator's device, or the CPU, if None.

    Raises:
        ValueError: fewer than 2 frames, a kind that is not known, probabilities that do not sum to 1.
    """
    if frames < 2:
        raise ValueError(f"frames must be at least 2, got {frames}")
    if set(mix) - set(GIVEN_MIX) or min(mix.values()) < 0 or abs(sum(mix.values()) - 1) > 1e-6:
        raise ValueError(f"mix must give probabilities of {', '.join(GIVEN_MIX)} that sum to 1, got {dict(mix)}")
    if device is None:
        device = generator.device if generator is not None else torch.device("cpu")

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, device=device)

    place = torch.arange(frames, device=device).expand(batch, frames)
    first = place == 0
    length = 1 + (uniform(batch, 1) * (frames - 1)).long()
    patterns = {
        "first": first,
        "prefix": place < length,
        "ends": first | (place == frames - 1),
        "random": uniform(batch, frames) < 0.5,
        "none": torch.zeros_like(first),
    }
    choice, below = uniform(batch, 1), 0.0
    given = torch.zeros_like(first)
    for kind, probability in mix.items():
        given = given | (patterns[kind] & (choice >= below) & (choice < below + probability))
        below += probability
    return torch.where(given.all(1, keepdim=True), first, given)


def bind(network: nn.Module, given: Tensor) -> Callable[..., Tensor]:
    """Return an image-conditioned network as the model that ``vidkern.diffusion.sample`` calls.

    The samplers hold given frames bit for bit, so what is known is read from the clip itself. Where the network has a
    method ``prepare_sampling``, so has what is returned.

    Args:
        network: called with ``known`` and ``given``.
        given: bool (F,), the frames that the task gives.
    """
    return _Bound(network, given)


class _Bound:
    """A network with its given frames, called as model(x, t, ...) without them."""

    def __init__(self, network: nn.Module, given: Tensor) -> None:
        self.network: Any = network
        self.given = given

    @property
    def prepare_sampling(self) -> Callable[..., Any]:
        """The network's own, which counts on the timestep of given frames; missing where the network has none."""
        return self.network.prepare_sampling

    def __call__(self, x: Tensor, t: Tensor, *labels: Tensor, **conditions: Any) -> Tensor:
        given = self.given.to(x.device).expand(x.shape[:2])
        return self.network(x, t, *labels, known=x, given=given, **conditions)


def frame_init(
    first: Tensor,
    noise: Tensor,
    schedule: Schedule,
    *,
    level: float = FRAME_INIT_LEVEL,
    cutoff_space: float = FRAME_INIT_CUTOFF,
    cutoff_time: float = FRAME_INIT_CUTOFF,
) -> Tensor:
    """Return starting noise with the layout of the first frame: FrameInit of ConsistI2V (Ren et al. 2024, section 3.3).

    The first frame as a still clip, noised to timestep ``level`` of the schedule by the same noise, lends its low
    frequencies; the noise keeps its high ones: x_T = L(alpha first + sigma n) + (n - L(n)), with L a Gaussian low-pass
    filter of time, height and width, exp(-(f_t^2 / cutoff_time^2 + (f_h^2 + f_w^2) / cutoff_space^2) / 2) for
    frequencies f as a share of the highest one. Frames far from the first thus start from its colours and layout.

    Args:
        first: float32 (B, C, H, W), the given first frame.
        noise: float32 (B, F, C, H, W), standard normal.
        schedule: on their device.
        level: in (0, 1]; higher leaves less of the frame.
        cutoff_space, cutoff_time: above 0; higher leaves more of the frame.

    Returns:
        float32 (B, F, C, H, W), for ``shape`` of ``vidkern.diffusion.sample``.

    Raises:
        ValueError: shapes that do not fit, or an option out of its range.
    """
    if first.shape != noise[:, 0].shape:
        raise ValueError(f"first must be of shape {tuple(noise[:, 0].shape)}, got {tuple(first.shape)}")
    for name, value, most in (
        ("level", level, 1.0),
        ("cutoff_space", cutoff_space, float("inf")),
        ("cutoff_time", cutoff_time, float("inf")),
    ):
        if not 0 < value <= most:
            raise ValueError(f"{name} must be above 0{' and at most 1' if most == 1 else ''}, got {value}")
    timestep = min(round(level * schedule.num_steps), schedule.num_steps - 1)
    step = torch.full(noise.shape[:2], timestep, device=noise.device)
    alpha, sigma = (c[:, :, None, None, None] for c in schedule.coefficients(step))
    change = alpha * first[:, None] + (sigma - 1) * noise
    return noise + _low_pass(change, cutoff_space, cutoff_time)


def _low_pass(clip: Tensor, cutoff_space: float, cutoff_time: float) -> Tensor:
    """Filter (B, F, C, H, W) along F, H and W by a Gaussian transfer function."""
    axes, cutoffs = (1, 3, 4), (cutoff_time, cutoff_space, cutoff_space)
    exponent = clip.new_zeros(())
    for axis, cutoff in zip(axes, cutoffs, strict=True):
        frequency = 2 * torch.fft.fftfreq(clip.shape[axis], device=clip.device)  # 1 is the highest
        shape = [-1 if i == axis else 1 for i in range(clip.dim())]
        exponent = exponent + (frequency / cutoff).square().view(shape)
    spectrum = torch.fft.fftn(clip, dim=axes) * torch.exp(-exponent / 2)
    return torch.fft.ifftn(spectrum, dim=axes).real
