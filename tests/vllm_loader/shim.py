"""Import this before vllm: picks vLLM's CPU platform, and lets a CUDA build of torchvision import beside a
CPU torch (its compiled operators do not load, and nothing here calls them)."""

from __future__ import annotations

import os
from typing import Any

os.environ["VLLM_TARGET_DEVICE"] = "cpu"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

import torch

_register_fake = torch.library.register_fake


def _skip_torchvision(op: Any, func: Any = None, /, **kw: Any) -> Any:
    if isinstance(op, str) and op.startswith("torchvision::"):
        return (lambda f: f) if func is None else func
    return _register_fake(op, func, **kw)


torch.library.register_fake = _skip_torchvision
try:
    import torchvision  # noqa: F401
finally:
    torch.library.register_fake = _register_fake
