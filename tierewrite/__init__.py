"""Rewrites exported safetensors checkpoints so that every tied weight is stored once, under its canonical name.

    import tierewrite

    report = tierewrite.rewrite("naive", "canonical")
    print(report.before_bytes, "->", report.after_bytes)

The public interface is what `__init__.pyi` lists, and only that; everything else may change. Names are loaded when
first used, so that importing the package costs nothing (no torch, no transformers, no NumPy).
"""

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """The first use of a public name: `lazy_loader` takes over. (A command has its signals by then.)"""
    _attach()
    return globals()["__all__"] if name == "__all__" else globals()["__getattr__"](name)


def __dir__() -> list[str]:
    _attach()
    return list(globals()["__all__"])


def _attach() -> None:
    import lazy_loader

    try:
        public = lazy_loader.attach_stub(__name__, __file__)
    except ValueError as error:
        raise ImportError("tierewrite cannot be imported from an archive: it reads files; pip install it") from error
    globals().update(zip(("__getattr__", "__dir__", "__all__"), public, strict=True))
