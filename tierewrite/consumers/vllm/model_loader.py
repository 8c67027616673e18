"""vLLM's default model loader, given what a rewrite would write in place of what the files hold.

The class is imported by vLLM alone, through `plugin.register`. All is decided by `tierewrite.stream` for the
consumer vllm: what `rewrite --for vllm` would refuse is refused before any weight is loaded, with the same message.

What of vLLM is used (0.32.0 and 0.33.0):

- public: the entry point `vllm.general_plugins`, `register_model_loader`, `BaseModelLoader`'s methods `create_model`
  and `load_weights`, `LoadConfig`.
- private: `DefaultModelLoader.Source`, `_prepare_weights` (the folder of a model) and `_get_weights_iterator`
  (replaced); `counter_before_loading_weights`; `local_expert_ids` with `ep_weight_filter.should_skip_weight`;
  `ModelConfig.word_embeddings_untied_by_checkpoint` (vLLM unties a head that is stored before any loader exists, in
  `ModelConfig.maybe_untie_word_embeddings`: undone here if the head is dropped); `VllmConfig._get_quantization_config`
  (the quantization config is read before, too: made again from the corrected ignore list); in plugin.py
  `_LOAD_FORMAT_TO_MODEL_LOADER` (to register once).

A version that changes one of these may load wrong weights without an error, so versions that were not tested are
refused, unless `{"any_version": true}`. One that is new is tested by tests/test_vllm_plugin.py: every parameter has to
equal that of the rewritten checkpoint.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import time
from collections.abc import Iterator, Mapping

import huggingface_hub
import torch
import vllm
from vllm.config import ModelConfig, VllmConfig
from vllm.config.load import LoadConfig
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.ep_weight_filter import should_skip_weight

import tierewrite
from tierewrite.consumers.vllm.plugin_options import OF_VLLM, checked_options, refuse_untested
from tierewrite.errors import UsageError
from tierewrite.source.table import CONFIG_NAME, QUANT_CONFIG_NAME

log = logging.getLogger("vllm.tierewrite")
_WARNINGS = 5
"""Of one checkpoint, in vLLM's log."""


class CanonicalModelLoader(DefaultModelLoader):
    """vLLM's DefaultModelLoader over `tierewrite.stream`.

    Args:
        load_config: vLLM's; its `model_loader_extra_config` holds the options.

    Raises:
        UsageError: an option that does not exist or cannot be, or a version of vLLM that was not tested.
    """

    counter_before_loading_weights: float

    def __init__(self, load_config: LoadConfig) -> None:
        given = load_config.model_loader_extra_config
        extra = dict(given) if isinstance(given, dict) else {}
        inner = {name: extra.pop(name) for name in OF_VLLM if name in extra}
        self._options = checked_options(extra)
        refuse_untested(vllm.__version__, self._options.pop("any_version", False))
        self._reader: str | None = self._options.pop("inner_format", None)
        # DefaultModelLoader knows neither the format's name nor the options.
        super().__init__(
            dataclasses.replace(load_config, load_format=self._reader or "safetensors", model_loader_extra_config=inner)
        )
        self._streams: dict[str, tierewrite.Stream] = {}

    def create_model(self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str = "") -> torch.nn.Module:
        """The model, built for the checkpoint that a rewrite would write. Raises what `tierewrite.stream` raises."""
        stream = self._stream_of(model_config)
        if model_config.word_embeddings_untied_by_checkpoint and not any(
            name.endswith("lm_head.weight") for name in stream.names
        ):
            tie_again(model_config)
        correct_quantization(vllm_config, model_config, self.load_config, stream.configs)
        return super().create_model(vllm_config, model_config, prefix)

    def load_weights(self, model: torch.nn.Module, model_config: ModelConfig) -> None:
        """Fills the model. Raises what `tierewrite.stream` raises, SourceChanged, and what vLLM's loader raises."""
        self._stream_of(model_config)
        super().load_weights(model, model_config)

    def _stream_of(self, model_config: ModelConfig) -> tierewrite.Stream:
        """The checkpoint of a model, decided once."""
        model, revision = model_config.model, model_config.revision
        if model not in self._streams:
            folder = self._prepare_weights(model, None, revision, False, None)[0]
            if not os.path.isdir(model):
                fetch_configs(model, revision, self.load_config.download_dir)
            options = {"trust_remote_code": model_config.trust_remote_code, **self._options}
            began = time.perf_counter()
            stream = tierewrite.stream(folder, consumer="vllm", **options)
            log.info(
                "tierewrite: %d tensors of %d in the files, %s bytes hashed, decided in %.2f s",
                len(stream), len(stream.plan.source), f"{stream.hashed_bytes:,}", time.perf_counter() - began,
            )  # fmt: skip
            for sentence in stream.warnings[:_WARNINGS]:
                log.warning("tierewrite: %s", sentence)
            if len(stream.warnings) > _WARNINGS:
                log.warning(
                    "tierewrite: %d more warnings; `tierewrite plan` shows them", len(stream.warnings) - _WARNINGS
                )
            self._streams[model] = stream
        return self._streams[model]

    def _get_weights_iterator(self, source: DefaultModelLoader.Source) -> Iterator[tuple[str, torch.Tensor]]:
        """See DefaultModelLoader: what the rewritten files would give, in the order that they would give it."""
        stream = self._streams.get(source.model_or_path)
        if stream is None or source.subfolder is not None or source.prefix:
            inner: Iterator[tuple[str, torch.Tensor]] = super()._get_weights_iterator(source)
            return inner  # what the model reads besides its own checkpoint
        if source.allow_patterns_overrides is not None:
            raise UsageError(
                f"this model class reads files of its own choice ({', '.join(source.allow_patterns_overrides)}), which "
                "--load-format tierewrite cannot; load it without"
            )
        if self.load_config.safetensors_load_strategy == "torchao":
            raise UsageError(
                "vLLM puts torchao's tensors together out of the files themselves, which --load-format tierewrite "
                "cannot; rewrite the checkpoint first (tierewrite rewrite SRC DST --for vllm), and load DST"
            )
        if self._reader is not None:
            return stream.through(super()._get_weights_iterator(source))
        if self.counter_before_loading_weights == 0.0:
            self.counter_before_loading_weights = time.perf_counter()
        local = self.local_expert_ids
        wanted = None if local is None else lambda name: not should_skip_weight(name, local)
        return stream.tensors(by_name=True, wanted=wanted)


