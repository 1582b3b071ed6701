"""Patching and taking it back: what is found, what is refused, and that nothing else of a model changes."""

import copy
import functools
import logging
import pickle
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKLWan

import vidkern
from tests.integrations.vae_cases import WAN21, fill, patched, relative, wan
from vidkern.integrations import apply_vidkern_to_wan_vae, patching


def latents():
    return torch.randn(1, 4, 2, 4, 6, generator=torch.Generator("cpu").manual_seed(1), device="cpu")


@torch.no_grad()
def decoded(model):
    return model.decode(latents()).sample


def instance_attributes(model):
    return {path: dict(module.__dict__) for path, module in model.named_modules()}


def test_the_report_says_what_was_changed_and_is_logged(caplog):
    with caplog.at_level(logging.INFO, "vidkern"):
        report = vidkern.patch(wan())
    assert report
    assert report.changed[0][:2] == ("", "AutoencoderKLWan")
    blocks = [change for change in report.changed if change.what.startswith("WanResidualBlock")]
    assert [change.modules for change in blocks] == [16]
    assert str(report).startswith("patched AutoencoderKLWan:\n  ")
    assert caplog.messages == [str(report)]


def test_a_pipeline_is_searched_and_named():
    class Another(AutoencoderKLWan):
        pass

    pipeline = SimpleNamespace(
        components={"vae": wan(), "other": Another(**WAN21), "text": torch.nn.Linear(2, 2), "none": None}
    )
    report = vidkern.patch(pipeline)
    assert {change.path for change in report.changed} == {"vae"}
    assert [refusal.path for refusal in report.refused] == ["other"]
    assert "patched vae (AutoencoderKLWan):" in str(report)
    assert "not patched other (Another): the model must be a" in str(report)
    vidkern.unpatch(pipeline)
    assert instance_attributes(pipeline.components["vae"]).keys() == instance_attributes(wan()).keys()
    assert "_decode" not in pipeline.components["vae"].__dict__


def test_a_model_inside_another_is_found():
    inside = torch.nn.ModuleDict({"wrapped": wan()})
    report = vidkern.patch(inside)
    assert {change.path for change in report.changed} == {"wrapped"}


def test_what_is_not_known_stays_as_it_is():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    report = vidkern.patch(model)
    assert not report
    assert str(report) == "nothing to patch"
    assert "forward" not in model.__dict__


def test_something_else_than_a_model_is_refused():
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module or a pipeline with components, got int"):
        vidkern.patch(3)


def test_an_unknown_switch_is_refused():
    with pytest.raises(TypeError, match=r"'nrom' is not a switch of any model that vidkern knows: .*norm"):
        vidkern.patch(wan(), nrom=False)


def test_parameters_and_state_dict_stay():
    model = wan()
    parameters, keys = list(map(id, model.parameters())), list(model.state_dict())
    values = {name: value.clone() for name, value in model.state_dict().items()}
    vidkern.patch(model)
    assert list(map(id, model.parameters())) == parameters
    decoded(model)
    assert list(model.state_dict()) == keys
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
    assert type(model) is AutoencoderKLWan


def test_unpatch_restores_exactly():
    model = wan()
    theirs = decoded(model)
    before = instance_attributes(model)
    methods = {path: module.forward.__func__ for path, module in model.named_modules()}
    vidkern.patch(model)
    assert not torch.equal(decoded(model), theirs)  # another order of summation: it is patched
    vidkern.unpatch(model)
    after = instance_attributes(model)
    assert {path: held.keys() for path, held in after.items()} == {path: held.keys() for path, held in before.items()}
    assert {path: module.forward.__func__ for path, module in model.named_modules()} == methods
    assert torch.equal(decoded(model), theirs)


def test_unpatching_twice_or_what_was_never_patched_is_harmless():
    model = wan()
    theirs = decoded(model)
    vidkern.unpatch(model)
    assert torch.equal(decoded(model), theirs)


def test_patching_twice_is_harmless():
    model = wan()
    first = vidkern.patch(model)
    ours = decoded(model)
    assert vidkern.patch(model) == first
    assert torch.equal(decoded(model), ours)
    vidkern.unpatch(model)
    assert "_decode" not in model.__dict__


def test_the_last_switches_count():
    model = wan()
    vidkern.patch(model)
    vidkern.patch(model, assembly=False, norm=False)
    assert "_decode" not in model.__dict__
    assert "forward" not in model.decoder.mid_block.resnets[0].__dict__
    assert "forward" in model.decoder.conv_in.__dict__


