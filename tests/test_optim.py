"""AdamWEMA: torch's AdamW with averages, whose state dict either reads."""

import copy
import dataclasses
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vidkern import _library, backend
from vidkern.ops.optimizer import torch_kernels
from vidkern.optim import AdamWEMA

SETTINGS: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.1}


def network(seed: int = 0) -> nn.Sequential:
    """Layers of which one's weights are channels-last."""
    torch.manual_seed(seed)
    layers = nn.Sequential(nn.Conv3d(2, 3, 3), nn.Flatten(), nn.Linear(3, 5), nn.LayerNorm(5))
    return layers.to(memory_format=torch.channels_last_3d)


def weights(model: nn.Module) -> list[Tensor]:
    return list(model.parameters())


def average_of(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def backward(model: nn.Module, number: int) -> None:
    x = torch.randn(4, 2, 3, 3, 3, generator=torch.Generator().manual_seed(number))
    model(x).pow(2).sum().backward()


def take(model: nn.Module, optimizer: torch.optim.Optimizer, numbers: range, **options: Any) -> None:
    for number in numbers:
        backward(model, number)
        optimizer.step(**options)
        optimizer.zero_grad()


def assert_same(a: nn.Module, b: nn.Module, rtol: float = 0, atol: float = 0) -> None:
    for x, y in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=rtol, atol=atol)


