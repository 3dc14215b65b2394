"""What is trained for a concept, and the loss: the same in ComfyUI's node and in the script.

Custom Diffusion (arXiv 2212.04488) trains the matrices that compute keys and values from the text, and the embedding of
a new word; everything else stays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ...encoders.concept_texts import Name
from ...encoders.concepts import Concept, Delta
from ..differences import Differences, typical_size
from .augment import NONE

BOTH = ("k", "v")


@dataclass(frozen=True)
class Recipe:
    """How a concept is trained.

    Attributes:
        steps: optimizer steps.
        learning_rate: change per step, as a share of a weight's root mean square.
        batch_size: pictures per step.
        rank: rank of the factors; 0 trains whole matrices.
        new_word: whether a new word's embedding is trained.
        prior_weight: weight of the loss on pictures of the class in general; both losses are means over what counts.
        augmentation: one of `augment.AUGMENTATIONS`.
        seed: seed of everything random.
    """

    steps: int = 400
    learning_rate: float = 2e-3
    batch_size: int = 2
    rank: int = 0
    new_word: bool = True
    prior_weight: float = 0.25
    augmentation: str = NONE
    seed: int = 0


class ConceptWeights(Differences):
    """The differences that are trained, whole or as factors, and the new word.

    Args:
        layers: per cross-attention layer, the base weights (C, text width) of its keys "k" and values "v".
        tokens: per text encoder, the embedding (n, d) to start from; empty trains none.
        rank: see `Recipe`.
        seed: seed of the factors.
    """

    def __init__(
        self, layers: Mapping[str, Mapping[str, torch.Tensor]], tokens: Mapping[str, torch.Tensor], rank: int, seed: int
    ):
        parts = {f"{key}.{part}": (key, part) for key, found in layers.items() for part in BOTH if part in found}
        super().__init__({name: layers[key][part] for name, (key, part) in parts.items()}, rank, seed)
        self.parts = parts
        self.word = torch.nn.ParameterDict()
        self.starts = {encoder: start.detach().float().clone() for encoder, start in tokens.items()}
        self.sizes = {encoder: typical_size(start) for encoder, start in self.starts.items()}
        for encoder, start in self.starts.items():
            self.word[encoder] = torch.nn.Parameter(torch.zeros_like(start))

    def addition(self, key: str, part: str, context: torch.Tensor) -> torch.Tensor:
        """What is added to a layer's keys or values, (B, L, C), for text states (B, L, text width).

        The first token is the same in every prompt and teaches nothing: its part is kept, but has no gradient.
        """
        added = self.output(f"{key}.{part}", context)
        return torch.cat((added[:, :1].detach(), added[:, 1:]), 1)

    def tokens(self) -> dict[str, torch.Tensor]:
        """The embedding of the new word per text encoder, (n, d)."""
        return {e: self.starts[e].to(word.device) + self.sizes[e] * word for e, word in self.word.items()}

    def deltas(self) -> dict[str, dict[str, Delta]]:
        """The differences in the form that a concept has them."""
        found: dict[str, dict[str, Delta]] = {}
        for name, (key, part) in self.parts.items():
            found.setdefault(key, {})[part] = Delta(self.factors(name))
        return found

    def concept(self, name: Name, source: str) -> Concept:
        """The concept in its present state; `source` names what trains it."""
        tokens = {encoder: token.detach().cpu() for encoder, token in self.tokens().items()}
        called = name.placeholder or name.class_word
        return Concept(called, self.deltas(), name.class_word, name.placeholder, tokens, source_format=source)


def concept_optimizer(weights: ConceptWeights, recipe: Recipe) -> torch.optim.Optimizer:
    """The optimizer of a concept's weights."""
    return torch.optim.AdamW(weights.parameters(), lr=recipe.learning_rate, weight_decay=0.01)


def prediction_weight(sigma: torch.Tensor, v_prediction: bool) -> torch.Tensor:
    """The factor that turns a denoiser's squared error at sigma (B,) into that of the network's own prediction.

    A denoiser's error is that of the prediction times sigma (noise), or times sigma / sqrt(1 + sigma^2) (v).
    """
    return sigma**-2 + (1.0 if v_prediction else 0.0)


def masked_error(found: torch.Tensor, wanted: torch.Tensor, mask: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Mean squared error inside a mask.

    Custom Diffusion's code divides the error of all channels by the mask of one, which weighs pictures of the concept
    four times as much as pictures of the class; here both are means, and `Recipe.prior_weight` is a quarter.

    Args:
        found, wanted: (B, C, h, w).
        mask: (B, h, w).
        weight: weight of each picture, (B,).
    """
    error = (found.float() - wanted.float()).square().mean(1) * weight[:, None, None]
    return (error * mask).sum() / mask.sum().clamp(min=1)


def concept_losses(
    found: torch.Tensor, wanted: torch.Tensor, masks: torch.Tensor, weight: torch.Tensor, recipe: Recipe
) -> dict[str, torch.Tensor]:
    """The loss `concept` of the batch's first `recipe.batch_size` pictures and, if there are more, the weighted loss
    `prior` of the others. The remaining arguments are those of `masked_error`."""
    split = [slice(0, recipe.batch_size), slice(recipe.batch_size, None)]
    own, prior = ((found[part], wanted[part], masks[part], weight[part]) for part in split)
    losses = {"concept": masked_error(*own)}
    if len(prior[0]):
        losses["prior"] = recipe.prior_weight * masked_error(*prior)
    return losses


@dataclass(frozen=True, eq=False)
class Example:
    """A training picture as the model sees it.

    Attributes:
        latent: (C, h, w).
        mask: (h, w), 1 where the loss counts.
        caption: {} in it stands for the concept.
    """

    latent: torch.Tensor
    mask: torch.Tensor
    caption: str


class Batch(NamedTuple):
    """n pictures with the random draws for each.

    Attributes:
        latents: (n, C, h, w), fp32.
        masks: (n, h, w).
        captions: n captions.
        noise: (n, C, h, w).
        times: (n,), int64, the timesteps of the noise.
    """

    latents: torch.Tensor
    masks: torch.Tensor
    captions: list[str]
    noise: torch.Tensor
    times: torch.Tensor


def draw_batch(
    examples: Sequence[Example],
    prior: Sequence[Example],
    size: int,
    times: int,
    generator: torch.Generator,
    device: torch.device,
    processes: int = 1,
    rank: int = 0,
) -> Batch:
    """The batch of one process: `size` pictures of the concept and, if there is a prior, as many of the class in
    general. Every process makes the draws of all processes and takes its own.

    Args:
        examples: pictures of the concept.
        prior: pictures of the class; empty for none.
        size: pictures of each kind.
        times: number of timesteps of the noise.
        generator: in the same state in every process.
        device: device of the batch.
        processes, rank: number of processes, and index of this one.
    """
    chosen: list[Example] = []
    for some in filter(len, (examples, prior)):
        numbers = torch.randint(len(some), (processes, size), generator=generator)[rank].tolist()
        chosen += [some[number] for number in numbers]
    latents = torch.stack([example.latent for example in chosen]).to(device, torch.float32)
    drawn = torch.randint(times, (processes, len(chosen)), generator=generator)[rank]
    noise = torch.randn((processes, *latents.shape), generator=generator)[rank]
    return Batch(
        latents,
        torch.stack([example.mask for example in chosen]).to(device),
        [example.caption for example in chosen],
        noise.to(device),
        drawn.to(device),
    )


def latent_mask(mask: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """A picture's mask (H, W), averaged to the size (h, w) of its latent."""
    return F.adaptive_avg_pool2d(mask[None, None], size)[0, 0]
