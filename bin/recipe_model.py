"""What bin/recipe has in place of the 26B download: a tiny random DiffusionGemma with a tokenizer, and some prompts.

python bin/recipe_model.py MODEL PROMPTS
"""

import string
import sys
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import DiffusionGemmaForBlockDiffusion, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parent.parent / "fixtures" / "make"))
from tiny_models import diffusion_gemma_config

SPECIAL = ["<pad>", "<eos>", "<bos>", "<boi>", "<eoi>", "<image>", "<unk>"]  # the ids that the config gives them
TEMPLATE = "{{ bos_token }}{% for message in messages %}{{ message['content'] }}{% endfor %}"
PROMPTS = ["Why is the sky blue?", "Write a haiku about rain.", "12 * 12 = ?", "Name three rivers.", "Fold a crane."]


def tokenizer() -> PreTrainedTokenizerFast:
    """A token for every printable character."""
    words = {word: i for i, word in enumerate([*SPECIAL, *string.printable])}
    letters = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    letters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=letters, chat_template=TEMPLATE, **names)


def main(folder: str, prompts: str) -> int:
    torch.manual_seed(0)
    model = DiffusionGemmaForBlockDiffusion(diffusion_gemma_config()).to(torch.bfloat16)
    # As the 26B model's generation_config.json has them; without them vLLM refuses to serve.
    settings = model.generation_config
    settings.update(**settings._get_default_generation_params())
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    Path(prompts).write_text("\n".join(PROMPTS) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
