"""The inputs that the modulation family's kernels are held to, and the float64 truth beside them.

The tests (test_modulation_kernels.py) and the accuracy table (benchmarks/accuracy.py) go through the same cases.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tests.ops.backends import Kernels
from tests.ops.common import Deviation, deviation
from tests.ops.test_modulation import OPERATORS as PUBLIC_OPERATORS
from vidkern.ops.modulation import reference

EPS = 1e-6
BACKENDS = ("cpu", "triton", "cuda")

#: Operator: how one writes it in plain PyTorch.
PLAIN = {operator.__name__: plain for operator, (plain, *_) in PUBLIC_OPERATORS.items()}
OPERATORS = tuple(PLAIN)
RESIDUAL_NORMS = ("gate_residual_modulate", "gate_residual_rms_modulate")

Tensors = Mapping[str, Tensor | None]


def argument_names(name: str) -> list[str]:
    """Return an operator's arguments, as its schema names them."""
    return [argument.name for argument in _schema(name).arguments]


def result_names(name: str) -> list[str]:
    """Return an operator's results, as its schema names them."""
    return [result.name or "z" for result in _schema(name).returns]


def _schema(name: str) -> Any:
    return getattr(torch.ops.vidkern, name).default._schema


def token_inputs(name: str) -> list[str]:
    """Return the (B, F, N, D) inputs."""
    return [argument for argument in argument_names(name) if argument in ("x", "y")]


def vector_inputs(name: str) -> list[str]:
    """Return the (B, F, D) inputs."""
    return [argument for argument in argument_names(name) if argument in ("gate", "shift", "scale")]


def outputs(name: str) -> list[str]:
    """Return the results that carry a gradient."""
    return [result for result in result_names(name) if result not in ("mean", "rstd")]


def make_inputs(name: str, shape: tuple[int, int, int, int], device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return random inputs; the vectors are views of one (B, F, 6D) tensor, as a model has them."""
    batch, frames, _, channels = shape
    made = {token: torch.randn(shape, device=device).to(dtype) for token in token_inputs(name)}
    chunks = torch.randn(batch, frames, 6 * channels, device=device).to(dtype).chunk(6, -1)
    return made | {vector: chunks[i] for i, vector in enumerate(vector_inputs(name), start=2)}


def make_upstream(name: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor | None]:
    """Return a random gradient for every output."""
    x = inputs["x"]
    return {f"d{output}": torch.randn(x.shape, device=x.device).to(x.dtype) for output in outputs(name)}


def run(find: Callable[[str], Callable[..., Any]], name: str, inputs: Tensors, upstream: Tensors) -> dict[str, Tensor]:
    """Return every result of an operator and of its backward, by name; a gradient that is not given is None."""
    forward = _call(find(name), name, inputs)
    return forward | _call(find(f"{name}_backward"), f"{name}_backward", {**forward, **inputs, **upstream})


def _call(kernel: Callable[..., Any], name: str, values: Tensors) -> dict[str, Tensor]:
    results = kernel(*(EPS if argument == "eps" else values[argument] for argument in argument_names(name)))
    return dict(zip(result_names(name), [results] if isinstance(results, Tensor) else results, strict=True))


def reference_kernel(name: str) -> Callable[..., Any]:
    """Return the definition of an operator or of its backward."""
    return getattr(reference, name)


def exact_results(name: str, inputs: Tensors, upstream: Tensors) -> dict[str, Tensor]:
    """Return what :func:`run` should have, in float64."""
    wide = [{key: None if t is None else t.double() for key, t in given.items()} for given in (inputs, upstream)]
    return run(reference_kernel, name, *wide)


def plain_results(name: str, inputs: Mapping[str, Tensor], upstream: Tensors) -> dict[str, Tensor]:
    """Return the outputs and gradients of plain PyTorch, every tensor in the tokens' dtype."""
    dtype = inputs["x"].dtype
    leaves = {key: tensor.detach().to(dtype).requires_grad_() for key, tensor in inputs.items()}
    computed = PLAIN[name](*leaves.values())
    found = dict(zip(outputs(name), [computed] if isinstance(computed, Tensor) else computed, strict=True))
    reaching = [(found[key[1:]], grad) for key, grad in upstream.items() if grad is not None]
    grads = torch.autograd.grad([out for out, _ in reaching], list(leaves.values()), [grad for _, grad in reaching])
    return {key: out.detach() for key, out in found.items()} | {
        f"d{key}": grad for key, grad in zip(leaves, grads, strict=True)
    }


class Case(NamedTuple):
    """Tokens that an operator's accuracy is held on: what becomes of standard normal x and y."""

    kind: str
    shape: tuple[int, int, int, int]
    dtype: torch.dtype
    x: Callable[[Tensor], Tensor] = lambda x: x
    y: Callable[[Tensor], Tensor] = lambda y: y

    def __str__(self) -> str:
        return f"{self.kind}-{self.shape}-{self.dtype}"

    def inputs(self, name: str, device: str) -> dict[str, Tensor]:
        """Return an operator's inputs, the same in every process."""
        torch.manual_seed(0)
        made = make_inputs(name, self.shape, device, self.dtype)
        return made | {key: getattr(self, key)(made[key].float()).to(self.dtype) for key in token_inputs(name)}


def deviations(kernels: Kernels, name: str, case: Case) -> dict[str, Deviation]:
    """Return how far every output and gradient of a case is from float64."""
    inputs = case.inputs(name, kernels.device)
    upstream = make_upstream(name, inputs)
    ours = run(kernels.find, name, inputs, upstream)
    plain, exact = plain_results(name, inputs, upstream), exact_results(name, inputs, upstream)
    return {key: deviation(ours[key], plain[key], exact[key]) for key in ours if key not in ("mean", "rstd")}


_F32, _BF16, _F16 = torch.float32, torch.bfloat16, torch.float16
_HARD = (1, 2, 5, 384)

CASES = [
    *(Case("random", (2, 3, 5, 32), dtype) for dtype in (_F32, _BF16, _F16)),
    *(Case("random", (1, 2, 3, 1152), dtype) for dtype in (_F32, _BF16, _F16)),
    Case("random", (4, 5, 1, 8), _F32),
    Case("random", (2, 1, 19, 64), _BF16),
    Case("random", (1, 1, 2, 1000), _F16),
    Case("random", (1, 1, 2, 3072), _BF16),
    Case("random", (1, 1, 1, 8192), _F32),
    *(Case("mean 1000", _HARD, dtype, x=lambda x: x + 1e3) for dtype in (_F32, _BF16, _F16)),
    *(Case("deviation 1e-4", _HARD, dtype, lambda x: 1e-4 * x + 1, lambda y: 1e-4 * y) for dtype in (_F32, _BF16)),
    *(Case("values 1e-5", _HARD, dtype, lambda x: 1e-5 * x, lambda y: 1e-5 * y) for dtype in (_F32, _BF16)),
    *(Case("values 1e4", _HARD, dtype, lambda x: 1e4 * x, lambda y: 1e4 * y) for dtype in (_F32, _BF16)),
    *(Case("constant rows", _HARD, dtype, lambda x: 0 * x - 12.3, lambda y: 0 * y) for dtype in (_F32, _BF16)),
]
