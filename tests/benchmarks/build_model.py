"""What asking a model class for its ties costs at least: import torch and transformers, build the class on `meta`.

python build_model.py CHECKPOINT
"""

from __future__ import annotations

import sys

import torch
import transformers


def main(checkpoint: str) -> None:
    config = transformers.AutoConfig.from_pretrained(checkpoint)
    model_class = getattr(transformers, config.architectures[0])
    with torch.device("meta"):
        model = model_class(config)
    assert model.all_tied_weights_keys


if __name__ == "__main__":
    main(sys.argv[1])
