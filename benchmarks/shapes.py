"""The token shapes that the suites time: Latte and Wan, in full on a GPU and scaled down on a CPU."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tokens:
    """A named activation (B, F, N, D)."""

    name: str
    batch: int
    frames: int
    tokens: int
    channels: int

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.batch, self.frames, self.tokens, self.channels


LATTE = {"Latte-S": 384, "Latte-B": 768, "Latte-L": 1024, "Latte-XL": 1152}

# Wan2.1 1.3B and 14B at 81 x 480 x 832, Wan2.2 5B at 121 x 704 x 1280
WAN = {"Wan-1.3B": (21, 1560, 1536), "Wan-5B": (31, 880, 3072), "Wan-14B": (21, 1560, 5120)}

#: A call so small that only its overhead is seen.
TINY = Tokens("tiny", 1, 2, 4, 64)


def video_tokens(device: torch.device) -> dict[str, Tokens]:
    """Return the shapes by name, Latte-XL first, sized so that one call takes milliseconds at most.

    A GPU gets Latte/2 at 16 x 256 x 256 with batch 4, and whole Wan clips. A CPU gets Latte/4 with batch 1 (64 tokens
    a frame), and two frames of a Wan clip at half its height and width.
    """
    on_gpu = device.type == "cuda"
    latte = [Tokens(name, 4, 16, 256, d) if on_gpu else Tokens(name, 1, 16, 64, d) for name, d in LATTE.items()]
    wan = [
        Tokens(name, 1, frames, tokens, d) if on_gpu else Tokens(name, 1, 2, tokens // 4, d)
        for name, (frames, tokens, d) in WAN.items()
    ]
    return {shape.name: shape for shape in [*reversed(latte), *wan]}
