"""No model permutes or copies its tokens: the operators read them where the products leave them."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from models.fvdm import fvdm
from models.latte import latte

REARRANGING = {"permute", "transpose", "clone", "contiguous", "_to_copy", "copy_"}
SMALL = {"hidden_size": 64, "num_heads": 2, "input_size": 8}
BATCH, FRAMES, SIDE = 2, 4, 8


class Rearranged(TorchDispatchMode):
    """Notes every call that permutes, or copies, a tensor as large as the tokens."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.elements = elements
        self.calls: list[tuple[str, tuple[int, ...]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        of = args[0] if args else None
        if (
            func._schema.name.removeprefix("aten::") in REARRANGING
            and of.dim() > 2
            and of.numel() >= self.elements
            and of.is_floating_point()
        ):
            self.calls.append((func._schema.name, tuple(of.shape)))
        return func(*args, **(kwargs or {}))


def models():
    for variant in (1, 2, 3, 4):
        yield f"Latte variant {variant}", latte("Latte-S/2", depth=2, variant=variant, **SMALL)
    yield "Latte with rope", latte("Latte-S/2", depth=2, temporal_position="rope", **SMALL)
    yield "FVDM", fvdm("FVDM-S/2", depth=2, **SMALL)


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("name", [name for name, _ in models()])
def test_forward_and_backward_leave_the_tokens_where_they_are(name, autocast):
    torch.manual_seed(0)
    model = dict(models())[name]
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    size = model.config.hidden_size
    x = torch.randn(BATCH, FRAMES, 4, SIDE, SIDE, device="cpu")
    t = torch.randint(1000, (BATCH, FRAMES) if name == "FVDM" else (BATCH,), device="cpu")
    tokens = BATCH * FRAMES * (SIDE // 2) ** 2 * size
    with Rearranged(tokens) as rearranged, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        model(x, t).square().mean().backward()
    assert rearranged.calls == []
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


def test_the_watch_sees_a_rearrangement():
    x = torch.randn(2, 3, 4, 5, device="cpu")
    with Rearranged(x.numel()) as rearranged:
        x.permute(0, 2, 1, 3).contiguous()
    assert [name for name, _ in rearranged.calls] == ["aten::permute", "aten::clone"]
