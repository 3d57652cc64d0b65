"""The torch policy, loaded and batched in the same way by the engine that samples and the algorithm that trains."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from millstream.pipeline.models.weight_files import check_fit
from millstream.schemas.errors import ConfigError


def load_model(folder: str | Path) -> Any:
    """The causal language model of a Hugging Face folder, in float32. Raises `ConfigError` naming the folder."""
    _check(folder, "config.json")
    disable_progress_bar()  # type: ignore[no-untyped-call]  # a run shows its own progress
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)


def load_tokenizer(folder: str | Path) -> Any:
    """The folder's tokenizer, exactly as its ``tokenizer.json`` says.

    Not by ``AutoTokenizer``: before transformers 5.16 it replaces any tokenizer beside a Qwen2 model by Qwen's own.
    """
    _check(folder, "tokenizer.json")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    if not tokenizer.chat_template:
        raise ConfigError(f"model folder {folder}: its tokenizer has no chat template and can't render messages")
    return tokenizer


def _check(folder: str | Path, name: str) -> None:
    if not (Path(folder) / name).is_file():
        raise ConfigError(f"{folder} is not a Hugging Face model folder: it has no {name}")


def one_thread() -> None:
    """Small models run ten times faster if torch's threads do not compete for a few cores."""
    torch.set_num_threads(1)


def left_pad(rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """Token rows as model input that ends flush: ``input_ids``, ``attention_mask``, ``position_ids``, each
    (rows, longest row)."""
    width = max(map(len, rows))
    ids = torch.zeros((len(rows), width), dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :] = torch.tensor(row)
        mask[i, width - len(row) :] = 1
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


def parameters(model: Any) -> dict[str, Tensor]:
    """The model's weights by name; tied ones once."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def digest(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, types, shapes and bytes: the same for equal weights, wherever they lie."""
    found = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def copy_weights(model: Any, weights: Mapping[str, Tensor]) -> None:
    """Overwrites the model's weights. Raises `ConfigError`, without changing any, if names or shapes differ."""
    own = parameters(model)
    check_fit(*({name: tuple(each.shape) for name, each in tensors.items()} for tensors in (weights, own)))
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(weights[name])
