"""PromptNet as a trainable module: a base model that reads its words, and the loss of a batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn

from ...encoders.clip_pixels import normalize
from ...encoders.promptnet import PromptNet, PromptNetConfig, initial_state
from ..base import Base
from ..sampling import States


class PromptNetTraining(nn.Module):
    """A base model, its vision tower, and the PromptNet that is trained; all else stays as it is.

    Args:
        base: its modules become this one's.
        config: the PromptNet's architecture.
        l2: weight of the mean square of S*; 0, as published, computes none.
        seed: seed of the initial weights that the UNet does not give.

    Raises:
        ValueError: the base has two text towers, or the architecture does not fit it.
    """

    def __init__(self, base: Base, config: PromptNetConfig, l2: float = 0.0, seed: int = 0):
        super().__init__()
        if len(base.towers) != 1:
            raise ValueError(f"--base: expected a model with one text tower, got one with {len(base.towers)}")
        self.base, self.l2 = base, l2
        self.unet, self.tower, self.vision, self.autoencoder = base.unet, base.towers[0], base.vision, base.autoencoder
        self.requires_grad_(False)
        torch.manual_seed(seed)
        self.promptnet = PromptNet(config)
        self.promptnet.load_state_dict(initial_state(self.promptnet, self.unet.state_dict()))

    def see(self, pictures: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What PromptNet takes of pictures (n, 3, H, W) in [-1, 1]: latents, and the vision tower's tokens.

        Args:
            noise: of the latents' shape, samples them from the autoencoder's distribution.
        """
        with torch.no_grad():
            side = self.vision.config.image_size
            small = F.interpolate(pictures, (side, side), mode="bicubic", antialias=True).clamp(-1, 1)
            tokens = self.vision.vision_model(normalize((small + 1) / 2)).last_hidden_state
            return self.autoencoder.encode(pictures, noise), tokens

    def words(self, seen: tuple[torch.Tensor, torch.Tensor], noisy: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """S* (n, k, D) for noisy latents (n, C, h, w) at timesteps t (n,)."""
        reference, tokens = seen
        return self.promptnet(reference, noisy, t, tokens)

    def read(self, tokens: torch.Tensor, place: torch.Tensor, words: torch.Tensor) -> States:
        """Text states (n, 77, D) with S* in the place of a word.

        Args:
            tokens: (n, 77), with a word of one token at `place`.
            place: (n,), its row.
            words: (n, 1, D).
        """
        with replaced(self.tower.text_model.embeddings, place, words[:, 0]):
            return self.tower(tokens).last_hidden_state.float(), None

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The losses of a batch: `noise` and, if it has a weight, `size`.

        Args:
            batch: `reference` and `target` (n, 3, H, W) pictures of the same thing in [-1, 1], `tokens` (n, 77),
                `place` (n,), and the draws `noise` and `latent` (n, C, h, w), `t` (n,).
        """
        seen = self.see(batch["reference"], batch["latent"])
        with torch.no_grad():
            latents = self.autoencoder.encode(batch["target"], batch["latent"])
        noisy, target = self.base.noised(latents, batch["noise"], batch["t"])
        words = self.words(seen, noisy, batch["t"])
        prediction = self.base.predict(noisy, batch["t"], self.read(batch["tokens"], batch["place"], words))
        losses = {"noise": F.mse_loss(prediction, target)}
        return losses | ({"size": self.l2 * words.square().mean()} if self.l2 else {})


@contextmanager
def replaced(embeddings: nn.Module, place: torch.Tensor, vectors: torch.Tensor) -> Iterator[None]:
    """Puts vectors (n, D) into the rows `place` (n,) of what a text tower's embeddings, with positions, give."""

    def put(_module, _inputs, output: torch.Tensor) -> torch.Tensor:
        rows = torch.arange(len(output), device=output.device)
        return output.index_put((rows, place), vectors.to(output))

    hook = embeddings.register_forward_hook(put)
    try:
        yield
    finally:
        hook.remove()
