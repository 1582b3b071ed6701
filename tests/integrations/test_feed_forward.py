"""The feed-forward of patched transformers: what it keeps for the backward pass, and what leaves it as it was."""

import copy

import pytest
import torch
from torch import nn

import vidkern
from tests.integrations import test_cogvideox, test_latte, test_official_latte, test_wan
from tests.integrations.public_latte import Latte, LatteVIDEO
from tests.integrations.transformer_cases import (
    assert_equal_training,
    normal,
    output_and_gradients,
    patched,
    relative,
    saved_bytes,
)

WHAT = "feed-forward: GELU computed again for the backward pass, not kept"
#: A small model, a call of it, its blocks' layers and the elements of GELU's output in all of them.
MODELS = {
    "Latte": (test_latte.latte, test_latte.call, "ff", 4 * 2 * 5 * 16 * 256),
    "Wan": (test_wan.wan, test_wan.call, "ffn", 2 * 2 * 24 * 48),
    "SkyReels": (test_wan.skyreels, lambda m: test_wan.call(m, test_wan.CLIP), "ffn", 2 * 2 * 24 * 48),
    "CogVideoX": (test_cogvideox.cogvideox, test_cogvideox.call, "ff", 2 * 2 * (48 + 6) * 128),
    "public Latte": (lambda: test_official_latte.network(Latte), test_official_latte.call, "mlp", 4 * 2 * 4 * 16 * 256),
    "FVDM": (lambda: test_official_latte.network(LatteVIDEO), test_official_latte.call, "mlp", 4 * 2 * 4 * 16 * 256),
}
every_model = pytest.mark.parametrize(("make", "call", "name", "elements"), MODELS.values(), ids=MODELS)


def layers_of(model, name):
    return [layer for path, layer in model.named_modules() if "blocks" in path and path.endswith(f".{name}")]


def linears_of(layer):
    return [part for part in layer.modules() if isinstance(part, nn.Linear)]


def calls_of_gelu_mlp(monkeypatch):
    """Return a list that fills with the inputs of every call of the operator."""
    calls, operator = [], vidkern.ops.gelu_mlp

    def noted(*args):
        calls.append(args)
        return operator(*args)

    monkeypatch.setattr(vidkern.ops, "gelu_mlp", noted)
    return calls


@every_model
def test_the_backward_pass_keeps_one_activation_less(make, call, name, elements):
    model = make()
    ours, without = patched(model), patched(model, mlp=False)
    assert_equal_training(model, without, call)
    saved = saved_bytes(without, call) - saved_bytes(ours, call)
    assert saved == 4 * elements


@every_model
def test_every_layer_goes_through_the_operator(make, call, name, elements, monkeypatch):
    calls = calls_of_gelu_mlp(monkeypatch)
    model = make()
    report = vidkern.patch(model)
    layers = layers_of(model, name)
    assert f"{len(layers)} x {WHAT}" in str(report)
    call(model)
    assert {id(args[1]) for args in calls} == {id(linears_of(layer)[0].weight) for layer in layers}
    calls.clear()
    assert WHAT not in str(vidkern.patch(model, mlp=False))
    call(model)
    assert not calls


