"""The ablations: configurations that build, measures with known values, runs that go on, verdicts that follow."""

import dataclasses
import json

import numpy as np
import pytest
import torch
import yaml

from models.ablations import arms, digit_network, report, run, studies
from models.ablations.measures import DigitJudge, Drawn, measure, measure_real
from models.ablations.numbers import centroids, ink_variation, jerk, path_error, psnr, warp_error
from models.command_line import read_yaml
from models.config import TrainConfig, parse_train_config
from models.data import MovingDigits
from models.motion import to_network
from models.networks import build_network


def spot(path, side=16):
    """A clip (1, F, 1, side, side) of one bright pixel at each (x, y)."""
    clip = torch.full((1, len(path), 1, side, side), -1.0)
    for i, (x, y) in enumerate(path):
        clip[0, i, 0, y, x] = 1
    return clip


def digits(count, motion=False):
    data = MovingDigits(num_frames=6, size=16, length=count, seed=3, motion=motion)
    samples = [data[i] for i in range(count)]
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}


# ---- configurations


@pytest.mark.parametrize("scale", studies.SCALES.values(), ids=list(studies.SCALES))
def test_every_training_of_a_scale_can_be_built(scale):
    for data in ("digits", "clips"):
        for training in studies.trainings_of(scale, list(studies.STUDIES.values())):
            config = parse_train_config(["--config", str(scale.config(data, training.network)), *training.options])
            with torch.device("meta"):
                build_network(dataclasses.replace(config, s2dm=dataclasses.replace(config.s2dm, unet=None)))
            assert config.log.checkpoint_every < config.steps


@pytest.mark.parametrize("scale", studies.SCALES.values(), ids=list(studies.SCALES))
def test_the_variants_have_equal_parameters(scale):
    counts = []
    for variant, depth in enumerate(scale.variant_depths, 1):
        config = read_yaml(TrainConfig, scale.config("clips", "latte"))
        model = dataclasses.replace(config.model, variant=variant, depth=depth)
        with torch.device("meta"):
            network = build_network(dataclasses.replace(config, model=model))
        counts.append(sum(p.numel() for p in network.parameters() if p.requires_grad))
    assert max(counts) < 1.03 * min(counts)


def test_the_estimate_counts_each_training_once_for_every_seed():
    gpu, both = studies.SCALES["gpu"], [studies.STUDIES["timesteps"], studies.STUDIES["variants"]]
    assert len(studies.trainings_of(gpu, both)) == 7
    assert studies.gpu_hours(gpu, both, ["digits"]) == 7 * 3 * gpu.hours["digits_latte"]
    assert studies.gpu_hours(gpu, [studies.STUDIES["flow"]], ["digits", "clips"]) == pytest.approx(
        3 * gpu.hours["digits_s2dm"] + gpu.hours["clips_s2dm"]
    )


# ---- numbers


def test_the_centroid_of_a_spot_is_its_place_and_a_straight_path_has_no_jerk():
    straight, bent = [(2, 3), (4, 6), (6, 9), (8, 12)], [(2, 3), (4, 6), (6, 9), (6, 5)]
    assert torch.equal(centroids(spot(straight))[0], torch.tensor(straight).double())
    assert jerk(spot(straight)).item() == 0
    assert jerk(spot(bent)).item() == pytest.approx((0 + np.hypot(2, 7)) / 2)
    assert path_error(spot(bent), spot(straight)).item() == pytest.approx(np.hypot(2, 7) / 4)
    assert centroids(torch.full((1, 1, 1, 4, 6), -1.0)).tolist() == [[[2.5, 1.5]]]


def test_ink_that_comes_and_goes_varies():
    clip = spot([(1, 1), (2, 2), (3, 3), (4, 4)])
    assert ink_variation(clip).item() == 0
    clip[0, 1] = -1
    assert ink_variation(clip).item() == pytest.approx(np.std([2, 0, 2, 2], ddof=1) / 1.5)


def test_psnr_looks_at_frames_that_were_not_given():
    truth = torch.zeros(1, 3, 1, 4, 4)
    clips = truth + torch.tensor([9.0, 0.2, 0.2]).view(1, 3, 1, 1, 1)
    given = torch.tensor([True, False, False])
    assert psnr(clips, truth, given).item() == pytest.approx(10 * np.log10(4 / 0.04))


