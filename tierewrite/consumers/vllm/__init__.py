"""vLLM as a consumer.

It loads incomplete and contradictory quantized checkpoints without a warning; each rule here names one way in which
that goes wrong.

The functions' docstrings name where in vLLM 0.33 the behaviour was read (below vllm/ of the package), and
tests/vllm_behaviour.json records what the real loader does with a checkpoint that has the defect.

classes.json is what vLLM's own classes do with names, recorded by tests/vllm_loader/classes.py: which they know, read,
pass over and refuse, and which modules take a quantization. Where it lacks a class, a note says so, and no finding is
made of what only the class decides.

Not checked: what the weights' values mean; tensor-parallel layouts; algorithms that schemes.py does not know, beyond
names and completeness (a note says so).
"""

from __future__ import annotations

from pathlib import Path

from tierewrite.consumers.backbone import BackboneTable
from tierewrite.consumers.consumer import Consumer
from tierewrite.consumers.dry_load import DryLoader
from tierewrite.consumers.loader_rules import loader_rules
from tierewrite.consumers.rules import RuleSet
from tierewrite.consumers.vllm import (
    rules_config,
    rules_files,
    rules_ignore,
    rules_names,
    rules_scales,
    rules_shapes,
    rules_unread,
)
from tierewrite.consumers.vllm.corrected_ignore import corrected_ignore_lists
from tierewrite.consumers.vllm.subject import VllmSubject
from tierewrite.planning.policy import FOR_CONSUMER

SEEN_BY_LOADER = frozenset(
    {
        "architectures", "cannot-be-quantized", "group-size-mismatch", "ignore-everything", "ignore-one-expert",
        "ignore-partly-fused", "ignore-side-conflict", "ignore-substring", "ignored-but-quantized", "not-divisible",
        "quant-algo-mismatch", "quant-config-invalid", "quant-config-missing", "unlisted-lm-head",
        "unlisted-unquantized",
    }
)  # fmt: skip

VLLM: Consumer[VllmSubject] = Consumer(
    name="vllm",
    version="0.33.0",
    # Mistral's own format: default_loader.py `_prepare_weights`. Else the files that the index names, or all.
    reads_alone="consolidated*.safetensors",
    presets=FOR_CONSUMER["vllm"],
    backbones=BackboneTable.read(Path(__file__).parent / "backbones.json", Path(__file__).parent / "classes.json"),
    rules=RuleSet.joined(
        rules_files.RULES,
        rules_config.RULES,
        rules_ignore.RULES,
        rules_names.RULES,
        rules_unread.RULES,
        rules_shapes.RULES,
        rules_scales.RULES,
    ),
    subject_type=VllmSubject,
    corrected_configs=corrected_ignore_lists,
    seen_by_loader=SEEN_BY_LOADER,
    loader_rules=loader_rules("vLLM"),
    dry_loader=DryLoader("vLLM", "vllm", Path(__file__).parent / "dry_load.py"),
)
