"""Predicts how long an operator or a whole step takes on GPUs that are not here, from its bytes and its FLOPs.

time = max(bytes / (bandwidth * efficiency), flops / rate) + launches * overhead, with the operator's efficiency as the
newest GPU run under results/ shows it, or before there is one the target that it is held to.
"""

import argparse
import functools
import math
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.markdown import markdown
from benchmarks.report import newest, put_into
from benchmarks.results import RESULTS, Run, read_runs
from benchmarks.shapes import Tokens, video_tokens
from benchmarks.steps import forecast
from benchmarks.steps.prediction import Machine
from models.latte import latte

BEGIN, END = "<!-- roofline: begin -->", "<!-- roofline: end -->"
FLOAT = 4
#: Seconds from the end of one kernel to the first loads of the next, in a CUDA graph: an assumption.
LAUNCH_SECONDS = 2e-6
#: What a copy and a product of matrices reach of the datasheet's figures, as an H200 was measured.
COPY_SHARE, PRODUCT_SHARE = 4300 / 4800, 790 / 989


@dataclass(frozen=True)
class Device:
    """A GPU by what its copies and its dense bfloat16 products reach, and the targets of each family there."""

    name: str
    bytes_per_second: float
    flops_per_second: float
    targets: dict[str, float]  # family: share of the copy's bandwidth

    @classmethod
    def of_datasheet(cls, name: str, gigabytes: float, teraflops: float, **targets: float) -> "Device":
        return cls(name, gigabytes * COPY_SHARE * 1e9, teraflops * PRODUCT_SHARE * 1e12, targets)


DEVICES = [
    Device.of_datasheet("A100", 2039, 312, modulation=0.88, attention=0.80, activation=0.88, optimizer=0.88),
    Device.of_datasheet("RTX A6000", 768, 155, modulation=0.88, attention=0.80, activation=0.88, optimizer=0.88),
    Device.of_datasheet("H200", 4800, 989, modulation=0.90, attention=0.85, activation=0.90, optimizer=0.90),
]


@dataclass(frozen=True)
class Cost:
    """What one pass of an operator takes: bytes through device memory, FLOPs of its products, kernel launches."""

    bytes: int
    flops: int = 0
    launches: int = 1

    def seconds(self, device: Device, efficiency: float) -> float:
        """Return the predicted time."""
        memory = self.bytes / (device.bytes_per_second * efficiency)
        return max(memory, self.flops / device.flops_per_second) + self.launches * LAUNCH_SECONDS


Shape = tuple[int, ...]


@dataclass(frozen=True)
class Operator:
    """An operator of a family: the shapes that it is predicted for, by name, and the costs of its passes there."""

    family: str
    name: str
    shapes: Callable[[], dict[str, Shape]]
    cost: Callable[[Shape, int, bool], Cost]  # of a shape, bytes an element, whether it is the backward pass
    dtype: torch.dtype = torch.bfloat16
    differentiable: bool = True

    @property
    def passes(self) -> list[bool]:
        """Whether each of its passes is the backward one."""
        return [False, True] if self.differentiable else [False]

    @property
    def precision(self) -> str:
        return str(self.dtype).removeprefix("torch.")


def of_tokens(shape: Callable[[Tokens], Shape], prefix: str = "") -> Callable[[], dict[str, Shape]]:
    """Return the shapes that an operator sees of the GPU's activations whose names begin so."""

    def shapes() -> dict[str, Shape]:
        every = video_tokens(torch.device("cuda")).values()
        return {tokens.name: shape(tokens) for tokens in every if tokens.name.startswith(prefix)}

    return shapes


# --- modulation ---


def runs_of_a_frame(shape: Shape) -> int:
    """Return into how many runs of tokens the CUDA kernels cut a frame: rows of the vector gradients."""
    b, f, n, _ = shape
    length = 32
    while length > 8 and b * f * math.ceil(n / length) < 1000:
        length //= 2
    return math.ceil(n / length)


