"""The FLOPs that a step of a network needs at least, and those of the library's attention operators."""

import math
from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.steps.variants import DDIM_STEPS, TRAINING, Setting
from models.latte import Latte


def flops_of(setting: Setting, task: str) -> int:
    """Return the FLOPs of a task's products, with nothing computed twice or for more rows than there are conditions."""
    mapping = {getattr(torch.ops.vidkern, name): flops for name, flops in ATTENTION_FLOPS.items()}
    with torch.device("meta"):
        network = Latte(setting.config).eval()
    batch = setting.batch if task == TRAINING else 2 * setting.batch
    x = torch.empty(batch, *setting.shape[1:], device="meta")
    t = torch.zeros(x.shape[: 1 + setting.per_frame], dtype=torch.int64, device="meta")
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        out = network(x, t, t.flatten()[:batch])
        if task == TRAINING:
            out.backward(torch.empty_like(out))
    return counter.get_total_flops() * (1 if task == TRAINING else DDIM_STEPS)


def attention_flops(qkv: tuple[int, ...], keys: int) -> int:
    """Return those of q k^T and p v, of qkv (B, F, N, 3, H, d) when each query meets so many keys."""
    return 4 * math.prod(qkv) // 3 * keys


#: FLOPs of the library's attention operators, from the shapes of their arguments.
ATTENTION_FLOPS: dict[str, Callable[..., int]] = {
    "temporal_attention_packed": lambda qkv, *_, **__: attention_flops(qkv, qkv[1]),
    "temporal_attention_packed_backward": lambda _, qkv, *__, **___: 2 * attention_flops(qkv, qkv[1]),
    "attention_packed": lambda qkv, *_, **__: attention_flops(qkv, qkv[2]),
    "attention_packed_backward": lambda _, qkv, *__, **___: 2 * attention_flops(qkv, qkv[2]),
}
