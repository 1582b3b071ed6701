"""What the causal convolution operators mean, in plain PyTorch.

Padding is (time, height, width): time before the first frame only, space around. Each output frame is one conv2d of
its own window of kT input frames, side by side as channels, so that its bits do not depend on how many frames come
with it (they do in a conv3d of the clip). Float32 is summed in float64: libraries sum in many orders, and one of them
is often a few times nearer to the truth than another.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

_CHANNELS_LAST = torch.channels_last_3d


def extent(size: int, dilation: int) -> int:
    """Return how many padding positions a kernel of this size needs along its axis in all."""
    return (size - 1) * dilation


def around(size: int, dilation: int) -> tuple[int, int]:
    """Return the padding (before, after) along a space axis; the odd one of an even kernel comes after."""
    total = extent(size, dilation)
    return total // 2, total - total // 2


def output_shape(
    x: Tensor, weight: Tensor, cache: Tensor | None, stride: Sequence[int], dilation: Sequence[int]
) -> tuple[int, int, int, int, int]:
    """Return y's (B, Cout, F', H', W'): H' = ceil(H / stride), and so W'; without a cache so F' too."""
    missing = 0 if cache is None else extent(weight.shape[2], dilation[0]) - cache.shape[2]
    frames, height, width = (
        -(-size // step) for size, step in zip((x.shape[2] - missing, *x.shape[3:]), stride, strict=True)
    )
    return x.shape[0], weight.shape[0], frames, height, width


def empty_output(
    x: Tensor, weight: Tensor, cache: Tensor | None, stride: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    """Return y in channels_last_3d, uninitialised."""
    shape = output_shape(x, weight, cache, stride, dilation)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=_CHANNELS_LAST)


def pad_axis(x: Tensor, dim: int, before: int, after: int, mode: str) -> Tensor:
    """Pad one axis with "zeros", the edge ("replicate") or the mirrored inside without the edge ("reflect")."""
    if before == after == 0:
        return x
    if mode == "zeros":
        last_first = [0, 0] * (x.dim() - 1 - dim) + [before, after]
        return F.pad(x, last_first)
    if mode == "replicate":
        left, right = x.narrow(dim, 0, 1), x.narrow(dim, x.shape[dim] - 1, 1)
        sizes = [-1] * x.dim()
        sizes[dim] = before
        left = left.expand(sizes)
        sizes[dim] = after
        return torch.cat((left, x, right.expand(sizes)), dim)
    left = x.narrow(dim, 1, before).flip(dim)
    right = x.narrow(dim, x.shape[dim] - 1 - after, after).flip(dim)
    return torch.cat((left, x, right), dim)


def pad_axis_backward(grad: Tensor, dim: int, before: int, after: int, mode: str) -> Tensor:
    """Return the gradient of x from that of ``pad_axis(x, ...)``."""
    size = grad.shape[dim] - before - after
    inside = grad.narrow(dim, before, size)
    if mode == "zeros" or before == after == 0:
        return inside
    inside = inside.clone()
    left, right = grad.narrow(dim, 0, before), grad.narrow(dim, before + size, after)
    if mode == "replicate":
        inside.narrow(dim, 0, 1).add_(left.sum(dim, keepdim=True))
        inside.narrow(dim, size - 1, 1).add_(right.sum(dim, keepdim=True))
    else:
        inside.narrow(dim, 1, before).add_(left.flip(dim))
        inside.narrow(dim, size - 1 - after, after).add_(right.flip(dim))
    return inside


def pad(
    x: Tensor,
    cache: Tensor | None,
    kernel: Sequence[int],
    dilation: Sequence[int],
    time_pad: str,
    space_pad: str,
) -> Tensor:
    """Put the cache, or the time padding, before the frames of x, and the space padding around them."""
    if cache is None:
        mode = "replicate" if time_pad == "first_frame" else "zeros"
        x = pad_axis(x, 2, extent(kernel[0], dilation[0]), 0, mode)
    else:
        x = torch.cat((cache, x), 2)
    for dim in (3, 4):
        x = pad_axis(x, dim, *around(kernel[dim - 2], dilation[dim - 2]), space_pad)
    return x


def pad_backward(
    grad: Tensor,
    cache: Tensor | None,
    kernel: Sequence[int],
    dilation: Sequence[int],
    time_pad: str,
    space_pad: str,
) -> tuple[Tensor, Tensor]:
    """Return (dx, dcache) from the gradient of ``pad(x, cache, ...)``; dcache is empty without a cache."""
    for dim in (4, 3):
        grad = pad_axis_backward(grad, dim, *around(kernel[dim - 2], dilation[dim - 2]), space_pad)
    if cache is None:
        mode = "replicate" if time_pad == "first_frame" else "zeros"
        dx = pad_axis_backward(grad, 2, extent(kernel[0], dilation[0]), 0, mode)
        return dx, grad.new_empty(0)
    return grad[:, :, cache.shape[2] :], grad[:, :, : cache.shape[2]]


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float32 else dtype


def _channels_last(x: Tensor) -> Tensor:
    """Return a fresh channels-last copy; what was not asked for (of one dimension) stays as it is."""
    return x.clone(memory_format=_CHANNELS_LAST) if x.dim() == 5 else x


def causal_conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cache: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    dilation: Sequence[int],
    time_pad: str,
    space_pad: str,
) -> Tensor:
    """Return y (B, Cout, F', H', W'), channels last."""
    y = empty_output(x, weight, cache, stride, dilation)
    if y.numel() == 0:
        return y
    kernel = weight.shape[2:]
    frames = pad(x, cache, kernel, dilation, time_pad, space_pad)
    wide = _sum_dtype(x.dtype)
    flat = weight.transpose(1, 2).flatten(1, 2).to(wide)  # (Cout, kT * Cin, kH, kW)
    bias = None if bias is None else bias.to(wide)
    for j in range(y.shape[2]):
        window = torch.cat([frames[:, :, j * stride[0] + i * dilation[0]] for i in range(kernel[0])], 1)
        # one layout, so one algorithm and its bits
        window = window.to(wide, memory_format=torch.channels_last)
        y[:, :, j] = F.conv2d(window, flat, bias, stride[1:], dilation=dilation[1:])
    return y if residual is None else y.add_(residual)


