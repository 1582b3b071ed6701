"""Latte and FVDM against what the public code gave: outputs, losses and every parameter's gradient."""

import pytest
from safetensors.torch import load_file
from torch import Tensor

from models.latte import Latte, LatteConfig
from tests.models.public_cases import CASES, CLASSES, IMAGES, NETWORK, RECORDED, TEXT_SHAPE, Case, run
from vidkern.diffusion import diffusion_loss, make_schedule

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def recorded() -> dict[str, Tensor]:
    return load_file(RECORDED)


def build(case: Case) -> Latte:
    conditions = {
        "class": {"num_classes": CLASSES, "class_dropout": 0.0},
        "text": {"text_size": TEXT_SHAPE[0] * TEXT_SHAPE[1]},
    }
    return Latte(LatteConfig(**{**NETWORK, **case.network_options, **conditions.get(case.condition, {})}))


def call(case: Case, model: Latte, tensors: dict[str, Tensor]) -> Tensor:
    x, t, y, text = tensors["x"], tensors["t"], tensors.get("y"), tensors.get("text")
    if case.call == "cfg":
        return model.forward_with_cfg(x, t, y, cfg_scale=2.5)
    if case.call == "joint":
        return model(x, t, y, num_images=IMAGES, image_labels=tensors["image_labels"])
    if case.call == "loss":
        return diffusion_loss(model, x, t, make_schedule("linear", device=x.device), tensors["key"], y=y)["loss"]
    return model(x, t, y, text=text)


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_are_those_of_the_public_code(name, recorded):
    case = CASES[name]
    model = build(case)
    ours = run(case, lambda tensors: call(case, model, tensors), model.named_parameters)
    theirs = {key: recorded[f"{name}/{key}"] for key in ours}
    scale = theirs["output"].abs().max()
    assert (ours["output"] - theirs["output"]).abs().max() <= TOLERANCE * scale
    norms = theirs["gradient_norms"]
    assert norms.min() > 0
    assert ((ours["gradient_norms"] - norms).abs() <= TOLERANCE * norms).all()
    assert ((ours["gradient_products"] - theirs["gradient_products"]).abs() <= TOLERANCE * norms).all()
