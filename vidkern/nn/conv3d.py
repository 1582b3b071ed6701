"""Convolutions of video as modules: causal ones, whole or in a stream of chunks, and the one after an upsampling."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vidkern import ops
from vidkern.nn.prepared import channels_inside, prepared


class CausalConv3d(nn.Conv3d):
    """A 3D convolution that sees no later frame, over ``vidkern.ops.causal_conv3d``; parameters as ``nn.Conv3d``.

    Under autocast its arguments and parameters are cast, as ``nn.Conv3d``'s are. Where no gradient is recorded, the
    weight is laid out for the kernel, and cast, once, until it changes.

    Args:
        in_channels: Cin.
        out_channels: Cout.
        kernel_size: 3 for 3x3x3, or (kT, kH, kW); the operator names those that it offers.
        stride: 1 or 2, or (time, height, width) of them.
        dilation: a positive number, or (time, height, width) of them.
        bias: whether there is one.
        time_pad: "zeros" or "first_frame" before the first frame.
        space_pad: "zeros", "replicate" or "reflect" around each frame.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        dilation: int | Sequence[int] = 1,
        bias: bool = True,
        time_pad: str = "zeros",
        space_pad: str = "zeros",
    ) -> None:
        kernel, steps, spread = _triple(kernel_size), _triple(stride), _triple(dilation)
        super().__init__(in_channels, out_channels, kernel, steps, dilation=spread, bias=bias)
        self.time_pad = time_pad
        self.space_pad = space_pad

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Convolve a whole clip.

        Args:
            x: (B, Cin, F, H, W), best in channels_last_3d.
            residual: of the result's shape, added to it.

        Returns:
            (B, Cout, F', H', W') in channels_last_3d.
        """
        x, weight, bias, residual = self._cast(x, residual)
        return ops.causal_conv3d(
            x,
            weight,
            bias,
            stride=self.stride,
            dilation=self.dilation,
            time_pad=self.time_pad,
            space_pad=self.space_pad,
            residual=residual,
        )

    def stream(self, x: Tensor, cache: Tensor | None, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Convolve the next chunk of a clip: chunks give what the whole clip gives.

        Args:
            x: (B, Cin, F, H, W), the next frames.
            cache: what the call before returned; None for the first chunk.
            residual: of the result's shape, added to it.

        Returns:
            (y, cache): the chunk's result, and the frames that the next chunk reads too.
        """
        x, weight, bias, residual = self._cast(x, residual)
        return ops.causal_conv3d_stream(
            x,
            cache,
            weight,
            bias,
            stride=self.stride,
            dilation=self.dilation,
            time_pad=self.time_pad,
            space_pad=self.space_pad,
            residual=residual,
        )

    def _cast(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Return (x, weight, bias, residual) in autocast's dtype where autocast is on."""
        if not _autocast(x):
            return x, prepared(self, self.weight.dtype, channels_inside), self.bias, residual
        dtype = torch.get_autocast_dtype(x.device.type)
        bias = None if self.bias is None else self.bias.to(dtype)
        weight = prepared(self, dtype, channels_inside)
        return x.to(dtype), weight, bias, None if residual is None else residual.to(dtype)


class UpsampleConv(nn.Conv2d):
    """Nearest doubling of each frame followed by a 3x3 convolution, over ``vidkern.ops.upsample_conv``.

    Parameters as ``nn.Conv2d``'s. Where no gradient is recorded, the weight is folded once, until it changes. Under
    autocast arguments and parameters are cast, as ``nn.Conv2d``'s are.

    Args:
        in_channels: Cin.
        out_channels: Cout.
        bias: whether there is one.
    """

    def __init__(self, in_channels: int, out_channels: int, bias: bool = True) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Double and convolve.

        Args:
            x: (B, Cin, F, H, W), best in channels_last_3d.

        Returns:
            (B, Cout, F, 2H, 2W) in channels_last_3d.
        """
        dtype = x.dtype
        if _autocast(x):
            dtype = torch.get_autocast_dtype(x.device.type)
        bias = None if self.bias is None else self.bias.to(dtype)
        return ops.upsample_conv(x.to(dtype), prepared(self, dtype, ops.upsample_phases), bias)


def _autocast(x: Tensor) -> bool:
    """Whether autocast is on where x is; torch refuses to say so of the meta device, which has none."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def _triple(value: int | Sequence[int]) -> tuple[int, int, int]:
    if isinstance(value, int):
        return value, value, value
    time, height, width = value
    return time, height, width