def test_without_the_cuda_library_a_gpu_s_step_is_torch_s(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not torch_kernels.wanted(torch.device("cpu"))
    built = _library.operators["adamw_ema_"]
    monkeypatch.setitem(built.kernels, "cuda", dataclasses.replace(built.kernels["cuda"], unavailable="not built"))
    assert torch_kernels.wanted(torch.device("cuda"))
    with backend("reference"):
        assert not torch_kernels.wanted(torch.device("cuda"))
    monkeypatch.setitem(built.kernels, "cuda", dataclasses.replace(built.kernels["cuda"], unavailable=None))
    assert not torch_kernels.wanted(torch.device("cuda"))


@pytest.mark.parametrize("decay", [0.8, torch.tensor(0.8, dtype=torch.float64)], ids=["number", "tensor"])
def test_torch_s_kernels_take_the_same_step(decay: float | Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = network(), network()
    averages, expected = average_of(ours), average_of(theirs)
    scale = torch.tensor(0.3)
    take(ours, AdamWEMA(ours.parameters(), averages, ema_decay=decay, **SETTINGS), range(4), gradient_scale=scale)
    monkeypatch.setattr(torch_kernels, "wanted", lambda _: True)
    take(theirs, AdamWEMA(theirs.parameters(), expected, ema_decay=decay, **SETTINGS), range(4), gradient_scale=scale)
    assert_same(ours, theirs, rtol=1e-4, atol=5e-5)
    torch.testing.assert_close(averages, expected, rtol=1e-4, atol=5e-5)


def test_it_is_torch_s_adamw_and_a_lerp() -> None:
    ours, theirs = network(), network()
    averages, expected = average_of(ours), average_of(theirs)
    optimizer = AdamWEMA(ours.parameters(), averages, ema_decay=0.8, **SETTINGS)
    other = torch.optim.AdamW(theirs.parameters(), foreach=False, **SETTINGS)
    for number in range(5):
        take(ours, optimizer, range(number, number + 1))
        take(theirs, other, range(number, number + 1))
        expected = [0.8 * e + 0.2 * p.detach() for e, p in zip(expected, theirs.parameters(), strict=True)]
    assert_same(ours, theirs, rtol=1e-4, atol=5e-5)
    torch.testing.assert_close(averages, expected, rtol=1e-4, atol=5e-5)


def test_the_scale_is_that_of_the_gradients() -> None:
    ours, theirs = network(), network()
    take(ours, AdamWEMA(ours.parameters(), **SETTINGS), range(3), gradient_scale=torch.tensor(0.5))
    optimizer = AdamWEMA(theirs.parameters(), **SETTINGS)
    for number in range(3):
        backward(theirs, number)
        for p in theirs.parameters():
            p.grad.mul_(0.5)
        optimizer.step()
        optimizer.zero_grad()
    assert_same(ours, theirs)


@pytest.mark.parametrize("fused", [True, False])
def test_torch_s_state_goes_in_and_ours_goes_out(fused: bool) -> None:
    """Steps of torch's, then ours, then torch's again: as torch's alone."""
    ours, theirs = network(), network()
    first = torch.optim.AdamW(ours.parameters(), fused=fused, **SETTINGS)
    take(ours, first, range(2))
    second = AdamWEMA(ours.parameters(), lr=1.0, ema_decay=0.7)
    second.load_state_dict(first.state_dict())
    assert second.param_groups[0]["lr"] == 1e-2
    assert second.param_groups[0]["ema_decay"] == 0.7
    take(ours, second, range(2, 4))
    state = second.state_dict()["state"][0]
    assert set(state) == {"step", "exp_avg", "exp_avg_sq"}
    assert state["step"].item() == 4
    third = torch.optim.AdamW(ours.parameters(), fused=True)
    third.load_state_dict(second.state_dict())
    take(ours, third, range(4, 6))
    take(theirs, torch.optim.AdamW(theirs.parameters(), fused=True, **SETTINGS), range(6))
    assert_same(ours, theirs, rtol=1e-4, atol=5e-5)


def test_a_resumed_run_has_the_same_bits() -> None:
    whole, parts = network(), network()
    averages = average_of(whole), average_of(parts)
    take(whole, AdamWEMA(whole.parameters(), averages[0], **SETTINGS), range(4))
    first = AdamWEMA(parts.parameters(), averages[1], **SETTINGS)
    take(parts, first, range(2))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = AdamWEMA(parts.parameters(), averages[1], **SETTINGS)
    second.load_state_dict(torch.load(file, weights_only=True))
    take(parts, second, range(2, 4))
    assert_same(whole, parts)
    assert all(torch.equal(a, b) for a, b in zip(*averages, strict=True))


def test_moments_of_another_layout_are_laid_out_anew() -> None:
    ours, theirs = network(), network()
    contiguous = AdamWEMA([p.detach().clone(memory_format=torch.contiguous_format) for p in ours.parameters()])
    for p, moments in zip(ours.parameters(), contiguous.state.values(), strict=True):
        moments["exp_avg"].copy_(p.detach())
    direct = AdamWEMA(theirs.parameters())
    for p in theirs.parameters():
        direct.state[p]["exp_avg"].copy_(p.detach())
    loaded = AdamWEMA(ours.parameters())
    loaded.load_state_dict(contiguous.state_dict())
    take(ours, loaded, range(1))
    take(theirs, direct, range(1))
    assert_same(ours, theirs)


def test_groups_have_settings_of_their_own() -> None:
    still, moving = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    averages = [torch.zeros(3), torch.zeros(3)]
    groups = [{"params": [still], "lr": 0.0}, {"params": [moving], "ema_decay": 0.0}]
    optimizer = AdamWEMA(groups, averages, lr=0.5, weight_decay=0.0, ema_decay=0.5)
    for p in (still, moving):
        p.grad = torch.ones(3)
    optimizer.step()
    assert torch.equal(still, torch.ones(3))
    assert torch.equal(averages[0], torch.full((3,), 0.5))
    torch.testing.assert_close(moving.detach(), torch.full((3,), 0.5))
    assert torch.equal(averages[1], moving)


def test_a_parameter_without_a_gradient_rests_and_its_average_goes_on() -> None:
    p, average = nn.Parameter(torch.ones(3)), torch.zeros(3)
    optimizer = AdamWEMA([p], [average], ema_decay=0.75)
    optimizer.step()
    assert torch.equal(p, torch.ones(3))
    assert torch.equal(average, torch.full((3,), 0.25))
    assert optimizer.state[p]["step"].item() == 0


def test_a_group_that_comes_later_has_no_average() -> None:
    model, late = network(), nn.Parameter(torch.ones(4))
    averages = average_of(model)
    optimizer = AdamWEMA(model.parameters(), averages, **SETTINGS)
    optimizer.add_param_group({"params": [late], "weight_decay": 0.0})
    late.grad = torch.ones(4)
    take(model, optimizer, range(1))
    torch.testing.assert_close(late.detach(), torch.full((4,), 0.99))
    assert not torch.equal(averages[0], model[0].weight)


def test_bfloat16_weights_may_have_a_float32_average() -> None:
    """At a decay of 0.9999 a bfloat16 average would never move."""
    p, average = nn.Parameter(torch.ones(3, dtype=torch.bfloat16)), torch.ones(3)
    optimizer = AdamWEMA([p], [average], lr=0.25, weight_decay=0.0)
    p.grad = torch.ones_like(p)
    optimizer.step()
    torch.testing.assert_close(average, torch.full((3,), 1 - 0.25e-4), rtol=1e-7, atol=0)


def test_a_copy_keeps_its_own_averages() -> None:
    model = network()
    pair = nn.ModuleList([model, network(1).requires_grad_(False)])
    optimizer = AdamWEMA(model.parameters(), pair[1].parameters(), **SETTINGS)
    twin, twin_optimizer = copy.deepcopy((pair, optimizer))
    before = average_of(pair[1])
    take(twin[0], twin_optimizer, range(1))
    assert all(torch.equal(a, b) for a, b in zip(before, pair[1].parameters(), strict=True))
    assert not torch.equal(before[0], weights(twin[1])[0])
    take(model, optimizer, range(1))
    assert_same(pair, twin)


def test_a_closure_is_called_with_gradients() -> None:
    p = nn.Parameter(torch.ones(2))

    def closure() -> Tensor:
        loss = p.sum()
        loss.backward()
        return loss

    assert AdamWEMA([p], lr=0.5, weight_decay=0.0).step(closure).item() == 2
    torch.testing.assert_close(p.detach(), torch.full((2,), 0.5))


@pytest.mark.parametrize(
    ("ema", "error", "message"),
    [
        ([], ValueError, r"ema must have one tensor for each of the 1 params, got 0"),
        ([torch.ones(3, 2)], ValueError, r"ema\[0\] must be the shape of params\[0\]"),
        ([torch.ones(2, 3).double()], TypeError, r"ema\[0\] must be float32, got float64"),
        ([torch.ones(3, 2).T], ValueError, r"ema\[0\] must have the strides of params\[0\]"),
        ([torch.ones(2, 3, device="meta")], ValueError, r"ema\[0\] must be on the device of params\[0\]"),
        ([nn.Parameter(torch.ones(2, 3))], ValueError, r"ema\[0\] must not require gradients"),
        (["weights"], TypeError, r"ema\[0\] must be a torch.Tensor, got str"),
    ],
    ids=str,
)
def test_averages_that_do_not_fit_are_named(ema: list[Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        AdamWEMA([nn.Parameter(torch.ones(2, 3))], ema)


def test_a_decay_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match="ema_decay must be from 0 to 1, got 2"):
        AdamWEMA([nn.Parameter(torch.ones(2))], ema_decay=2)
