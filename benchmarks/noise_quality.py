"""Shows that the noise is the same bits everywhere and normal, and renders the tables of docs/noise.md.

python -m benchmarks.noise_quality --measure --into docs/noise.md     all of it: an hour on two cores
python -m benchmarks.noise_quality --launches --into docs/noise.md    the launches anew: minutes
"""

import argparse
import importlib
import json
import math
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import launches
from benchmarks.environment import default_device, device_name, environment
from benchmarks.report import markdown, put_into
from benchmarks.steps.variants import Setting
from tests.ops.backends import Kernels, kernels_of
from vidkern.diffusion import make_schedule
from vidkern.ops.noise import generator

FOLDER = Path(__file__).resolve().parent / "noise"
BACKENDS = ("cpu", "triton", "cuda")
CASES = 12  # of each operator, sharing and dtype
SHARING = ("independent", "shared", "mixed", "progressive")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TARGETS = ("epsilon", "v", "flow")
BODY = 4.0  # the radius where the tail begins
QUICK_LATTE = Setting(
    "Latte-S/2", 2, (("input_size", 8), ("hidden_size", 64), ("depth", 2), ("num_heads", 2), ("num_frames", 3))
)


# ---- the same bits on every backend


class Random:
    """Random arguments of the operators: the same numbers on every device, from a seed."""

    def __init__(self, seed: int, device: str) -> None:
        self._generator, self._device = torch.Generator("cpu").manual_seed(seed), device

    def integer(self, low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=self._generator))

    def shape(self) -> tuple[int, ...]:
        return tuple(self.integer(1, size) for size in (4, 5, 6, 20, 20))

    def clip(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return a clip, contiguous, with channels last, the second half of channels, or one frame for all."""
        batch, frames, channels, *size = shape
        layout = self.integer(0, 4)
        stored = {
            1: (batch, frames, *size, channels),
            2: (batch, frames, 2 * channels, *size),
            3: (batch, 1, *shape[2:]),
        }
        values = torch.randn(stored.get(layout, shape), generator=self._generator).to(dtype).to(self._device)
        views: dict[int, Callable[[Tensor], Tensor]] = {
            1: lambda x: x.permute(0, 1, 4, 2, 3),
            2: lambda x: x[:, :, channels:],
            3: lambda x: x.expand(shape),
        }
        return views.get(layout, lambda x: x)(values)

    def choice(self, values: Sequence[Any]) -> Any:
        return values[self.integer(0, len(values))]

    def levels(self, shape: tuple[int, ...]) -> Tensor:
        return torch.rand(shape[:2], generator=self._generator).to(self._device)

    def key(self) -> Tensor:
        return torch.randint(-(2**63), 2**63 - 1, (2,), generator=self._generator).to(self._device)

    def mode(self, sharing: str, shape: tuple[int, ...]) -> tuple[str, Tensor | None, int]:
        """Return sharing, base_weight and sample_offset."""
        weight = self.levels(shape) if sharing in ("mixed", "progressive") else None
        return sharing, weight, self.integer(0, 2**32 - shape[0] + 1)

    def timesteps(self, shape: tuple[int, ...]) -> Tensor:
        return torch.randint(-1, 1000, shape[:2], generator=self._generator).to(self._device)

    def tables(self, *names: str) -> list[Tensor]:
        """Return tables of a schedule that has them."""
        schedule = make_schedule("flow" if names == ("sigma",) else "linear", device=self._device)
        return [getattr(schedule, name) for name in names]

    def step(self, shape: tuple[int, ...], dtype: torch.dtype, table: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return a sampler's x_t to table, and guidance to clip."""
        guidance = self.choice((None, 3.5))
        wanted = (shape[0] * (1 if guidance is None else 2), shape[1], self.choice((1, 2)) * shape[2], *shape[3:])
        t, drop = self.timesteps(shape), torch.randint(0, 300, shape[:2], generator=self._generator).to(self._device)
        hold = torch.randint(0, 2, shape[:2], generator=self._generator).bool().to(self._device)
        before = {
            "x_t": self.clip(shape, dtype),
            "model_out": self.clip(wanted, dtype),
            "t": t,
            "t_prev": (t - drop).clamp(min=-1),
            "table": self.tables(table)[0],
        }
        return before, {"guidance": guidance, "hold": self.choice((None, hold)), "clip": self.choice((None, 1.0))}


def philox_normal(random: Random, sharing: str, dtype: torch.dtype) -> tuple[Any, ...]:
    shape = random.shape()
    return (list(shape), random.key(), *random.mode(sharing, shape), dtype)


def add_noise(random: Random, sharing: str, dtype: torch.dtype) -> tuple[Any, ...]:
    shape, target = random.shape(), random.choice((None, *TARGETS))
    levels = random.levels(shape), random.levels(shape)
    return (random.clip(shape, dtype), *levels, random.key(), target, *random.mode(sharing, shape))


def add_noise_backward(random: Random, sharing: str, dtype: torch.dtype) -> tuple[Any, ...]:
    shape = random.shape()
    grads, levels = [random.clip(shape, dtype) for _ in range(2)], (random.levels(shape), random.levels(shape))
    mode = random.mode(sharing, shape)
    return (*grads, random.clip(shape, dtype), *levels, random.key(), random.choice(TARGETS), *mode)


def diffusion_mse(random: Random, sharing: str, dtype: torch.dtype) -> tuple[Any, ...]:
    shape, prediction = random.shape(), random.choice((*TARGETS, "x0"))
    clips, levels = [random.clip(shape, dtype) for _ in range(2)], (random.levels(shape), random.levels(shape))
    return (*clips, *levels, random.key(), prediction, *random.mode(sharing, shape))


def diffusion_mse_backward(random: Random, sharing: str, dtype: torch.dtype) -> tuple[Any, ...]:
    shape = random.shape()
    return random.levels(shape), random.clip(shape, dtype)


def hybrid_loss(random: Random, sharing: str, dtype: torch.dtype) -> tuple[Any, ...]:
    shape, prediction = random.shape(), random.choice((*TARGETS, "x0"))
    model_out = random.clip((*shape[:2], 2 * shape[2], *shape[3:]), dtype)
    levels = random.levels(shape), random.levels(shape)
    t, tables = random.timesteps(shape), random.tables("posterior_mean_coef", "posterior_log_variance", "log_beta")
    mode = random.mode(sharing, shape)
    return (model_out, random.clip(shape, dtype), *levels, t.clamp(min=0), *tables, random.key(), prediction, *mode)


def ddim_step(random: Random, sharing: str, dtype: torch.dtype) -> tuple[Any, ...]:
    shape, prediction = random.shape(), random.choice(("epsilon", "v", "x0"))
    before, after = random.step(shape, dtype, "alphas_cumprod")
    eta = random.choice((0.3, 1.0))
    return (*before.values(), prediction, eta, random.key(), *after.values(), *random.mode(sharing, shape))


def ddpm_step(random: Random, sharing: str, dtype: torch.dtype) -> tuple[Any, ...]:
    """Without the learned range, whose exponential is each backend's own."""
    shape, prediction = random.shape(), random.choice(("epsilon", "v", "x0"))
    before, after = random.step(shape, dtype, "alphas_cumprod")
    variance = random.choice(("fixed_small", "fixed_large"))
    return (*before.values(), prediction, variance, random.key(), *after.values(), *random.mode(sharing, shape))


def flow_step(random: Random, sharing: str, dtype: torch.dtype) -> tuple[Any, ...]:
    before, after = random.step(random.shape(), dtype, "sigma")
    return (*before.values(), random.choice(("flow", "x0")), *after.values())


class Operator(NamedTuple):
    """An operator's random arguments, and which of its results have the definition's bits: the others are sums."""

    family: str
    arguments: Callable[[Random, str, torch.dtype], tuple[Any, ...]]
    sharing: Sequence[str] = SHARING
    exact: Callable[[list[Tensor]], list[Tensor]] = list


OPERATORS = {
    "philox_normal": Operator("noise", philox_normal),
    "add_noise": Operator("noise", add_noise),
    "add_noise_backward": Operator("noise", add_noise_backward, exact=lambda results: results[:1]),
    "diffusion_mse": Operator("noise", diffusion_mse, exact=lambda results: results[1:]),
    "diffusion_mse_backward": Operator("noise", diffusion_mse_backward, sharing=("",)),
    # of the gradient's factors the residual; the others have an exponential, which is each backend's own
    "hybrid_loss": Operator("noise", hybrid_loss, exact=lambda results: [results[2].chunk(2, dim=2)[0]]),
    "ddim_step": Operator("sampling", ddim_step),
    "ddpm_step": Operator("sampling", ddpm_step),
    "flow_step": Operator("sampling", flow_step, sharing=("",)),
}


def equality(cases: int, dtypes: Sequence[torch.dtype]) -> Iterator[dict[str, Any]]:
    """Yield, for each operator, sharing, dtype and backend, how many random cases have the definition's bits."""
    for backend in BACKENDS:
        for name, operator in OPERATORS.items():
            kernels = kernels_of(operator.family, backend)
            for sharing in operator.sharing:
                for dtype in dtypes:
                    seed = zlib.crc32(f"{name} {sharing} {dtype}".encode())
                    found = [_same_bits(kernels, name, sharing, dtype, seed + i) for i in range(cases)]
                    yield {
                        "operator": name,
                        "sharing": sharing,
                        "dtype": str(dtype).removeprefix("torch."),
                        "backend": backend,
                        "cases": cases,
                        "equal": sum(same for same, _ in found),
                        "numbers": sum(numbers for _, numbers in found),
                    }


def _same_bits(kernels: Kernels, name: str, sharing: str, dtype: torch.dtype, seed: int) -> tuple[bool, int]:
    """Return whether a backend has the bits that the definition has on the CPU, and of how many numbers."""
    family, arguments, _, exact = OPERATORS[name]
    reference = importlib.import_module(f"vidkern.ops.{family}.reference")
    ours = kernels.find(name)(*arguments(Random(seed, kernels.device), sharing, dtype))
    wanted = getattr(reference, name)(*arguments(Random(seed, "cpu"), sharing, dtype))
    pairs = list(zip(exact(_listed(ours)), exact(_listed(wanted)), strict=True))
    same = all(torch.equal(_bits(x.cpu()), _bits(y)) for x, y in pairs)
    return same, sum(y.numel() for _, y in pairs)


def _listed(results: Any) -> list[Tensor]:
    return [results] if isinstance(results, Tensor) else list(results)


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().view({4: torch.int32, 2: torch.int16}[x.element_size()])


# ---- the polynomials against float64


def polynomials(words: int) -> list[dict[str, Any]]:
    """Return the largest errors of the generator's float32 arithmetic, over at least so many words of each kind."""
    random = torch.Generator("cpu").manual_seed(0)
    exponents = torch.arange(31)
    fractions = torch.randint(2**23, (words // 31,), generator=random)
    radius_word = (((1 << 23) + fractions)[:, None] << 8 >> (31 - exponents)).flatten()  # as many in every octave of u
    angle_word = torch.randint(2**32, radius_word.shape, generator=random)
    u = ((radius_word & 0x7FFFFFFF) | 1).to(torch.float32).double() / 2**31
    radius = (-2 * u.log()).clamp(min=0).sqrt()
    angle = math.pi * ((angle_word & generator.FRACTION).double() / 2**23 - 0.5 + (angle_word >> 31))
    cosine, sine = generator.direction(angle_word)
    normals = torch.stack(generator.box_muller(radius_word, angle_word)).double()
    exact = radius * torch.stack([angle.cos(), angle.sin()])
    body = (radius < BODY).expand(2, -1)
    rows = [
        ("radius", generator.radius(radius_word).double(), radius),
        ("cosine and sine", torch.stack([cosine, sine]).double(), torch.stack([angle.cos(), angle.sin()])),
        (f"normals, body: radius below {BODY:.0f}", normals[body], exact[body]),
        (f"normals, tail: radius {BODY:.0f} and more", normals[~body], exact[~body]),
    ]
    return [
        {
            "quantity": name,
            "words": ours.numel(),
            "error": float((ours - wanted).abs().max()),
            "largest": float(wanted.abs().max()),
        }
        for name, ours, wanted in rows
    ]


# ---- the record and its tables


def measure(quick: bool) -> dict[str, Any]:
    """Return everything that the tables show; ``quick`` has a little of each."""
    device = default_device()
    if device.type == "cpu":
        importlib.import_module("tests.triton_interpreter").enable()
    statistics = importlib.import_module("tests.ops.noise_statistics")
    counts = statistics.count(device.type, 1 if quick else statistics.ROUNDS)
    return {
        "environment": environment(device),
        "equality": list(equality(1, DTYPES[:1]) if quick else equality(CASES, DTYPES)),
        "statistics": [statistic._asdict() for statistic in statistics.statistics(counts)],
        "polynomials": polynomials(10**4 if quick else 10**7),
        "launches": counted_launches(quick),
    }


def counted_launches(quick: bool) -> dict[str, Any]:
    """Return the launches of steps, or of their first two parts."""
    return launches.measure(QUICK_LATTE, parts=2) if quick else launches.measure()


def report(record: dict[str, Any]) -> str:
    """Return one device's tables."""
    env = record["environment"]
    on_gpu = "capability" in env
    head = (
        f"### {env['device']}, commit {env['commit']}, {env['date'][:10]}: torch {env['torch']}, triton {env['triton']}"
    )
    return "\n\n".join(
        [
            head,
            "**The same bits.** Random cases whose results have the bits that the definition has on the CPU, of all:",
            _equality_table(record["equality"], on_gpu),
            f"**Statistics** of {record['statistics'][0]['numbers']:.2e} numbers drawn on this device:",
            _statistics_table(record["statistics"]),
            "**float32 against float64**, the largest errors of the generator's arithmetic:",
            _polynomial_table(record["polynomials"]),
            "**Launches:**",
            launches.table(record["launches"]),
        ]
    )


def _equality_table(rows: Sequence[dict[str, Any]], on_gpu: bool) -> str:
    titles = {
        "cpu": "C++",
        "triton": "Triton" if on_gpu else "Triton, interpreted",
        "cuda": "CUDA" if on_gpu else "CUDA, emulated",
    }
    groups: dict[tuple[str, str, str], dict[str, dict[str, Any]]] = {}
    for row in rows:
        key = row["operator"], row["sharing"], row["dtype"]
        groups.setdefault(key, {})[row["backend"]] = row
    backends = list(dict.fromkeys(row["backend"] for row in rows))
    cells = [
        [*key, *(f"{by[b]['equal']} of {by[b]['cases']}" for b in backends), str(by[backends[0]]["numbers"])]
        for key, by in groups.items()
    ]
    header = ["operator", "sharing", "dtype", *(titles[b] for b in backends), "numbers each"]
    return "\n".join(markdown(header, cells))


def _statistics_table(rows: Sequence[dict[str, Any]]) -> str:
    cells = [
        [
            row["name"],
            f"{row['numbers']:.1e}",
            f"{row['value']:.6g}",
            f"{row['expected']:.6g}",
            "" if row["z"] is None else f"{row['z']:+.2f}",
            f"{row['p']:.3f}",
        ]
        for row in rows
    ]
    return "\n".join(markdown(["statistic", "numbers", "found", "expected", "z", "p"], cells))


def _polynomial_table(rows: Sequence[dict[str, Any]]) -> str:
    cells = [[row["quantity"], f"{row['words']:.1e}", f"{row['error']:.2e}", f"{row['largest']:.3f}"] for row in rows]
    return "\n".join(markdown(["quantity", "inputs", "largest error", "largest value"], cells))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return 1 where a case has other bits than the definition."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.noise_quality", description=__doc__)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--measure", action="store_true", help="measure on this machine first")
    what.add_argument(
        "--launches", action="store_true", help="count the launches anew, and keep the rest measured here"
    )
    parser.add_argument("--quick", action="store_true", help="measure a little of everything")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="the folder that holds <device>.json")
    parser.add_argument("--into", type=Path, metavar="PAGE", help="write between the markers of this page")
    options = parser.parse_args(arguments)
    if options.measure or options.launches:
        options.folder.mkdir(exist_ok=True)
        path = options.folder / f"{device_name(default_device())}.json"
        record = measure(options.quick) if options.measure else json.loads(path.read_text())
        if options.launches:
            record["launches"] = counted_launches(options.quick)
        path.write_text(json.dumps(record, indent=1) + "\n")
    records = [json.loads(path.read_text()) for path in sorted(options.folder.glob("*.json"))]
    rendered = "\n\n".join(map(report, records))
    if options.into is None:
        print(rendered)
    else:
        put_into(options.into, rendered)
    return int(any(row["equal"] < row["cases"] for record in records for row in record["equality"]))


if __name__ == "__main__":
    sys.exit(main())