def tie_again(model_config: ModelConfig) -> None:
    """Undoes `ModelConfig.maybe_untie_word_embeddings`: the head that was found in the files is dropped."""
    model_config.hf_config.tie_word_embeddings = True
    model_config.hf_config.get_text_config().tie_word_embeddings = True
    model_config.word_embeddings_untied_by_checkpoint = False


def correct_quantization(
    vllm_config: VllmConfig, model_config: ModelConfig, load_config: LoadConfig, configs: Mapping[str, bytes]
) -> None:
    """Gives vLLM the quantization config of the rewritten checkpoint, where that differs.

    vLLM reads `quantization_config` of config.json, there or in its `text_config`, else hf_quant_config.json
    (transformers_utils/config.py `get_config`, weight_utils.py `get_quant_config`).

    Args:
        configs: the configs that a rewrite would change, by name.
    """
    owner, quantization = model_config.hf_config, None
    if CONFIG_NAME in configs:
        content = json.loads(configs[CONFIG_NAME])
        text = content.get("text_config")
        quantization = content.get("quantization_config")
        if quantization is None and isinstance(text, dict) and text.get("quantization_config") is not None:
            owner, quantization = owner.text_config, text["quantization_config"]
    if quantization is None and QUANT_CONFIG_NAME in configs:
        quantization = json.loads(configs[QUANT_CONFIG_NAME])
    if quantization is None or model_config.quantization is None:
        return
    owner.quantization_config = quantization
    before = vllm_config.quant_config
    vllm_config.quant_config = VllmConfig._get_quantization_config(model_config, load_config)
    if hasattr(before, "use_deep_gemm"):  # decided when the config was made
        vllm_config.quant_config.use_deep_gemm = before.use_deep_gemm


def fetch_configs(model: str, revision: str | None, download_dir: str | None) -> None:
    """Brings the configs of a hub id into the snapshot that vLLM has brought the weights into."""
    huggingface_hub.snapshot_download(
        model,
        revision=revision,
        cache_dir=download_dir,
        allow_patterns=["*.json", "*.py"],
        local_files_only=huggingface_hub.constants.HF_HUB_OFFLINE,
    )
