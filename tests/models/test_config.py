"""Configuration: YAML, command line, and one clear line for every mistake."""

import io
import os
import sys
from pathlib import Path

import pytest
import yaml

from models import train
from models.command_line import UsageError, differences, one_line_errors, read_yaml, to_dict, to_yaml
from models.config import TrainConfig, parse_train_config

CONFIGS = sorted((Path(__file__).parents[2] / "models" / "configs").glob("*.yaml"))


@pytest.fixture
def yaml_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(
        "steps: 7\noptim: {lr: 1e-3, betas: [0.8, 0.95]}\nmodel: {depth: 4, num_classes: null}\ncompile: true\n"
    )
    return path


def test_the_command_line_goes_before_the_file_and_the_file_before_the_defaults(yaml_file: Path) -> None:
    config = parse_train_config(["--steps", "9", "--config", str(yaml_file), "--optim.betas", "0.7", "0.9"])
    assert (config.steps, config.optim.lr, config.optim.betas) == (9, 1e-3, (0.7, 0.9))
    assert (config.model.depth, config.model.num_classes, config.compile) == (4, None, True)
    assert config.batch_size == TrainConfig().batch_size
    assert parse_train_config([f"--config={yaml_file}", "--no-compile"]).compile is False
    assert parse_train_config(["--model.input-size", "16", "32"]).model.input_size == (16, 32)


def test_a_saved_configuration_is_the_one_that_was_saved(yaml_file: Path, tmp_path: Path) -> None:
    config = parse_train_config(["--config", str(yaml_file), "--model.input_size", "16", "32", "--resume", "never"])
    saved = tmp_path / "saved.yaml"
    saved.write_text(to_yaml(config))
    assert read_yaml(TrainConfig, saved) == config


