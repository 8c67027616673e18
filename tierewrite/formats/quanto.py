"""optimum-quanto: integers and FP8 by channel or group, with or without quantized activations.

Sources (optimum-quanto 0.2.7, optimum/quanto/):
- tensor/weights/qbytes.py and qtensor.py `save_to_state_dict`: 8-bit weights become `weight._data` (I8 or F8) and
  `weight._scale`; tensor/weights/qbits.py: 2- and 4-bit ones become `weight._data._data` (U8, packed), `weight._scale`
  and `weight._shift`.
- nn/qmodule.py `_save_to_state_dict`: `input_scale` and `output_scale` of every module, 1.0 until a calibration sets
  them, which needs quantized activations. They are factors: the range is 127 (or the largest FP8 number) times that.
- the types of all modules stand in quanto_qmap.json (models/transformers_models.py `_save_pretrained`), and nothing in
  config.json: see `formats.descriptions`.
"""

from __future__ import annotations

from tierewrite.formats.family import Family, Signs, activation, main, weight

FAMILY = Family(
    name="quanto",
    signs=Signs(methods=("quanto",), endings=("_data",)),
    companions=(
        *main("weight", "weight._data", "weight._data._data"),
        *weight("weight._scale", "weight._shift"),
        *activation("max", "input_scale", "output_scale", uncalibrated=(1.0,), optional=True),
    ),
    # Other families' scales of these names have no value that means "not calibrated".
    own_only=frozenset({"input_scale", "output_scale"}),
)
