"""Arithmetic on scales and NVFP4 weights. `tierewrite.nvfp4` is public: the codec by itself, for conversion scripts."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
