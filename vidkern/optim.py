"""Optimisers: AdamW that moves the weights' average in the same pass over memory."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import ParamsT

from vidkern.ops import _check, adamw_ema_
from vidkern.ops.optimizer import torch_kernels


class AdamWEMA(torch.optim.AdamW):
    """torch.optim.AdamW and an exponential moving average of the weights, one pass for all parameters of a group.

    The state dict is that of ``torch.optim.AdamW(fused=True)``, so either reads the other's; the averages are the
    caller's tensors and are not in it. With FSDP2 each process works on its own shards. Nothing waits for the device,
    and a step can be captured into a CUDA graph, where what changes from step to step (``lr``, ``ema_decay``,
    ``gradient_scale``) is given as tensors. The arithmetic is :func:`vidkern.ops.adamw_ema_`'s; on a GPU
    for which the compiled library was not built, that of PyTorch's fused AdamW and foreach operators, in two passes.
    """

    def __init__(
        self,
        params: ParamsT,
        ema: Iterable[Tensor] | None = None,
        *,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        ema_decay: float | Tensor = 0.9999,
    ) -> None:
        """Begin with moments of 0.

        Args:
            params: parameters, or groups of them as dicts that may have settings of their own.
            ema: the averages, one for each parameter in the order of ``params``, each of its parameter's shape,
                device and dtype (or float32); None: AdamW alone. Parameters of groups added later have none.
            lr: learning rate, see :func:`vidkern.ops.adamw_ema_`.
            betas: decays of the moments.
            eps: added to the root of the second moment.
            weight_decay: decoupled.
            ema_decay: decay of the averages, a step.

        Raises:
            TypeError, ValueError: averages that do not fit the parameters, or a setting out of its range.
        """
        if not isinstance(ema_decay, Tensor) and not 0 <= ema_decay <= 1:
            raise ValueError(f"ema_decay must be from 0 to 1, got {ema_decay}")
        super().__init__(params, lr, betas, eps, weight_decay, fused=True, capturable=True)
        self._step_supports_amp_scaling = False  # a GradScaler unscales by itself and skips steps
        self._warned_capturable_if_run_uncaptured = True  # a step costs the same
        self.defaults["ema_decay"] = ema_decay
        for group in self.param_groups:
            group.setdefault("ema_decay", ema_decay)
        every = [p for group in self.param_groups for p in group["params"]]
        self._averages = {} if ema is None else _paired(every, list(ema))
        for p in every:
            self._state_of(p)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, gradient_scale: Tensor | None = None) -> Any:
        """Take a step with the parameters' gradients; parameters without one stay, and their averages go on.

        Args:
            closure: computes the loss anew and returns it.
            gradient_scale: what the gradients are multiplied by, a tensor () on the device, in place of clipping them.

        Returns:
            What the closure returns, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._step_group(group, gradient_scale)
        return loss

    def _step_group(self, group: dict[str, Any], gradient_scale: Tensor | None) -> None:
        """Step the parameters of a group, one call for each dtype and for those with and without an average."""
        calls: dict[Any, tuple[list[Tensor], ...]] = {}
        for p in group["params"]:
            average = self._averages.get(p)
            if average is not None:
                average = _local(average)
            if p.grad is None:
                if average is not None:
                    average.add_((_local(p) - average) * (1 - group["ema_decay"]))
                continue
            state, local = self._state_of(p), _local(p)
            lists = calls.setdefault((p.device, p.dtype, average is None), ([], [], [], [], [], []))
            lists[0].append(local)
            lists[1].append(_laid_out_like(local, _local(p.grad)))
            lists[2].append(_local(state["exp_avg"]))
            lists[3].append(_local(state["exp_avg_sq"]))
            lists[4].append(state["step"])
            if average is not None:
                lists[5].append(average)
        settings = {name: group[name] for name in ("lr", "betas", "eps", "weight_decay", "ema_decay")}
        for lists in calls.values():
            torch._foreach_add_(lists[4], 1)
            take = torch_kernels.adamw_ema_ if torch_kernels.wanted(lists[0][0].device) else adamw_ema_
            take(*lists, **settings, grad_scale=gradient_scale)

    def _state_of(self, p: Tensor) -> dict[str, Any]:
        """The parameter's moments and count of steps, which lie where it lies."""
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(p, memory_format=torch.preserve_format)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Go on from the state of this class, of a pickle or of torch.optim.AdamW."""
        super().__setstate__(state)
        for group in self.param_groups:
            group["fused"] = group["capturable"] = True
            group.setdefault("ema_decay", self.defaults["ema_decay"])
            for p in group["params"]:
                if values := self.state.get(p):
                    values["step"] = values["step"].to(p.device, torch.float32)
                    for name in ("exp_avg", "exp_avg_sq"):
                        values[name] = _laid_out_like(p, values[name])

    def __getstate__(self) -> dict[str, Any]:
        """The state for a copy or a pickle, which keep the averages."""
        return super().__getstate__() | {"_averages": self._averages}


def _paired(params: list[Tensor], averages: list[Tensor]) -> dict[Tensor, Tensor]:
    """Each parameter's average; raises where one does not fit."""
    if len(averages) != len(params):
        raise ValueError(f"ema must have one tensor for each of the {len(params)} params, got {len(averages)}")
    for i, (average, p) in enumerate(zip(averages, params, strict=True)):
        name, of = f"ema[{i}]", f"params[{i}]"
        _check.is_tensor(name, average)
        _check.has_shape(name, average, p.shape, f"the shape of {of}")
        _check.has_dtype(name, average, (p.dtype, torch.promote_types(p.dtype, torch.float32)))
        _check.same_device(name, average, of, p)
        if average.requires_grad:
            raise ValueError(f"{name} must not require gradients")
        if isinstance(average, DTensor) is not isinstance(p, DTensor):
            raise ValueError(f"{name} must be sharded where {of} is")
        if _local(average).stride() != _local(p).stride():
            raise ValueError(f"{name} must have the strides of {of} = {p.stride()}, got {average.stride()}")
    return dict(zip(params, averages, strict=True))


def _local(tensor: Tensor) -> Tensor:
    """This process's shard of a DTensor, or the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _laid_out_like(p: Tensor, tensor: Tensor) -> Tensor:
    """The tensor with its elements in memory in the order of the parameter's."""
    if tensor.stride() == p.stride():
        return tensor
    return torch.empty_like(p, dtype=tensor.dtype, requires_grad=False).copy_(tensor)
