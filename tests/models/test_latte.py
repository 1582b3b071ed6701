"""Latte as users call it: sizes, variants, conditions, other lengths, joint training, precision, compilation."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from models.conditions import draw_dropped
from models.latte import Latte, LatteConfig, latte
from tests.models.plain_latte import plain_latte
from tests.models.public_cases import fill

BATCH, FRAMES, CHANNELS, SIZE, CLASSES = 2, 4, 4, 8, 5
SMALL = {"input_size": SIZE, "hidden_size": 64, "depth": 4, "num_heads": 2, "num_frames": FRAMES}


def small(seed: int = 0, **options: Any) -> Latte:
    model = Latte(LatteConfig(**{**SMALL, **options}))
    fill(model.named_parameters(), seed)
    return model.eval()


def clip(frames: int = FRAMES, batch: int = BATCH, size: int = SIZE, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    return torch.randn(batch, frames, CHANNELS, size, size)


def upstream(output: Tensor) -> Tensor:
    torch.manual_seed(9)
    return torch.randn(output.shape)


def gradients(model: Latte, output: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    (output.float() * upstream(output)).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def relative(ours: Tensor, wanted: Tensor) -> float:
    ours, wanted = ours.detach().double(), wanted.detach().double()
    return float((ours - wanted).norm() / wanted.norm())


@pytest.mark.parametrize(("size", "millions"), [("S", 32.6), ("B", 129.8), ("L", 457.2), ("XL", 674.1)])
def test_published_sizes_have_the_published_number_of_parameters(size, millions):
    with torch.device("meta"):
        model = latte(f"Latte-{size}/2", num_classes=101)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(millions * 1e6, abs=0.05e6)


def test_state_dict_has_the_public_names_and_shapes():
    with torch.device("meta"):
        shapes = {name: tuple(v.shape) for name, v in latte("Latte-XL/2", num_classes=101).state_dict().items()}
    wanted = {
        "pos_embed": (1, 256, 1152),
        "temp_embed": (1, 16, 1152),
        "x_embedder.proj.weight": (1152, 4, 2, 2),
        "x_embedder.proj.bias": (1152,),
        "t_embedder.mlp.0.weight": (1152, 256),
        "t_embedder.mlp.2.weight": (1152, 1152),
        "y_embedder.embedding_table.weight": (102, 1152),
        "blocks.27.attn.qkv.weight": (3456, 1152),
        "blocks.27.attn.qkv.bias": (3456,),
        "blocks.27.attn.proj.weight": (1152, 1152),
        "blocks.27.mlp.fc1.weight": (4608, 1152),
        "blocks.27.mlp.fc2.weight": (1152, 4608),
        "blocks.27.adaLN_modulation.1.weight": (6912, 1152),
        "final_layer.linear.weight": (32, 1152),
        "final_layer.adaLN_modulation.1.weight": (2304, 1152),
    }
    assert {name: shapes[name] for name in wanted} == wanted
    assert len(shapes) == 28 * 10 + 2 + 2 + 4 + 1 + 4
    assert not any("norm" in name for name in shapes)


def test_a_fresh_model_predicts_exactly_zero_and_can_learn():
    model = Latte(LatteConfig(**SMALL, num_classes=CLASSES))
    output = model(clip(), torch.tensor([3, 700]), torch.tensor([0, 4]))
    assert output.shape == (BATCH, FRAMES, 2 * CHANNELS, SIZE, SIZE)
    assert torch.count_nonzero(output) == 0
    assert gradients(model, output)["final_layer.linear.weight"].norm() > 0


@pytest.mark.parametrize("temporal_position", ["absolute", "rope"])
@pytest.mark.parametrize("patch_embedding", ["uniform", "tubelet"])
@pytest.mark.parametrize("variant", [1, 2, 3, 4])
def test_every_variant_is_its_plain_writing(variant, patch_embedding, temporal_position):
    options = {"variant": variant, "patch_embedding": patch_embedding, "temporal_position": temporal_position}
    model = small(num_classes=CLASSES, **options)
    x, t, y = clip(), torch.tensor([[3, 700, 0, 41], [999, 20, 500, 8]]), torch.tensor([1, CLASSES])
    weights = {name: value.double().requires_grad_() for name, value in model.state_dict().items()}
    plain = plain_latte(weights, model.config, x.double(), t, y)
    ours = model(x, t, y)
    assert relative(ours, plain) < 1e-6
    (plain * upstream(plain)).sum().backward()
    for name, gradient in gradients(model, ours).items():
        assert relative(gradient, weights[name].grad) < 1e-5, name


def test_variants_1_and_2_differ_with_the_same_weights():
    x, t = clip(), torch.tensor([3, 700])
    assert relative(small(variant=2)(x, t), small(variant=1)(x, t)) > 0.01


def test_one_timestep_for_the_clip_equals_the_same_for_every_frame():
    model, x, t = small(), clip(), torch.tensor([3, 700])
    assert relative(model(x, t[:, None].expand(-1, FRAMES)), model(x, t)) < 1e-6


@pytest.mark.parametrize("frames", [2, 7])
def test_other_frame_counts_are_those_of_a_model_built_for_them(frames):
    x, t = clip(frames), torch.tensor([3, 700])
    assert torch.equal(small()(x, t), small(num_frames=frames)(x, t))


def test_other_frame_sizes_are_those_of_a_model_built_for_them():
    x, t = clip()[..., :6], torch.tensor([3, 700])
    assert torch.equal(small()(x, t), small(input_size=(SIZE, 6))(x, t))


@pytest.mark.parametrize("variant", [1, 3])
def test_in_joint_training_images_meet_neither_the_clip_nor_each_other(variant):
    model = small(variant=variant, num_classes=CLASSES)
    x, t, y = clip(FRAMES + 2), torch.tensor([3, 700]), torch.tensor([1, 2])
    labels = torch.tensor([[0, 3], [4, 1]])
    joint = model(x, t, y, num_images=2, image_labels=labels)
    assert relative(joint[:, :FRAMES], model(x[:, :FRAMES], t, y)) < 1e-6
    changed = x.clone()
    changed[:, 0] += 1
    changed[:, -1] -= 1
    again = model(changed, t, y, num_images=2, image_labels=labels)
    assert relative(again[:, FRAMES], joint[:, FRAMES]) < 1e-6
    assert relative(again[:, FRAMES + 1], joint[:, FRAMES + 1]) > 0.01
    alone = model(x, t, y, num_images=2, image_labels=labels.flip(1))
    assert relative(alone[:, FRAMES], joint[:, FRAMES]) > 0.001


def test_joint_training_takes_a_timestep_for_each_frame_and_image():
    model, x = small(), clip(FRAMES + 2)
    t = torch.randint(0, 1000, (BATCH, FRAMES + 2))
    joint = model(x, t, num_images=2)
    shared = model(x, t[:, -1], num_images=2)
    assert relative(joint[:, :FRAMES], model(x[:, :FRAMES], t[:, :FRAMES])) < 1e-6
    assert relative(joint[:, -1], shared[:, -1]) < 1e-6
    assert relative(joint[:, -2], shared[:, -2]) > 0.001


def test_guidance_moves_epsilon_only():
    model = small(num_classes=CLASSES)
    x, t, y = clip(), torch.tensor([3, 3]), torch.tensor([2, CLASSES])
    plain = model(torch.cat([x[:1], x[:1]]), t, y)
    guided = model.forward_with_cfg(x, t, y, cfg_scale=4.0)
    cond, uncond = plain[:, :, :CHANNELS].chunk(2)
    wanted = torch.cat([uncond + 4.0 * (cond - uncond)] * 2)
    assert relative(guided[:, :, :CHANNELS], wanted) < 1e-6
    assert torch.equal(guided[:, :, CHANNELS:], plain[:, :, CHANNELS:])


def test_dropped_labels_are_the_null_class_and_those_of_the_images_with_them():
    model = small(num_classes=CLASSES, class_dropout=0.9).train()
    x, t, y = clip(FRAMES + 1), torch.tensor([3, 700]), torch.tensor([1, 2])
    labels, null = torch.tensor([[0], [3]]), torch.tensor([[0], [CLASSES]])
    options = {"num_images": 1, "dropped": {}}
    dropped = model(x, t, y, image_labels=labels, num_images=1, dropped={"y": torch.tensor([False, True])})
    assert torch.equal(dropped, model(x, t, torch.tensor([1, CLASSES]), image_labels=null, **options))
    assert relative(dropped[1:], model(x, t, y, image_labels=labels, **options)[1:]) > 0.001


def test_dropped_text_is_the_projection_of_zeros_which_is_its_bias():
    model = small(text_size=6, text_dropout=0.9).train()
    x, t, text = clip(), torch.tensor([3, 700]), torch.randn(BATCH, 2, 3)
    assert model.text_embedding_projection[1].bias.norm() > 0.01
    dropped = model(x, t, text=text, dropped={"text": torch.tensor([True, False])})
    with_text = model(x, t, text=text, dropped={})
    assert torch.equal(dropped[1], with_text[1])
    assert torch.equal(dropped[0], model(x, t, text=torch.zeros_like(text), dropped={})[0])
    assert relative(dropped[0], with_text[0]) > 0.001


def test_a_training_network_draws_its_drops_where_it_is_told_none():
    model = small(num_classes=CLASSES, class_dropout=0.5).train()
    x, t, y = clip(batch=4), torch.full((4,), 700), torch.full((4,), 2)
    torch.manual_seed(0)
    drawn = model(x, t, y)
    torch.manual_seed(0)
    drops = torch.rand(4) < 0.5
    assert drops.any()
    assert not drops.all()
    assert torch.equal(drawn, model(x, t, y, dropped={"y": drops}))
    assert torch.equal(model.eval()(x, t, y), model(x, t, y, dropped={}))


def test_drops_are_drawn_with_their_probability_and_not_where_it_is_0():
    torch.manual_seed(0)
    drops = draw_dropped({"y": 0.25, "text": 0.0}, 4000)
    assert list(drops) == ["y"]
    # 5 standard deviations of a binomial
    assert abs(drops["y"].double().mean() - 0.25) < 5 * (0.25 * 0.75 / 4000) ** 0.5


@pytest.mark.parametrize("recompute", ["all", "cheap"])
def test_checkpointing_gives_the_same_bits(recompute):
    model, x, t = small(), clip(), torch.tensor([3, 700])
    plain = gradients(model, model(x, t))
    model.activation_checkpointing, model.recompute = True, recompute
    checkpointed = gradients(model, model(x, t))
    assert all(torch.equal(checkpointed[name], plain[name]) for name in plain)


class Called(TorchDispatchMode):
    """Counts the operators that run."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


