"""Sampling: one step of DDIM, DDPM or flow matching, with a timestep per frame, guidance and exact hold."""

from vidkern.ops.sampling.op import ddim_step, ddpm_step, flow_step

__all__ = ["ddim_step", "ddpm_step", "flow_step"]
