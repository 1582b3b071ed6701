"""Classifier-free guidance with a scale for each condition."""

import itertools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor


def guide(
    model: Callable[..., Tensor], conditions: Mapping[str, Tensor], scales: Mapping[str, float]
) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the guided model as a function of (x, t), as ``vidkern.diffusion.sample`` calls it.

    With K scales, taken in their order, and eps_k the prediction with the first k of their conditions kept and the
    others dropped (Brooks et al. 2023, eq. 3; for K = 1, Ho & Salimans 2022):

        eps = eps_0 + sum_k s_k (eps_k - eps_(k-1)) = sum_k w_k eps_k,   w_0 = 1 - s_1, w_k = s_k - s_(k+1), w_K = s_K

    It is computed in the second form, in float32 or wider, by one call of the model with up to (K + 1) B samples:
    predictions of weight 0 are left out, so that scales of 1 cost nothing and give the conditional prediction's bits.
    What a network of a learned variance says about it is taken from eps_K, which sees every condition.

    Args:
        model: called as model(x, t, dropped=..., **conditions); its first C output channels are guided.
        conditions: by the keyword of the model's forward; (B, ...) each. One without a scale is always kept.
        scales: by the condition's name. 1 is no guidance, 0 ignores the condition.

    Raises:
        ValueError: a scale of a condition that is not there.
    """
    unknown = [name for name in scales if name not in conditions]
    if unknown:
        raise ValueError(f"scales must name conditions among ({', '.join(conditions)}), got {', '.join(unknown)}")
    factors = [1.0, *scales.values(), 0.0]
    weights = [here - after for here, after in itertools.pairwise(factors)]
    kept = [k for k, weight in enumerate(weights) if weight != 0 or k == len(scales)]
    copies = len(kept)
    repeated = {name: torch.cat([value] * copies) for name, value in conditions.items()}
    dropped = {
        name: torch.cat([_mask(conditions[name], place >= k) for k in kept]) for place, name in enumerate(scales)
    }

    def guided(x: Tensor, t: Tensor) -> Tensor:
        out = model(torch.cat([x] * copies), torch.cat([t] * copies), dropped=dropped, **repeated)
        predictions = out.unflatten(0, (copies, len(x)))
        dtype = torch.promote_types(out.dtype, torch.float32)
        channels = x.shape[2]
        epsilon = sum(weights[k] * predictions[i, :, :, :channels].to(dtype) for i, k in enumerate(kept))
        return torch.cat([epsilon, predictions[-1, :, :, channels:].to(dtype)], dim=2)

    return guided


def _mask(condition: Tensor, value: bool) -> Tensor:
    """Bool (B,), all `value`, on the condition's device."""
    return torch.full(condition.shape[:1], value, device=condition.device)
