"""The calculator's untrained model: a tiny Qwen2 with random weights, as a Hugging Face folder."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Digits, Sequence, WhitespaceSplit
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from examples.calculator.tasks import FIRST, SECOND

DIGITS = "-0123456789"  # numbers are read digit by digit: fewer words to choose an answer from
UNKNOWN, PAD, START, END = "<unk>", "<pad>", "<|im_start|>", "<|im_end|>"
# Roles, and what agents and tasks add to phrasings and numbers.
PROMPT_WORDS = "system user assistant choose a tool first second then result . ?"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    f"{START} {{{{ message['role'] }}}} {{{{ message['content'] }}}} {END} "
    "{% endfor %}"
    f"{{% if add_generation_prompt %}}{START} assistant{{% endif %}}"
)


def vocabulary() -> list[str]:
    """Every word of every conversation, special tokens first."""
    phrases = [phrase for table in (FIRST, SECOND) for phrases in table.values() for phrase in phrases]
    words = {word for phrase in [PROMPT_WORDS, *FIRST, *phrases] for word in phrase.split() if not word.startswith("{")}
    return [UNKNOWN, PAD, START, END, *sorted(words), *DIGITS]


def create(folder: str | Path, seed: int = 0) -> None:
    """Writes model and tokenizer to ``folder``; the same seed gives the same weights."""
    words = vocabulary()
    make_tokenizer(words).save_pretrained(folder)
    config = Qwen2Config(
        vocab_size=len(words),
        hidden_size=128,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_hidden_layers=1,
        intermediate_size=256,
        max_position_embeddings=512,
        initializer_range=0.05,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=words.index(END),
        pad_token_id=words.index(PAD),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(config)
    model.save_pretrained(folder)


def create_tokenizer(folder: str | Path) -> None:
    """Writes a folder for vLLM's ``--tokenizer``. Beside a Qwen2 transformers loads Qwen's own kind of tokenizer,
    whatever the folder says; beside another kind of model it reads the folder's."""
    make_tokenizer(vocabulary()).save_pretrained(folder)
    (Path(folder) / "config.json").write_text(json.dumps({"model_type": "llama"}))


def make_tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    core = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token=UNKNOWN))
    core.pre_tokenizer = Sequence([WhitespaceSplit(), Digits(individual_digits=True)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token=UNKNOWN,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[START],
        chat_template=CHAT_TEMPLATE,
    )
