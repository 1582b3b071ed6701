"""Motion: forms against independent computations, warping, occlusion, the colour wheel, extractors, moving digits."""

import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_sample_image
from torch import Tensor, nn

from models.command_line import UsageError
from models.data import MovingDigits
from models.motion import from_grid, from_network, to_grid, to_network, warp
from models.motion.colour_wheel import colour_wheel
from models.motion.extract import LEAST_SIDE, clip_motion, load_extractor
from models.motion.occlusion import visible


def random_motion(*leading: int, height: int = 5, width: int = 7) -> tuple[Tensor, Tensor]:
    """Flow of a few pixels and a soft occlusion map, float64."""
    generator = torch.Generator().manual_seed(0)
    flow = 3 * torch.randn(*leading, 2, height, width, dtype=torch.float64, generator=generator)
    return flow, torch.rand(*leading, 1, height, width, dtype=torch.float64, generator=generator)


# forms


def test_forms_are_what_their_equations_say() -> None:
    flow, occlusion = random_motion(2, 3)
    motion, grid = to_network(flow, occlusion).numpy(), to_grid(flow, occlusion).numpy()
    assert motion.shape == grid.shape == (2, 3, 3, 5, 7)
    for (b, i, _, y, x), _ in np.ndenumerate(flow.numpy()[:, :, :1]):
        dx, dy = flow[b, i, :, y, x].tolist()
        seen = 2 * float(occlusion[b, i, 0, y, x]) - 1
        np.testing.assert_allclose(motion[b, i, :, y, x], [8 * dx / 3.5, 8 * dy / 2.5, seen], rtol=1e-14)
        # the centres of the seven columns lie at -1, -2/3, ..., 1, those of the five rows at -1, -1/2, ..., 1
        np.testing.assert_allclose(grid[b, i, :, y, x], [(x + dx) / 3 - 1, (y + dy) / 2 - 1, seen], atol=1e-14)
    for back in (from_network(torch.from_numpy(motion)), from_grid(torch.from_numpy(grid))):
        torch.testing.assert_close(back, (flow, occlusion), rtol=1e-12, atol=1e-12)


def test_drawn_maps_are_clamped_and_flows_are_not() -> None:
    drawn = torch.tensor([1.5, -2.0, 1.2]).view(3, 1, 1).expand(3, 4, 8)
    flow, occlusion = from_network(drawn)
    assert torch.equal(flow, torch.tensor([0.75, -0.5]).view(2, 1, 1).expand(2, 4, 8))
    assert occlusion.eq(1).all()
    assert from_grid(-drawn)[1].eq(0).all()


def test_resized_motion_is_in_pixels_of_its_new_size() -> None:
    flow = torch.tensor([8.0, -2.0]).view(2, 1, 1).expand(2, 16, 32)
    motion = F.interpolate(to_network(flow, torch.ones(1, 16, 32))[None], (4, 16), mode="area")[0]
    small, _ = from_network(motion)
    assert torch.equal(small, torch.tensor([4.0, -0.5]).view(2, 1, 1).expand(2, 4, 16))


def test_shapes_that_do_not_fit_are_named() -> None:
    flow, occlusion = random_motion(2)
    with pytest.raises(ValueError, match=r"flow must be \(..., 2, H, W\), got \(2, 1, 5, 7\)"):
        to_network(occlusion, occlusion)
    with pytest.raises(ValueError, match=r"occlusion must be of flow's shape \(2, 2, 5, 7\) .* got \(1, 5, 7\)"):
        to_grid(flow, occlusion[0])
    with pytest.raises(ValueError, match=r"motion must be \(..., 3, H, W\), got \(2, 2, 5, 7\)"):
        from_network(flow)
    with pytest.raises(ValueError, match=r"flow must have frame's height and width \(4, 7\), got \(2, 2, 5, 7\)"):
        warp(torch.zeros(3, 4, 7), flow)


# warping


