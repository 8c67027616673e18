"""The entry point `vllm.general_plugins`: registers `--load-format tierewrite`, and never stops vLLM.

    vllm serve exported --load-format tierewrite
    vllm serve exported --load-format tierewrite \\
        --model-loader-extra-config '{"on_mismatch": "keep", "ties": "ties.json"}'

vLLM loads plugins in every process, and one whose `register` raises stops it; so whatever goes wrong here becomes a
warning, and vLLM then does not know the load format. What is read in a checkpoint, and when, says `model_loader`.
"""

from __future__ import annotations

import logging

LOAD_FORMAT = "tierewrite"

log = logging.getLogger(__name__)


def register() -> None:
    """Makes the load format known to the vLLM of this process; again is no error. Never raises."""
    try:
        from vllm.model_executor.model_loader import _LOAD_FORMAT_TO_MODEL_LOADER, register_model_loader

        from tierewrite.consumers.vllm.model_loader import CanonicalModelLoader

        if _LOAD_FORMAT_TO_MODEL_LOADER.get(LOAD_FORMAT) is not CanonicalModelLoader:
            register_model_loader(LOAD_FORMAT)(CanonicalModelLoader)
    except Exception as error:
        log.warning("--load-format %s is not available: %s: %s", LOAD_FORMAT, type(error).__name__, error)
