"""Semantics: what a picture means and its style, as CLIP's vision tower embeds it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

_NEAR, _OPPOSITE = 1e-4, 3.1415926535 - 1e-3


@dataclass(frozen=True, eq=False)
class Semantics:
    """Attributes:
        embedding: (D,), the image embedding, of length 1.
        tokens: (t, V), the tower's last hidden states, or None: for models that read those.
        norm: length that the embedding had, for models that take it as the tower gives it; by default that of the given
            one.

    Raises:
        ValueError: the embedding is not one vector, or not finite, or zero.
    """

    embedding: torch.Tensor
    tokens: torch.Tensor | None = None
    norm: float = 0.0

    def __post_init__(self):
        embedding = self.embedding.detach().float().cpu()
        if embedding.ndim != 1 or not torch.isfinite(embedding).all() or not embedding.any():
            raise ValueError(
                f"semantics: expected one finite image embedding, got {tuple(self.embedding.shape)} or other values"
            )
        object.__setattr__(self, "norm", self.norm or float(embedding.norm()))
        object.__setattr__(self, "embedding", embedding / embedding.norm())

    @property
    def scaled(self) -> torch.Tensor:
        """The embedding with unit variance per coordinate: sqrt(D) times the unit vector, as adapters take it."""
        return self.embedding * len(self.embedding) ** 0.5


def slerp(a: torch.Tensor, b: torch.Tensor, share: float) -> torch.Tensor:
    """The unit vector at `share` of the way from a to b, both (D,) of length 1, along the great circle; along the line
    between vectors that are equal or opposite, which have no single circle."""
    a, b = a.double(), b.double()
    angle = torch.arccos((a @ b).clamp(-1, 1))
    if not _NEAR < float(angle) < _OPPOSITE:
        line = torch.lerp(a, b, share)
        # The middle of opposite vectors is nothing; either end is as good.
        return line / line.norm() if line.norm() > _NEAR else a
    return (torch.sin((1 - share) * angle) * a + torch.sin(share * angle) * b) / torch.sin(angle)


def between(a: Semantics, b: Semantics, share: float) -> Semantics:
    """The semantics at `share` of the way from one to another: embeddings along the great circle, tokens along a line.

    Raises:
        ValueError: they come from different vision towers.
    """
    if len(a.embedding) != len(b.embedding):
        raise ValueError(
            f"semantics: expected embeddings of the same vision tower, got widths {len(a.embedding)} and "
            f"{len(b.embedding)}"
        )
    tokens = None
    if a.tokens is not None and b.tokens is not None and a.tokens.shape == b.tokens.shape:
        tokens = torch.lerp(a.tokens, b.tokens, share)
    return Semantics(slerp(a.embedding, b.embedding, share), tokens, (1 - share) * a.norm + share * b.norm)