def test_warping_by_a_translation_moves_the_frame() -> None:
    frame = torch.from_numpy(np.random.default_rng(0).normal(size=(3, 6, 9)))
    flow = torch.zeros(4, 2, 6, 9, dtype=torch.float64)
    flow[1, 0], flow[1, 1] = 2, -1
    flow[2, 0] = 0.25
    flow[3] = 100
    warped = warp(frame, flow)
    torch.testing.assert_close(warped[0], frame, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(warped[1, :, 1:, :-2], frame[:, :-1, 2:], rtol=1e-12, atol=1e-12)
    between = 0.75 * frame[:, :, :-1] + 0.25 * frame[:, :, 1:]
    torch.testing.assert_close(warped[2, :, :, :-1], between, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(warped[3], frame[:, -1:, -1:].expand(3, 6, 9), rtol=1e-12, atol=1e-12)
    batch = warp(frame.expand(2, 1, 3, 6, 9), flow)
    torch.testing.assert_close(batch, warped.expand(2, 4, 3, 6, 9))
    torch.testing.assert_close(warp(frame, flow[2]), warped[2])


def test_warping_samples_where_the_grid_says() -> None:
    flow, occlusion = random_motion()
    frame = torch.from_numpy(np.random.default_rng(1).normal(size=(2, 5, 7)))
    place = to_grid(flow, occlusion)[:2].movedim(0, -1)
    sampled = F.grid_sample(frame[None], place[None], padding_mode="border", align_corners=True)[0]
    torch.testing.assert_close(warp(frame, flow), sampled)


# occlusion


def test_a_square_hides_what_it_leaves_and_shows_itself() -> None:
    square = torch.zeros(2, 24, 32, dtype=torch.bool)
    square[0, 8:16, 6:14] = square[1, 8:16, 10:18] = True  # first frame, frame i
    backward, forward = torch.zeros(2, 24, 32), torch.zeros(2, 24, 32)
    backward[0, square[1]], forward[0, square[0]] = -4, 4
    assert torch.equal(visible(backward, forward)[0].bool(), square[1] | ~square[0])


@pytest.mark.parametrize(("surplus", "shown"), [(1.6, 1), (1.8, 0), (-1.4, 1), (-1.6, 0)])
def test_the_forward_backward_threshold(surplus: float, shown: int) -> None:
    flow = torch.tensor([10.0, 0.0]).view(2, 1, 1).expand(2, 4, 40)
    there_and_back = visible(-flow, flow + torch.tensor([surplus, 0.0]).view(2, 1, 1))
    # 1.6^2 < 0.01 (10^2 + 11.6^2) + 0.5, and 1.8^2 is more; 1.4^2 < 0.01 (10^2 + 8.6^2) + 0.5, and 1.6^2 is more
    assert there_and_back[0, :, 10:].eq(shown).all()
    assert there_and_back[0, :, :9].eq(0).all()  # from outside


# the colour wheel


def published_wheel() -> np.ndarray:
    """The 55 colours of Baker et al. 2007, counted out segment by segment, (55, 3)."""
    wheel: list[list[float]] = []
    for length, fixed, changing, falls in (
        (15, 0, 1, 0),
        (6, 1, 0, 1),
        (4, 1, 2, 0),
        (11, 2, 1, 1),
        (13, 2, 0, 0),
        (6, 0, 2, 1),
    ):
        for i in range(length):
            colour = [0.0, 0.0, 0.0]
            colour[fixed] = 1
            colour[changing] = 1 - i / length if falls else i / length
            wheel.append(colour)
    return np.array(wheel)


def test_colours_at_the_four_axes() -> None:
    flow = torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]]).T.view(2, 2, 2)
    red_green_blue = (colour_wheel(flow).flatten(1).T + 1) / 2
    right, down, left, up = red_green_blue.numpy()
    np.testing.assert_allclose(right, [1, 0, 0], atol=1e-6)
    np.testing.assert_allclose(down, [1, 13.5 / 15, 0], atol=1e-6)  # a quarter of 54 hues: in red to yellow
    np.testing.assert_allclose(left, [0, 1 - 2 / 11, 1], atol=1e-6)  # the 27th: in cyan to blue
    np.testing.assert_allclose(up, [4.5 / 13, 0, 1], atol=1e-6)  # 40.5: in blue to magenta


