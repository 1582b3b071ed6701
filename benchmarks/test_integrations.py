"""Models that users have, patched against unpatched: time and peak memory of a call, and of one with its gradient."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vidkern
from benchmarks.environment import default_device
from benchmarks.harness import AUTOMATIC, Problem
from benchmarks.sample_clock import sample_clock

pytestmark = pytest.mark.benchmark(group="integrations", timer=sample_clock)

ON_GPU = default_device().type == "cuda"
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
#: Of the patched model's output, over the largest of the unpatched one's; both round in DTYPE.
TOLERANCE = 5e-2 if ON_GPU else 1e-4
ROUNDS = 30
DECODES = 10  # of a whole clip, seconds each


@dataclass(frozen=True)
class Model:
    """A model of diffusers and one call of it, full size on a GPU and small on a CPU.

    Attributes:
        name: the class.
        what: the call, in a few words.
        build: makes the model.
        make_inputs: makes the call's arguments on a device, the latents first.
    """

    name: str
    what: str
    build: Callable[[], Any]
    make_inputs: Callable[[torch.device], list[Tensor]]


def randn(*shape: int, device: torch.device) -> Tensor:
    return torch.randn(shape, device=device).to(DTYPE)


def latte() -> Model:
    """Latte-1's text-to-video transformer at 16 x 512 x 512, 4 pairs of blocks; on a CPU one small pair."""
    from diffusers import LatteTransformer3DModel

    heads, head_size, layers, size = (16, 72, 4, 64) if ON_GPU else (6, 64, 1, 16)
    frames, text, caption = 16, 120, 4096 if ON_GPU else 64
    return Model(
        "LatteTransformer3DModel",
        f"{layers} x {heads * head_size}, {frames} x {size // 2}^2 tokens",
        lambda: LatteTransformer3DModel(
            num_attention_heads=heads,
            attention_head_dim=head_size,
            in_channels=4,
            out_channels=8,
            num_layers=layers,
            cross_attention_dim=heads * head_size,
            attention_bias=True,
            sample_size=size,
            patch_size=2,
            activation_fn="gelu-approximate",
            norm_type="ada_norm_single",
            norm_elementwise_affine=False,
            norm_eps=1e-6,
            caption_channels=caption,
            video_length=frames,
        ),
        lambda device: [
            randn(1, 4, frames, size, size, device=device),
            torch.tensor([500], device=device),
            randn(1, text, caption, device=device),
        ],
    )


def wan() -> Model:
    """Wan 2.2 TI2V 5B's width at 121 x 704 x 1280, of 2 layers, the first frame given; on a CPU 8 small frames."""
    from diffusers import WanTransformer3DModel

    heads, ffn, layers, text_size = (24, 14336, 2, 4096) if ON_GPU else (3, 1536, 2, 64)
    channels, frames, height, width = (48, 31, 44, 80) if ON_GPU else (16, 8, 12, 12)
    places = height * width // 4

    def make_inputs(device: torch.device) -> list[Tensor]:
        timesteps = torch.full((1, frames), 500.0, device=device)
        timesteps[:, 0] = 0.0
        return [
            randn(1, channels, frames, height, width, device=device),
            timesteps.repeat_interleave(places, dim=1),
            randn(1, 512 if ON_GPU else 32, text_size, device=device),
        ]

    return Model(
        "WanTransformer3DModel",
        f"{layers} x {heads * 128}, {frames} x {places} tokens, a timestep each",
        lambda: WanTransformer3DModel(
            num_attention_heads=heads,
            ffn_dim=ffn,
            num_layers=layers,
            text_dim=text_size,
            in_channels=channels,
            out_channels=channels,
        ),
        make_inputs,
    )


def cogvideox() -> Model:
    """CogVideoX 5B's width at 49 x 480 x 720, of 4 layers; on a CPU 4 small frames."""
    from diffusers import CogVideoXTransformer3DModel

    heads, layers, text, text_size = (48, 4, 226, 4096) if ON_GPU else (6, 2, 32, 64)
    frames, height, width = (13, 60, 90) if ON_GPU else (4, 12, 16)
    return Model(
        "CogVideoXTransformer3DModel",
        f"{layers} x {heads * 64}, {text} + {frames} x {height * width // 4} tokens",
        lambda: CogVideoXTransformer3DModel(
            num_attention_heads=heads,
            num_layers=layers,
            max_text_seq_length=text,
            text_embed_dim=text_size,
            sample_frames=4 * (frames - 1) + 1,
            sample_height=height,
            sample_width=width,
        ),
        lambda device: [
            randn(1, frames, 16, height, width, device=device),
            torch.tensor([500], device=device),
            randn(1, text, text_size, device=device),
        ],
    )


def in_dtype(model: nn.Module, device: torch.device) -> nn.Module:
    """Return a model in DTYPE on a device, with what its class keeps in float32."""
    kept = getattr(model, "_keep_in_fp32_modules", None) or []
    model = model.to(device, DTYPE).eval()
    for name, parameter in model.named_parameters():
        if any(part in name for part in kept):
            parameter.data = parameter.data.float()
    return model


