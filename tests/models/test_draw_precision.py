"""Drawing in bfloat16: weights are cast once for all steps, clips keep their bits, the network comes back as it was."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from models.latte import Latte, LatteConfig
from models.sampling.draw import draw_clips
from tests.models.public_cases import fill
from vidkern.diffusion import make_schedule


@pytest.fixture
def network() -> Latte:
    model = Latte(LatteConfig(input_size=8, hidden_size=64, depth=2, num_heads=2, num_frames=2))
    fill(model.named_parameters(), 1)
    model.blocks[0].requires_grad_(False)  # some weights ask for a gradient, as in training
    return model.eval()


class WeightCasts(TorchDispatchMode):
    """Counts the casts of a network's linear layers to bfloat16."""

    def __init__(self, network: Latte) -> None:
        super().__init__()
        self.weights = {m.weight.data_ptr() for m in network.modules() if isinstance(m, nn.Linear)}
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        cast = str(func) == "aten._to_copy.default" and kwargs.get("dtype") == torch.bfloat16
        self.count += cast and args[0].data_ptr() in self.weights
        return func(*args, **kwargs)


def draw(network: Latte, num_steps: int) -> Tensor:
    schedule = make_schedule("linear")
    return draw_clips(network, schedule, 1, batch_size=1, seed=3, num_steps=num_steps, precision="bfloat16")


def test_weights_are_cast_once_for_all_steps(network):
    counts = []
    for num_steps in (1, 3):
        with WeightCasts(network) as casts:
            draw(network, num_steps)
        counts.append(casts.count)
    linear_layers = 2 * 5 + 2 + 2  # of the blocks, the timesteps and the end
    assert counts == [linear_layers] * 2


def test_kept_casts_change_neither_the_clips_nor_the_network(network):
    before = {name: (p.requires_grad, p.detach().clone()) for name, p in network.named_parameters()}
    kept = draw(network, 3)
    for name, parameter in network.named_parameters():
        asked, value = before[name]
        assert parameter.requires_grad == asked
        assert torch.equal(parameter, value)
    torch.set_autocast_cache_enabled(False)
    try:
        assert torch.equal(kept, draw(network, 3))
    finally:
        torch.set_autocast_cache_enabled(True)
