"""Results on disk and the tables that are made of them."""

import re

import pytest

from benchmarks import report
from benchmarks.report import full_report, never_on_gpu, newest, put_into, result_table, run_report
from benchmarks.results import Run, figures, read_runs, result_path
from benchmarks.steps.tables import STEPS
from tests.benchmarks.problems import CEILINGS, environment_of, result_of


def test_a_run_is_on_disk_after_every_result(tmp_path):
    run = Run(tmp_path / "device" / "run.json", environment_of(), CEILINGS)
    for i in range(2):
        run.add(result_of(shape_name=str(i)))
        assert Run.read(run.path) == run
    assert [path.name for path in run.path.parent.iterdir()] == ["run.json"]
    assert read_runs(tmp_path) == [run]


def test_a_run_is_filed_under_device_date_and_commit(tmp_path):
    assert result_path(environment_of(), tmp_path) == tmp_path / "nvidia-h200" / "2026-11-21T030405-0123456789.json"


def test_figures_follow_from_the_result_and_the_ceilings():
    assert figures(result_of(flops=8 * 10**11), CEILINGS) == pytest.approx(
        {
            "seconds": 2e-3,
            "gigabytes_per_second": 3000,
            "percent_of_copy": 75,
            "teraflops": 400,
            "percent_of_product": 50,
            "times_eager": 4,
            "times_ours:triton": 1.5,
        }
    )


def test_a_wrong_result_has_no_figures():
    variants = result_of()["variants"] | {"ours:cuda": {"correct": False, "error_over_bound": 7.0}}
    wrong = result_of(variants=variants)
    assert figures(wrong, CEILINGS) == {}
    assert "wrong result" in result_table(Run(None, environment_of(), CEILINGS, [wrong]))[2]


def test_the_table_shows_time_bandwidth_and_ratios_with_the_failures_kept():
    run = Run(None, environment_of(), CEILINGS, [result_of()])
    cells = [cell.strip() for cell in result_table(run)[2].strip("|").split("|")]
    assert cells == [
        *("layer_norm_modulate", "Latte-XL", "bfloat16", "forward+backward", "cuda"),
        *("2.000 ms", "3000.0", "75", "4.00x", "fails", "triton 1.50x"),
    ]
    assert "**nvidia-h200**, commit 0123456789, 2026-11-21: torch 2.13.0." in run_report(run)
    assert "copy 4000.0 GB/s, 8192^3 bfloat16 product 800.00 TFLOP/s" in run_report(run)


def test_memory_and_energy_are_shown_where_they_were_measured():
    variants = result_of()["variants"]
    variants["ours:cuda"] |= {"peak_bytes": 3 * 2**19, "joules": 0.0125}
    header, _, row = result_table(Run(None, environment_of(), CEILINGS, [result_of(variants=variants)]))
    cells = dict(zip(*([cell.strip() for cell in line.strip("|").split("|")] for line in (header, row)), strict=True))
    assert (cells["memory"], cells["energy"]) == ("1.5 MiB", "12.50 mJ")
    assert "memory" not in result_table(Run(None, environment_of(), CEILINGS, [result_of()]))[0]


def test_eager_memory_is_shown_as_a_ratio_to_ours():
    variants = result_of()["variants"]
    variants["ours:cuda"] |= {"peak_bytes": 2**20}
    variants["eager"] |= {"peak_bytes": 3 * 2**19}
    header, _, row = result_table(Run(None, environment_of(), CEILINGS, [result_of(variants=variants)]))
    cells = dict(zip(*([cell.strip() for cell in line.strip("|").split("|")] for line in (header, row)), strict=True))
    assert cells["memory"] == "1.0 MiB (eager 1.50x)"


def test_a_kernel_counts_as_run_only_when_a_gpu_gave_the_right_gradient():
    waiting = ("layer_norm_modulate", "cuda")
    on_gpu = Run(None, environment_of(), CEILINGS, [result_of()])
    on_cpu = Run(None, environment_of(), CEILINGS, [result_of()])
    del on_cpu.environment["capability"]
    forward_only = Run(None, environment_of(), CEILINGS, [result_of(passes="forward")])
    wrong = result_of()
    wrong["variants"]["ours:cuda"]["correct"] = False
    assert waiting in never_on_gpu([])
    assert waiting not in never_on_gpu([on_gpu])
    assert ("layer_norm_modulate", "triton") not in never_on_gpu([on_gpu])
    assert ("attention", "cuda") in never_on_gpu([on_gpu])
    assert waiting in never_on_gpu([on_cpu, forward_only, Run(None, environment_of(), CEILINGS, [wrong])])


