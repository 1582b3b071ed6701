"""The plain-PyTorch baselines compute what the library's models compute: only then is their speed a comparison."""

import pytest
import torch

from benchmarks.baselines.plain import PlainLatte
from models.latte import Latte, LatteConfig

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
