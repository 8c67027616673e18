"""What a suffix means: the quantization families, and the questions that are asked of them.

Each family is a small file with one `Family` of data; `families.MODULES` lists them. Adding a format is adding such a
file, its name there, and a fixture (README.md).

What is refused: guessing. A suffix under a tied module that no family knows is None, and the group that holds
it is left alone by whoever asked.
"""

from __future__ import annotations

from tierewrite.formats.detection import Recognised, detect, recognise, written_in
from tierewrite.formats.families import FAMILIES
from tierewrite.formats.family import Companion, Family, Role, Signs
from tierewrite.formats.smoothing import Adjacency
from tierewrite.formats.suffixes import (
    beginnings,
    classify,
    concerns,
    ends_longer_suffix,
    fused_companions,
    fused_parameters,
    is_companion,
    is_main,
    is_own_parameter,
    kv_scale,
    kv_words,
    main_names,
    main_parameter,
    part_of_weight,
)

__all__ = [
    "FAMILIES",
    "Adjacency",
    "Companion",
    "Family",
    "Recognised",
    "Role",
    "Signs",
    "beginnings",
    "classify",
    "concerns",
    "detect",
    "ends_longer_suffix",
    "fused_companions",
    "fused_parameters",
    "is_companion",
    "is_main",
    "is_own_parameter",
    "kv_scale",
    "kv_words",
    "main_names",
    "main_parameter",
    "part_of_weight",
    "recognise",
    "written_in",
]
