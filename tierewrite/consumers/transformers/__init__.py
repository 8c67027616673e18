"""transformers as a consumer: its record. Its rules are in `rules`, the names that its quantizers need in `names`."""

from __future__ import annotations

from tierewrite.consumers.backbone import BackboneTable
from tierewrite.consumers.consumer import Consumer
from tierewrite.consumers.subject import Subject
from tierewrite.consumers.transformers.names import needed_names
from tierewrite.consumers.transformers.rules import MODELING, RULES, WHOLE_FILE
from tierewrite.planning.policy import FOR_CONSUMER

TRANSFORMERS: Consumer[Subject] = Consumer(
    name="transformers",
    version="5.24.0",
    reads_alone=WHOLE_FILE,  # `_get_resolved_checkpoint_files`
    presets=FOR_CONSUMER["transformers"],
    # ties.on_disk has applied transformers' own renamings already.
    backbones=BackboneTable.names_unchanged(MODELING),
    rules=RULES,
    subject_type=Subject,
    needed_names=needed_names,
)
