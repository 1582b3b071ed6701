"""The plain-PyTorch baselines compute what the library's models compute: only then is their speed a comparison."""

import pytest
import torch

from benchmarks.baselines.plain import PlainLatte
from benchmarks.baselines.plain_diffusion import PlainDiffusion
from models.latte import Latte, LatteConfig
from vidkern import ops
from vidkern.diffusion import diffusion_loss, make_schedule

CONFIG = LatteConfig(input_size=8, hidden_size=64, depth=4, num_heads=2, num_frames=4, num_classes=5)


@pytest.mark.parametrize("kind", ["softmax", "sdpa"])
@pytest.mark.parametrize("per_frame", [False, True], ids=["latte", "fvdm"])
def test_outputs_and_gradients_are_the_models(kind, per_frame):
    torch.manual_seed(0)
    ours, plain = Latte(CONFIG).eval(), PlainLatte(CONFIG, kind).eval()
    for parameter in ours.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.05)
    plain.load_state_dict(ours.state_dict())
    x, y = torch.randn(2, 4, 4, 8, 8), torch.tensor([3, 5])
    t = torch.randint(1000, (2, 4) if per_frame else (2,))
    got, wanted = ours(x, t, y), plain(x, t, y)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    upstream = torch.randn_like(got)
    for model, out in ((ours, got), (plain, wanted)):
        out.backward(upstream)
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    theirs = dict(plain.named_parameters())
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            error = (parameter.grad - theirs[name].grad).norm() / theirs[name].grad.norm()
            assert error < 1e-5, f"{name}: gradient differs by {error:.1e}"


@pytest.mark.parametrize("tables_on_host", [False, True])
@pytest.mark.parametrize("per_frame", [False, True], ids=["latte", "fvdm"])
def test_the_loss_and_its_gradient_are_the_librarys(per_frame, tables_on_host):
    shape, schedule, key = (4, 3, 2, 5, 6), make_schedule("linear"), torch.tensor([3, 4])
    torch.manual_seed(0)
    x0, y = torch.randn(shape).clamp(-1, 1), torch.arange(4)
    t = torch.tensor([0, 1, 500, 999])
    if per_frame:
        t = torch.stack([t, t.flip(0), t.roll(1)], 1)
    weight = torch.randn(4, 2, requires_grad=True)

    def model(x, t, y):
        hidden = torch.einsum("oc,bfchw->bfohw", weight, x) + 0.1 * y[:, None, None, None, None]
        return torch.tanh(hidden + t.view(4, -1, 1, 1, 1) / 1000)

    plain = PlainDiffusion(schedule, tables_on_host).loss(model, x0, t, y, noise=ops.philox_normal(shape, key))
    ours = diffusion_loss(model, x0, t, schedule, key, y=y)["loss"]
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=0)
    wanted, got = (torch.autograd.grad(loss, weight)[0] for loss in (plain, ours))
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))


@pytest.mark.parametrize("per_frame", [False, True], ids=["latte", "fvdm"])
@pytest.mark.parametrize("t_prev", [479, -1])
def test_the_guided_ddim_step_is_the_librarys(t_prev, per_frame):
    schedule = make_schedule("linear")
    torch.manual_seed(0)
    x, out, y = torch.randn(2, 3, 2, 5, 6), torch.randn(4, 3, 4, 5, 6), torch.arange(4)
    times = (4, 3) if per_frame else (4,)
    plain = PlainDiffusion(schedule).guided_ddim_step(
        lambda *_: out, torch.cat([x, x]), torch.full(times, 500), torch.full(times, t_prev), y, 3.0
    )
    t, then = torch.full((2, 3), 500), torch.full((2, 3), t_prev)
    ours = ops.ddim_step(x, out, t, then, schedule, guidance_scale=3.0)
    torch.testing.assert_close(ours, plain[:2], rtol=1e-4, atol=1e-4)
    assert torch.equal(plain[2:], plain[:2])
