"""Rewrites exported safetensors checkpoints so that every tied weight is stored once, under its canonical name.

    import tierewrite

    report = tierewrite.rewrite("naive", "canonical")
    print(report.before_bytes, "->", report.after_bytes)

What is listed in `__all__` is the public interface; everything else may change. Names are loaded when first used, so
that importing the package costs nothing (no torch, no transformers, no NumPy).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_WHERE = {
    "rewrite": "rewriting",
    "plan": "rewriting",
    "inspect": "inspection",
    "verify": "verification",
    "report_page": "pages",
    "Page": "pages",
    "dedupe_state_dict": "state_dict",
    "prepare_for_vllm": "rewriting",
    "check": "readiness",
    "ReadinessReport": "readiness",
    "NotReady": "errors",
    "batch": "batching",
    "BatchReport": "batching",
    "BatchResult": "batching",
    "BatchInterrupted": "batching",
    "Progress": "engines",
    "Report": "report",
    "RewritePlan": "planning",
    "Inspection": "inspection",
    "Verification": "verification",
    "TieMap": "ties",
    "TierewriteError": "errors",
    "UsageError": "errors",
    "TieFileError": "errors",
    "Refused": "errors",
    "SourceError": "errors",
    "HeaderError": "errors",
    "ShardIndexError": "errors",
    "ConfigError": "errors",
    "SystemFailure": "errors",
    "SourceChanged": "errors",
    "VerificationFailed": "errors",
    "Interrupted": "errors",
}

__all__ = [
    "BatchInterrupted",
    "BatchReport",
    "BatchResult",
    "ConfigError",
    "HeaderError",
    "Inspection",
    "Interrupted",
    "NotReady",
    "Page",
    "Progress",
    "ReadinessReport",
    "Refused",
    "Report",
    "RewritePlan",
    "ShardIndexError",
    "SourceChanged",
    "SourceError",
    "SystemFailure",
    "TieFileError",
    "TieMap",
    "TierewriteError",
    "UsageError",
    "Verification",
    "VerificationFailed",
    "__version__",
    "batch",
    "check",
    "dedupe_state_dict",
    "inspect",
    "plan",
    "prepare_for_vllm",
    "report_page",
    "rewrite",
    "verify",
]

if TYPE_CHECKING:
    from tierewrite.batching import BatchInterrupted, BatchReport, BatchResult, batch
    from tierewrite.engines import Progress
    from tierewrite.errors import (
        ConfigError,
        HeaderError,
        Interrupted,
        NotReady,
        Refused,
        ShardIndexError,
        SourceChanged,
        SourceError,
        SystemFailure,
        TieFileError,
        TierewriteError,
        UsageError,
        VerificationFailed,
    )
    from tierewrite.inspection import Inspection, inspect
    from tierewrite.pages import Page, report_page
    from tierewrite.planning import RewritePlan
    from tierewrite.readiness import ReadinessReport, check
    from tierewrite.report import Report
    from tierewrite.rewriting import plan, prepare_for_vllm, rewrite
    from tierewrite.state_dict import dedupe_state_dict
    from tierewrite.ties import TieMap
    from tierewrite.verification import Verification, verify


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'tierewrite' has no attribute '{name}'")
    value = getattr(importlib.import_module(f"tierewrite.{_WHERE[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
