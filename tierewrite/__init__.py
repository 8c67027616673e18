"""Rewrites exported safetensors checkpoints so that every tied weight is stored once, under its canonical name.

    import tierewrite

    report = tierewrite.rewrite("naive", "canonical")
    print(report.before_bytes, "->", report.after_bytes)

The public interface is what `__init__.pyi` lists, and only that; everything else may change. Names are loaded when
first used, so that importing the package costs nothing (no torch, no transformers, no NumPy).
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
