"""Every network that a configuration can name, built."""

from collections.abc import Mapping

import torch
from torch import Tensor

from models.config import TrainConfig
from models.latte import Latte

Network = Latte


def build_network(config: TrainConfig) -> Network:
    """The network of `config.network` with fresh weights, on torch's default device.

    Raises ValueError for sizes that cannot be built.
    """
    return Latte(config.model)


def check_network(config: TrainConfig, x0: Tensor, conditions: Mapping[str, Tensor]) -> None:
    """Run the network on a batch without values, so that what does not fit is told before the first step.

    Raises ValueError for clips (B, F, C, H, W), a condition or a size that the network or an operator does not take.
    """
    with torch.device("meta"):
        network = build_network(config).eval()
        t = torch.zeros(len(x0), dtype=torch.int64)
        images = {"num_images": config.data.images} if config.data.images else {}
        network(x0.to("meta"), t, **images, **{name: value.to("meta") for name, value in conditions.items()})
