"""Loading weights: every form of checkpoint, other naming, other lengths, and what an error says."""

import argparse
import re
from typing import Any

import pytest
import torch
from diffusers import LatteTransformer3DModel
from safetensors.torch import save_file
from torch import Tensor

from models.checkpoints import CheckpointError, load_weights, read_checkpoint
from models.latte import Latte, LatteConfig
from tests.models.public_cases import fill
from vidkern import ops

SMALL = {"input_size": 8, "hidden_size": 64, "depth": 4, "num_heads": 2, "num_frames": 4, "num_classes": 5}


def model(seed: int = 0, **options: Any) -> Latte:
    built = Latte(LatteConfig(**{**SMALL, **options}))
    fill(built.named_parameters(), seed)
    return built.eval()


def state(seed: int) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model(seed).state_dict().items()}


def assert_loaded(loaded: Latte, wanted: dict[str, Tensor]) -> None:
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, wanted[name]), name


class TrainingOptions:
    """Stands for a configuration class that only the training code knows."""

    def __init__(self, learning_rate: float) -> None:
        self.learning_rate = learning_rate


CONTAINERS = {
    "bare": lambda: (state(1), ""),
    "ema": lambda: ({"ema": state(1)}, "ema"),
    "model and ema": lambda: ({"model": state(2), "ema": state(1)}, "ema"),
    "model": lambda: ({"model": state(1), "step": 7}, "model"),
    "everything": lambda: (
        {
            "model": state(2),
            "ema": state(1),
            "opt": {"state": {0: {"exp_avg": torch.randn(3)}}, "param_groups": [{"lr": 1e-4}]},
            "args": argparse.Namespace(options=TrainingOptions(1e-4), names=["a"]),
        },
        "ema",
    ),
}


@pytest.mark.parametrize("container", CONTAINERS)
def test_every_container_is_understood(container, tmp_path):
    content, entry = CONTAINERS[container]()
    torch.save(content, tmp_path / "weights.pt")
    loaded = model()
    report = load_weights(loaded, tmp_path / "weights.pt")
    assert (report.entry, report.naming) == (entry, "latte")
    assert len(report.loaded) == len(loaded.state_dict())
    assert_loaded(loaded, state(1))


def test_the_training_weights_can_be_asked_for():
    loaded = model()
    assert load_weights(loaded, {"model": state(2), "ema": state(1)}, entry="model").entry == "model"
    assert_loaded(loaded, state(2))
    with pytest.raises(CheckpointError, match="must hold weights under 'ema', got the entries model"):
        load_weights(loaded, {"model": state(2)}, entry="ema")


def test_safetensors(tmp_path):
    save_file(state(1), tmp_path / "weights.safetensors")
    loaded = model()
    load_weights(loaded, tmp_path / "weights.safetensors")
    assert_loaded(loaded, state(1))


@pytest.mark.parametrize("wrap", ["module.{}", "_orig_mod.{}", "module._orig_mod.{}", "_orig_mod.module.{}"])
def test_wrappers_leave_no_trace(wrap):
    loaded = model()
    load_weights(loaded, {wrap.format(name): value for name, value in state(1).items()})
    assert_loaded(loaded, state(1))


def test_a_wrapper_inside_leaves_no_trace():
    loaded = model()
    load_weights(loaded, {name.replace("blocks.1.", "blocks.1._orig_mod."): v for name, v in state(1).items()})
    assert_loaded(loaded, state(1))


def fvdm_state(seed: int) -> dict[str, Tensor]:
    def theirs(name: str) -> str:
        block = re.match(r"blocks\.(\d+)\.", name)
        if block is None:
            return name
        kind = ("spatial", "temp")[int(block[1]) % 2]
        return f"blocks_{kind}.{int(block[1]) // 2}.{name.removeprefix(block[0])}"

    return {theirs(name): value for name, value in state(seed).items()}


def test_fvdm_naming():
    loaded = model()
    assert load_weights(loaded, {"ema": fvdm_state(1)}).naming == "fvdm"
    assert_loaded(loaded, state(1))
    with pytest.raises(CheckpointError, match="need variant 1, got a model of variant 2"):
        load_weights(model(variant=2), fvdm_state(1))


def test_positions_of_another_length_are_computed_and_reported():
    loaded = model(num_frames=6, input_size=12)
    report = load_weights(loaded, state(1))
    assert report.computed == ("pos_embed", "temp_embed")
    fresh = model(num_frames=6, input_size=12)
    assert torch.equal(loaded.temp_embed, fresh.temp_embed)
    assert torch.equal(loaded.pos_embed, fresh.pos_embed)
    assert torch.equal(loaded.blocks[3].mlp.fc2.weight, state(1)["blocks.3.mlp.fc2.weight"])
    without = {name: value for name, value in state(1).items() if name != "temp_embed"}
    assert load_weights(model(), without).computed == ("temp_embed",)
    assert "temp_embed" not in load_weights(model(temporal_position="rope"), state(1)).loaded