def test_differences_are_named() -> None:
    old, new = parse_train_config(["--optim.lr", "1"]), parse_train_config(["--optim.lr", "2", "--steps", "5"])
    assert differences(to_dict(old), to_dict(new)) == ["steps: 100000 -> 5", "optim.lr: 1.0 -> 2.0"]
    assert differences(to_dict(old), to_dict(old)) == []


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model.dpeth", "3"], "unknown option --model.dpeth; the nearest is --model.depth"),
        (["--lr", "3"], "unknown option --lr; the nearest is --optim.lr"),
        (["--btach-size=3"], "unknown option --btach-size; the nearest is --batch_size"),
        (["--zzzz", "3"], "unknown option --zzzz"),
        (["--model.depth", "x"], "Error parsing --model.depth: invalid literal for int() with base 10: 'x'"),
        (["--strategy", "dp"], "invalid choice 'dp' for argument '--strategy'. Expected one of ('ddp', 'fsdp')."),
        (["--optim.betas", "0.9"], "Missing value for argument '--optim.betas'. Expected 2 values."),
        (["--model.depth", "3"], "Error parsing model: depth must be"),
        (["--steps", "0"], "--steps wants at least 1, got 0"),
        (["--micro_batch_size", "0"], "--micro_batch_size wants at least 1, got 0"),
        (["--data.kind", "videos"], "--data.kind videos wants --data.path"),
        (["--diffusion.ptss_probability", "2"], "--diffusion.ptss_probability wants from 0 to 1, got 2.0"),
        (["--diffusion.noise_base_weight", "3"], "--diffusion.noise_base_weight wants from 0 to 1, got 3.0"),
        (["--optim.lr", "nan"], "--optim.lr wants at least 0, got nan"),
        (["--optim.betas", "0.9", "1.5"], "--optim.betas wants numbers from 0 to below 1, got 1.5"),
        (["--optim.max_grad_norm", "-1"], "--optim.max_grad_norm wants at least 0, got -1.0"),
        (["--optim.ema_decay", "2"], "--optim.ema_decay wants from 0 to 1, got 2.0"),
        (["--data.images", "-1"], "--data.images wants at least 0, got -1"),
        (["--log.sample_clips", "0"], "--log.sample_clips wants at least 1, got 0"),
        (
            ["--log.sample_every", "5", "--log.sample_steps", "2000"],
            "--log.sample_steps wants from 1 to 1000, got 2000",
        ),
        (["--log.fps", "0"], "--log.fps wants at least 1, got 0"),
        (["--diffusion.noise", "mixed"], "--diffusion.noise mixed wants a --diffusion.noise_base_weight"),
        (["--config", "nowhere.yaml"], "cannot read the configuration nowhere.yaml: No such file or directory"),
        (["--config"], "--config wants the path of a YAML file"),
        (["--diffusion.schedule", "flow"], "--diffusion.schedule flow does not go with --diffusion.prediction epsilon"),
        (
            ["--diffusion.schedule", "flow", "--diffusion.prediction", "flow"],
            "--diffusion.schedule flow has no variance to learn: it wants --model.no_learn_sigma",
        ),
    ],
)
def test_mistakes_on_the_command_line(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        train.main(argv)
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f"models.train: error: {message}")
    assert printed.err.count("\n") == 1
    assert printed.out == ""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim: {warmup_step: 3}", "unknown key optim.warmup_step; the nearest is optim.warmup_steps"),
        ("lr: 1", "unknown key lr; the nearest is optim.lr"),
        ("modell: {depth: 4}", "unknown key modell; the nearest is model"),
        ("model: 3", "model wants keys of its own, got 3"),
        ("- 1\n- 2", "want keys of TrainConfig, got [1, 2]"),
        ("steps: many", "Error parsing --steps: invalid literal for int() with base 10: 'many'"),
        ("compile: 3", "invalid choice '3' for argument '--compile'. Expected one of ('True', 'False')."),
        ("steps: {a: 1}", "--steps"),
        ("a: b: c", "not YAML"),
    ],
)
def test_mistakes_in_a_file(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(UsageError) as error:
        read_yaml(TrainConfig, path)
    assert str(path) in str(error.value)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_help_names_every_option_and_succeeds(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        train.main(["--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert "--optim.warmup_steps" in shown
    assert "Steps over which the learning rate rises linearly" in shown


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_shipped_configurations_are_valid(path: Path) -> None:
    config = parse_train_config(["--config", str(path)])
    assert config.run_dir == f"outputs/{path.stem}"
    written = yaml.safe_load(path.read_text())
    assert written.get("network", "latte") == config.network
    assert written[config.network_section]["num_frames"] == config.network_config.num_frames


def test_the_papers_settings() -> None:
    names = ("latte_xl_ffs", "fvdm_xl_faceforensics", "fvdm_xl_skytimelapse", "fvdm_xl_ucf101", "fvdm_xl_taichi")
    assert set(names) < {path.stem for path in CONFIGS}
    for path in (path for path in CONFIGS if path.stem in names):
        config = read_yaml(TrainConfig, path)
        assert (config.optim.lr, config.optim.weight_decay, config.optim.ema_decay) == (1e-4, 0.0, 0.9999)
        assert (config.model.hidden_size, config.model.depth, config.model.num_heads) == (1152, 28, 16)
        assert (config.model.num_frames, config.model.input_size, config.model.in_channels) == (16, 32, 4)
        fvdm = path.stem.startswith("fvdm")
        assert config.diffusion.timesteps == ("ptss" if fvdm else "clip")
        assert not fvdm or config.diffusion.ptss_probability == 0.2
        assert config.model.num_classes == (101 if "ucf101" in path.stem else None)


def test_any_name_of_a_file_can_be_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, "utf-8", errors="strict"))
    with one_line_errors("a command"):
        print(f"{os.fsdecode(b'caf' + bytes([0xE9]))}.mp4, 視.mp4", flush=True)
    assert written.getvalue().decode() == "caf\\udce9.mp4, 視.mp4\n"