def test_colours_are_those_of_the_published_wheel() -> None:
    flow, _ = random_motion(2, height=20, width=20)
    unit, wheel = 3.0, published_wheel()
    dx, dy = (flow / unit).movedim(-3, 0).numpy()
    place = (np.arctan2(-dy, -dx) / np.pi + 1) / 2 * 54
    low, part = np.floor(place).astype(int), (place % 1)[..., None]
    colour = (1 - part) * wheel[low] + part * wheel[(low + 1) % 55]
    length = np.hypot(dx, dy)[..., None]
    assert (length < 1).any()
    assert (length > 1).any()
    wanted = np.where(length <= 1, 1 - length * (1 - colour), 0.75 * colour)
    np.testing.assert_allclose((colour_wheel(flow, unit).movedim(-3, -1).numpy() + 1) / 2, wanted, atol=1e-6)
    assert torch.equal(colour_wheel(torch.zeros(2, 3, 3)), torch.ones(3, 3, 3))
    with pytest.raises(ValueError, match="unit must be positive, got 0"):
        colour_wheel(flow, 0)
    with pytest.raises(ValueError, match=r"flow must be \(..., 2, H, W\), got \(3, 4, 4\)"):
        colour_wheel(torch.zeros(3, 4, 4))


# extractors


def shifted_windows(dx: int, dy: int, size: int, shrink: int) -> Tensor:
    """uint8 (2, 3, size, size): a photograph, and the same one (dx, dy) / shrink pixels to the right and down."""
    pixels, side = torch.from_numpy(load_sample_image("flower.jpg").copy()).permute(2, 0, 1), size * shrink
    tops_and_lefts = ((10, 200), (10 - dy, 200 - dx))
    windows = torch.stack([pixels[:, top : top + side, left : left + side] for top, left in tops_and_lefts])
    return F.interpolate(windows, (size, size), mode="bicubic", antialias=True)


@pytest.mark.parametrize(
    ("dx", "dy", "size", "shrink"), [(6, -3, 96, 4), (9, 7, 96, 4), (5, 2, 256, 1), (-3, 5, 64, 3)]
)
def test_dis_finds_a_translation_of_a_photograph(dx: int, dy: int, size: int, shrink: int) -> None:
    clip = shifted_windows(dx, dy, size, shrink)
    flow, occlusion = clip_motion(clip, load_extractor("dis"))
    assert flow[0].eq(0).all()
    assert occlusion[0].eq(1).all()
    # frame 1 at x shows what frame 0 shows at x - d
    error = (flow[1] + torch.tensor([dx, dy]).view(2, 1, 1) / shrink).norm(dim=0)[8:-8, 8:-8]
    assert error.mean() < 0.1  # pixels
    assert error.quantile(0.95) < 0.2
    assert occlusion[1, :, 8:-8, 8:-8].mean() > 0.99


class Shifts(nn.Module):
    """Stands in for RAFT: a flow that is always (w, 2 w), w its one weight, after some that are not."""

    def __init__(self, large: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        if large:
            self.mask_predictor = nn.Linear(1, 1)
        self.seen: list[tuple[float, float, tuple[int, ...]]] = []

    def forward(self, a: Tensor, b: Tensor) -> list[Tensor]:
        self.seen.append((float(a.min()), float(a.max()), tuple(a.shape)))
        flow = torch.stack([self.weight, 2 * self.weight]).view(2, 1, 1).expand(len(b), 2, *b.shape[-2:])
        return [flow + 100, flow]


@pytest.fixture
def torchvision(monkeypatch: pytest.MonkeyPatch) -> dict[str, Shifts]:
    """A torchvision whose RAFTs are Shifts; those that were built, by name."""
    built, module = {}, ModuleType("torchvision.models.optical_flow")

    def maker(name: str) -> None:
        def build(*, weights: None) -> Shifts:
            built[name] = Shifts(name == "raft_large")
            return built[name]

        setattr(module, name, build)

    maker("raft_large")
    maker("raft_small")
    for name in ("torchvision", "torchvision.models"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return built


@pytest.mark.parametrize("name", ["raft_large", "raft_small"])
def test_raft_takes_enlarged_frames_and_gives_pixels_of_the_clip(
    torchvision: dict[str, Shifts], tmp_path: Path, name: str
) -> None:
    state = Shifts(name == "raft_large").state_dict()
    state["weight"] += 16
    torch.save(state, tmp_path / "raft.pth")
    extractor = load_extractor("raft", tmp_path / "raft.pth")
    assert extractor.identity.startswith(f"{name} ")
    clip = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (11, 3, 64, 100), dtype=np.uint8))
    flow, _ = clip_motion(clip, extractor)
    [network] = torchvision.values()
    assert {shape for _, _, shape in network.seen} == {(8, 3, LEAST_SIDE, 400), (2, 3, LEAST_SIDE, 400)}
    assert all(-1 <= low < -0.9 and 0.9 < high <= 1 for low, high, _ in network.seen)
    torch.testing.assert_close(flow[1:], torch.tensor([4.0, 8.0]).view(2, 1, 1).expand(10, 2, 64, 100))
    state["weight"] += 1
    torch.save(state, tmp_path / "other.pth")
    assert load_extractor("raft", tmp_path / "other.pth").identity != extractor.identity


