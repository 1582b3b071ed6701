"""CLIP (Radford et al. 2021) as an encoder of texts and of images, from a local folder, by transformers."""

import hashlib
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer, CLIPVisionModel, PreTrainedModel
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.utils import logging

from models.digest import sha256_of
from models.text.encoder import warn_of_cuts

_BATCH = 64  # texts in one call of the network
_VOCABULARIES = ("tokenizer.json", "vocab.json")
_M = TypeVar("_M", bound=PreTrainedModel)


class ClipText:
    """The last hidden states of CLIP's text network, after its final norm, as Stable Diffusion takes them.

    A text is begin token, tokens and end token, cut or padded to the network's length (77); padding is not masked, so
    attention over the embeddings sees all of it, as Stable Diffusion's does.
    """

    def __init__(self, model: CLIPTextModel, tokenizer: CLIPTokenizer) -> None:
        """`model`: on its device, in evaluation mode."""
        self._model, self._tokenizer = model, tokenizer
        self.length, self.width = model.config.max_position_embeddings, model.config.hidden_size
        words = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
        self.identity = f"clip-{self.length}-{sha256_of(model.state_dict())[:16]}-{words[:8]}"

    @torch.inference_mode()
    def encode(self, texts: list[str]) -> Tensor:
        """Embeddings float32 (len(texts), L, W) on the CPU."""
        warn_of_cuts(texts, [len(ids) for ids in self._tokenizer(texts, verbose=False)["input_ids"]], self.length)
        numbers = self._tokenizer(
            texts, padding="max_length", max_length=self.length, truncation=True, return_tensors="pt"
        )["input_ids"].to(self._model.device)
        return torch.cat([self._model(part).last_hidden_state.float().cpu() for part in numbers.split(_BATCH)])


class ClipImage:
    """The last hidden states of CLIP's vision network: the class token, then one for each patch (257 for ViT-L/14)."""

    def __init__(self, model: CLIPVisionModel) -> None:
        """`model`: on its device, in evaluation mode."""
        config: Any = model.config
        self._model, self._side = model, config.image_size
        self.length, self.width = (config.image_size // config.patch_size) ** 2 + 1, config.hidden_size

    @torch.inference_mode()
    def encode(self, images: Tensor) -> Tensor:
        """Embeddings float32 (n, L, W), on the model's device, of images (n, 3 or 1, H, W) in [-1, 1].

        Images are resized to the network's size on their shorter side, cropped about their centre, and normalised as
        CLIP's were.
        """
        side, (height, width) = self._side, images.shape[-2:]
        scale = side / min(height, width)
        size = (round(height * scale), round(width * scale))
        pixels = (images.to(self._model.device).float().expand(-1, 3, -1, -1) + 1) / 2
        pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
        top, left = (size[0] - side) // 2, (size[1] - side) // 2
        mean, std = (pixels.new_tensor(values).view(3, 1, 1) for values in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
        pixels = (pixels[..., top : top + side, left : left + side] - mean) / std
        return self._model(pixels).last_hidden_state.float()


def load_clip_text(folder: str, device: str | torch.device = "cpu") -> ClipText:
    """The text side of the CLIP model in `folder`: its own, or a pipeline's with text_encoder/ and tokenizer/.

    Raises ValueError in one line where there is none.
    """
    model = _load(CLIPTextModel, folder, "text_encoder", device)
    root = Path(folder) / "tokenizer"
    root = root if root.is_dir() else Path(folder)
    if not any((root / name).exists() for name in _VOCABULARIES):  # transformers would make one of no words
        raise ValueError(f"{root} has no tokenizer: wanted {' or '.join(_VOCABULARIES)}")
    return ClipText(model, _from_folder(CLIPTokenizer, root))


def load_clip_image(folder: str, device: str | torch.device = "cpu") -> ClipImage:
    """The vision side of the CLIP model in `folder`: its own, or a pipeline's with image_encoder/.

    Raises ValueError in one line where there is none.
    """
    return ClipImage(_load(CLIPVisionModel, folder, "image_encoder", device))


def _load(kind: type[_M], folder: str, part: str, device: str | torch.device) -> _M:
    """A network in evaluation mode from `folder`, or from its sub-folder `part` where the folder is a pipeline's."""
    root = Path(folder)
    root = root / part if (root / part).is_dir() else root
    model, report = _from_folder(kind, root, output_loading_info=True)
    if report["missing_keys"]:
        raise ValueError(f"{root} has no weights of a {kind.__name__}: missing {sorted(report['missing_keys'])[0]}")
    return model.to(device).eval().requires_grad_(False)


def _from_folder(kind: Any, folder: Path, **options: Any) -> Any:
    if not folder.is_dir():
        raise ValueError(f'no folder {folder}: want "wordllama" or the local folder of a CLIP model')
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # a whole CLIP has the other side's weights too, each of which would be told
    try:
        return kind.from_pretrained(folder, local_files_only=True, **options)
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"cannot load a {kind.__name__} from {folder}: {reason}") from error
    finally:
        logging.set_verbosity(verbosity)
