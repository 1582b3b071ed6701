"""The exponential moving average of a network's weights."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float) -> None:
    """ema <- decay * ema + (1 - decay) * model for every trained parameter, in one foreach call.

    Both networks have the same parameters in the same order; FSDP2 shards are averaged where they lie.
    """
    pairs = [(e, p) for e, p in zip(ema.parameters(), model.parameters(), strict=True) if p.requires_grad]
    torch._foreach_lerp_(_local(e for e, _ in pairs), _local(p for _, p in pairs), 1 - decay)


def _local(parameters: Iterable[Tensor]) -> list[Tensor]:
    return [p.to_local() if isinstance(p, DTensor) else p for p in parameters]
