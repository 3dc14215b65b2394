"""Autoencoder between pictures and latents: factor 4, eight channels, no normalization over the picture at its ends.

Stable Diffusion's own autoencoder ends both halves in a group norm of 32 groups. With the few channels that suffice
here, each group would hold one or two, so the norm would remove a channel's mean over the picture, and with it the
colors. This one normalizes in its residual branches only and works at half resolution, at a tenth of the cost.
"""

from __future__ import annotations

import torch
from torch import nn

CHANNELS = 8
FACTOR = 4


class _Residual(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.branch = nn.Sequential(
            nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, 1, 1),
            nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, 1, 1),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.branch(x)


class Autoencoder(nn.Module):
    """Encodes pictures (n, 3, H, W) in [-1, 1] as latents (n, 8, H/4, W/4) of unit variance per channel, and back."""

    def __init__(self, width: int = 48):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(2), nn.Conv2d(12, width, 3, 1, 1), _Residual(width),
            nn.Conv2d(width, 2 * width, 4, 2, 1), _Residual(2 * width), _Residual(2 * width),
            nn.SiLU(), nn.Conv2d(2 * width, CHANNELS, 3, 1, 1),
        )  # fmt: skip
        self.decoder = nn.Sequential(
            nn.Conv2d(CHANNELS, 2 * width, 3, 1, 1), _Residual(2 * width), _Residual(2 * width),
            nn.Conv2d(2 * width, 4 * width, 3, 1, 1), nn.PixelShuffle(2), _Residual(width), _Residual(width),
            nn.SiLU(), nn.Conv2d(width, 12, 3, 1, 1), nn.PixelShuffle(2),
        )  # fmt: skip
        self.register_buffer("mean", torch.zeros(CHANNELS))
        self.register_buffer("std", torch.ones(CHANNELS))

    def encode(self, pictures: torch.Tensor) -> torch.Tensor:
        """Latents of `pictures`, shifted and scaled by the buffers `mean` and `std`."""
        return (self.encoder(pictures) - self.mean[:, None, None]) / self.std[:, None, None]

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Pictures of `latents`, not clamped."""
        return self.decoder(latents * self.std[:, None, None] + self.mean[:, None, None])
