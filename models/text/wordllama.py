"""The default text encoder: wordllama's token embeddings (Miller 2024), a look-up in 16 MB.

They are LLaMA 2's tokens as 256 numbers each, trained so that a text's mean serves retrieval. An embedding knows
neither its neighbours nor its place: to cross-attention, the same words in another order are the same text.
"""

import safetensors.torch
import torch
from tokenizers import Tokenizer
from torch import Tensor

from models.data.packaged import Member, Package, packaged
from models.text.encoder import warn_of_cuts

LENGTH = 32  # tokens of a text; a caption of one sentence has 8 to 25
_END = "</s>"
_EMBEDDINGS, _TOKENIZER = "l2_supercat_256.safetensors", "l2_supercat_tokenizer_config.json"
_PACKAGE = Package(
    "wordllama==0.4.0.post1",
    {
        _EMBEDDINGS: Member(
            f"wordllama/weights/{_EMBEDDINGS}", "64b47a2dc493cb8e85944076601189739852d7b64e0e1eedcb1937a251cd9fd5"
        ),
        _TOKENIZER: Member(
            f"wordllama/tokenizers/{_TOKENIZER}", "93248f2a9ec36c7b35f700a033d5f36228aae48db61aee31007fa49062cdeb68"
        ),
    },
)


class WordLlama:
    """Token embeddings of a text, cut to 32 tokens or padded to them with the end token's; none is masked.

    The tokens before the padding are the package's own, without a begin token, so "" is padding alone.
    """

    length = LENGTH

    def __init__(self, tokenizer: Tokenizer, table: Tensor, identity: str) -> None:
        """`table`: float32 (tokens, W)."""
        self.identity, self.width = identity, table.shape[1]
        self._tokenizer, self._table = tokenizer, table
        self._end: int = tokenizer.get_vocab()[_END]

    def encode(self, texts: list[str]) -> Tensor:
        """Embeddings float32 (len(texts), 32, W)."""
        tokens = [encoding.ids for encoding in self._tokenizer.encode_batch(texts, add_special_tokens=False)]
        warn_of_cuts(texts, [len(ids) for ids in tokens], LENGTH)
        padded = torch.full((len(texts), LENGTH), self._end)
        for row, ids in zip(padded, tokens, strict=True):
            row[: len(ids)] = torch.tensor(ids[:LENGTH])
        return self._table[padded]


def load_wordllama() -> WordLlama:
    """The encoder, its two files from the package's wheel (20 MB, downloaded once); DownloadError without them."""
    files = packaged(_PACKAGE, "wordllama")
    table = safetensors.torch.load_file(files[_EMBEDDINGS])["embedding.weight"].float()
    digest = _PACKAGE.files[_EMBEDDINGS].sha256[:16]
    return WordLlama(Tokenizer.from_file(str(files[_TOKENIZER])), table, f"wordllama-{LENGTH}-{digest}")