def test_a_clip_that_moves_as_its_flow_says_has_no_warping_error():
    torch.manual_seed(0)
    first = torch.rand(1, 1, 3, 8, 8) * 2 - 1
    clip = torch.cat([first, first.roll(1, -1), first.roll(2, -1)], 1)  # to the right, so the flow points left
    flow = torch.zeros(1, 3, 2, 8, 8)
    flow[0, 1, 0], flow[0, 2, 0] = -1, -2
    visible = torch.ones(1, 3, 1, 8, 8)
    visible[..., :2] = 0  # what came in from the other side
    assert warp_error(clip, to_network(flow, visible)).item() == pytest.approx(0, abs=1e-6)
    still = warp_error(clip, to_network(0 * flow, visible)).item()
    moved = (clip[:, 1:] - first)[..., 2:].double().abs().mean().item()
    assert still == pytest.approx(moved)


# ---- measures


def test_measures_rank_real_clips_before_noisy_ones():
    torch.manual_seed(0)
    judge = DigitJudge(digit_network.DigitNetwork(6).eval().requires_grad_(False))
    data = digits(24, motion=True)
    real, given = data["video"], torch.zeros(6, dtype=torch.bool)

    def found(clips):
        drawn = Drawn(clips, real, data["label"], data["label"], given, truth=real, motion=data["motion"])
        return measure(drawn, judge), measure_real(drawn, judge)

    same, of_real = found(real)
    worse, again = found(real + 0.3 * torch.randn_like(real))
    assert same["digits_distance"].value == pytest.approx(0, abs=1e-5)
    assert same["psnr"].value == np.inf
    for name in ("digits_distance", "warp_error", "jerk", "ink", "path_error"):
        assert worse[name].low > same[name].high, name
    assert of_real == again
    assert set(of_real) == {"accuracy", "warp_error", "jerk", "ink"}


def test_clips_with_given_frames_have_no_distance():
    judge = DigitJudge(digit_network.DigitNetwork(6).eval().requires_grad_(False))
    data = digits(4)
    given = torch.tensor([True, *[False] * 5])
    drawn = Drawn(0.9 * data["video"], data["video"], data["label"], data["label"], given, truth=data["video"])
    assert "digits_distance" not in measure(drawn, judge)


def test_the_digit_network_learns_and_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(digit_network, "STEPS", 12)
    monkeypatch.setattr(digit_network, "BATCH", 32)
    network = digit_network.digit_network(6, tmp_path)
    data = digits(128)
    wanted = 2 * centroids(data["video"]) / 15 - 1
    untrained = digit_network.DigitNetwork(6)
    errors = [(n(data["video"])[1] - wanted).square().mean().item() for n in (network, untrained)]
    assert errors[0] < 0.9 * errors[1]
    monkeypatch.setattr(digit_network, "_train", None)
    kept = digit_network.digit_network(6, tmp_path)
    assert torch.equal(kept.features(data["video"]), network.features(data["video"]))


def test_other_motion_is_none_or_that_of_another_clip():
    motion = torch.randn(4, 2, 3, 5, 5)
    assert torch.equal(arms.other_motion(motion, "own"), motion)
    zero = arms.other_motion(motion, "zero")
    assert not zero[:, :, :2].any()
    assert (zero[:, :, 2] == 1).all()
    assert torch.equal(arms.other_motion(motion, "other")[0], motion[2])


