"""What the diffusion tests share: a watch for host traffic, and a small model with a timestep and a condition."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from vidkern._library import operators

aten = torch.ops.aten
#: Operators that wait for the device, or bring a host value to it, when the tensors are on a GPU.
HOST_TRAFFIC = {
    aten._local_scalar_dense,
    aten.equal,
    aten.is_nonzero,
    aten.item,
    aten.lift,
    aten.lift_fresh,
    aten.masked_select,
    aten.nonzero,
    aten.repeat_interleave,
}


class NoHostTraffic(TorchDispatchMode):
    """Fails on every operator that would synchronise with the host or copy from it, inside our operators too."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "vidkern":
            with self:
                return operators[func._opname](*args, **(kwargs or {}))
        packet = func._overloadpacket
        assert packet not in HOST_TRAFFIC, f"{func} synchronises or copies from the host"
        if packet in (aten.index, aten.index_put, aten.index_put_):
            assert all(i is None or i.dtype != torch.bool for i in args[1]), f"{func} by a mask synchronises"
        return func(*args, **(kwargs or {}))


class Network(nn.Module):
    """A channel mixture with a timestep and a condition; smooth, bounded, different in every frame."""

    def __init__(self, channels: int, learned_range: bool = True) -> None:
        super().__init__()
        outputs = 2 * channels if learned_range else channels
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(outputs, channels, generator=generator) * 0.4)
        self.bias = nn.Parameter(torch.randn(outputs, generator=generator) * 0.1)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        level = (t if t.dim() == 2 else t[:, None]).to(x.dtype)[:, :, None, None, None] / 1000
        hidden = torch.einsum("oc,bfchw->bfohw", self.weight.to(x.dtype), x)
        hidden = hidden + self.bias.to(x.dtype)[:, None, None] + level
        if y is not None:
            hidden = hidden + 0.1 * y.to(x.dtype)[:, None, None, None, None]
        return torch.tanh(hidden)
