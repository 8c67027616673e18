"""What people keep beside checkpoints and no rewrite is for: adapters, pipelines, other formats, tokenizers."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from tierewrite.errors import shown
from tierewrite.source.folder import loader_of, safetensors_among
from tierewrite.source.side_files import in_other_formats
from tierewrite.source.table import CONFIG_NAME, INDEX_NAME

PIPELINE_NAME = "model_index.json"
"""What makes a folder a pipeline of diffusers (diffusers' `DiffusionPipeline.config_name`)."""

_POINTER = b"version https://git-lfs.github.com/spec/"
_POINTER_BYTES = 1024
"""The most that a pointer has (git-lfs' docs/spec.md)."""


def no_model(files: Collection[str]) -> str | None:
    """Why a folder with files of these names is none that a rewrite is for; None if it may be one, or is neither."""
    if PIPELINE_NAME in files:
        return f"a pipeline of diffusers ({PIPELINE_NAME}), whose parts are loaded together"
    weights = safetensors_among(files)
    if weights:
        kinds = [loader_of(name) for name in weights]
        if INDEX_NAME not in files and all(kinds):
            return f"holds {kinds[0]} ('{shown(weights[0])}'), which is loaded by that name, and no model"
        return None
    if INDEX_NAME in files:
        return None
    others = in_other_formats(files)
    if others:
        what = "GGUF weights" if others[0].endswith(".gguf") else "weights in another format than safetensors"
        return f"holds {what} ('{shown(others[0])}')"
    if any(name.startswith("tokenizer") or name == CONFIG_NAME for name in files):
        return "holds a tokenizer or a config, and no weights"
    return None


def pointers(folder: Path, files: Collection[str]) -> str | None:
    """Why a checkpoint cannot be read: its weights are Git LFS pointers. None if they are not."""
    for name in safetensors_among(files):
        try:
            if (folder / name).stat().st_size > _POINTER_BYTES:
                continue
            with open(folder / name, "rb") as file:
                begins = file.read(len(_POINTER))
        except OSError:  # its own rewrite fails, and says why
            continue
        if begins == _POINTER:
            return f"its weights are Git LFS pointers ('{shown(name)}'); run `git lfs pull` in it"
    return None


def why_skipped(folder: Path) -> str | None:
    """Why a folder of a list is skipped; None if it is not."""
    try:
        files = [path.name for path in folder.iterdir() if not path.is_dir()]
    except OSError:
        return None
    return no_model(files) or pointers(folder, files)
