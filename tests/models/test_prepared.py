"""Modulation vectors that are computed once for a whole sampling run, against those computed in every step."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from models.image_to_video import bind
from models.latte import Latte, LatteConfig, Prepared
from models.sampling.draw import draw_clips
from models.sampling.guidance import guide
from models.training.distributed import World, distribute
from models.videofusion import VideoFusion
from tests.models.public_cases import fill
from vidkern.diffusion import given_frames, interpolation, make_schedule, progressive, sample, standard
from vidkern.nn import TimestepEmbedder

BATCH, FRAMES, CHANNELS, SIZE, CLASSES, WIDTH, WEIGHT = 2, 4, 2, 8, 5, 6, 0.6
SHAPE = (BATCH, FRAMES, CHANNELS, SIZE, SIZE)
LINEAR = make_schedule("linear")
KEY = torch.tensor([3, 1])


def small(seed: int = 4, **options: Any) -> Latte:
    sizes = {"input_size": SIZE, "hidden_size": 64, "depth": 2, "num_heads": 2, "num_frames": FRAMES}
    model = Latte(LatteConfig(in_channels=CHANNELS, **{**sizes, **options}))
    fill(model.named_parameters(), seed)
    return model.eval()


def two_networks(**options: Any) -> VideoFusion:
    model = VideoFusion(small(**options).config, LINEAR, WEIGHT)
    fill(model.named_parameters(), 6)
    return model.eval()


def clip(seed: int = 0) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def some_of(times: Tensor, *shape: int) -> Tensor:
    return times[torch.randint(len(times), shape, generator=torch.Generator().manual_seed(7))]


TIMES = torch.tensor([700, 3, 250, 999, 41])
LABELS = torch.tensor([2, CLASSES])
TEXT = torch.randn(BATCH, 2, WIDTH // 2, generator=torch.Generator().manual_seed(5))
DROPPED = torch.tensor([False, True])
#: Options of the network, its conditions, and what only ``forward`` is given.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "unconditional": ({}, {}),
    "classes": ({"num_classes": CLASSES}, {"y": LABELS}),
    "dropped classes": ({"num_classes": CLASSES}, {"y": LABELS - 1, "dropped": {"y": DROPPED}}),
    "text": ({"text_size": WIDTH}, {"text": TEXT, "dropped": {"text": DROPPED}}),
    "variant 4": ({"variant": 4}, {}),
    "given frames": ({"image_condition": "replace"}, {}),
}


@torch.no_grad()
@pytest.mark.parametrize("per_frame", [False, True])
@pytest.mark.parametrize(("options", "conditions"), CASES.values(), ids=CASES)
def test_a_prepared_step_is_the_step(options, conditions, per_frame):
    model, x = small(**options), clip()
    t = some_of(TIMES, BATCH, FRAMES) if per_frame else some_of(TIMES, BATCH)
    images = {}
    if "image_condition" in options:
        images = {"known": clip(1), "given": torch.tensor([[True, False, False, True]]).expand(BATCH, FRAMES)}
    prepared = model.prepare_sampling(TIMES, **conditions)
    torch.testing.assert_close(
        model(x, t, prepared=prepared, **images), model(x, t, **conditions, **images), rtol=1e-5, atol=1e-5
    )


@torch.no_grad()
def test_prepared_under_autocast_keeps_its_precision():
    model, x, t = small(num_classes=CLASSES), clip(), some_of(TIMES, BATCH)
    with torch.autocast("cpu", torch.bfloat16):
        prepared = model.prepare_sampling(TIMES, LABELS)
        ours, wanted = model(x, t, prepared=prepared), model(x, t, LABELS)
    assert prepared is not None
    assert prepared.vectors.dtype == torch.bfloat16
    torch.testing.assert_close(ours, wanted, rtol=1e-2, atol=1e-2)


TASKS = {
    "standard": standard,
    "interpolation": interpolation,
    "progressive": functools.partial(progressive, ramp=2),
    "given frames": functools.partial(given_frames, index=[2]),
}


def without_it(model: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a model without its ``prepare_sampling``."""
    return lambda *arguments, **options: model(*arguments, **options)


class Counted:
    """Calls a network, with or without its ``prepare_sampling``, and counts how often timesteps are embedded."""

    def __init__(self, network: Latte | VideoFusion, prepares: bool) -> None:
        self.embedded = 0
        self.model = network if prepares else without_it(network)
        for part in network.modules():
            if isinstance(part, TimestepEmbedder):
                part.register_forward_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.embedded += 1


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_a_run_embeds_its_timesteps_once_and_draws_the_same_clips(task):
    known = None if task is standard else clip(2)
    drawn = []
    for prepares, embedded in ((True, 1), (False, 3)):
        counted = Counted(small(), prepares)
        drawn.append(sample(counted.model, SHAPE, LINEAR, KEY, num_steps=3, task=task, known=known))
        assert counted.embedded == embedded
    torch.testing.assert_close(*drawn, rtol=1e-4, atol=1e-4)


#: An image-conditioned network or two networks, with classes: labels in the samplers' own guidance or ours.
OTHERS = {
    "replace": functools.partial(small, num_classes=CLASSES, image_condition="replace"),
    "concat": functools.partial(small, num_classes=CLASSES, image_condition="concat"),
    "VideoFusion": functools.partial(two_networks, num_classes=CLASSES),
}
GUIDED = {"y": torch.tensor([0, 3]), "y_null": CLASSES, "cfg_scale": 3.0}


