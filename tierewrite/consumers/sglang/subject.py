"""What SGLang's rules look at: a subject with SGLang's reading of the quantization config, and what its class does."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

from tierewrite.consumers import modelopt
from tierewrite.consumers.modelopt import FUSED, Declared, Layout
from tierewrite.consumers.sglang.classes import ModelClass, model_class
from tierewrite.consumers.subject import Module, Subject
from tierewrite.errors import shown
from tierewrite.formats.experts import split_expert
from tierewrite.ties.on_disk import on_disk

VERSION = "0.5.23"
HEADS = frozenset({"lm_head", "embed_out", "proj_out", "output_projection"})
"""Last words of the modules that are a model's head."""


class SglangSubject(Subject):
    """A subject with SGLang's reading of the quantization config."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        known = self.known
        if known.how == "read":
            self.notes.append(
                f"what SGLang does with '{shown(self.architecture)}' was searched in its text; its loader was not run"
            )
        elif known.how == "not known":
            self.notes.append(
                f"what SGLang {VERSION} does with '{shown(self.architecture)}' is not known: its ties and left-over "
                "tensors were not checked"
            )

    @cached_property
    def known(self) -> ModelClass:
        """What is known of the class that SGLang builds: the first one in the config."""
        found = model_class(self.architecture)
        quantized = isinstance(self.config.get("quantization_config"), dict) or bool(self.folder.quant_config)
        return found if quantized else found.unquantized()

    @cached_property
    def declared(self) -> Declared | None:
        """The quantization config that SGLang uses: config.json's, else hf_quant_config.json (weight_utils.py
        `get_quant_config`).
        """
        inside, beside = modelopt.declared(self)
        found = inside or (None if isinstance(self.config.get("quantization_config"), dict) else beside)
        # modelopt_quant.py `ModelOptFp4Config.from_config`: 16 where NVFP4 says nothing.
        return replace(found, group_size=16) if found and found.group_size is None and "NVFP4" in found.algo else found

    @property
    def layout(self) -> Layout | None:
        """What a quantized module must have on disk, where that is known."""
        return self.declared.layout if self.declared is not None else None

    def excluded_by(self, module: str) -> list[int]:
        """Entries of the exclude list, by number, that leave the module unquantized.

        modelopt_quant.py `ModelOptQuantConfig.is_layer_excluded`: a wildcard of the whole name or of one part of it,
        after fusing; quantization/utils.py `is_layer_skipped`: a path within the name, before fusing.
        """
        fused = modelopt.fused_name(module)
        if split_expert(module)[1] is not None:
            module = fused  # the experts of a layer are one module
        if module not in self._excluded:
            names = {fused, fused.removeprefix("language_model.")}
            parts = list(dict.fromkeys(part for name in names for part in (name, *name.split("."))))
            self._excluded[module] = [
                number
                for number, (entry, pattern) in enumerate(self._patterns)
                if f".{entry.rstrip('.')}." in f".{module}." or any(fnmatchcase(part, pattern) for part in parts)
            ]
        return self._excluded[module]

    @cached_property
    def _excluded(self) -> dict[str, list[int]]:
        return {}

    @cached_property
    def _patterns(self) -> list[tuple[str, str]]:
        """The entries, each with the wildcard that SGLang makes of it, in which only a star means something."""
        entries = self.declared.exclude if self.declared is not None else ()
        return [(entry, entry.replace("[", "[[]").replace("?", "[?]")) for entry in entries]

    @cached_property
    def built_quantized(self) -> dict[str, Module]:
        """Modules that are quantized on disk and that SGLang builds quantized."""
        if self.layout is None or self.known.quantized is False:
            return {}
        return modelopt.quantized_modules(self, lambda name: bool(self.excluded_by(name)))

    def tied(self) -> Iterator[tuple[str, tuple[str, ...]]]:
        """Canonical name and aliases on disk of every declared tie, part by part."""
        if self.ties is not None:
            for group in on_disk(self.ties, self.entries).groups:
                for canonical, *aliases in group.slots:
                    yield canonical, tuple(aliases)

    def stored(self, name: str) -> bool:
        """The tensor, or something of its module, is on disk."""
        return name in self.entries or (name.endswith(".weight") and name.removesuffix(".weight") in self._stems)

    @cached_property
    def _stems(self) -> set[str]:
        return {key.rpartition(".")[0] for key in self.entries}

    def shards_of(self, module: str) -> list[str]:
        """The other projections of the parameter that it is fused into, as far as they are stored; with itself."""
        parent, _, leaf = module.rpartition(".")
        names = next((shards for shards in FUSED.values() if leaf in shards), (leaf,))
        return [name for shard in names if (name := f"{parent}.{shard}") in self.modules]


def is_head(name: str) -> bool:
    """Whether it is the weight of a model's head."""
    return name.endswith(".weight") and name.removesuffix(".weight").rpartition(".")[2] in HEADS
