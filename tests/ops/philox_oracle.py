"""The noise written a second time from README.md: numbers in Python's integers and float64, bits in NumPy's float32."""

import math

import numpy as np

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


LOG = "3FFFFFFF 3F80003D 3F2AACEE 3EFFB11E 3ECBC719 3EB0A606 3EA61E78 3E4EFD06"
SIN = "40490FDB C0A55DE1 40233458 BF192665 3D9ED7FB"
COS = "3F800000 C09DE9D3 4081DE83 BFAA7B0D 3E60F833"


def _horner(coefficients: str, y: np.ndarray) -> np.ndarray:
    *rest, value = np.array([int(word, 16) for word in coefficients.split()], dtype=np.uint32).view(np.float32)
    for coefficient in reversed(rest):
        value = value * y
        value = value + coefficient
    return value


def box_muller(p: np.ndarray, q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The even and the odd lane of uint32 words: NumPy's float32 +, -, * and sqrt round correctly, one by one."""
    f32 = np.float32
    a = ((p & 0x7FFFFFFF) | 1).astype(np.int32).astype(f32)
    i = a.view(np.int32) - np.int32(0x4EB504F3)
    j = i & np.int32(0x7FFFFF)
    g = f32(1) - (j + np.int32(0x3F3504F3)).view(f32)
    r = np.sqrt(_horner(LOG, g) * g + (i - j).astype(f32) * f32(float.fromhex("-0x1.62e43p-23")))
    x = ((q & 0x7FFFFF).astype(np.int32) - np.int32(0x400000)).astype(f32) * f32(2.0**-23)
    z = x * x
    s, c = x * _horner(SIN, z), _horner(COS, z)
    turned = q >= 1 << 31
    return r * np.where(turned, -c, c), r * np.where(turned, -s, s)