def called_backward(model):
    """What the backward pass of a model runs."""
    loss = model(clip(), torch.tensor([3, 700])).square().sum()
    with Called() as called:
        loss.backward()
    return called.counts


def test_what_is_cheap_is_computed_again_and_no_product_or_attention():
    model = small()
    plain = called_backward(model)
    model.activation_checkpointing = True
    whole = called_backward(model)
    model.recompute = "cheap"
    cheap = called_backward(model)
    dear = ("aten::addmm", "aten::mm", "vidkern::temporal_attention_packed", "vidkern::attention_packed")
    assert all(cheap[name] == plain[name] for name in dear)
    assert all(whole[name] > plain[name] for name in dear if name != "aten::mm")
    again = ("vidkern::gate_residual_modulate", "vidkern::gelu_tanh")
    assert all(cheap[name] == whole[name] > plain[name] for name in again)


def test_bfloat16_autocast_is_close_to_float32():
    model, x, t = small(num_classes=CLASSES), clip(), torch.tensor([[3, 700, 0, 41], [999, 20, 500, 8]])
    y = torch.tensor([1, 3])
    exact = model(x, t, y)
    wanted = gradients(model, exact)
    with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
        ours = model(x, t, y)
    assert ours.dtype == torch.bfloat16
    assert relative(ours, exact) < 0.02
    ours_gradients = gradients(model, ours)
    assert all(ours_gradients[name].dtype == torch.float32 for name in wanted)
    assert max(relative(ours_gradients[name], wanted[name]) for name in wanted) < 0.05


