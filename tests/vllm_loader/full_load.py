"""vLLM's own loader with real bytes on a CPU, for any class: the judge of the dry load.

    PYTHON full_load.py FOLDER...        a JSON line each, in their order

Configs, model and loaders are those that consumers/vllm/dry_load.py runs, and so is the choice of kernels; here the
parameters have memory and the tensors have bytes. Every folder is loaded into two models whose memory was filled with
two different patterns: an element that keeps both was written by nobody. Tiny models only.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).resolve().parents[2] / "tierewrite" / "consumers" / "vllm" / "dry_load.py"


def dry_load() -> Any:
    """The script as a module; it finds what it imports by the first entry of the path."""
    spec = importlib.util.spec_from_file_location("vllm_dry_load", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


script = dry_load()
import torch  # noqa: E402 (after the script, which chooses the platform)


def built(config: Any) -> torch.nn.Module:
    """The model with memory."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    config.compilation_config.static_forward_context.clear()
    with set_current_vllm_config(config), set_default_torch_dtype(config.model_config.dtype):
        return initialize_model(config)


def pattern(target: torch.Tensor, which: int) -> torch.Tensor:
    """Bytes that no checkpoint of the tests holds."""
    raw = torch.empty(target.shape, dtype=target.dtype)
    raw.reshape(-1).view(torch.uint8).fill_((0x39, 0x3A)[which])
    return raw


def same_elements(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Which elements have the same bytes."""
    size = a.element_size()
    rows = [t.detach().contiguous().reshape(-1).view(torch.uint8).view(-1, size) for t in (a, b)]
    return (rows[0] == rows[1]).all(1)


def loaded(folder: str) -> dict[str, Any]:
    """Outcome, the key that the load is aborted at, and the elements that nobody wrote, by parameter."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    vllm = script.Vllm()
    with tempfile.TemporaryDirectory() as home:
        try:
            config = vllm.prepare(folder, 0, 1, f"file://{home}/meeting", False)
            models = [built(config), built(config)]
        except Exception as error:
            return {"outcome": "refused", "error": f"{type(error).__name__}: {error}"[:300]}
        key: list[str | None] = [None]
        failed = None
        for which, model in enumerate(models):
            for target in vllm.targets(model).values():
                if not target.is_meta and target.numel():
                    target.data.copy_(pattern(target, which))
            loader = DefaultModelLoader(config.load_config)
            everything = loader.get_all_weights

            def watched(*args: Any, everything: Any = everything) -> Any:
                for name, tensor in everything(*args):
                    key[0] = name
                    yield name, tensor
                key[0] = None

            loader.get_all_weights = watched
            try:
                with set_current_vllm_config(config):
                    loader.load_weights(model, config.model_config)
            except Exception as error:
                failed = f"{type(error).__name__}: {error}"[:300]
                if "not initialized" not in failed:
                    return {"outcome": "aborts", "key": key[0], "error": failed}
        first, second = map(vllm.targets, models)
        unfilled = {}
        for name, target in first.items():
            if target.is_meta or not target.numel():
                continue
            kept = same_elements(target, pattern(target, 0)) & same_elements(second[name], pattern(target, 1))
            if kept.any():
                unfilled[name] = int(kept.sum())
        return {"outcome": "loaded", "failed": failed, "unfilled": unfilled}


def main() -> None:
    """A forked child for each folder: vLLM keeps global state."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.set_num_threads(1)
    script.Vllm().imports()
    for folder in sys.argv[1:]:
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                answer = loaded(folder)
            except BaseException as error:
                traceback.print_exc()
                answer = {"outcome": "harness", "error": repr(error)[:300]}
            with os.fdopen(write, "w") as file:
                json.dump(answer, file)
            os._exit(0)
        os.close(write)
        with os.fdopen(read) as file:
            text = file.read()
        os.waitpid(pid, 0)
        out.write((text or '{"outcome": "harness", "error": "its process was ended"}') + "\n")
        out.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
