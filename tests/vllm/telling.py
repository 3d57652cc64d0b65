"""A model whose every token tells which weights made it, and LoRA adapters that do so as well."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from examples.calculator import model as calculator

HIDDEN, INNER, VOCABULARY = 128, 256, len(calculator.vocabulary())
FIRST, ADAPTERS = 10, 100  # token of version 0, and of adapter 0


def create(folder: Path) -> None:
    """Writes version 0, and beside it the folder ``tokenizer`` for vLLM."""
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_hidden_layers=1,
        intermediate_size=INNER,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=3,
    )
    model = Qwen2ForCausalLM(config)
    model.load_state_dict(weights(0))
    model.save_pretrained(folder)
    calculator.create_tokenizer(folder.parent / "tokenizer")


def weights(version: int) -> dict[str, Tensor]:
    """Whatever is asked, each token is `FIRST` + version: nothing is added to the embeddings, which are all ones."""
    tensors = {name: torch.zeros(p.shape) for name, p in _empty().named_parameters()}
    for name in tensors:
        if "norm" in name or "embed" in name:
            tensors[name].fill_(1.0)
        if "gate_proj" in name or "up_proj" in name:
            tensors[name].fill_(1 / HIDDEN)  # so that an adapter of down_proj has something to work with
    head = tensors["lm_head.weight"]
    head[FIRST + version] = 1.0
    for number in range(3):
        head[ADAPTERS + number] = 10 * _direction(number)
    return tensors


def create_adapter(folder: Path, number: int) -> None:
    """With it each token is `ADAPTERS` + number: it turns the last hidden state into that token's direction."""
    folder.mkdir(parents=True)
    prefix = "base_model.model.model.layers.0.mlp.down_proj"
    tensors = {
        f"{prefix}.lora_A.weight": torch.full((1, INNER), 1 / INNER),
        f"{prefix}.lora_B.weight": 100 * _direction(number)[:, None],
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 1, "lora_alpha": 1, "target_modules": ["down_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def _direction(number: int) -> Tensor:
    """Orthogonal to all ones, and to the others."""
    block = 1 << number
    return torch.tensor([1.0 if (i // block) % 2 else -1.0 for i in range(HIDDEN)])


def _empty() -> Qwen2ForCausalLM:
    with torch.device("meta"):
        return Qwen2ForCausalLM(
            Qwen2Config(
                vocab_size=VOCABULARY,
                hidden_size=HIDDEN,
                num_attention_heads=4,
                num_key_value_heads=4,
                num_hidden_layers=1,
                intermediate_size=INNER,
                tie_word_embeddings=False,
            )
        )
