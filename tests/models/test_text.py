"""Text conditions: embeddings against the models' own, what is cut and padded, the cache, and the dataset."""

import logging
import multiprocessing
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import CLIPImageProcessorPil, CLIPTextConfig, CLIPTextModel, CLIPTokenizer, CLIPVisionModel

from models.data import MovingDigits
from models.data.packaged import cache_folder
from models.text import TextDataset, TextEncoder, load_text_encoder
from models.text.cache import TextCache
from models.text.clip import ClipText, load_clip_image
from models.training.checkpointing import StorageError
from tests.models.tiny_clip import LENGTH, SIDE, save_tiny_clip


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_clip(tmp_path_factory.mktemp("clip"))


def test_wordllama_looks_up_the_packages_tokens(caplog: pytest.LogCaptureFixture) -> None:
    encoder = load_text_encoder("wordllama")
    table = load_file(cache_folder() / "wordllama" / "l2_supercat_256.safetensors")["embedding.weight"].float()
    ids = [263, 9881, 8401, 701, 322, 2175]  # as the package's own tokenizer numbers the text
    got = encoder.encode(["a seven moving up and left", "", "word " * 40])
    assert got.shape == (3, encoder.length, encoder.width) == (3, 32, 256)
    assert torch.equal(got[0], table[[*ids, *[2] * 26]])
    assert torch.equal(got[1], table[[2] * 32])
    assert torch.equal(got[2], table[[1734] * 32])
    assert caplog.messages == [f"1 of 3 texts cut to 32 tokens; the first has 41: '{'word ' * 12} ...'"]


def test_clip_texts_are_the_networks_last_hidden_states(clip: Path, caplog: pytest.LogCaptureFixture) -> None:
    encoder = load_text_encoder(str(clip))
    texts = ["a c b", "", " ".join("abc" * 5)]
    with caplog.at_level(logging.WARNING, "models"):
        got = encoder.encode(texts)
    letters = [2, 3, 4] * 5
    ids = torch.tensor([[0, 2, 4, 3, 1, *[1] * 7], [0, 1, *[1] * 10], [0, *letters[: LENGTH - 2], 1]])
    with torch.no_grad():
        wanted = CLIPTextModel.from_pretrained(clip)(ids).last_hidden_state
    assert (encoder.length, encoder.width) == (LENGTH, 32)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    assert (got[0] - got[1]).abs().max() > 0.1
    assert [record.getMessage() for record in caplog.records if record.name.startswith("models")] == [
        f"1 of 3 texts cut to {LENGTH} tokens; the first has 17: 'a b c a b c a b c a b c a b c'"
    ]


def test_clip_is_found_in_a_pipelines_folders(clip: Path, tmp_path: Path) -> None:
    CLIPTextModel.from_pretrained(clip).save_pretrained(tmp_path / "text_encoder")
    CLIPTokenizer.from_pretrained(clip).save_pretrained(tmp_path / "tokenizer")
    CLIPVisionModel.from_pretrained(clip).save_pretrained(tmp_path / "image_encoder")
    whole, part = load_text_encoder(str(clip)), load_text_encoder(str(tmp_path))
    assert torch.equal(whole.encode(["b a"]), part.encode(["b a"]))
    assert whole.identity == part.identity
    images = torch.rand(1, 3, SIDE, SIDE)
    assert torch.equal(load_clip_image(str(clip)).encode(images), load_clip_image(str(tmp_path)).encode(images))


def test_other_weights_or_words_are_another_encoder(clip: Path) -> None:
    model, tokenizer = CLIPTextModel.from_pretrained(clip), CLIPTokenizer.from_pretrained(clip)
    first = ClipText(model, tokenizer).identity
    assert ClipText(model, tokenizer).identity == first
    fewer = CLIPTokenizer({"<|startoftext|>": 0, "<|endoftext|>": 1, "b</w>": 2, "b": 5}, [])
    assert ClipText(model, fewer).identity != first
    with torch.no_grad():
        model.get_input_embeddings().weight[3, 3] += 1e-4
    assert ClipText(model, tokenizer).identity != first