def output_of(model: nn.Module) -> Callable[..., Tensor]:
    @torch.no_grad()
    def forward(x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        return model(hidden_states=x, timestep=t, encoder_hidden_states=text, return_dict=False)[0]

    return forward


def output_and_gradient_of(model: nn.Module) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return a training step without its optimiser; of the gradient it returns each parameter's norm."""
    parameters = list(model.parameters())

    def step(x: Tensor, t: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        output = model(hidden_states=x, timestep=t, encoder_hidden_states=text, return_dict=False)[0]
        gradients = torch.autograd.grad(output, parameters, output)
        return output.detach(), torch.stack(torch._foreach_norm(gradients))

    return step


def small_problems() -> list[Problem]:
    """Return none: the operators that patched models call have small cases in suites of their own."""
    return []


@pytest.fixture(autouse=True)
def _diffusers() -> None:
    pytest.importorskip("diffusers")


@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "gradient"])
@pytest.mark.parametrize("make_model", [latte, wan, cogvideox])
def test_transformers(make_model: Callable[[], Model], gradient: bool, measured: Any, device: torch.device) -> None:
    model = make_model()
    torch.manual_seed(0)
    theirs = in_dtype(model.build(), device)
    ours = copy.deepcopy(theirs)
    vidkern.patch(ours)
    call = output_and_gradient_of if gradient else output_of
    measured(
        Problem(
            family="integrations",
            operator=model.name + (" and its gradient" if gradient else ""),
            shape_name=model.what,
            shape=tuple(model.make_inputs(device)[0].shape),
            dtype=DTYPE,
            backward=False,
            ours=call(ours),
            plain=call(theirs),
            make_inputs=model.make_inputs,
            backends=(AUTOMATIC,),
            tolerance=TOLERANCE,
        ),
        rounds=ROUNDS,
    )


def wan_vae() -> Model:
    """Wan 2.1's decoder at 81 x 480 x 832; on a CPU a third as wide, 9 small frames."""
    from diffusers import AutoencoderKLWan

    shape = (1, 16, 21, 60, 104) if ON_GPU else (1, 16, 3, 8, 12)
    return Model(
        "AutoencoderKLWan.decode",
        f"Wan 2.1, {pixels(shape, 8)}",
        lambda: AutoencoderKLWan(base_dim=96 if ON_GPU else 32),
        lambda device: [randn(*shape, device=device)],
    )


def wan22_vae() -> Model:
    """Wan 2.2's decoder at 81 x 704 x 1280; on a CPU an eighth as wide, 9 small frames."""
    from diffusers import AutoencoderKLWan

    width, channels = (256, 48) if ON_GPU else (32, 16)
    shape = (1, channels, 21, 44, 80) if ON_GPU else (1, channels, 3, 6, 8)
    return Model(
        "AutoencoderKLWan.decode",
        f"Wan 2.2, {pixels(shape, 16)}",
        lambda: AutoencoderKLWan(
            base_dim=160 if ON_GPU else 16,
            decoder_base_dim=width,
            z_dim=channels,
            is_residual=True,
            in_channels=12,
            out_channels=12,
            patch_size=2,
            scale_factor_spatial=16,
        ),
        lambda device: [randn(*shape, device=device)],
    )


def cogvideox_vae() -> Model:
    """CogVideoX's decoder at 49 x 480 x 720; on a CPU a quarter as wide, 9 small frames."""
    from diffusers import AutoencoderKLCogVideoX

    widths = (128, 256, 256, 512) if ON_GPU else (32, 64, 64, 128)
    shape = (1, 16, 13, 60, 90) if ON_GPU else (1, 16, 3, 8, 12)
    return Model(
        "AutoencoderKLCogVideoX.decode",
        f"CogVideoX, {pixels(shape, 8)}",
        lambda: AutoencoderKLCogVideoX(block_out_channels=widths),
        lambda device: [randn(*shape, device=device)],
    )


def pixels(latents: tuple[int, ...], ratio: int) -> str:
    """Return the size of the clip that is decoded from latents (B, C, F, H, W)."""
    _, _, frames, height, width = latents
    return f"{4 * frames - 3} x {height * ratio} x {width * ratio}"


def clip_of(model: Any) -> Callable[[Tensor], Tensor]:
    @torch.no_grad()
    def decode(z: Tensor) -> Tensor:
        return model.decode(z, return_dict=False)[0]

    return decode


@pytest.mark.parametrize("make_model", [wan_vae, wan22_vae, cogvideox_vae])
def test_decoders(make_model: Callable[[], Model], measured: Any, device: torch.device) -> None:
    model = make_model()
    torch.manual_seed(0)
    theirs = in_dtype(model.build(), device)
    ours = copy.deepcopy(theirs)
    vidkern.patch(ours)
    measured(
        Problem(
            family="integrations",
            operator=model.name,
            shape_name=model.what,
            shape=tuple(model.make_inputs(device)[0].shape),
            dtype=DTYPE,
            backward=False,
            ours=clip_of(ours),
            plain=clip_of(theirs),
            make_inputs=model.make_inputs,
            backends=(AUTOMATIC,),
            tolerance=TOLERANCE,
        ),
        compiled=False,
        rounds=DECODES,
    )