def as_sampled(network: Latte | VideoFusion, task: Any) -> Callable[..., Tensor]:
    """Return a network as ``models.sampling.draw`` hands it to the sampler."""
    if network.config.image_condition is None:
        return network
    return bind(network, task(torch.zeros(1, dtype=torch.int64), FRAMES)[1][0])


@pytest.mark.parametrize("guidance", [{}, GUIDED], ids=["conditional", "guided"])
@pytest.mark.parametrize("task", [TASKS["interpolation"], TASKS["given frames"]], ids=["ends", "middle"])
@pytest.mark.parametrize("make", OTHERS.values(), ids=OTHERS)
def test_other_networks_draw_the_same_clips(make, task, guidance):
    options = {"task": task, "known": clip(2), "num_steps": 3, "y": LABELS - 1, **guidance}
    drawn, embedded = [], []
    for prepares in (True, False):
        counted = Counted(make(), prepares=True)
        model = as_sampled(counted.model, task)
        drawn.append(sample(model if prepares else without_it(model), SHAPE, LINEAR, KEY, **options))
        embedded.append(counted.embedded)
    networks = 2 if make is OTHERS["VideoFusion"] else 1
    assert embedded == [networks, 3 * networks]
    torch.testing.assert_close(*drawn, rtol=1e-4, atol=1e-4)
    assert (drawn[0] - clip(2)).abs().max() > 1e-2


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_guidance_by_classes_is_prepared_for_both_halves(sampler):
    network = small(num_classes=CLASSES)
    options = {"y": torch.tensor([0, 3]), "y_null": CLASSES, "cfg_scale": 3.0, "num_steps": 3, "sampler": sampler}
    with_it, without = Counted(network, True), Counted(network, False)
    ours = sample(with_it.model, SHAPE, LINEAR, KEY, **options)
    assert with_it.embedded == 1
    torch.testing.assert_close(ours, sample(without.model, SHAPE, LINEAR, KEY, **options), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", [small, two_networks], ids=["Latte", "VideoFusion"])
def test_guidance_by_scales_is_prepared(make):
    network = make(text_size=WIDTH)
    with_it, without = Counted(network, True), Counted(network, False)
    ours, wanted = (
        sample(guide(each.model, {"text": TEXT}, {"text": 4.0}), SHAPE, LINEAR, KEY, num_steps=3)
        for each in (with_it, without)
    )
    assert with_it.embedded == (1 + 3) * (1 if make is small else 2)
    torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4)


def test_a_model_that_prepares_nothing_is_called_as_ever():
    network = small(num_classes=CLASSES, patch_embedding="tubelet")
    assert network.prepare_sampling(TIMES, LABELS) is None
    counted = Counted(network, True)
    options = {"y": LABELS, "num_steps": 3}
    drawn = sample(counted.model, SHAPE, LINEAR, KEY, **options)
    assert counted.embedded == 3
    assert torch.equal(drawn, sample(Counted(network, False).model, SHAPE, LINEAR, KEY, **options))


@pytest.mark.parametrize("make", [small, two_networks], ids=["Latte", "VideoFusion"])
def test_sharded_weights_are_left_to_forward(make):
    sizes = {"batch_size": 1, "seed": 0, "num_steps": 2, "precision": "bfloat16"}
    wanted = draw_clips(make(), LINEAR, 1, **sizes)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        network = make()
        distribute(network, make(), "fsdp", World(0, 1, torch.device("cpu")))
        assert network.prepare_sampling(TIMES) is None
        torch.testing.assert_close(draw_clips(network, LINEAR, 1, **sizes), wanted, rtol=2e-2, atol=2e-2)
    finally:
        dist.destroy_process_group()


@torch.no_grad()
def test_a_prepared_step_compiles_into_one_graph():
    torch._dynamo.reset()
    model = small(num_classes=CLASSES)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
    for i, times in enumerate((TIMES, TIMES[:3])):
        prepared, t = model.prepare_sampling(times, LABELS), some_of(times, BATCH, FRAMES)
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            ours = compiled(clip(i), t, prepared=prepared)
        torch.testing.assert_close(ours, model(clip(i), t, LABELS), rtol=1e-5, atol=1e-5)


def three_samples(prepared: Prepared) -> Prepared:
    return prepared._replace(vectors=prepared.vectors[:, [0, 1, 1]])


def narrower(prepared: Prepared) -> Prepared:
    return prepared._replace(vectors=prepared.vectors[..., :-8])


@pytest.mark.parametrize(
    ("options", "change", "message"),
    [
        ({"y": LABELS}, None, "y must be left out with prepared, got Tensor"),
        ({"dropped": {"y": DROPPED}}, None, "dropped must be left out with prepared, got dict"),
        ({"num_images": 1, "image_labels": LABELS[:, None]}, None, "num_images must be left out .*, got int"),
        ({}, three_samples, r"prepared must be of 2 samples and 896 channels, got \(3, 896\)"),
        ({}, narrower, r"prepared must be of 2 samples and 896 channels, got \(2, 888\)"),
    ],
)
def test_what_does_not_go_with_prepared_is_refused(options, change, message):
    model = small(num_classes=CLASSES)
    prepared = model.prepare_sampling(TIMES, LABELS)
    assert prepared is not None
    with pytest.raises(ValueError, match=message):
        model(clip(), some_of(TIMES, BATCH), prepared=change(prepared) if change else prepared, **options)
