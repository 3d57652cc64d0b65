"""Low-rank adapters in place of full weights (Hu et al., LoRA, arXiv:2106.09685), by peft."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from millstream.pipeline.models.policy import parameters
from millstream.schemas.errors import ConfigError


@dataclass(frozen=True, slots=True)
class LoraOptions:
    rank: int = 16  # "LoRA Without Regret" (Schulman et al., 2025): policy gradients need little capacity
    alpha: int = 32  # the adapters' scale is alpha / rank
    targets: str | tuple[str, ...] = "all-linear"  # modules by name, as peft finds them


class Lora:
    """``model`` with adapters, of which alone have gradients. Servers know nothing of them: `merged` are plain weights.

    Raises `ConfigError` if peft is not installed or finds no such modules.
    """

    def __init__(self, model: Any, options: LoraOptions, seed: int) -> None:
        try:
            from peft import LoraConfig, get_peft_model
        except ImportError as error:
            raise ConfigError(f"lora needs peft: install millstream[lora] ({error})") from error
        targets = options.targets if isinstance(options.targets, str) else list(options.targets)
        alpha: Any = options.alpha  # peft divides by the rank; its type says int
        config = LoraConfig(r=options.rank, lora_alpha=alpha, target_modules=targets)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            try:
                self.model: Any = get_peft_model(model, config).eval()
            except ValueError as error:
                raise ConfigError(f"lora: {error}") from error

    @torch.no_grad()
    def merged(self) -> dict[str, Tensor]:
        """The weights by their names in the model without adapters, tied ones once. Merged ones are copies."""
        adapted = {
            f"{name}.base_layer.weight": module.get_delta_weight("default")
            for name, module in self.model.named_modules()
            if hasattr(module, "get_delta_weight") and "default" in module.lora_A
        }
        return {
            name.removeprefix("base_model.model.").replace(".base_layer", ""): weight + adapted[name]
            if name in adapted
            else weight
            for name, weight in parameters(self.model).items()
            if ".lora_" not in name
        }

    def state(self) -> dict[str, Tensor]:
        return {name: weight for name, weight in parameters(self.model).items() if ".lora_" in name}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Raises `ConfigError` if the adapters have other names or shapes."""
        own = self.state()
        if {name: weight.shape for name, weight in own.items()} != {name: each.shape for name, each in state.items()}:
            raise ConfigError("the checkpoint's adapters have other names or shapes: its lora options were others")
        with torch.no_grad():
            for name, weight in own.items():
                weight.copy_(state[name])