def test_a_bfloat16_model_is_close_to_float32():
    model, x, t = small(temporal_position="rope"), clip(), torch.tensor([3, 700])
    exact = model(x, t)
    ours = model.to(torch.bfloat16)(x.bfloat16(), t)
    assert ours.dtype == torch.bfloat16
    assert relative(ours, exact) < 0.03


@pytest.mark.parametrize("temporal_position", ["absolute", "rope"])
def test_a_float64_model_is_close_to_float32(temporal_position):
    model = small(temporal_position=temporal_position)
    x, t = clip(), torch.tensor([3, 900])
    wanted = model(x, t)
    got = model.double()(x.double(), t)
    assert got.dtype == torch.float64
    assert relative(wanted, got) < 1e-5


@pytest.mark.parametrize(("per_frame", "recompute"), [(False, "all"), (False, "cheap"), (True, None)])
def test_compiles_into_one_graph_for_every_batch_and_length(per_frame, recompute):
    torch._dynamo.reset()
    model = small(num_classes=CLASSES, depth=2, class_dropout=0.5).train()
    if recompute is not None:
        model.activation_checkpointing, model.recompute = True, recompute
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for i, (batch, frames) in enumerate([(2, 3), (3, 2), (5, 3)]):
        x, y = clip(frames, batch), torch.randint(0, CLASSES, (batch,))
        t = torch.randint(0, 1000, (batch, frames) if per_frame else (batch,))
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            torch.manual_seed(i)
            output = compiled(x, t, y)
            ours = gradients(model, output)
        torch.manual_seed(i)
        wanted = model(x, t, y)
        assert relative(output, wanted) < 1e-6
        plain = gradients(model, wanted)
        assert max(relative(ours[name], plain[name]) for name in plain) < 1e-5


