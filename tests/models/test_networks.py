"""Training of every network: what a batch and a step give it, what a run saves, and checkpoints from before."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from models import train
from models.command_line import read_yaml
from models.config import TrainConfig
from models.image_to_video import draw_given
from models.latte import Latte
from models.networks import blocks_of, build_network, check_network
from models.s2dm import S2DM
from models.sampling.network import load_network
from models.text.encoder import load_text_encoder
from models.training import checkpointing, step
from models.training.data import Batches
from models.training.distributed import World
from models.training.draws import Draws, draw
from models.vdm import VDM
from tests.models.runs import config, newest, options, read_metrics
from tests.models.test_two_processes import S2DM as TINY_S2DM
from tests.models.tiny_clip import LENGTH, WIDTH, save_tiny_clip

WORLD = World(0, 1, torch.device("cpu"))
CONFIGS = Path(__file__).parents[2] / "models" / "configs"
TINY_VDM: dict[str, Any] = {
    "network": "vdm",
    "vdm__input_size": 8,
    "vdm__num_frames": 3,
    "vdm__base_channels": 8,
    "vdm__channel_multipliers": (1, 2),
    "vdm__num_heads": 1,
    "vdm__reference_channels": 1,
    "data__size": 16,
}


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIDKERN_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("name", "conditions", "millions"),
    [
        ("s2dm_sd15", {"text": (1, 77, 768), "motion": (1, 16, 3, 128, 128)}, 860),
        ("vdm_flow", {"text": (1, 77, 768), "reference": (1, 4, 16, 16)}, 147),
    ],
)
def test_the_large_configurations_run(name: str, conditions: dict[str, Any], millions: float) -> None:
    """Without values: sizes, operators and conditions fit, and the blocks to shard hold most weights."""
    settings = read_yaml(TrainConfig, CONFIGS / f"{name}.yaml")
    shape = settings.network_config
    with torch.device("meta"):
        x0 = torch.empty(1, shape.num_frames, shape.in_channels, *shape.frame_size)
        check_network(settings, x0, {name: torch.empty(size) for name, size in conditions.items()})
        network = build_network(settings, pretrained=False)
    count = sum(p.numel() for p in network.parameters())
    assert count / 1e6 == pytest.approx(millions, rel=0.002)
    assert sum(p.numel() for block in blocks_of(network) for p in block.parameters()) > 0.9 * count


def test_a_vdm_learns_motion_from_the_first_frame_and_the_caption(clip: Path, tmp_path: Path) -> None:
    batches = Batches(config(tmp_path, **TINY_VDM, vdm__text_width=WIDTH, data__text=clip), WORLD)
    x0, conditions = batches.first(3)
    assert conditions.keys() == {"text", "reference"}
    for i in range(3):
        sample = batches.dataset[0, i]
        mean_of_four = sample["motion"].view(3, 3, 8, 2, 8, 2).mean((3, 5))
        torch.testing.assert_close(x0[i], mean_of_four)
        assert torch.equal(conditions["reference"][i], sample["video"][0])
        caption = batches.dataset.captions[int(sample["caption"])]  # type: ignore[attr-defined]
        wanted = load_text_encoder(str(clip)).encode([caption])[0]
        torch.testing.assert_close(conditions["text"][i], wanted)


def test_an_s2dm_is_given_motion_and_the_first_frame_s_tokens(clip: Path, tmp_path: Path) -> None:
    overrides = {"s2dm__image_width": WIDTH, "s2dm__image_dropout": 0.0, "data__image_encoder": clip}
    settings = config(tmp_path, **{**TINY_S2DM, **overrides})
    batches, run = Batches(settings, WORLD), step.make_run(settings, WORLD)
    x0, conditions = next(batches.after(0))
    assert conditions["image"].shape == (4, (28 // 14) ** 2 + 1, WIDTH)
    same = [torch.equal(conditions["image"][0], tokens) for tokens in conditions["image"]]
    assert same == [True, False, False, False]
    assert torch.equal(conditions["reference"], x0[:, 0])
    assert conditions["motion"].shape == (4, 2, 3, 16, 16)
    before = {name: p.clone() for name, p in run.model.named_parameters()}
    assert torch.isfinite(step.train_step(run, x0, conditions)).all()
    moved = {name for name, p in run.model.named_parameters() if not torch.equal(p, before[name])}
    assert "encoders.image.weight" in moved
    assert "encoders.motion.project.weight" in moved


def test_a_latte_of_text_takes_the_flattened_embedding(clip: Path, tmp_path: Path) -> None:
    settings = config(tmp_path, model__text_size=LENGTH * WIDTH, model__text_dropout=0.3, data__text=clip)
    run = step.make_run(settings, WORLD)
    weight = run.model.get_parameter("text_embedding_projection.1.weight").detach().clone()
    batches = Batches(settings, WORLD).after(0)
    for _ in range(3):  # the output layer, then the modulations leave zero, then the gradient reaches the text
        step.train_step(run, *next(batches))
    assert not torch.equal(run.model.get_parameter("text_embedding_projection.1.weight"), weight)


def test_draws_are_the_whole_batch_s_and_their_weights_sum_to_one(tmp_path: Path) -> None:
    settings = config(tmp_path, batch_size=4000, **{**TINY_S2DM, "s2dm__reference_dropout": 0.0})
    draws = draw(settings, 2, torch.Generator().manual_seed(0))
    assert draws.dropped.keys() == {"reference", "motion"}
    assert not draws.dropped["reference"].any()
    assert draws.dropped["motion"].float().mean().item() == pytest.approx(0.4, abs=0.03)
    assert draws.weight(slice(0, 1000)) == 0.25

    given = draw_given(7, 5, generator=torch.Generator().manual_seed(1))
    uneven = Draws(torch.zeros(7), {}, given)
    parts = [slice(0, 3), slice(3, 6), slice(6, 7)]
    weights = [float(uneven.weight(part)) for part in parts]
    assert weights == pytest.approx([(~given[part]).sum().item() / (~given).sum().item() for part in parts])
    assert sum(weights) == pytest.approx(1)
    assert torch.equal(uneven.part(parts[1]).given, given[3:6])


def test_given_frames_do_not_count(tmp_path: Path) -> None:
    """A fresh network's output is 0: the loss is the mean square of the noise in the frames that are not given."""
    settings = config(tmp_path, model__image_condition="replace", model__learn_sigma=False, batch_size=5)
    run = step.make_run(settings, WORLD)
    seen: list[dict[str, Any]] = []
    run.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append({**kwargs, "x": args[0]}), with_kwargs=True
    )
    x0, conditions = next(Batches(settings, WORLD).after(0))
    values = step.train_step(run, x0, conditions)
    given, noisy = seen[0]["given"], seen[0]["x"]
    assert torch.equal(seen[0]["known"], x0)
    assert 0 < given.sum() < given.numel()
    assert torch.equal(noisy[given], x0[given])
    assert values[0].item() == pytest.approx(1, rel=0.15)


