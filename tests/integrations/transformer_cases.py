"""What the tests of patched transformers share: random weights, and gradients beside the unpatched model's."""

import copy

import torch

import vidkern

#: Largest error of a float32 output, over the largest output, and of a gradient, over the largest gradient.
TOLERANCE = 5e-6

ATTENTIONS = ("spatial_attention", "temporal_attention")


def fill(model, seed=0):
    """Give every parameter a random value that keeps activations near one; norms' weights are around one."""
    generator = torch.Generator("cpu").manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        values = torch.randn(parameter.shape, generator=generator, device="cpu")
        if "norm" in name and parameter.dim() == 1 and name.endswith("weight") and "linear" not in name:
            values = 1 + 0.3 * values
        else:
            values = values / (parameter[0].numel() if parameter.dim() > 1 else 10) ** 0.5
        with torch.no_grad():
            parameter.copy_(values)
    return model.eval()


def normal(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed), device="cpu")


def patched(model, **switches):
    """Return a patched copy."""
    model = copy.deepcopy(model)
    assert vidkern.patch(model, **switches), "nothing was patched"
    return model


def relative(ours, theirs):
    """Return max |ours - theirs| / max |theirs|."""
    return float((ours.double() - theirs.double()).abs().max() / theirs.abs().max())


def rms(values):
    return float(values.double().square().mean().sqrt())


def assert_closer(ours, theirs, exact):
    """Hold the root mean square error of ours to theirs, with a tenth more."""
    assert ours.dtype == theirs.dtype
    assert 0 < rms(ours - exact) < 1.1 * rms(theirs - exact)


def output_and_gradients(model, call):
    """Return call(model), and the gradients of a random weighting of it by parameter."""
    model.zero_grad(set_to_none=True)
    output = call(model)
    (output * normal(*output.shape, seed=2).to(output.dtype)).sum().backward()
    return output.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_equal_training(theirs, ours, call, tolerance=TOLERANCE):
    """Hold the output and every parameter's gradient of ours to theirs."""
    wanted, wanted_gradients = output_and_gradients(theirs, call)
    got, gradients = output_and_gradients(ours, call)
    assert wanted.abs().max() > 0
    assert got.shape == wanted.shape
    assert got.stride() == wanted.stride()
    assert got.dtype == wanted.dtype
    assert relative(got, wanted) < tolerance
    assert gradients.keys() == wanted_gradients.keys()
    largest = max(gradient.abs().max() for gradient in wanted_gradients.values())
    for name, gradient in wanted_gradients.items():
        assert (gradients[name] - gradient).abs().max() < tolerance * largest, name


def assert_compiles(model, call):
    """Compile a patched model into one graph forward and one backward, without the minute that inductor's C++ takes."""
    torch._dynamo.reset()
    compiled = copy.deepcopy(model)
    compiled.compile(backend="aot_eager", fullgraph=True)
    assert_equal_training(model, compiled, call)


def assert_exactly_unpatched(model, call):
    """Patch, unpatch, and hold the instance's attributes, the state_dict's keys and every bit of the output."""
    keys, before = list(model.state_dict()), {path: list(part.__dict__) for path, part in model.named_modules()}
    with torch.no_grad():
        theirs = call(model)
        vidkern.patch(model)
        assert list(model.state_dict()) == keys
        report, ours = vidkern.patch(model), call(model)
        assert report
        assert not torch.equal(ours, theirs)  # another order of summation: it is patched
        vidkern.unpatch(model)
        assert torch.equal(call(model), theirs)
    assert {path: list(part.__dict__) for path, part in model.named_modules()} == before


def assert_as_accurate(model, call, reduced=torch.bfloat16, keep_float32=()):
    """Hold a patched 16-bit model to the unpatched one's distance from float32."""
    with torch.no_grad():
        exact = call(model)
        low = copy.deepcopy(model).to(reduced)
        for name, parameter in low.named_parameters():
            if any(part in name for part in keep_float32):
                parameter.data = model.get_parameter(name).data.clone()
        assert_closer(call(patched(low)), call(low), exact)


def assert_autocast_as_accurate(model, call):
    """Hold a patched model under bfloat16 autocast to the unpatched one's distance from float32."""
    ours = patched(model)
    with torch.no_grad():
        exact = call(model)
        with torch.autocast("cpu", torch.bfloat16):
            assert_closer(call(ours), call(model), exact)


def assert_checkpointing_equal(model, call):
    """Compare a training step of a patched and an unpatched model, both with activation checkpointing."""
    ours = patched(model)
    for m in (model, ours):
        m.train()
        m.enable_gradient_checkpointing()
    assert_equal_training(model, ours, call)


def watched_operators(monkeypatch):
    """Return a set that fills with the names of the modulation and attention operators that are called."""
    called = set()
    for name in ("layer_norm_modulate", "gate_residual", "gate_residual_modulate", *ATTENTIONS):
        operator = getattr(vidkern.ops, name)

        def noted(*args, name=name, operator=operator, **kwargs):
            called.add(name)
            return operator(*args, **kwargs)

        monkeypatch.setattr(vidkern.ops, name, noted)
    return called


def saved_bytes(model, call):
    """Return the bytes of distinct memory, parameters left out, that autograd keeps for the backward pass of a call."""
    storages = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = call(model)
    assert output.requires_grad
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    return sum(count for pointer, count in storages.items() if pointer not in parameters)
