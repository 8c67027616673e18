"""Rewrites exported safetensors checkpoints so that every tied weight is stored once."""

__version__ = "0.1.0"
