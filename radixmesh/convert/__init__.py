"""Checkpoints from one form to another: safetensors, and Orbax as JAX programs read it."""
