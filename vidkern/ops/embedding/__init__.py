"""Embedding: sinusoidal embeddings of timesteps."""

from vidkern.ops.embedding.op import timestep_embedding

__all__ = ["timestep_embedding"]
