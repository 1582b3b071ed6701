"""A text as one vector: its tokens pooled by the attention of a learned query."""

import torch
from torch import Tensor, nn

#: Heads of the query's attention.
HEADS = 4

#: Standard deviation of the null text to begin with.
NULL_STD = 0.02


class TextPool(nn.Module):
    """Pool the embeddings of a text's tokens into one vector; a text that is dropped is a learned null vector.

    The query is of unit variance to begin with: a small one would weigh all tokens alike, and of a short text most are
    padding, which no two texts differ in.

    Args:
        text_width: W.
        size: D of the vector, a multiple of HEADS.
    """

    def __init__(self, text_width: int, size: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(text_width)
        self.query = nn.Parameter(torch.randn(1, 1, size))
        self.attention = nn.MultiheadAttention(size, HEADS, kdim=text_width, vdim=text_width, batch_first=True)
        self.null = nn.Parameter(NULL_STD * torch.randn(size))

    def forward(self, text: Tensor, dropped: Tensor) -> Tensor:
        """Return (B, D) for text (B, L, W), of any L; ``dropped`` (B,) bool says whose text is null.

        The null vector gets a gradient (of zeros, where no text is dropped), as replicas that exchange gradients want.
        """
        tokens = self.norm(text)
        pooled, _ = self.attention(self.query.expand(len(text), -1, -1), tokens, tokens, need_weights=False)
        return torch.where(dropped[:, None], self.null, pooled.squeeze(1))
