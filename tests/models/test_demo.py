"""The demo's own parts: the speed table compares equal networks, the loss curve reads what training wrote."""

import json

import pytest
import torch

from models import demo
from models.latte import LatteConfig

CONFIG = LatteConfig(
    input_size=8, patch_size=4, in_channels=3, hidden_size=64, depth=2, num_heads=2, num_frames=3, learn_sigma=False
)


def test_the_speed_table_measures_every_variant_and_that_ours_keeps_less(monkeypatch):
    monkeypatch.setattr(demo, "ROUNDS", 1)
    speeds = demo.measure_speed(CONFIG, torch.randn(2, 3, 3, 8, 8), "bfloat16")
    assert list(speeds)[-1] == "vidkern"
    assert len(speeds) == 3
    assert all(speed.seconds > 0 for speed in speeds.values())
    public, _, ours = speeds.values()
    assert 0 < ours.kept < public.kept
    rows = demo.speed_table(speeds, clips=2, precision="bfloat16").splitlines()
    assert rows[2].split("|")[3].strip() == "1.00"
    assert f"{2 / ours.seconds:.2f}" in rows[-1]


def test_a_baseline_that_computes_something_else_is_refused(monkeypatch):
    class Wrong(demo.PlainLatte):
        def forward(self, x, t, y=None):
            return 1.01 * super().forward(x, t, y)

    monkeypatch.setattr(demo, "PlainLatte", Wrong)
    with pytest.raises(SystemExit, match="does not compute the gradients that vidkern computes"):
        demo.measure_speed(CONFIG, torch.randn(2, 3, 3, 8, 8), "bfloat16")


def test_the_loss_curve_is_drawn_from_the_metrics(tmp_path):
    (tmp_path / "train").mkdir()
    lines = [json.dumps({"step": i, "loss": 1 / i}) for i in range(1, 61)]
    (tmp_path / "train" / "metrics.jsonl").write_text("\n".join(lines))
    first, last = demo.write_loss_curve(tmp_path)
    assert first == pytest.approx(sum(1 / i for i in range(1, 26)) / 25)
    assert last == pytest.approx(sum(1 / i for i in range(36, 61)) / 25)
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_given_frames_that_come_out_changed_stop_the_demo(monkeypatch):
    torch.manual_seed(0)
    network = demo.Latte(CONFIG).eval()
    config = demo.TrainConfig(model=CONFIG)
    real = torch.rand(3, 3, 8, 8) * 2 - 1
    monkeypatch.setattr(demo, "STEPS", 2)
    monkeypatch.setattr(demo, "OVERLAP", 1)
    drawn = demo.draw_tasks(network, config, real)
    assert [int(d.held.sum()) for d in drawn.values()] == [0, 1, 2, 3]
    assert len(drawn["long-video"].clip) == 3 + (demo.WINDOWS - 1) * 2
    monkeypatch.setattr(demo, "draw_clips", lambda *args, **options: torch.zeros(1, *real.shape))
    with pytest.raises(SystemExit, match="a given frame came out changed"):
        demo.draw_tasks(network, config, real)
