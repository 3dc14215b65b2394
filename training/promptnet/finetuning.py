"""What is fine-tuned on a subject's pictures, and the draws of a step (ProFusion, arXiv 2305.13579).

The whole PromptNet learns, and so do the layers of the UNet that compute queries, keys and values. A reference and the
picture that has to be predicted are drawn independently of one another, so that S* says what the pictures have in
common.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ...encoders.promptnet import PromptNet
from ..differences import Differences

WEIGHT_DECAY = 0.01
_LEAST_SIZE = 0.01
"""Typical size of a weight of PromptNet that is zero, or nearly."""


@dataclass(frozen=True)
class FineTuning:
    """How PromptNet is fine-tuned. The published training takes 50 steps.

    Attributes:
        steps: optimizer steps.
        learning_rate: change per step, as a share of a weight's root mean square.
        batch_size: pictures per step.
        rank: rank of the UNet's differences; 0 trains whole matrices, as published.
        seed: seed of everything random.
    """

    steps: int = 50
    learning_rate: float = 5e-4
    batch_size: int = 4
    rank: int = 0
    seed: int = 0


class Tuned(torch.nn.Module):
    """PromptNet and the UNet's differences as one module, so that one run stores and updates both.

    Args:
        promptnet: in fp32.
        layers: the base weight (C, D) of each of the UNet's layers, by its name.
        recipe: how it is trained.
    """

    def __init__(self, promptnet: PromptNet, layers: Mapping[str, torch.Tensor], recipe: FineTuning):
        super().__init__()
        self.promptnet = promptnet.requires_grad_(True)
        self.differences = Differences(layers, recipe.rank, recipe.seed)

    def optimizer(self, recipe: FineTuning) -> torch.optim.Optimizer:
        """AdamW, whose learning rate for each weight of PromptNet follows the size of that weight."""
        rate = recipe.learning_rate
        groups = [{"params": list(self.differences.parameters()), "lr": rate}]
        for p in self.promptnet.parameters():
            size = float(p.detach().square().mean().sqrt())
            groups.append({"params": [p], "lr": rate * max(_LEAST_SIZE, size)})
        return torch.optim.AdamW(groups, weight_decay=WEIGHT_DECAY)


class StepDraws(NamedTuple):
    """The random draws of a step of n pictures.

    Attributes:
        targets, references: n numbers of pictures each.
        noise: (n, C, h, w).
        times: (n,), int64, timesteps.
    """

    targets: list[int]
    references: list[int]
    noise: torch.Tensor
    times: torch.Tensor


def draw_step(
    pictures: int, size: int, shape: tuple[int, ...], times: int, generator: torch.Generator, device: torch.device
) -> StepDraws:
    """The draws of a step.

    Args:
        pictures: number of pictures; none of them occurs twice among the targets, or among the references, before all
            have occurred.
        size: n.
        shape: (C, h, w) of a latent.
        times: number of timesteps.
        generator: of the step.
        device: of the noise and the timesteps.
    """
    rounds = -(-size // pictures)
    targets, references = (
        torch.cat([torch.randperm(pictures, generator=generator) for _ in range(rounds)])[:size].tolist()
        for _ in range(2)
    )
    noise = torch.randn((size, *shape), generator=generator)
    drawn = torch.randint(times, (size,), generator=generator)
    return StepDraws(targets, references, noise.to(device), drawn.to(device))


def lora_state(differences: Differences, prefix: str, dtype: torch.dtype = torch.float16) -> dict[str, torch.Tensor]:
    """The differences as ComfyUI's own nodes load and save a LoRA.

    Args:
        differences: of the UNet's layers, by their names in it.
        prefix: of these names in a file.
    """
    state = {}
    for name in differences.scales:
        up, *down = (factor.detach().to("cpu", dtype).contiguous() for factor in differences.factors(name))
        if down:
            state[f"{prefix}{name}.lora_up.weight"], state[f"{prefix}{name}.lora_down.weight"] = up, down[0]
            state[f"{prefix}{name}.alpha"] = torch.tensor(float(up.shape[1]), dtype=dtype)
        else:
            state[f"{prefix}{name}.diff"] = up
    return state
