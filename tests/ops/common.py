"""What the operator tests share: the float64 contract, opcheck and gradcheck, compiling without recompilation."""

import contextlib
import ctypes
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

#: The dtypes that kernels serve.
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


#: mallopt's name for the byte whose complement fills new memory, and a byte that makes huge numbers, or NaN, of it.
M_PERTURB, HUGE = -6, 0x80


@contextlib.contextmanager
def poisoned_empty() -> Iterator[None]:
    """Fill new tensors with NaN or huge numbers, so that an element which a kernel leaves unwritten is seen.

    torch fills those that are made through its dispatcher, the C library all others on the CPU, and on a GPU they take
    the place of NaN that was freed before.
    """
    deterministic = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    libc = ctypes.CDLL(None)
    libc.mallopt(M_PERTURB, HUGE)
    if torch.cuda.is_available():
        # the allocator keeps what is freed, in a pool of small blocks and one of large ones
        freed = [torch.full((count,), torch.nan, device="cuda") for count in (2**25, *[2**17] * 16)]
        del freed
    try:
        yield
    finally:
        libc.mallopt(M_PERTURB, 0)
        torch.use_deterministic_algorithms(deterministic)
        torch.utils.deterministic.fill_uninitialized_memory = fill


#: Elements between the halves of a tensor that is far apart, and of each of the places in which a half lies.
FAR, PLACE, PLACES = 2**31, 16384, 64
_next_place = itertools.count()


@functools.cache
def _room(dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return memory for all tensors that are far apart: 4 GiB in 16 bits, of which a CPU gets the few pages in use."""
    return torch.empty(FAR + PLACE * PLACES, dtype=dtype, device=device)


def far_apart(tensor: Tensor, dim: int) -> Tensor:
    """Return a small tensor's values, with 2^31 elements from one index of a dimension to the other."""
    assert tensor.shape[dim] <= 2
    strides = [FAR if i == dim else stride for i, stride in enumerate(tensor.stride())]
    assert sum((size - 1) * stride % FAR for size, stride in zip(tensor.shape, strides, strict=True)) < PLACE
    room, start = _room(tensor.dtype, tensor.device), next(_next_place) % PLACES * PLACE
    return room.as_strided(tensor.shape, strides, start).copy_(tensor)


def ulp(value: Tensor, dtype: torch.dtype) -> float:
    """Return one unit in the last place of the largest magnitude."""
    finite = value[value.isfinite()].abs()
    return torch.finfo(dtype).eps * float(finite.max()) if finite.numel() else 0.0


class Deviation(NamedTuple):
    """Largest distances from float64: of a result, of plain PyTorch in its dtype, and what the contract allows."""

    ours: float
    plain: float
    bound: float


def deviation(ours: Tensor, plain: Tensor, exact: Tensor) -> Deviation:
    """Return how far finite values are from float64; max|ours - f64| <= 1.25 * max|plain - f64| + 1 ulp is allowed."""
    finite = exact.to(ours.dtype).isfinite()
    if not finite.any():
        return Deviation(0.0, 0.0, 0.0)
    error = float((ours.double() - exact)[finite].abs().max())
    plain_error = float((plain.double() - exact)[finite & plain.isfinite()].abs().max())
    return Deviation(error, plain_error, 1.25 * plain_error + ulp(exact[finite], ours.dtype))


def assert_contract(name: str, ours: Tensor, plain: Tensor, exact: Tensor) -> None:
    """Require the contract of :func:`deviation`, and NaN and Inf in the same places."""
    assert ours.shape == exact.shape, f"{name}: shape {tuple(ours.shape)}, wanted {tuple(exact.shape)}"
    finite = exact.to(ours.dtype).isfinite()
    assert torch.equal(ours.isfinite(), finite), f"{name}: NaN or Inf in other places than the definition has them"
    error, plain_error, bound = deviation(ours, plain, exact)
    assert error <= bound, f"{name}: error {error:.3e}, plain PyTorch {plain_error:.3e}, bound {bound:.3e}"


def leaves(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Return detached copies in a dtype that require gradients, with the inputs' strides."""
    return [tensor.detach().to(dtype, copy=True).requires_grad_() for tensor in tensors]


def value_and_grads(
    function: Callable[..., Tensor | tuple[Tensor, ...]], inputs: Sequence[Tensor], upstream: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the outputs and the gradient of every input, for given gradients of the outputs."""
    outputs = function(*inputs)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    given = [grad.to(output.dtype) for grad, output in zip(upstream, outputs, strict=True)]
    return [output.detach() for output in outputs], list(torch.autograd.grad(outputs, list(inputs), given))


def assert_value_and_grads(
    ours: Callable[..., Any],
    plain: Callable[..., Any],
    inputs: Sequence[Tensor],
    upstream: Sequence[Tensor],
    dtype: torch.dtype,
) -> None:
    """Hold an operator and all its gradients against the contract; ``plain`` is also the float64 truth."""
    rounded = [tensor.to(dtype) for tensor in inputs]
    given = [grad.to(dtype) for grad in upstream]
    ours_out, ours_grads = value_and_grads(ours, leaves(rounded, dtype), given)
    plain_out, plain_grads = value_and_grads(plain, leaves(rounded, dtype), given)
    exact_out, exact_grads = value_and_grads(plain, leaves(rounded, torch.float64), given)
    for i, triple in enumerate(zip(ours_out, plain_out, exact_out, strict=True)):
        assert_contract(f"output {i}", *triple)
    for i, triple in enumerate(zip(ours_grads, plain_grads, exact_grads, strict=True)):
        assert_contract(f"gradient of input {i}", *triple)


def assert_compiles_once(
    function: Callable[..., Any], make: Callable[..., Sequence[Any]], sizes: Sequence[Sequence[int]]
) -> None:
    """Require torch.compile(fullgraph=True) to serve every size with one compilation, values and gradients equal.

    ``make(*size)`` returns fresh arguments; those that require gradients get one.
    """
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for i, size in enumerate(sizes):
        args = make(*size)
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            ours = _run(compiled, args)
        for got, wanted in zip(ours, _run(function, args), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)


def _run(function: Callable[..., Any], args: Sequence[Any]) -> list[Tensor]:
    outputs = function(*args)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    wanted = [arg for arg in args if isinstance(arg, Tensor) and arg.requires_grad]
    if not wanted:
        return outputs
    reaching = [output for output in outputs if output.requires_grad]
    return outputs + list(torch.autograd.grad(reaching, wanted, [torch.ones_like(output) for output in reaching]))


@contextlib.contextmanager
def no_synchronisation() -> Iterator[None]:
    """Raise where the host waits for a CUDA device, a copy from the host included."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