@pytest.mark.parametrize(("kind", "overrides"), [(S2DM, TINY_S2DM), (VDM, TINY_VDM)], ids=["s2dm", "vdm"])
def test_a_run_shows_samples_and_its_network_comes_back(
    kind: type[torch.nn.Module], overrides: dict[str, Any], tmp_path: Path
) -> None:
    samples = {"log__sample_every": 40, "log__sample_steps": 2, "log__sample_clips": 2}
    argv = options(tmp_path, **{**overrides, "steps": 40, "optim__lr": 3e-3}, **samples)
    assert train.main(argv) == 0
    losses = torch.tensor([row["loss"] for row in read_metrics(tmp_path)])
    assert losses[-10:].mean() < 0.9 * losses[:10].mean()
    assert {path.name for path in (tmp_path / "samples").iterdir()} == {"step_00000040.gif", "step_00000040.png"}
    network, settings = load_network(tmp_path)
    assert isinstance(network, kind)
    assert settings.network == overrides["network"]
    ema = newest(tmp_path)["ema"]
    assert all(torch.equal(value, ema[name]) for name, value in network.state_dict().items() if name in ema)


def test_a_checkpoint_from_before_other_networks_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(options(tmp_path, steps=2)) == 0
    path = checkpointing.paths(tmp_path / "checkpoints")[-1]
    state = torch.load(path, weights_only=True)
    for name in ("network", "s2dm", "vdm", "init"):
        del state["config"][name]
    for name in ("text", "latents", "size", "image_encoder"):
        del state["config"]["data"][name]
    del state["config"]["model"]["image_condition"]
    torch.save(state, path)
    assert isinstance(load_network(path)[0], Latte)
    assert train.main(options(tmp_path, steps=3)) == 0
    said = Counter(
        line.split(":")[1].strip() for line in capsys.readouterr().err.splitlines() if "models.train:" in line
    )
    assert said["changed since"] == 1
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"network": "vdm", "vdm__text_width": 8}, "--network vdm with text wants --data.text"),
        ({"data__text": "wordllama"}, "--data.text wordllama: the network takes no text, see --model"),
        ({**TINY_S2DM, "s2dm__image_width": 8}, "--network s2dm with image wants --data.image_encoder"),
        ({**TINY_S2DM, "s2dm__pose_channels": 3}, "--s2dm.pose_channels 3 wants pictures of poses: 3 channels,"),
        (
            {**TINY_S2DM, "s2dm__pose_channels": 2, "data__kind": "motion", "data__path": "nowhere"},
            "--s2dm.pose_channels 2 wants pictures of poses: 3 channels,",
        ),
        (
            {**TINY_S2DM, "data__kind": "videos", "data__path": "."},
            "--network s2dm with motion wants --data.kind digits or motion, got videos",
        ),
        ({**TINY_VDM, "data__kind": "motion", "data__path": "nowhere"}, "--data.size wants --network vdm and"),
        ({"data__kind": "motion", "data__path": "nowhere"}, "no motion at nowhere: python -m models.flow makes it"),
        ({"data__latents": True}, "--data.latents wants --data.kind motion, got digits"),
        ({"recompute": "cheap"}, "--recompute cheap wants --activation_checkpointing, and a --network other than s2dm"),
        ({"data__least_visible": 0.5}, "--data.least_visible wants --data.kind motion, got digits"),
        ({**TINY_VDM, "vdm__reference_channels": 2}, "channels must be 1 or 3, got 2"),
        ({**TINY_S2DM, "s2dm__unet": "nowhere"}, "no U-Net at nowhere: want a local folder, or owner/name on the hub"),
    ],
)
def test_mistakes_are_one_line(
    overrides: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        train.main(options(tmp_path, **overrides))
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(f"models.train: error: {message}")
    assert said.count("\n") == 1


def test_an_embedding_of_another_width_is_told(clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train.main(options(tmp_path, **{**TINY_S2DM, "s2dm__text_width": 9}, data__text=clip))
    assert capsys.readouterr().err.endswith(
        f"models.train: error: text must be of shape (1, L, 9), got (1, {LENGTH}, {WIDTH})\n"
    )
