"""SGLang as a consumer.

It looks for no parameter that is not filled, so that incomplete checkpoints load without a warning, and in some fifty
classes it does not tie the head that the config says is tied. What its classes do is in classes.json, measured by
running its loader; the rules' docstrings name where in SGLang 0.5.23 the behaviour was read (below sglang/srt/).

Not checked by rules: algorithms other than ModelOpt's NVFP4 and FP8 (a note says so); the dry load checks them all.
"""

from __future__ import annotations

from pathlib import Path

from tierewrite.consumers.backbone import BackboneTable
from tierewrite.consumers.consumer import Consumer
from tierewrite.consumers.dry_load import DryLoader
from tierewrite.consumers.loader_rules import loader_rules
from tierewrite.consumers.rules import RuleSet
from tierewrite.consumers.sglang import rules_names, rules_quantization
from tierewrite.consumers.sglang.needed import needed_names
from tierewrite.consumers.sglang.subject import VERSION, SglangSubject
from tierewrite.planning.policy import FOR_CONSUMER

SGLANG: Consumer[SglangSubject] = Consumer(
    name="sglang",
    version=VERSION,
    reads_alone="",  # the files that the index names, or all: weight_utils.py filter_duplicate_safetensors_files
    presets=FOR_CONSUMER["sglang"],
    backbones=BackboneTable.names_unchanged("models/registry.py"),
    rules=RuleSet.joined(rules_names.RULES, rules_quantization.RULES),
    subject_type=SglangSubject,
    needed_names=needed_names,
    loader_rules=loader_rules("SGLang"),
    dry_loader=DryLoader("SGLang", "sglang", Path(__file__).parent / "dry_load.py"),
)
