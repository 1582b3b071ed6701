"""Noise: Philox4x32-10 noise that is the same bits on every backend, forward diffusion, and its losses."""

from vidkern.ops.noise.op import add_noise, diffusion_mse, hybrid_loss, philox_normal

__all__ = ["add_noise", "diffusion_mse", "hybrid_loss", "philox_normal"]
