"""Records what the public Latte and FVDM code gives for every case; run by hand, where both and timm are at hand.

python -m tests.models.record_public_parity --latte <clone of Vchitect/Latte> --fvdm <clone of Yaofang-Liu/FVDM>
"""

import argparse
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from models.fvdm import latte_name
from tests.models.public_cases import CASES, CLASSES, IMAGES, NETWORK, RECORDED, Case, run
from vidkern import ops

#: Where each network is in its clone, and its class.
NETWORKS = {
    "latte": ("latte", "models/latte.py", "Latte"),
    "latte_img": ("latte", "models/latte_img.py", "Latte"),
    "fvdm": ("fvdm", "models/latte_video.py", "LatteVIDEO"),
}
EXTRAS = {"none": 1, "class": 2, "text": 78}


def load(name: str, path: Path) -> ModuleType:
    """Import a file, or a package's __init__.py, under a name of its own."""
    package = [str(path.parent)] if path.name == "__init__.py" else None
    spec = importlib.util.spec_from_file_location(name, path, submodule_search_locations=package)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def record(case: Case, clones: dict[str, Path]) -> dict[str, Tensor]:
    """Run one case through the public code."""
    clone, path, class_name = NETWORKS[case.network]
    network = getattr(load(f"public_{case.network}", clones[clone] / path), class_name)
    model: nn.Module = network(
        **{**NETWORK, **case.network_options}, num_classes=CLASSES, extras=EXTRAS[case.condition]
    )
    model.train(case.call == "joint")  # its images' labels are read in training only
    if case.condition == "class":
        model.y_embedder.dropout_prob = 0.0

    def parameters() -> Iterator[tuple[str, nn.Parameter]]:
        return ((latte_name(name), parameter) for name, parameter in model.named_parameters())

    def call(tensors: dict[str, Tensor]) -> Tensor:
        x, t, conditions = tensors["x"], tensors["t"], _conditions(tensors)
        if case.call == "cfg":
            return model.forward_with_cfg(x, t, cfg_scale=2.5, **conditions)
        if case.call != "loss":
            return model(x, t, **conditions)
        package = load(f"public_{clone}_diffusion", clones[clone] / "diffusion/__init__.py")
        diffusion = package.create_diffusion("")
        noise = ops.philox_normal(x.shape, tensors["key"], dtype=x.dtype, device=x.device)
        if case.network == "fvdm":
            return diffusion.training_losses_video(model, x, t, conditions, noise)[0]["loss"].mean()
        return diffusion.training_losses(model, x, t, conditions, noise)["loss"].mean()

    return run(case, call, parameters)


def _conditions(tensors: dict[str, Tensor]) -> dict[str, Any]:
    names = {"y": "y", "text": "text_embedding", "image_labels": "y_image"}
    conditions: dict[str, Any] = {names[key]: value for key, value in tensors.items() if key in names}
    return conditions | ({"use_image_num": IMAGES} if "y_image" in conditions else {})


def main() -> None:
    """Record every case into RECORDED."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--latte", type=Path, required=True)
    parser.add_argument("--fvdm", type=Path, required=True)
    clones = vars(parser.parse_args())
    torch.set_num_threads(1)
    recorded = {f"{name}/{key}": value for name, case in CASES.items() for key, value in record(case, clones).items()}
    RECORDED.parent.mkdir(exist_ok=True)
    save_file(recorded, RECORDED)


if __name__ == "__main__":
    main()
