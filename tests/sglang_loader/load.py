#!/usr/bin/env python3
"""Feed checkpoints to SGLang's own model classes and weight loaders on a CPU, with their bytes.

    VENV/bin/python load.py --out FILE CKPT_DIR...

The judge of consumers/sglang/dry_load.py, whose replacements for a GPU it uses: here memory is real, files are read by
SGLang's own iterator, and what was written is seen in the bytes. Every folder is loaded three times: as it is, and over
two patterns; an element that differs between those two was written by no key. Writes one JSON object by folder name.
Tiny models only.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1] / "tierewrite" / "consumers" / "sglang"))
sys.dont_write_bytecode = True
import dry_load  # noqa: E402
import torch  # noqa: E402

PATTERNS = (0x11, 0x2E)


class Log(logging.Handler):
    """Collects SGLang's warnings."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.add(record.getMessage()[:200])


def raw(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's bytes, sharing its memory."""
    return tensor.detach().reshape(-1).view(torch.uint8)


def digest(tensor: torch.Tensor) -> str:
    """Short SHA-256 of dtype, shape and bytes."""
    content = bytes(raw(tensor.detach().contiguous()).numpy())
    return hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode() + content).hexdigest()[:16]


def fill(loader: dry_load.Sglang, prepared: Any, pattern: int | None) -> tuple[dict[str, torch.Tensor], str, str]:
    """Builds and loads the model once: what it holds, the key at which the load was aborted, and what SGLang said."""
    from sglang.srt.model_loader import loader as sglang_loader
    from sglang.srt.model_loader.utils import set_default_torch_dtype

    config, load_config, _ = prepared
    with set_default_torch_dtype(config.dtype):
        model = sglang_loader._initialize_model(*prepared)
    targets = loader.targets(model)
    if pattern is not None:
        for tensor in targets.values():
            if tensor.numel():
                raw(tensor.data).fill_(pattern)
    at = ""

    def watched(items: Any) -> Any:
        nonlocal at
        for key, tensor in items:
            at = key
            yield key, tensor

    items = sglang_loader.DefaultModelLoader(load_config)._get_all_weights(config, model)
    try:
        with set_default_torch_dtype(config.dtype):
            sglang_loader.DefaultModelLoader.load_weights_only(model, watched(items), torch.device("cpu"))
    except Exception as error:
        return targets, at, f"{type(error).__name__}: {error}"[:200]
    return targets, "", ""


def load(loader: dry_load.Sglang, folder: Path) -> dict[str, Any]:
    """What SGLang does with one folder."""
    log = Log()
    with tempfile.TemporaryDirectory() as home:
        try:
            prepared = loader.prepare(str(folder), 0, 1, f"file://{home}/meeting", False)
            logging.getLogger().addHandler(log)
            held, key, error = fill(loader, prepared, None)
        except Exception as e:
            return {"refused": f"{type(e).__name__}: {e}"[:200]}
        if error:
            return {"key": key, "error": error}
        first, second = (fill(loader, prepared, pattern)[0] for pattern in PATTERNS)
    unfilled = {
        name: int((raw(tensor) != raw(second[name])).view(-1, tensor.element_size()).any(1).sum())
        for name, tensor in first.items()
        if tensor.numel()
    }
    unfilled = {name: count for name, count in unfilled.items() if count}
    digests = {name: digest(t) for name, t in held.items() if t.numel() and name not in unfilled}
    return {"unfilled": unfilled, "digests": digests, "warns": len(log.lines)}


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", required=True)
    parser.add_argument("folders", nargs="+", type=Path)
    options = parser.parse_args()
    loader = dry_load.Sglang()
    found: dict[str, Any] = {"sglang": loader.imports()}
    torch.set_num_threads(1)
    for folder in options.folders:
        with tempfile.NamedTemporaryFile() as file:
            child = os.fork()
            if not child:
                Path(file.name).write_text(json.dumps(load(loader, folder)), encoding="utf-8")
                os._exit(0)
            os.waitpid(child, 0)
            text = Path(file.name).read_text(encoding="utf-8")
        found[folder.name] = json.loads(text) if text else {"crashed": True}
    Path(options.out).write_text(json.dumps(found), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