def causal_conv3d_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    cache: Tensor | None,
    stride: Sequence[int],
    dilation: Sequence[int],
    time_pad: str,
    space_pad: str,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (dx, dweight, dbias, dcache); ``wanted`` says which of them, and the others are empty."""
    grads = [torch.zeros_like(x), torch.zeros_like(weight), weight.new_zeros(weight.shape[0])]
    grads.append(x.new_empty(0) if cache is None else torch.zeros_like(cache))
    if dy.numel() > 0:
        kernel, wide = weight.shape[2:], _sum_dtype(x.dtype)
        dframes, *rest = torch.ops.aten.convolution_backward(
            dy.to(wide),
            pad(x, cache, kernel, dilation, time_pad, space_pad).to(wide),
            weight.to(wide),
            [weight.shape[0]],
            stride,
            [0, 0, 0],
            dilation,
            False,
            [0, 0, 0],
            1,
            [wanted[0] or wanted[3], wanted[1], wanted[2]],
        )
        grads[1:3] = rest
        if dframes is not None:
            grads[0], grads[3] = pad_backward(dframes, cache, kernel, dilation, time_pad, space_pad)
    dx, dweight, dbias, dcache = (
        grad.to(x.dtype) if want else x.new_empty(0) for grad, want in zip(grads, wanted, strict=True)
    )
    return _channels_last(dx), dweight.contiguous(), dbias, _channels_last(dcache)


def _wide(x: Tensor) -> Tensor:
    """Return x in the dtype that norms are computed in: float32 for 16 bits, float64 otherwise."""
    return x.to(torch.promote_types(_sum_dtype(x.dtype), torch.float32))


def _statistic(value: Tensor, x: Tensor) -> Tensor:
    return value.to(torch.promote_types(x.dtype, torch.float32))


def _grouped(x: Tensor, groups: int) -> Tensor:
    return _wide(x).unflatten(1, (groups, x.shape[1] // groups))  # (B, G, C / G, F, H, W)


def _per_channel(x: Tensor, like: Tensor) -> Tensor:
    return x.to(like.dtype).view(1, *like.shape[1:3], 1, 1, 1)  # (C,), beside (B, G, C / G, F, H, W)


def _normed(x: Tensor, mean: Tensor, rstd: Tensor, norm: str, groups: int) -> Tensor:
    if norm == "rms":
        return _grouped(x, 1) * rstd[:, None, None]
    return (_grouped(x, groups) - mean[..., None, None, None, None]) * rstd[..., None, None, None, None]


def _affine(normed: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    z = normed * _per_channel(weight, normed)
    return z if bias is None else z + _per_channel(bias, normed)


def norm_silu_pad(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cache: Tensor | None,
    norm: str,
    groups: int,
    eps: float,
    kernel: Sequence[int],
    dilation: Sequence[int],
    time_pad: str,
    space_pad: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (padded, mean, rstd): statistics (B, G) of "group"; (B, F, H, W), and an empty mean, of "rms"."""
    wide = _grouped(x, groups)
    if norm == "rms":
        mean = wide.new_empty(0)
        rstd = (wide.square().mean((1, 2)) + eps).rsqrt()
    else:
        mean = wide.mean((2, 3, 4, 5))
        centred = wide - mean[..., None, None, None, None]
        rstd = (centred.square().mean((2, 3, 4, 5)) + eps).rsqrt()
    act = F.silu(_affine(_normed(x, mean, rstd, norm, groups), weight, bias))
    padded = pad(act.flatten(1, 2).to(x.dtype), cache, kernel, dilation, time_pad, space_pad)
    return _channels_last(padded), _statistic(mean, x), _statistic(rstd, x)


def norm_silu_pad_backward(
    dpadded: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cache: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    norm: str,
    groups: int,
    kernel: Sequence[int],
    dilation: Sequence[int],
    time_pad: str,
    space_pad: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (dx, dweight, dbias, dcache); dweight and dbias in float32 or wider, dcache empty without a cache."""
    dact, dcache = pad_backward(_wide(dpadded), cache, kernel, dilation, time_pad, space_pad)
    normed = _normed(x, mean, rstd, norm, groups)
    z = _affine(normed, weight, bias)
    gate = z.sigmoid()
    dz = dact.reshape(normed.shape) * gate * (1 + z * (1 - gate))
    dbias = dz.sum((0, 3, 4, 5)).flatten()
    dweight = (dz * normed).sum((0, 3, 4, 5)).flatten()
    dnormed = dz * _per_channel(weight, normed)
    if norm == "rms":
        dx = dnormed - normed * (dnormed * normed).mean((1, 2), keepdim=True)
        dx = dx * rstd[:, None, None]
    else:
        over = (2, 3, 4, 5)
        dx = dnormed - dnormed.mean(over, keepdim=True) - normed * (dnormed * normed).mean(over, keepdim=True)
        dx = dx * rstd[..., None, None, None, None]
    dx = _channels_last(dx.flatten(1, 2).to(x.dtype))
    return dx, _statistic(dweight, x), _statistic(dbias, x), _channels_last(dcache.to(x.dtype))