def test_another_dtype_is_converted_and_reported():
    half = {name: value.half() for name, value in state(1).items()}
    loaded = model()
    report = load_weights(loaded, half)
    assert len(report.cast) == len(report.loaded)
    assert "final_layer.linear.bias (float16 to float32)" in report.cast
    assert_loaded(loaded, {name: value.float() for name, value in half.items()})


def test_another_size_is_named_with_both_shapes_and_changes_nothing():
    loaded, before = model(), state(0)
    other = Latte(LatteConfig(**{**SMALL, "hidden_size": 128, "depth": 2, "num_classes": 7})).state_dict()
    with pytest.raises(CheckpointError) as error:
        load_weights(loaded, other)
    message = str(error.value)
    assert "another shape: x_embedder.proj.weight (checkpoint (128, 4, 2, 2), model (64, 4, 2, 2))" in message
    assert "missing: blocks.2." in message
    assert "the checkpoint looks like depth 2, hidden_size 128, in_channels 4, patch_size 2, num_classes 7" in message
    assert "\n" not in message
    assert_loaded(loaded, before)


def test_missing_and_unexpected_keys_are_named():
    changed = state(1)
    changed["blocks.0.attn.query.weight"] = changed.pop("blocks.0.attn.qkv.weight")
    with pytest.raises(CheckpointError) as error:
        load_weights(model(), changed)
    assert "missing: blocks.0.attn.qkv.weight; unexpected: blocks.0.attn.query.weight" in str(error.value)
    report = load_weights(model(), changed, strict=False)
    assert report.missing == ("blocks.0.attn.qkv.weight",)
    assert report.unexpected == ("blocks.0.attn.query.weight",)
    assert "missing: blocks.0.attn.qkv.weight; unexpected: blocks.0.attn.query.weight" in str(report)


def test_what_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*absent\.pt"):
        load_weights(model(), tmp_path / "absent.pt")
    for name in ("text.pt", "text.safetensors"):
        (tmp_path / name).write_text("not a checkpoint")
        with pytest.raises(CheckpointError, match="cannot be read as a checkpoint"):
            load_weights(model(), tmp_path / name)
    torch.save(state(1), tmp_path / "whole.pt")
    content = (tmp_path / "whole.pt").read_bytes()
    (tmp_path / "truncated.pt").write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="cannot be read as a checkpoint"):
        load_weights(model(), tmp_path / "truncated.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match="must hold a dictionary, got list"):
        load_weights(model(), tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match=r"must hold tensors, .* got step"):
        load_weights(model(), {"step": 3})


class Payload:
    """Would make a file when unpickled without care."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_nothing_in_a_checkpoint_is_executed(tmp_path):
    torch.save({"ema": state(1), "args": Payload(str(tmp_path / "made"))}, tmp_path / "bad.pt")
    load_weights(model(), tmp_path / "bad.pt")
    assert not (tmp_path / "made").exists()


def test_objects_of_foreign_classes_are_empty_placeholders(tmp_path):
    torch.save({"ema": state(1), "args": TrainingOptions(0.5)}, tmp_path / "args.pt")
    assert not hasattr(read_checkpoint(tmp_path / "args.pt")["args"], "learning_rate")


def diffusers_latte() -> LatteTransformer3DModel:
    theirs = LatteTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=32,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        attention_bias=True,
        sample_size=8,
        patch_size=2,
        activation_fn="gelu-approximate",
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        caption_channels=16,
        video_length=4,
    )
    fill(theirs.named_parameters(), 3)
    return theirs.eval()


def test_diffusers_blocks_are_loaded_and_what_has_no_place_is_named():
    theirs, ours = diffusers_latte(), model(num_classes=None)
    with pytest.raises(CheckpointError) as error:
        load_weights(ours, theirs.state_dict())
    assert "missing: final_layer.adaLN_modulation.1.weight, final_layer.adaLN_modulation.1.bias" in str(error.value)
    assert "unexpected: scale_shift_table, caption_projection.linear_1.weight" in str(error.value)
    assert "strict=False loads the rest" in str(error.value)
    report = load_weights(ours, theirs.state_dict(), strict=False)
    assert report.naming == "diffusers"
    assert report.missing == ("final_layer.adaLN_modulation.1.weight", "final_layer.adaLN_modulation.1.bias")

    ends: dict[str, Tensor] = {}
    theirs.norm_out.register_forward_hook(lambda _module, args, _output: ends.update(theirs=args[0]))
    ours.final_layer.register_forward_hook(
        lambda _module, args, _output: ends.update(ours=ops.gate_residual(args[0], *args[2]))
    )
    x, t = torch.randn(2, 4, 4, 8, 8), torch.tensor([3, 700])
    with torch.no_grad():
        ours(x, t)
        theirs(x.transpose(1, 2), t, encoder_hidden_states=torch.randn(2, 3, 16))
    torch.testing.assert_close(ends["ours"].flatten(0, 1), ends["theirs"], rtol=1e-5, atol=1e-5)