@pytest.mark.parametrize("size", [(40, 56), (SIDE, SIDE), (20, 16)])
def test_images_are_prepared_as_clip_prepares_them(clip: Path, size: tuple[int, int]) -> None:
    rows, columns = torch.meshgrid(torch.linspace(0, 3, size[0]), torch.linspace(0, 4, size[1]), indexing="ij")
    image = torch.stack([torch.sin(rows + columns), torch.cos(rows), torch.sin(2 * columns)])
    pixels = ((image + 1) * 127.5).round().to(torch.uint8)
    prepare = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=SIDE)
    prepared = prepare(Image.fromarray(pixels.permute(1, 2, 0).numpy()), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        wanted = CLIPVisionModel.from_pretrained(clip)(prepared).last_hidden_state
    encoder = load_clip_image(str(clip))
    got = encoder.encode((pixels / 127.5 - 1)[None])
    assert got.shape == (1, 5, 32) == (1, encoder.length, encoder.width)
    torch.testing.assert_close(got, wanted, rtol=0, atol=0.02)  # PIL resizes in 8 bits
    assert (encoder.encode(-image[None]) - wanted).abs().max() > 0.2
    grey = image[None, :1]
    torch.testing.assert_close(encoder.encode(grey), encoder.encode(grey.repeat(1, 3, 1, 1)))


class Counting:
    """An encoder of the letters' codes that knows what it was asked for."""

    length, width = 4, 2

    def __init__(self, identity: str = "counting") -> None:
        self.identity, self.asked = identity, list[str]()

    def encode(self, texts: list[str]) -> torch.Tensor:
        self.asked += texts
        codes = [[ord(letter) for letter in text.ljust(4)[:4]] for text in texts]
        return torch.tensor(codes)[:, :, None].float() * torch.tensor([1.0, -0.5])


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VIDKERN_CACHE", str(tmp_path))
    return tmp_path


def test_the_cache_encodes_each_text_once(cache: Path) -> None:
    encoder = Counting()
    texts = [f"{number}" for number in range(300)]
    TextCache("counting", (4, 2)).fill(encoder, [*texts, "", "7", "déjà"])
    assert encoder.asked == [*texts, "", "déjà"]
    again = TextCache("counting", (4, 2))
    again.fill(encoder, ["new", "7", ""])
    assert encoder.asked[len(texts) + 2 :] == ["new"]
    for text in ("7", "", "déjà", "new"):
        assert torch.equal(again[text], Counting().encode([text])[0])
    changed = again["7"]
    changed += 1
    assert torch.equal(again["7"], Counting().encode(["7"])[0])

    other = Counting("other")
    TextCache("other", (4, 2)).fill(other, ["7"])
    assert other.asked == ["7"]
    assert {path.name for path in (cache / "text").iterdir()} == {"counting", "other"}
    assert not list(cache.rglob("*.tmp"))


def _fill(_: int) -> None:
    TextCache("counting", (4, 2)).fill(Counting(), [str(number) for number in range(200)])


@pytest.mark.parametrize("left", [0, 60, 140], ids=["nothing", "half a header", "half the numbers"])
def test_a_damaged_file_of_the_cache_is_made_again(cache: Path, left: int) -> None:
    encoder = Counting()
    texts = TextCache(encoder.identity, (4, 2))
    texts.fill(encoder, ["a", "b"])
    wanted = texts["a"].clone()
    texts.path("a").write_bytes(texts.path("a").read_bytes()[:left])
    again = TextCache(encoder.identity, (4, 2))
    again.fill(encoder, ["a", "b"])
    assert torch.equal(again["a"], wanted)
    assert encoder.asked == ["a", "b", "a"]


def test_a_cache_that_cannot_be_written_is_named(cache: Path) -> None:
    (cache / "text").write_text("in its place")
    with pytest.raises(StorageError, match=r"cannot write .*text/counting/.*\.npy: Not a directory"):
        TextCache("counting", (4, 2)).fill(Counting(), ["a"])


def test_processes_may_fill_one_cache(cache: Path) -> None:
    with multiprocessing.get_context("fork").Pool(3) as pool:
        pool.map(_fill, range(3))
    wanted = Counting().encode([str(number) for number in range(200)])
    kept = TextCache("counting", (4, 2))
    assert torch.equal(torch.stack([kept[str(number)] for number in range(200)]), wanted)
    assert not list(cache.rglob("*.tmp"))


@pytest.mark.parametrize("workers", [0, 2])
def test_samples_carry_the_embedding_of_their_caption(cache: Path, workers: int) -> None:
    digits = MovingDigits(num_frames=2, size=16, length=12, seed=3)
    encoder = Counting()
    dataset = TextDataset(digits, encoder)
    assert len(encoder.asked) == len(set(encoder.asked)) == 80
    assert (len(dataset), dataset.captions, dataset.classes) == (12, digits.captions, digits.classes)
    context = "fork" if workers else None
    [batch] = DataLoader(dataset, batch_size=12, num_workers=workers, multiprocessing_context=context)
    assert torch.equal(batch["text"], Counting().encode([digits.captions[number] for number in batch["caption"]]))
    assert torch.equal(batch["video"], torch.stack([digits[index]["video"] for index in range(12)]))
    assert torch.equal(dataset[5, 2]["video"], digits[5, 2]["video"])


class Silent(MovingDigits):
    captions = ()


def test_what_cannot_be_encoded_is_told_in_one_line(clip: Path, tmp_path: Path) -> None:
    encoder: TextEncoder = Counting()
    with pytest.raises(ValueError, match=r"^Silent has no captions to encode$"):
        TextDataset(Silent(), encoder)
    with pytest.raises(ValueError, match=r'^no folder nowhere: want "wordllama" or the local folder of a CLIP model$'):
        load_text_encoder("nowhere")
    with pytest.raises(ValueError, match=r"^cannot load a CLIPTextModel from [^\n]+$"):
        load_text_encoder(str(tmp_path))
    CLIPVisionModel.from_pretrained(clip).save_pretrained(tmp_path / "vision")
    CLIPTextConfig.from_pretrained(clip).save_pretrained(tmp_path / "vision")
    with pytest.raises(ValueError, match=r"^[^\n]+vision has no weights of a CLIPTextModel: missing [^\n]+$"):
        load_text_encoder(str(tmp_path / "vision"))
    CLIPTextModel.from_pretrained(clip).save_pretrained(tmp_path / "wordless")
    with pytest.raises(ValueError, match=r"wordless has no tokenizer: wanted tokenizer.json or vocab.json$"):
        load_text_encoder(str(tmp_path / "wordless"))