def modulation(name: str, passes: tuple[int, int], vectors: int, statistics_: int) -> Operator:
    """Return an operator by its passes over X forward and backward, its vectors and its statistics of a token."""

    def cost(shape: Shape, e: int, backward: bool) -> Cost:
        b, f, n, d = shape
        vector, kept = b * f * d, statistics_ * b * f * n * FLOAT
        moved = passes[backward] * b * f * n * d * e + kept
        if not backward:
            return Cost(moved + vectors * vector * e)
        read = max(1, vectors - 1)  # all but the shift
        partial = vector * runs_of_a_frame(shape) * FLOAT  # written, and read by the second kernel
        return Cost(moved + read * vector * e + vectors * (2 * partial + vector * FLOAT), launches=2)

    return Operator("modulation", name, of_tokens(lambda tokens: tokens.shape), cost)


# --- attention ---


def qkv_shape(tokens: Tokens) -> Shape:
    """Return (B, F, N, 3, H, d) as Latte (d = 64 and 72) or Wan (d = 128) split their channels."""
    heads = {384: 6, 768: 12, 1024: 16, 1152: 16}.get(tokens.channels, tokens.channels // 128)
    return tokens.batch, tokens.frames, tokens.tokens, 3, heads, tokens.channels // heads


def temporal_attention_cost(shape: Shape, e: int, backward: bool) -> Cost:
    """Return 4X forward and 7X backward; products: q k^T, p v; q k^T again, do v^T, p^T do, ds k, ds^T q."""
    b, f, n, _, h, d = shape
    elements = b * f * n * h * d
    passes, products = (7, 5) if backward else (4, 2)
    return Cost(passes * elements * e, products * 2 * elements * f)


# --- activation ---

#: An MLP's inner width over D.
RATIO = 4


def inner_shape(tokens: Tokens) -> Shape:
    """Return (B, F, N, I) of the activation inside an MLP."""
    return (*tokens.shape[:-1], RATIO * tokens.channels)


def gelu_cost(shape: Shape, e: int, backward: bool) -> Cost:
    """Return 2Y forward and 3Y backward."""
    return Cost((3 if backward else 2) * math.prod(shape) * e)


def runs_of_rows(rows: int, width: int) -> int:
    """Return into how many runs the CUDA kernels cut rows whose columns they sum."""
    length, blocks_of_a_row = 64, math.ceil(width / 2048)
    while length > 8 and math.ceil(rows / length) * blocks_of_a_row < 1000:
        length //= 2
    return math.ceil(rows / length)


def gelu_in_mlp_cost(shape: Shape, e: int, backward: bool) -> Cost:
    """Return 2Y forward; backward 4Y, since GELU is computed again, and the sums that are the first bias's gradient."""
    if not backward:
        return gelu_cost(shape, e, backward)
    rows, width = math.prod(shape[:-1]), shape[-1]
    partial = runs_of_rows(rows, width) * width * FLOAT  # written, and read by the second kernel
    return Cost(4 * rows * width * e + 2 * partial + width * FLOAT, launches=2)


# --- optimizer ---


@functools.cache
def parameter_counts() -> dict[str, Shape]:
    """Return the trained parameters of networks, all in one."""
    with torch.device("meta"):
        networks = {name: latte(name) for name in ("Latte-XL/2", "Latte-B/2", "Latte-S/2")}
    return {name: (sum(p.numel() for p in net.parameters() if p.requires_grad),) for name, net in networks.items()}


def foreach_launches(count: int) -> int:
    """Return the launches of one of PyTorch's operators on lists: up to 320 blocks of 65536 elements each."""
    return math.ceil(count / (320 * 65536))


def one_pass_cost(shape: Shape, e: int, backward: bool) -> Cost:
    """Return the norm, which reads g; then p, g, m, v and the average read, and all but g written."""
    (count,) = shape
    return Cost(10 * count * e, launches=foreach_launches(count) + 1)


def fused_adamw_cost(shape: Shape, e: int, backward: bool) -> Cost:
    """Return the norm; clipping (g read and written), fused AdamW (p, g, m, v; p, m, v), lerp (p, average; average)."""
    (count,) = shape
    return Cost((1 + 2 + 7 + 3) * count * e, launches=4 * foreach_launches(count))


def optimizer(name: str, cost: Callable[[Shape, int, bool], Cost]) -> Operator:
    """Return a way to take the optimiser's step of a whole network in float32."""
    return Operator("optimizer", name, parameter_counts, cost, torch.float32, differentiable=False)


OPERATORS = [
    modulation("layer_norm_modulate", (2, 3), 2, 2),
    modulation("rms_norm_modulate", (2, 3), 2, 1),
    modulation("gate_residual", (3, 3), 1, 0),
    modulation("gate_residual_modulate", (4, 6), 3, 2),
    modulation("gate_residual_rms_modulate", (4, 6), 3, 1),
    Operator("attention", "temporal_attention_packed", of_tokens(qkv_shape), temporal_attention_cost),
    Operator("activation", "gelu_tanh", of_tokens(inner_shape, "Latte"), gelu_cost),
    Operator("activation", "gelu_mlp, beside its products", of_tokens(inner_shape, "Latte"), gelu_in_mlp_cost),
    optimizer("adamw_ema_", one_pass_cost),
    optimizer("clip, fused AdamW, foreach lerp", fused_adamw_cost),
]
FAMILIES = sorted({operator.family for operator in OPERATORS})


# --- efficiency ---


def measured_efficiency(operator: Operator, backward: bool, runs: Iterable[Run]) -> tuple[float, str] | None:
    """Return (efficiency, device) of the newest run of an operator in its dtype on a GPU, or None.

    It is the median over its shapes of the time predicted from the run's own ceilings over the time measured; with
    ``backward``, of forward and backward together, as they are measured.
    """
    wanted = "forward+backward" if backward else "forward"
    for run in sorted(runs, key=lambda run: run.environment["date"], reverse=True):
        if "capability" not in run.environment:
            continue
        found = [
            _efficiency(operator, result, run.ceilings)
            for result in run.results
            if (result["operator"], result["passes"], result["dtype"]) == (operator.name, wanted, operator.precision)
            if result["traffic_bytes"] and result["ours"] != "ours:reference"
            if "seconds" in result["variants"][result["ours"]]
        ]
        if found:
            return statistics.median(found), run.environment["device"]
    return None


def _efficiency(operator: Operator, result: dict[str, Any], ceilings: dict[str, Any]) -> float:
    copy, product = ceilings["copy_gigabytes_per_second"] * 1e9, ceilings["product_teraflops"] * 1e12
    device = Device("measured", copy, product, {})
    passes = [False, True] if result["passes"] == "forward+backward" else [False]
    costs = [operator.cost(tuple(result["shape"]), operator.dtype.itemsize, backward) for backward in passes]
    return sum(cost.seconds(device, 1.0) for cost in costs) / result["variants"][result["ours"]]["seconds"]


# --- whole steps ---


def machines() -> list[Machine]:
    """Return the GPUs as whole steps are predicted for: what a copy reaches times the target, and TF32 at half rate."""
    return [
        Machine(
            d.name,
            d.bytes_per_second * d.targets["modulation"],
            d.flops_per_second,
            d.flops_per_second / 2,
            LAUNCH_SECONDS,
        )
        for d in DEVICES
    ]


def step_report(runs: Sequence[Run]) -> str:
    """Return the predictions of whole steps, what they rest on, and how they did on this machine's CPU."""
    gpus = machines()
    shares = [gpu.bytes / device.bytes_per_second for gpu, device in zip(gpus, DEVICES, strict=True)]
    sections = [
        "Predicted, not measured: milliseconds, in brackets how many times those of ours, and the share of the time in"
        " operators that memory bounds. Every operator that the step dispatches moves its arguments and its results"
        f" once, at {min(shares):.0%} to {max(shares):.0%} of what a copy reaches, or does its products, and takes"
        f" {LAUNCH_SECONDS * 1e6:.0f} us to launch.",
        "\n".join(forecast.step_table(gpus)),
        *("\n".join(forecast.parts_table(gpu)) for gpu in gpus),
        "Latte-XL/2 where nothing else is said, batch 4 for the sizes and 1 for frames and tokens; in brackets the time"
        " of SDPA in bfloat16 over ours:",
        "\n".join(forecast.curve_table(gpus)),
    ]
    tested = forecast.against_measurement(newest(runs))
    if tested:
        sections += ["The same model with this machine's own ceilings, beside what was measured:", "\n".join(tested)]
    return "\n\n".join(sections)


def draw_steps(folder: Path, runs: Sequence[Run]) -> None:
    """Draw the pictures of whole steps into a folder."""
    gpus = machines()
    forecast.draw_roofline(folder / "roofline.png", gpus)
    forecast.draw_parts(folder / "step_parts_predicted.png", gpus)
    forecast.draw_curves(folder / "step_scaling_predicted.png", gpus)
    forecast.draw_measured_parts(folder / "step_parts_measured.png", list(newest(runs)))


# --- tables ---


def table(family: str, runs: Sequence[Run]) -> str:
    """Return a family's predictions: what they rest on, and a row for each operator and shape."""
    operators = [operator for operator in OPERATORS if operator.family == family]
    found = {(op.name, back): measured_efficiency(op, back, runs) for op in operators for back in op.passes}
    rows = []
    for operator in operators:
        for name, shape in operator.shapes().items():
            costs = [operator.cost(shape, operator.dtype.itemsize, backward) for backward in operator.passes]
            cells = [" / ".join(f"{cost.bytes / 1e6:.1f}" for cost in costs)]
            for device in DEVICES:
                efficiencies = [(found[operator.name, b] or [device.targets[family]])[0] for b in operator.passes]
                times = [cost.seconds(device, eff) for cost, eff in zip(costs, efficiencies, strict=True)]
                cells.append(" / ".join(f"{time * 1e3:.3f}" for time in times))
            rows.append([operator.name, f"{name} {shape}", *cells])
    header = ["operator", "shape", "MB", *(f"{device.name}, predicted ms" for device in DEVICES)]
    return "\n".join([_basis(family, operators[0], found), "", *markdown(header, rows)])


def _basis(family: str, like: Operator, found: dict[tuple[str, bool], tuple[float, str] | None]) -> str:
    """Return what the predictions of a family's operators, which are like this one, rest on."""
    targets = ", ".join(f"{device.name} {device.targets[family]:.0%}" for device in DEVICES)
    measured = [
        f"{name} {'forward+backward' if backward else 'forward'} {efficiency[0]:.0%} on {efficiency[1]}"
        for (name, backward), efficiency in found.items()
        if efficiency
    ]
    told = f"measured efficiencies ({'; '.join(measured)})" if measured else ""
    aimed = f"the targets as efficiencies ({targets})" if len(measured) < len(found) else ""
    return (
        f"Predicted, not measured: {'forward / backward' if like.differentiable else 'a step'} in {like.precision} by"
        f" `benchmarks/roofline.py`, with {' and elsewhere '.join(filter(None, [told, aimed]))} of what a copy reaches,"
        f" and {LAUNCH_SECONDS * 1e6:.0f} us a launch."
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.roofline", description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder that holds <device>/*.json")
    parser.add_argument(
        "--into", type=Path, metavar="PAGE", help=f"write the family of the page's folder between {BEGIN} and {END}"
    )
    parser.add_argument("--steps", action="store_true", help="predict whole steps, in place of operators")
    parser.add_argument("--pictures", type=Path, metavar="FOLDER", help="with --steps: draw them into this folder too")
    options = parser.parse_args(arguments)
    runs = read_runs(options.results)
    if options.steps:
        told = step_report(runs)
        if options.into is None:
            print(told)
        else:
            put_into(options.into, told, BEGIN, END)
        if options.pictures is not None:
            draw_steps(options.pictures, runs)
        return 0
    if options.into is None:
        print("\n\n".join(table(family, runs) for family in FAMILIES))
        return 0
    family = options.into.resolve().parent.name
    if family not in FAMILIES:
        parser.error(f"--into must be a page in a folder named {', '.join(FAMILIES)}, got {options.into}")
    put_into(options.into, table(family, runs), BEGIN, END)
    return 0


if __name__ == "__main__":
    sys.exit(main())
