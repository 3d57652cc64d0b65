"""A model whose tokens show which weights made them, and LoRA adapters of the same kind.

Each token is a row of signs, hardly like any other row. Attention adds twenty times the row `AIM` to the last hidden
state (values come from the bias alone), so the answer is the token that has this row; each version gives the rows to
other tokens. Embedding and output layer share the rows, so a version shows only if both have been updated.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from examples.calculator import model as calculator

HIDDEN, INNER, VOCABULARY = 128, 256, len(calculator.vocabulary())
MOVED = 50  # rows that versions give to other tokens
AIM = 40
ROWS = torch.randint(0, 2, (VOCABULARY, HIDDEN), generator=torch.Generator().manual_seed(0)) * 2.0 - 1.0


def token(version: int) -> int:
    return (AIM - version) % MOVED


def adapter_token(number: int) -> int:
    return MOVED + number


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
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=3,
    )
    model = Qwen2ForCausalLM(config)
    model.load_state_dict(weights(0), strict=False)
    model.save_pretrained(folder)
    calculator.create_tokenizer(folder.parent / "tokenizer")


def weights(version: int) -> dict[str, Tensor]:
    """By parameter. Whatever is asked, each token is `token` of the version."""
    moved = ROWS[(torch.arange(MOVED) + version) % MOVED]
    towards_aim = (ROWS[AIM] / HIDDEN).expand(INNER, HIDDEN).contiguous()  # gives an adapter something to work with
    layer = {
        "self_attn.q_proj.weight": torch.zeros(HIDDEN, HIDDEN),
        "self_attn.q_proj.bias": torch.zeros(HIDDEN),
        "self_attn.k_proj.weight": torch.zeros(HIDDEN, HIDDEN),
        "self_attn.k_proj.bias": torch.zeros(HIDDEN),
        "self_attn.v_proj.weight": torch.zeros(HIDDEN, HIDDEN),
        "self_attn.v_proj.bias": 20 * ROWS[AIM],
        "self_attn.o_proj.weight": torch.eye(HIDDEN),
        "mlp.gate_proj.weight": towards_aim,
        "mlp.up_proj.weight": towards_aim.clone(),
        "mlp.down_proj.weight": torch.zeros(HIDDEN, INNER),
        "input_layernorm.weight": torch.ones(HIDDEN),
        "post_attention_layernorm.weight": torch.ones(HIDDEN),
    }
    return {
        "model.embed_tokens.weight": torch.cat([moved, ROWS[MOVED:]]),
        **{f"model.layers.0.{name}": tensor for name, tensor in layer.items()},
        "model.norm.weight": torch.ones(HIDDEN),
    }


def babbling() -> dict[str, Tensor]:
    """Weights of no version: what they say is all kinds of things, and the same at each time. With this
    seed "add 3 to 8 ?" is answered by 94 words, the last of them a full stop."""
    some = torch.Generator().manual_seed(285)
    return {
        name: tensor if "norm" in name else torch.randn(tensor.shape, generator=some) * 0.3
        for name, tensor in weights(0).items()
    }


def create_adapter(folder: Path, number: int) -> None:
    """With it each token is `adapter_token` of the number: it adds far more of that token's row."""
    folder.mkdir(parents=True)
    prefix = "base_model.model.model.layers.0.mlp.down_proj"
    tensors = {
        f"{prefix}.lora_A.weight": torch.full((1, INNER), 1 / INNER),
        f"{prefix}.lora_B.weight": 400 * ROWS[MOVED + number][:, None],
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 1, "lora_alpha": 1, "target_modules": ["down_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