def test_a_saved_state_comes_back(tmp_path):
    model, x, t = small(1), clip(), torch.tensor([3, 700])
    torch.save(model.state_dict(), tmp_path / "state.pt")
    other = small(2)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(other(x, t), model(x, t))


class TokenOperations(TorchDispatchMode):
    """Notes every torch operation whose result is at least as large as the tokens."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.tokens = tokens
        self.seen: list[str] = []
        self.projections: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        first = result[0] if isinstance(result, tuple | list) else result
        if isinstance(first, Tensor):
            if first.numel() >= self.tokens:
                self.seen.append(str(func).removesuffix(".default"))
            if str(func) in ("aten.addmm.default", "aten.mm.default"):
                self.projections.append(tuple(first.shape))
        return result


@pytest.mark.parametrize("variant", [1, 2, 3])
def test_tokens_are_never_rearranged_or_copied(variant):
    size, depth = 16, 4
    model = small(input_size=size, variant=variant, depth=depth)
    x, t = clip(size=size), torch.randint(0, 1000, (BATCH, FRAMES))
    tokens = BATCH * FRAMES * (size // 2) ** 2 * model.config.hidden_size
    with TokenOperations(tokens) as operations:
        output = model(x, t)
        (output * torch.randn_like(output)).sum().backward()
    matmuls_and_views = {"aten.addmm", "aten.mm", "aten.view", "aten.t", "aten.detach"}
    elementwise = {"aten.gelu", "aten.gelu_backward", "aten.add.Tensor"}
    ours = {name for name in operations.seen if name.startswith("vidkern.")}
    assert set(operations.seen) <= matmuls_and_views | elementwise | ours
    # positions of space and of time, and in the backward pass the residual's two ways into the first block
    assert operations.seen.count("aten.add.Tensor") <= 3
    assert operations.seen.count("vidkern.gate_residual_modulate") == 2 * depth
    assert operations.seen.count("vidkern.layer_norm_modulate") == 1
    assert not any(name.startswith("vidkern.gate_residual_backward") for name in operations.seen)
    modulations = [shape for shape in operations.projections if shape[1] == 6 * model.config.hidden_size]
    assert modulations == [(BATCH * FRAMES, 6 * model.config.hidden_size)] * depth


class NoHostTraffic(TorchDispatchMode):
    """Fails where the host would read a value of the device, or hand it one."""

    forbidden = ("aten._local_scalar_dense", "aten.lift_fresh", "aten._to_copy", "aten.nonzero", "aten.is_nonzero")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert not str(func).startswith(self.forbidden), f"{func} goes through the host"
        return func(*args, **(kwargs or {}))


def test_training_never_waits_for_the_device():
    model = small(num_classes=CLASSES, class_dropout=0.5).train()
    x, t, y = clip(FRAMES + 2), torch.tensor([3, 700]), torch.tensor([1, 2])
    labels = torch.tensor([[0, 3], [4, 1]])
    with NoHostTraffic():
        model(x, t, y, num_images=2, image_labels=labels).square().sum().backward()


BAD_CALLS = {
    "channels": (lambda m: m(torch.randn(2, 4, 3, 8, 8), torch.tensor([1, 2]), torch.tensor([0, 1])), "x must be"),
    "patch": (lambda m: m(torch.randn(2, 4, 4, 7, 8), torch.tensor([1, 2]), torch.tensor([0, 1])), r"multiples of"),
    "timesteps": (lambda m: m(clip(), torch.tensor([1, 2, 3]), torch.tensor([0, 1])), r"t must be \(B,\) = \(2,\)"),
    "no label": (lambda m: m(clip(), torch.tensor([1, 2])), r"y must be of shape \(2,\), got None"),
    "text": (
        lambda m: m(clip(), torch.tensor([1, 2]), torch.tensor([0, 1]), text=torch.randn(2, 8)),
        "text must be None",
    ),
    "images": (lambda m: m(clip(), torch.tensor([1, 2]), torch.tensor([0, 1]), num_images=4), "num_images must be"),
    "dropped condition": (
        lambda m: m(clip(), torch.tensor([1, 2]), torch.tensor([0, 1]), dropped={"text": torch.zeros(2).bool()}),
        r"dropped must name conditions among \(y\), got 'text'",
    ),
    "dropped samples": (
        lambda m: m(clip(), torch.tensor([1, 2]), torch.tensor([0, 1]), dropped={"y": torch.zeros(3).bool()}),
        r"dropped\['y'\] must be torch.bool of shape \(2,\), got torch.bool of shape \(3,\)",
    ),
    "image labels": (
        lambda m: m(clip(), torch.tensor([1, 2]), torch.tensor([0, 1]), num_images=2),
        r"image_labels must be of shape \(2, 2\), got None",
    ),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_input_gets_one_clear_error(name):
    call, message = BAD_CALLS[name]
    with pytest.raises(ValueError, match=message):
        call(small(num_classes=CLASSES))


def test_images_want_the_uniform_embedding():
    with pytest.raises(ValueError, match="num_images must be 0 with tubelets"):
        small(patch_embedding="tubelet")(clip(6), torch.tensor([1, 2]), num_images=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": 5}, "variant must be 1, 2, 3 or 4, got 5"),
        ({"depth": 3}, "depth must be positive, and even in variants 1 and 2, got 3"),
        ({"num_heads": 3}, "num_heads must be a divisor of hidden_size = 64, got 3"),
        ({"variant": 4, "num_heads": 1}, "num_heads must be even"),
        ({"patch_embedding": "cube"}, "patch_embedding must be uniform or tubelet, got 'cube'"),
        ({"temporal_position": "learned"}, "temporal_position must be absolute or rope, got 'learned'"),
        ({"input_size": 9}, "input_size must be a multiple of the patch's 2, got 9"),
        ({"patch_embedding": "tubelet", "num_frames": 5}, "num_frames must be a multiple of the patch's 2, got 5"),
        ({"num_classes": 5, "text_size": 8}, "text_size must be None where num_classes is given, got 8"),
        ({"class_dropout": 1.0}, r"class_dropout must be in \[0, 1\), got 1.0"),
        ({"text_dropout": -0.1}, r"text_dropout must be in \[0, 1\), got -0.1"),
    ],
)
def test_a_configuration_that_cannot_be_built_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Latte(LatteConfig(**{**SMALL, **options}))


def test_an_unknown_size_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match=r"Latte-XL/8, got 'Latte-XXL/2'"):
        latte("Latte-XXL/2")