def test_the_report_shows_each_devices_newest_run_of_each_family():
    runs = [
        Run(
            None, environment_of(commit="old"), CEILINGS, [result_of(), result_of(family="noise", operator="add_noise")]
        ),
        Run(None, environment_of(commit="new"), CEILINGS, [result_of()]),
        Run(None, environment_of("cpu-x", commit="other"), CEILINGS, [result_of()]),
    ]
    shown = full_report(runs)
    sections = {section.split("commit ")[1].split(",")[0]: section for section in re.split(r"\n\n(?=\*\*)", shown)}
    assert set(sections) == {"old", "new", "other"}
    assert "add_noise" in sections["old"].split("not yet")[0]
    assert "| layer_norm_modulate " not in sections["old"]
    assert "| layer_norm_modulate " in sections["new"]


def test_of_whole_steps_each_is_told_by_its_own_newest_run():
    training, drawing = (result_of(family=STEPS, passes=passes) for passes in ("training step", "DDIM sampling"))
    old = Run(None, environment_of(commit="old"), CEILINGS, [training, drawing])
    new = Run(None, environment_of(commit="new"), CEILINGS, [drawing])
    assert [run.results for run in newest([old, new])] == [[training], [drawing]]


def test_the_report_replaces_what_stands_between_the_markers(tmp_path):
    page = tmp_path / "README.md"
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    put_into(page, "new")
    put_into(page, "newer")
    assert page.read_text() == f"before\n{report.BEGIN}\nnewer\n{report.END}\nafter\n"
    page.write_text("nothing here")
    with pytest.raises(ValueError, match="must hold the lines"):
        put_into(page, "new")


def test_the_command_prints_or_writes(tmp_path, capsys):
    Run(tmp_path / "d" / "r.json", environment_of(), CEILINGS).add(result_of())
    assert report.main(["--results", str(tmp_path)]) == 0
    assert "| layer_norm_modulate " in capsys.readouterr().out
    page = tmp_path / "page.md"
    page.write_text(f"{report.BEGIN}\n{report.END}\n")
    report.main(["--results", str(tmp_path), "--into", str(page)])
    assert "75" in page.read_text()
    assert capsys.readouterr().out == ""


def test_the_summary_gives_the_spread_over_the_cases_and_leaves_out_tiny_calls():
    slower = result_of()["variants"] | {"eager": {"correct": True, "seconds": 3e-3}}
    results = [result_of(), result_of(variants=slower), result_of(timer="overhead"), result_of(passes="forward")]
    lines = report.summary([Run(None, environment_of(), CEILINGS, results)]).splitlines()
    _, _, *rows = [line for line in lines if line.startswith("|")]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [row[2:5] for row in cells] == [
        ["forward+backward", "2", "1.50x to 4.00x, median 2.75x"],
        ["forward", "1", "4.00x"],
    ]


def test_the_summary_has_operators_that_are_products_too():
    mlp = result_of(family="activation", operator="gelu_mlp", traffic_bytes=0, flops=10**12)
    *_, row = [
        line for line in report.summary([Run(None, environment_of(), CEILINGS, [mlp])]).splitlines() if "|" in line
    ]
    assert [cell.strip() for cell in row.strip("|").split("|")][1:4] == ["gelu_mlp", "forward+backward", "1"]


def test_the_kernels_of_the_newest_run_are_told_with_their_occupancy(tmp_path, capsys):
    kernel = {"kernel": "backward<float, 72>", "threads": 160, "registers": 96, "shared_bytes": 512, "local_bytes": 8}
    described = environment_of(threads_a_multiprocessor=2048)
    for date, blocks in (("01", 1), ("02", 4), ("03", None)):
        kernels = [kernel | {"blocks_per_sm": blocks}] if blocks else []
        Run(tmp_path / "d" / f"{date}.json", described, CEILINGS, kernels=kernels).write()
    assert report.main(["--results", str(tmp_path), "--kernels"]) == 0
    *_, row = capsys.readouterr().out.splitlines()
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells == ["backward<float, 72>", "160", "96", "512 B", "8 B", "4", "31%"]
