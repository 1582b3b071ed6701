"""Classifier-free guidance with a scale for each condition."""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

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

    Where the model has a method ``prepare_sampling``, so has what is returned, see ``vidkern.diffusion.sample``.

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

    return _Guided(model, repeated | {"dropped": dropped}, [weights[k] for k in kept])


class _Guided:
    """The weighted sum of a model's predictions under several sets of conditions, computed in one batch.

    Args:
        model: called as model(x, t, **conditions), or model(x, t, prepared=...) with what its ``prepare_sampling``
            returns.
        conditions: of the samples of the first prediction, then of the second, and so on.
        weights: of the predictions.
    """

    def __init__(self, model: Callable[..., Tensor], conditions: Mapping[str, Any], weights: Sequence[float]) -> None:
        self.model: Any = model  # a function, or a network that may have prepare_sampling
        self.conditions, self.weights = conditions, weights

    @property
    def prepare_sampling(self) -> Callable[[Tensor], Any]:
        """What a run's timesteps and the conditions become before its first step; missing where the model has none."""
        return functools.partial(self.model.prepare_sampling, **self.conditions)

    def __call__(self, x: Tensor, t: Tensor, **prepared: Any) -> Tensor:
        copies = len(self.weights)
        out = self.model(torch.cat([x] * copies), torch.cat([t] * copies), **(prepared or self.conditions))
        predictions = out.unflatten(0, (copies, len(x)))
        dtype = torch.promote_types(out.dtype, torch.float32)
        channels = x.shape[2]
        parts = zip(self.weights, predictions, strict=True)
        epsilon = sum(weight * part[:, :, :channels].to(dtype) for weight, part in parts)
        return torch.cat([epsilon, predictions[-1, :, :, channels:].to(dtype)], dim=2)


def _mask(condition: Tensor, value: bool) -> Tensor:
    """Bool (B,), all `value`, on the condition's device."""
    return torch.full(condition.shape[:1], value, device=condition.device)