def test_raft_that_cannot_be_had_is_one_clear_error(
    torchvision: dict[str, Shifts], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="--extractor raft wants --raft, the path of torchvision's RAFT weights"):
        load_extractor("raft")
    with pytest.raises(UsageError, match="--extractor dis does not go with --raft"):
        load_extractor("dis", tmp_path / "raft.pth")
    with pytest.raises(OSError, match=r"no checkpoint at .*raft\.pth"):
        load_extractor("raft", tmp_path / "raft.pth")
    torch.save({"weight": torch.zeros(3)}, tmp_path / "raft.pth")
    with pytest.raises(ValueError, match=r"raft\.pth does not hold the weights of torchvision's RAFT"):
        load_extractor("raft", tmp_path / "raft.pth")
    monkeypatch.setitem(sys.modules, "torchvision.models.optical_flow", None)
    with pytest.raises(ValueError, match="the extractor raft needs torchvision, which cannot be imported: "):
        load_extractor("raft", tmp_path / "raft.pth")


# moving digits


@pytest.mark.parametrize(("size", "most", "mean"), [(32, 0.6, 0.06), (128, 0.2, 0.004)])
def test_digits_warp_onto_themselves(size: int, most: float, mean: float) -> None:
    """Within resampling error, which falls as the square of the pixel's size; the background comes out exactly."""
    dataset = MovingDigits(num_frames=12, size=size, motion=True, seed=3)
    for index in range(6):
        video, motion = dataset[index]["video"], dataset[index]["motion"]
        assert torch.equal(video, MovingDigits(num_frames=12, size=size, seed=3)[index]["video"])
        flow, occlusion = from_network(motion)
        digit, shown = video > -1, occlusion > 0.5
        error = (warp(video[0], flow) - video).abs()
        assert error[digit].max() < most
        assert error[digit].mean() < mean
        assert (video[:1] - video).abs()[1:][digit[1:]].mean() > 0.1
        assert error[~digit & shown].max() < 1e-5
        # hidden is the background that frame 0 covers with ink, and nothing else
        assert torch.equal(shown, digit | (video[:1] == -1))
        assert (~shown).any()
        assert flow.movedim(1, -1)[~digit[:, 0]].eq(0).all()
        assert flow[0].eq(0).all()


def test_a_digits_flow_leads_to_its_place_in_the_first_frame() -> None:
    """The digit's centre of mass moves by its flow, which is one for all of its pixels."""
    dataset = MovingDigits(num_frames=12, size=64, motion=True, seed=5)
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    for index in range(4):
        ink = (dataset[index]["video"][:, 0] + 1) / 2
        flow, _ = from_network(dataset[index]["motion"])
        centre = torch.stack([(ink * axis).sum((1, 2)) / ink.sum((1, 2)) for axis in (x, y)], dim=1)
        for frame in range(1, 12):
            inside = flow[frame][:, ink[frame] > 0]
            torch.testing.assert_close(inside, inside[:, :1].expand_as(inside))
            torch.testing.assert_close(centre[frame] + inside[:, 0], centre[0], atol=0.05, rtol=0)
