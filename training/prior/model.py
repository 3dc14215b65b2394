"""The prior as a trainable module: the two towers, and the loss of a batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ...encoders.caption_prior import CaptionPrior, PriorConfig, text_mask
from ...encoders.clip_pixels import normalize
from ...samplers.prior import cosine_alphas
from ..base import Base

UNCONDITIONAL = 0.1
_LEAST_DEVIATION = 1e-3


class PriorTraining(nn.Module):
    """The towers of a base, and the prior that is trained; all else stays as it is.

    Args:
        base: its towers become this one's.
        inner, heads, layers: see `PriorConfig`.
        seed: seed of the initial weights.

    Raises:
        ValueError: the base has two text towers, or one without a projection to the space of image embeddings.
    """

    def __init__(self, base: Base, inner: int, heads: int, layers: int, seed: int = 0):
        super().__init__()
        tower, width = base.towers[0], base.vision.config.projection_dim
        projection = getattr(tower, "text_projection", None)
        if len(base.towers) != 1 or projection is None or tower.config.hidden_size != width:
            raise ValueError(
                f"--base: expected one text tower with a projection to the width {width} of the vision tower's, got "
                "another"
            )
        self.tower, self.vision, self.vocabulary = tower, base.vision, base.vocabularies[0]
        self.requires_grad_(False)
        torch.manual_seed(seed)
        self.prior = CaptionPrior(PriorConfig(width, inner, heads, layers))
        nn.init.normal_(self.prior.positional_embedding, std=0.01)
        nn.init.normal_(self.prior.prd_embedding, std=0.01)
        self.register_buffer("alphas", cosine_alphas().float(), persistent=False)

    @torch.no_grad()
    def see(self, pictures: torch.Tensor) -> torch.Tensor:
        """The image embeddings (n, D) of pictures (n, 3, H, W) in [-1, 1]."""
        side = self.vision.config.image_size
        small = F.interpolate(pictures, (side, side), mode="bicubic", antialias=True).clamp(-1, 1)
        return self.vision(normalize((small + 1) / 2)).image_embeds.float()

    @torch.no_grad()
    def measure(self, embeddings: torch.Tensor) -> None:
        """Sets the mean and the deviation by which embeddings are scaled to those of `embeddings` (m, D)."""
        self.prior.clip_mean.copy_(embeddings.mean(0, keepdim=True))
        self.prior.clip_std.copy_(embeddings.std(0, correction=0, keepdim=True).clamp(min=_LEAST_DEVIATION))

    @torch.no_grad()
    def read(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Sentences (n, D), text states (n, 77, D) and their mask (n, 77) of tokens (n, 77)."""
        found = self.tower(tokens)
        return found.text_embeds.float(), found.last_hidden_state.float(), text_mask(tokens, self.vocabulary.end)

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The loss `embedding` of a batch.

        Args:
            batch: `target` (n, 3, H, W) pictures in [-1, 1], `tokens` (n, 77), and the draws `noise` (n, D), `t` (n,),
                0..999.
        """
        wanted = self.prior.scaled(self.see(batch["target"]))
        level = self.alphas[batch["t"]][:, None]
        noisy = level.sqrt() * wanted + (1 - level).sqrt() * batch["noise"]
        found = self.prior(noisy, batch["t"], *self.read(batch["tokens"]))
        return {"embedding": F.mse_loss(found, wanted)}