def test_a_deep_copy_is_patched_and_apart():
    model = patched(wan())
    other = copy.deepcopy(model)
    assert other.decoder.forward.__self__ is other.decoder
    with torch.no_grad():
        other.decoder.conv_out.bias.add_(1)
    assert relative(decoded(model), decoded(other)) > 1e-2
    vidkern.unpatch(other)
    assert "forward" in model.decoder.__dict__


def test_a_pickle_holds_an_unpatched_model():
    model = wan()
    theirs = decoded(model)
    vidkern.patch(model)
    decoded(model)
    loaded = pickle.loads(pickle.dumps(model))
    assert torch.equal(decoded(loaded), theirs)
    assert vidkern.patch(loaded)
    assert torch.equal(decoded(loaded), decoded(model))
    vidkern.unpatch(loaded)
    assert torch.equal(decoded(loaded), theirs)


def test_save_pretrained_writes_what_it_always_wrote(tmp_path):
    model = wan()
    theirs = decoded(model)
    vidkern.patch(model)
    decoded(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(decoded(AutoencoderKLWan.from_pretrained(tmp_path)), theirs)


def test_another_dtype_after_patching():
    theirs, ours = wan(), patched(wan())
    for model in (theirs, ours):
        model.to(torch.float64)
    x = torch.randn(1, 3, 5, 16, 24, dtype=torch.float64)
    with torch.no_grad():  # decoding goes through float32 in diffusers' upsampling
        parameters = [model.encode(x).latent_dist.parameters for model in (ours, theirs)]
    assert relative(*parameters) < 1e-12


@torch.no_grad()
def test_weights_that_change_after_patching_are_seen():
    theirs, ours = wan(), patched(wan())
    decoded(ours)  # prepares weights
    for model in (theirs, ours):
        for parameter in model.decoder.parameters():
            parameter.mul_(1.1)
    assert relative(decoded(ours), decoded(theirs)) < 1e-4
    other = fill(wan(), seed=1)
    for model in (theirs, ours):
        model.load_state_dict(other.state_dict(), assign=True)
    assert relative(decoded(ours), decoded(theirs)) < 1e-4


def test_an_offload_hook_goes_on_calling_what_it_wraps():
    """The attributes are those that accelerate's add_hook_to_module sets."""
    model = wan()
    theirs, calls = decoded(model), []

    def hooked(module, *args, **kwargs):
        calls.append(module)
        return module._old_forward(*args, **kwargs)

    decoder = model.decoder
    decoder._old_forward = decoder.forward
    decoder.forward = functools.partial(hooked, decoder)
    vidkern.patch(model)
    assert relative(decoded(model), theirs) < 1e-4
    assert calls == [decoder] * 2
    assert patching._is_ours(decoder._old_forward)
    vidkern.unpatch(model)
    assert torch.equal(decoded(model), theirs)
    assert len(calls) == 4


def test_a_subclass_is_refused_and_left_alone():
    class Another(AutoencoderKLWan):
        pass

    model = Another(**WAN21)
    with pytest.raises(
        ValueError, match=r"must be a diffusers\S*AutoencoderKLWan itself, got a subclass of it: \S*Another"
    ):
        apply_vidkern_to_wan_vae(model)
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_another_class_is_refused():
    with pytest.raises(ValueError, match=r"got another class: torch\.nn\.modules\.linear\.Linear"):
        apply_vidkern_to_wan_vae(torch.nn.Linear(2, 2))


def test_another_version_of_the_code_is_refused(monkeypatch):
    def forward(self, x):
        return x

    model = wan()
    monkeypatch.setattr(type(model.decoder.mid_block.resnets[0]), "forward", forward)
    report = vidkern.patch(model)
    assert not report
    (refusal,) = report.refused
    assert refusal.reason.startswith("WanResidualBlock.forward of diffusers 0.")
    assert "is not the code that vidkern knows" in refusal.reason
    assert not any("forward" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("change", ["replaced", "hooked", "wrapped"])
def test_a_change_by_somebody_else_is_refused(change):
    model = wan()
    block = model.decoder.mid_block.resnets[0]
    if change == "replaced":
        block.forward = lambda x: x
        reason = "forward of a WanResidualBlock is already replaced"
    elif change == "hooked":
        block.conv1.register_forward_hook(lambda *_: None)
        reason = "decoder.mid_block.resnets.0.conv1 has a forward hook"
    else:
        block.conv1 = torch.nn.Sequential(block.conv1)
        reason = r"decoder.mid_block.resnets.0.conv1 must be a \S*WanCausalConv3d itself, got another class"
    with pytest.raises(ValueError, match=reason):
        apply_vidkern_to_wan_vae(model)
    assert "forward" not in model.decoder.__dict__


def test_third_parties_are_imported_lazily():
    code = "import sys, vidkern; sys.exit('diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
