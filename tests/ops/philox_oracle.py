"""The noise written a second time, number by number, with Python's integers and float64: what README.md says."""

import math

M64 = (1 << 64) - 1
M32 = (1 << 32) - 1
FRAME, BASE, STEP_FRAME, STEP_BASE = 0, 1, 2, 3


def philox4x32_10(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox4x32-10 as Salmon et al. 2011 print it: ten rounds, the key bumped before every round but the first."""
    left0, right0, left1, right1 = counter[1], counter[0], counter[3], counter[2]
    for i in range(10):
        k0, k1 = (key[0] + i * 0x9E3779B9) & M32, (key[1] + i * 0xBB67AE85) & M32
        high0, low0 = divmod(right0 * 0xD2511F53, 1 << 32)
        high1, low1 = divmod(right1 * 0xCD9E8D57, 1 << 32)
        right0, left0, right1, left1 = high1 ^ left0 ^ k0, low1, high0 ^ left1 ^ k1, low0
    return right0, left0, right1, left1


def normal(seed: int, offset: int, sample: int, frame: int, element: int, stream: int = FRAME, step: int = 0) -> float:
    """One number of a stream, in float64."""
    folded = (seed + offset * 0x9E3779B97F4A7C15) & M64
    group, lane = divmod(element, 4)
    words = philox4x32_10((group, frame, sample, stream + 256 * step), (folded & M32, folded >> 32))
    radius_word, angle_word = words[lane // 2 * 2], words[lane // 2 * 2 + 1]
    u = ((radius_word % (1 << 31)) | 1) / (1 << 31)
    angle = math.pi * ((angle_word % (1 << 23)) / (1 << 23) - 0.5)
    if angle_word >= 1 << 31:
        angle += math.pi
    return math.sqrt(-2 * math.log(u)) * (math.sin(angle) if lane % 2 else math.cos(angle))
