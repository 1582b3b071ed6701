"""The calls that are compared with the public Latte and FVDM code, made again from seeds wherever they run."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

RECORDED = Path(__file__).parent / "data" / "public_parity.safetensors"

BATCH, FRAMES, CHANNELS, SIZE = 2, 4, 4, 8
IMAGES = 2
CLASSES = 5
TEXT_SHAPE = (77, 768)

#: The small network of every case, in the argument names that Latte, FVDM and ours share.
NETWORK = {"input_size": SIZE, "hidden_size": 64, "depth": 4, "num_heads": 2, "num_frames": FRAMES}


@dataclass(frozen=True)
class Case:
    """One call of one public network.

    Attributes:
        network: "latte", "latte_img" or "fvdm": whose code records it.
        condition: "none", "class" or "text".
        call: "forward", "cfg", "joint" (with images) or "loss".
        seed: of the weights and the inputs.
        network_options: changes to NETWORK.
    """

    network: str
    condition: str
    call: str
    seed: int
    network_options: dict[str, Any] = field(default_factory=dict)


CASES = {
    "latte": Case("latte", "none", "forward", 1),
    "latte_class": Case("latte", "class", "forward", 2),
    "latte_cfg": Case("latte", "class", "cfg", 3),
    "latte_text": Case("latte", "text", "forward", 4),
    "latte_joint": Case("latte_img", "class", "joint", 5),
    "latte_patch4_mean_only": Case("latte", "none", "forward", 6, {"patch_size": 4, "learn_sigma": False}),
    "latte_loss": Case("latte", "class", "loss", 7),
    "fvdm": Case("fvdm", "none", "forward", 8),
    "fvdm_cfg": Case("fvdm", "class", "cfg", 9),
    "fvdm_loss": Case("fvdm", "none", "loss", 10),
}


def normal(shape: Iterable[int], generator: torch.Generator) -> Tensor:
    """Draw on the CPU, so that every device gets the same numbers."""
    return torch.randn(tuple(shape), generator=generator, device="cpu")


def fill(parameters: Iterable[tuple[str, nn.Parameter]], seed: int) -> None:
    """Give trainable parameters random values that depend on the seed and their names' order only."""
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in sorted(parameters, key=lambda named: named[0]):
        if parameter.requires_grad:
            scale = 0.5 / parameter[0].numel() ** 0.5 if parameter.dim() > 1 else 0.1
            parameter.data.copy_(scale * normal(parameter.shape, generator))


def inputs(case: Case) -> dict[str, Tensor]:
    """Return the tensors of a case: x and t, and those that its condition and its call want."""
    generator = torch.Generator().manual_seed(1000 + case.seed)
    images = IMAGES if case.call == "joint" else 0
    t_shape = (BATCH, FRAMES) if case.network == "fvdm" else (BATCH,)

    def integers(low: int, high: int, shape: tuple[int, ...]) -> Tensor:
        return torch.randint(low, high, shape, generator=generator, device="cpu")

    tensors = {
        "x": normal((BATCH, FRAMES + images, CHANNELS, SIZE, SIZE), generator),
        "t": integers(1, 1000, t_shape),
    }
    if case.condition == "class":
        tensors["y"] = integers(0, CLASSES, (BATCH,))
    if case.call == "cfg":
        tensors["y"][BATCH // 2 :] = CLASSES
    if case.condition == "text":
        tensors["text"] = normal((BATCH, *TEXT_SHAPE), generator)
    if case.call == "joint":
        tensors["image_labels"] = integers(0, CLASSES, (BATCH, IMAGES))
    if case.call == "loss":
        tensors["key"] = torch.tensor([case.seed, 0])
    return {name: tensor.to(torch.get_default_device()) for name, tensor in tensors.items()}


def results(output: Tensor, gradients: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Return what is recorded: the output, and of each gradient its norm and its product with a random direction."""
    generator = torch.Generator().manual_seed(2000 + seed)
    ordered = [gradients[name].double().cpu() for name in sorted(gradients)]
    directions = [normal(gradient.shape, generator).double() for gradient in ordered]
    pairs = zip(ordered, directions, strict=True)
    return {
        "output": output.detach().cpu(),
        "gradient_norms": torch.stack([gradient.norm() for gradient in ordered]),
        "gradient_products": torch.stack([(gradient * direction).sum() for gradient, direction in pairs]),
    }


def run(
    case: Case,
    call: Callable[[dict[str, Tensor]], Tensor],
    parameters: Callable[[], Iterable[tuple[str, nn.Parameter]]],
) -> dict[str, Tensor]:
    """Fill a network, call it, and go back from a random weighting of what it returns."""
    fill(parameters(), case.seed)
    output = call(inputs(case))
    weights = normal(output.shape, torch.Generator().manual_seed(3000 + case.seed))
    (output * weights.to(output.device)).sum().backward()
    gradients = {name: p.grad for name, p in parameters() if p.grad is not None}
    return results(output, gradients, case.seed)
