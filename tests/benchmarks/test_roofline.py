"""The roofline model, against numbers worked out by hand, and its tables."""

import pytest

from benchmarks import roofline
from benchmarks.results import Run
from benchmarks.roofline import OPERATORS, Cost, Device, measured_efficiency, table
from tests.benchmarks.problems import CEILINGS, environment_of, result_of

BY_NAME = {operator.name: operator for operator in OPERATORS}
XL = (4, 16, 256, 1152)


def test_modulation_by_hand():
    cost = BY_NAME["layer_norm_modulate"].cost
    # X = 2048; mean and rstd of 128 tokens 1024; shift and scale of 2 frames 64
    assert cost((1, 2, 64, 8), 2, False) == Cost(2 * 2048 + 1024 + 64, 0, 1)
    # scale 32; each of two gradients: 8 rows of runs for 2 frames written and read, and 64 bytes of totals
    assert cost((1, 2, 64, 8), 2, True) == Cost(3 * 2048 + 1024 + 32 + 2 * (2 * 8 * 64 + 64), 0, 2)
    residual = BY_NAME["gate_residual"].cost
    assert residual((1, 2, 64, 8), 2, False) == Cost(3 * 2048 + 32)
    assert residual((1, 2, 64, 8), 2, True) == Cost(3 * 2048 + 32 + 2 * 8 * 64 + 64, 0, 2)


def test_attention_by_hand():
    cost = BY_NAME["temporal_attention_packed"].cost
    assert cost((1, 16, 4, 3, 2, 64), 2, False) == Cost(4 * 8192 * 2, 2 * 2 * 8192 * 16, 1)
    assert cost((1, 16, 4, 3, 2, 64), 2, True) == Cost(7 * 8192 * 2, 5 * 2 * 8192 * 16, 1)


def test_activation_by_hand():
    gelu, in_mlp = BY_NAME["gelu_tanh"].cost, BY_NAME["gelu_mlp, beside its products"].cost
    assert gelu((1, 2, 64, 32), 2, False) == in_mlp((1, 2, 64, 32), 2, False) == Cost(2 * 8192)
    assert gelu((1, 2, 64, 32), 2, True) == Cost(3 * 8192)
    # 16 runs of 8 rows, each a row of 32 float32 sums, written and read, and the total
    assert in_mlp((1, 2, 64, 32), 2, True) == Cost(4 * 8192 + 2 * 16 * 128 + 128, 0, 2)
    assert roofline.runs_of_rows(16384, 4608) == 16384 // 32
    assert BY_NAME["gelu_tanh"].shapes()["Latte-XL"] == (4, 16, 256, 4608)


def test_the_optimisers_step_by_hand():
    count = 3 * 320 * 65536
    assert BY_NAME["adamw_ema_"].cost((count,), 4, False) == Cost(40 * count, launches=3 + 1)
    assert BY_NAME["clip, fused AdamW, foreach lerp"].cost((count,), 4, False) == Cost(52 * count, launches=12)
    assert BY_NAME["adamw_ema_"].shapes()["Latte-XL/2"] == (673681568,)
    told = table("optimizer", [])
    assert told.startswith("Predicted, not measured: a step in float32 by ")
    row = next(line for line in told.splitlines() if "adamw_ema_" in line and "Latte-XL" in line)
    assert "| 26947.3 |" in row  # 40 bytes each, at 0.9 * 4.3 TB/s 6.963 ms, and 34 launches
    assert "| 7.031 " in row


def test_the_longer_of_memory_and_products_and_the_launches():
    device = Device("some", 1e9, 1e12, {})
    assert Cost(1_000_000, 0, 2).seconds(device, 0.5) == pytest.approx(2e-3 + 4e-6)
    assert Cost(1_000_000, 3_000_000_000).seconds(device, 0.5) == pytest.approx(3e-3 + 2e-6)


def test_without_a_measurement_the_targets_serve():
    h200 = next(device for device in roofline.DEVICES if device.name == "H200")
    assert h200.bytes_per_second == pytest.approx(4300e9)
    on_cpu = Run(None, environment_of(), CEILINGS, [result_of(shape=list(XL))])
    del on_cpu.environment["capability"]
    told = table("modulation", [on_cpu])
    assert told.startswith("Predicted, not measured: ")
    assert "the targets as efficiencies (A100 88%, RTX A6000 88%, H200 90%)" in told
    assert "measured efficiencies" not in told
    row = next(line for line in told.splitlines() if "layer_norm_modulate" in line and "Latte-XL" in line)
    # 2X + 131072 + 294912 bytes of 37.7 MB at 3.87 TB/s; 3X, statistics, scale, 2 * (2 * 16 * 294912 + 294912) more
    assert "75.9 / 133.0" in row
    assert "0.022 / 0.038" in row


def test_the_newest_gpu_run_gives_the_efficiency():
    operator = BY_NAME["layer_norm_modulate"]
    runs = [
        Run(None, environment_of() | {"date": "2026-01-01"}, CEILINGS, [result_of(shape=list(XL))]),
        Run(
            None,
            environment_of() | {"date": "2026-02-01"},
            CEILINGS,
            [result_of(shape=list(XL)) | {"dtype": "float32"}],
        ),
    ]
    bytes_moved = sum(operator.cost(XL, 2, backward).bytes for backward in (False, True))
    expected = (bytes_moved / 4000e9 + 3 * roofline.LAUNCH_SECONDS) / 2e-3
    assert measured_efficiency(operator, True, runs) == (pytest.approx(expected), "nvidia-h200")
    assert measured_efficiency(operator, False, runs) is None
    assert "layer_norm_modulate forward+backward 3% on nvidia-h200" in table("modulation", runs)


def test_an_efficiency_is_that_of_the_operators_dtype():
    result = result_of(operator="adamw_ema_", shape=[10**9], passes="forward", dtype="float32", family="optimizer")
    runs = [Run(None, environment_of(), CEILINGS, [result | {"traffic_bytes": 40 * 10**9}])]
    expected = (40e9 / 4000e9 + 49 * roofline.LAUNCH_SECONDS) / 2e-3
    assert measured_efficiency(BY_NAME["adamw_ema_"], False, runs) == (pytest.approx(expected), "nvidia-h200")
    assert measured_efficiency(BY_NAME["gelu_tanh"], False, runs) is None


def test_a_page_gets_the_family_of_its_folder(tmp_path, capsys):
    page = tmp_path / "attention" / "README.md"
    page.parent.mkdir()
    page.write_text(f"before\n{roofline.BEGIN}\n{roofline.END}\nafter\n")
    assert roofline.main(["--results", str(tmp_path), "--into", str(page)]) == 0
    written = page.read_text()
    assert "temporal_attention_packed" in written
    assert "layer_norm" not in written
    assert written.endswith(f"{roofline.END}\nafter\n")
    with pytest.raises(SystemExit):
        roofline.main(["--into", str(tmp_path / "README.md")])
    assert "must be a page in a folder named activation, attention, modulation, optimizer" in capsys.readouterr().err