class Adapter(nn.Module):
    """A projection with a trained correction of low rank, as LoRA's."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        generator = torch.Generator().manual_seed(9)
        self.down = nn.Parameter(torch.randn(2, base.in_features, generator=generator) / 8)
        self.up = nn.Parameter(torch.randn(base.out_features, 2, generator=generator) / 8)

    def forward(self, x):
        return self.base(x) + x @ self.down.T @ self.up.T


def adapted(layer):
    for part in list(layer.modules()):
        for name, child in list(part.named_children()):
            if type(child) is nn.Linear:
                setattr(part, name, Adapter(child))


def hooked(layer):
    linears_of(layer)[1].register_forward_hook(lambda _, inputs, output: 2 * output)


def hooked_backwards(layer):
    linears_of(layer)[0].register_full_backward_hook(lambda _, inputs, outputs: (3 * inputs[0],))


def wrapped(layer):
    linear = linears_of(layer)[0]
    linear.forward = lambda x: nn.Linear.forward(linear, 2 * x)


def parametrized(layer):
    nn.utils.parametrizations.weight_norm(linears_of(layer)[0])
    linears_of(layer)[0].parametrizations.weight.original0.data *= 2


CHANGES = [adapted, hooked, hooked_backwards, wrapped, parametrized]


@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("model", ["CogVideoX", "FVDM"])
def test_what_changes_a_layer_is_honoured_before_and_after_patching(model, change, late):
    make, call, name, _ = MODELS[model]
    theirs, ours, before = make(), make(), make()
    report = vidkern.patch(ours) if late else None
    for each in (theirs, ours):
        change(layers_of(each, name)[1])
    report = report or vidkern.patch(ours)
    assert_equal_training(theirs, ours, call)
    (changed, gradients), (plain, others) = output_and_gradients(ours, call), output_and_gradients(before, call)
    moved = max(relative(gradients[key], others[key]) for key in gradients.keys() & others.keys())
    assert max(relative(changed, plain), moved) > 1e-3
    assert ("; its own feed-forward (" in str(report)) == (not late)


@pytest.mark.parametrize("model", ["CogVideoX", "FVDM"])
def test_dropout_drops_in_training_only(model, monkeypatch):
    make, call, name, _ = MODELS[model]
    theirs = make()
    for layer in layers_of(theirs, name):
        for part in layer.modules():
            if isinstance(part, nn.Dropout):
                part.p = 0.5
    ours, calls = patched(theirs), calls_of_gelu_mlp(monkeypatch)
    assert_equal_training(theirs, ours, call)
    assert calls
    calls.clear()
    for wanted, layer in zip(layers_of(theirs, name), layers_of(ours, name), strict=True):
        x = normal(3, 4, linears_of(layer)[0].in_features)
        kept = layer(x).detach()
        drawn = []
        for each in (wanted, layer):
            torch.manual_seed(3)
            drawn.append(each.train()(x).detach())
        assert torch.equal(*drawn)
        assert relative(drawn[1], kept) > 0.1
    assert len(calls) == len(layers_of(ours, name))


@pytest.mark.parametrize(
    ("make", "call", "reason"),
    [
        (lambda: test_cogvideox.cogvideox(activation_fn="gelu"), test_cogvideox.call, "its activation is GELU"),
        (lambda: test_latte.latte(activation_fn="geglu"), test_latte.call, "its activation is GEGLU"),
        (
            lambda: test_latte.latte(activation_fn="geglu-approximate"),
            test_latte.call,
            "its activation is ApproximateGELU",
        ),
    ],
)
def test_another_activation_is_left_as_it_is(make, call, reason, monkeypatch):
    calls = calls_of_gelu_mlp(monkeypatch)
    model = make()
    ours = copy.deepcopy(model)
    assert f"; its own feed-forward ({reason}" in str(vidkern.patch(ours))
    assert not any("forward" in layer.__dict__ for layer in layers_of(ours, "ff"))
    assert_equal_training(model, ours, call)
    assert not calls


def exact_gelu(layer):
    layer.act = nn.GELU()


def normed(layer):
    layer.norm = nn.LayerNorm(layer.fc2.in_features)


def without_bias(layer):
    layer.fc1.bias = None


class Packed(torch.Tensor):
    """A weight of another kind, as quantisation and sharding make it."""


def packed(layer):
    layer.fc2.weight = nn.Parameter(layer.fc2.weight.detach().as_subclass(Packed))


def of_another_structure(layer):
    layer.extra = nn.Identity()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (exact_gelu, "its activation is GELU(approximate='none')"),
        (normed, "LayerNorm in the place of a Dropout"),
        (without_bias, "Linear in the place of a Linear with bias"),
        (packed, "a Linear's weight is a Packed"),
        (of_another_structure, "it is not made as timm's Mlp"),
    ],
)
def test_an_mlp_that_computes_something_else_is_left_as_it_is(change, reason):
    model, ours = test_official_latte.network(Latte), test_official_latte.network(Latte)
    for each in (model, ours):
        change(layers_of(each, "mlp")[2])
    report = str(vidkern.patch(ours))
    assert f"; its own feed-forward ({reason})" in report
    assert f"3 x {WHAT}" in report
    assert_equal_training(model, ours, test_official_latte.call)


class OlderMlp(nn.Module):
    """timm's before version 0.6: one dropout, called twice."""

    def __init__(self, size):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(size, 4 * size), nn.GELU(approximate="tanh"), nn.Linear(4 * size, size)
        self.drop = nn.Dropout(0.0)

    def forward(self, x):
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


def test_an_older_timm_s_mlp_is_known(monkeypatch):
    model = test_official_latte.network(Latte)
    for block in model.blocks:
        mlp = OlderMlp(test_official_latte.WIDTH)
        mlp.load_state_dict(block.mlp.state_dict())
        block.mlp = mlp
    ours, calls = patched(model), calls_of_gelu_mlp(monkeypatch)
    assert_equal_training(model, ours, test_official_latte.call)
    assert len(calls) == len(model.blocks)


@every_model
def test_a_layer_called_alone_is_the_layer_to_float64_rounding(make, call, name, elements):
    """Also in chunks along either axis, as ``_chunk_size`` calls it."""
    model = make().double()
    ours = patched(model)
    x = torch.randn(3, 4, linears_of(layers_of(model, name)[0])[0].in_features, dtype=torch.float64)
    for wanted, layer in zip(layers_of(model, name), layers_of(ours, name), strict=True):
        theirs = wanted(x).detach()
        assert relative(layer(x).detach(), theirs) < 1e-12
        assert relative(torch.cat([layer(part) for part in x.chunk(2, dim=1)], dim=1).detach(), theirs) < 1e-12


def test_a_deep_copy_is_patched_and_unpatched_alone(monkeypatch):
    make, call, name, _ = MODELS["Latte"]
    model = patched(make())
    ours, calls = copy.deepcopy(model), calls_of_gelu_mlp(monkeypatch)
    assert list(ours.state_dict()) == list(make().state_dict())
    call(ours)
    own = {id(parameter) for parameter in ours.parameters()}
    assert len(calls) == 4
    assert all(id(weight) in own for _, weight, *_ in calls)
    vidkern.unpatch(ours)
    assert not any("forward" in layer.__dict__ for layer in layers_of(ours, name))
    assert all("forward" in layer.__dict__ for layer in layers_of(model, name))
