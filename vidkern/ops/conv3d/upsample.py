"""Nearest doubling of height and width followed by a 3x3 convolution, as four 2x2 convolutions of the small frames."""

import torch
import torch.nn.functional as F
from torch import Tensor

from vidkern.ops import _check

#: For an even and an odd position of the doubled axis: which of the three taps fall on its two neighbours.
_FOLD = (((1.0, 0.0, 0.0), (0.0, 1.0, 1.0)), ((1.0, 1.0, 0.0), (0.0, 0.0, 1.0)))


def upsample_phases(weight: Tensor) -> Tensor:
    """Fold a 3x3 kernel that follows a nearest doubling into the four 2x2 kernels of :func:`upsample_conv`.

    Two neighbours of the doubled frame are copies of one position, and their taps add up: an even row sees (w0) and
    (w1 + w2) of rows i - 1 and i, an odd one (w0 + w1) and (w2) of rows i and i + 1; columns likewise. Fold a weight
    that stays as it is once, not per call.

    Args:
        weight: (Cout, Cin, 3, 3), or (Cout, Cin, 1, 3, 3) as a 3D convolution has it.

    Returns:
        (4 * Cout, Cin, 2, 2) in weight's dtype, summed in float32 at least: even rows and columns, even rows and odd
        columns, odd and even, odd and odd. Differentiable.

    Raises:
        TypeError, ValueError: an argument of another type, dtype or shape.
    """
    _check.is_tensor("weight", weight)
    _check.has_dtype("weight", weight, _check.FLOATS)
    if weight.dim() == 5 and weight.shape[2] == 1:
        weight = weight.squeeze(2)
    if weight.dim() != 4 or weight.shape[2:] != (3, 3):
        raise ValueError(f"weight must be (Cout, Cin, 3, 3), got {_check.shape_of(weight)}")
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    fold = torch.tensor(_FOLD, dtype=wide.dtype, device=weight.device)
    return torch.einsum("api,bqj,ocij->abocpq", fold, fold, wide).flatten(0, 2).to(weight.dtype)


def upsample_conv(x: Tensor, phases: Tensor, bias: Tensor | None = None) -> Tensor:
    """Double height and width by nearest neighbour and convolve 3x3 with zero padding, in 4/9 of the products.

        y = conv3d(upsample(x, scale=(1, 2, 2)), weight, bias, padding=(0, 1, 1)),    phases = upsample_phases(weight)

    Each of the four phases of y, its even and odd rows and columns, is a 2x2 convolution of x itself; the doubled
    video is never made.

    Args:
        x: (B, Cin, F, H, W), best in channels_last_3d.
        phases: (4 * Cout, Cin, 2, 2) from :func:`upsample_phases`, in x's dtype.
        bias: (Cout,) in x's dtype.

    Returns:
        (B, Cout, F, 2H, 2W) in channels_last_3d, in x's dtype. Differentiable in every tensor.

    Raises:
        TypeError, ValueError: an argument of another type, dtype, shape or device.
    """
    _check_arguments(x, phases, bias)
    batch, _, frames, height, width = x.shape
    images = x.transpose(1, 2).flatten(0, 1).contiguous(memory_format=torch.channels_last)
    bias = None if bias is None else bias.repeat(4)
    small = F.conv2d(images, phases, bias, padding=1)  # (BF, 4 Cout, H + 1, W + 1)
    channels = phases.shape[0] // 4
    small = small.unflatten(1, (2, 2, channels))
    y = x.new_empty(batch * frames, height, 2, width, 2, channels)
    for row in (0, 1):
        for column in (0, 1):
            phase = small[:, row, column, :, row : row + height, column : column + width]
            y[:, :, row, :, column] = phase.permute(0, 2, 3, 1)
    return y.view(batch, frames, 2 * height, 2 * width, channels).permute(0, 4, 1, 2, 3)


def _check_arguments(x: Tensor, phases: Tensor, bias: Tensor | None) -> None:
    _check.is_tensor("x", x)
    _check.has_dims("x", x, "(B, C, F, H, W)")
    _check.has_dtype("x", x, _check.FLOATS)
    _check.is_tensor("phases", phases)
    if phases.dim() != 4 or phases.shape[0] % 4 or 0 in phases.shape or phases.shape[1:] != (x.shape[1], 2, 2):
        wanted = f"(4 * Cout, Cin = {x.shape[1]}, 2, 2)"
        raise ValueError(f"phases must be {wanted} as upsample_phases makes them, got {_check.shape_of(phases)}")
    _check.has_dtype("phases", phases, (x.dtype,))
    _check.same_device("phases", phases, "x", x)
    if bias is not None:
        _check.is_tensor("bias", bias)
        _check.has_shape("bias", bias, (phases.shape[0] // 4,), "(Cout,)")
        _check.has_dtype("bias", bias, (x.dtype,))
        _check.same_device("bias", bias, "x", x)