# ---- runs


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A tiny scale on digits, with a study of two arms that share a training."""
    config = yaml.safe_load(studies.SCALES["cpu"].config("digits", "latte").read_text())
    config["steps"], config["batch_size"], config["precision"] = 2, 2, "float32"
    config["model"] |= {"hidden_size": 64, "depth": 2, "num_heads": 2, "num_frames": 4, "patch_size": 8}
    (tmp_path / "configs" / "cpu").mkdir(parents=True)
    (tmp_path / "configs" / "cpu" / "digits_latte.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.setattr(studies, "CONFIGS", tmp_path / "configs")
    monkeypatch.setattr(digit_network, "STEPS", 1)
    study = studies.Study(
        "steps",
        "DDIM: steps of the sampler",
        "",
        (studies.Arm("2 steps", "fvdm_p0.2", steps=2), studies.Arm("1 step", "fvdm_p0.2", steps=1)),
        tasks=("standard", "interpolation"),
    )
    monkeypatch.setitem(studies.STUDIES, "steps", study)
    scale = dataclasses.replace(
        studies.SCALES["cpu"], seeds={"digits": 1}, clips={"digits": 6}, held=5, steps=2, batch=4
    )
    return run.Workplace(tmp_path / "out", scale, None)


def test_a_study_runs_reports_and_goes_on_where_it_stopped(place, monkeypatch):
    study = studies.STUDIES["steps"]
    trained = []
    real_main = arms.train.main
    monkeypatch.setattr(arms.train, "main", lambda options: trained.append(options) or real_main(options))
    assert not run.run(place, [study], ["digits"], minutes=0)
    assert not trained

    assert run.run(place, [study], ["digits"], minutes=None)
    found = run.records(place.out)
    assert len(found) == 4
    assert {len(run.pictured(place.out, record["name"])) for record in found} == {arms.PICTURED}
    standard = [record for record in found if record["task"] == "standard"]
    assert [record["clips"] for record in standard] == [6, 6]
    values = [record["measures"]["digits_distance"]["value"] for record in standard]
    assert values[0] != values[1]
    between = next(record for record in found if record["task"] == "interpolation")
    assert between["clips"] == 5
    assert 0 < between["measures"]["psnr"]["value"] < 40

    trained.clear()
    (place.out / run.CELLS / f"{found[0]['name']}.json").unlink()
    assert run.run(place, [study], ["digits"], minutes=None)
    assert len(trained) == 1  # for the cell that was lost; its training is found done
    assert [r["measures"] for r in run.records(place.out)] == [r["measures"] for r in found]

    page = place.out / "page.md"
    page.write_text(f"# Title\n\n{report.BEGIN}\n{report.END}\n\nAfter.\n")
    report.write_report(place.out, page)
    text = page.read_text()
    assert text.startswith("# Title\n")
    assert text.endswith("After.\n")
    assert "| 2 steps" in text
    assert len(json.loads((place.out / "page" / report.RESULTS).read_text())) == 4
    for picture in ("steps-digits.png", "steps-digits-clips.png"):
        assert (place.out / "page" / picture).read_bytes().startswith(b"\x89PNG")


def test_an_arm_is_done_again_when_its_configuration_changes(place):
    study = studies.STUDIES["steps"]
    one = dataclasses.replace(study, arms=study.arms[:1], tasks=("standard",))
    assert run.run(place, [one], ["digits"], minutes=None)
    other = run.Workplace(place.out, dataclasses.replace(place.scale, clips={"digits": 7}), None)
    assert not run.run(other, [one], ["digits"], minutes=0)
    assert run.run(other, [one], ["digits"], minutes=None)
    assert [record["clips"] for record in run.records(place.out)] == [7]


# ---- verdicts


def record(arm, seed, **measures):
    found = {name: dict(zip(("value", "low", "high"), value, strict=True)) for name, value in measures.items()}
    return {"study": "steps", "data": "digits", "task": "standard", "arm": arm, "seed": seed, "measures": found}


def test_arms_are_told_apart_only_where_no_intervals_of_any_seed_meet():
    table = report.Table(
        studies.STUDIES["steps"],
        "digits",
        "standard",
        [
            record("10 steps", 0, digits_distance=(5, 4, 6), psnr=(20, 19, 21)),
            record("10 steps", 1, digits_distance=(7, 6, 8), psnr=(20, 19, 21)),
            record("50 steps", 0, digits_distance=(2, 1, 3), psnr=(25, 24, 26)),
            record("50 steps", 1, digits_distance=(3, 2, 3.5), psnr=(21, 20, 22)),
            record("100 steps", 0, digits_distance=(2.8, 2, 4.5), psnr=(24, 23, 25)),
        ],
    )
    assert table.arms == ["10 steps", "50 steps", "100 steps"]
    assert table.value("10 steps", "digits_distance") == (6, 4, 8)
    assert table.value("50 steps", "digits_distance") == (2.5, 1, 3.5)
    distance, quality = (report.verdict(table, name) for name in ("digits_distance", "psnr"))
    assert distance.endswith(
        "best is 50 steps. Worse beyond all intervals: 10 steps. Not told apart from it: 100 steps."
    )
    assert quality.endswith(
        "best is 100 steps. Worse beyond all intervals: 10 steps. Not told apart from it: 50 steps."
    )
