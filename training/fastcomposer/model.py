"""FastComposer as one trainable module: fuses subjects into text states, and computes the losses of a batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ...attention.localization import localization_loss, masked_noise_loss, mean_of_pictures
from ...encoders.clip_pixels import normalize
from ...encoders.fuser import Fuser, fuse_rows
from ..base import Base
from ..open_attention import OpenAttention, middle_blocks
from ..sampling import States

FULL, LORA = "full", "lora"
_ATTENTION_LAYERS = ["to_q", "to_k", "to_v", "to_out.0"]


class FastComposer(nn.Module):
    """A base model, its vision tower and a fuser; only what is trained requires gradients.

    Args:
        base: its modules become this one's.
        train: FULL is the published recipe and trains the whole UNet; LORA, our variant for small machines, trains
            low-rank factors of its attention's projections instead. Both train the fuser.
        rank: rank of the factors.
        vision_layers: how many of the vision tower's last layers are trained; its last norm and projection never are.
        localization: weight of the localization loss. At 0 all attention stays fused and the loss is not computed.
        mask_probability: share of pictures whose noise loss is limited to the subjects.
        seed: seed of the initial weights of fuser and factors.

    Raises:
        ValueError: the vision tower has fewer layers, or a number is out of its range.
    """

    def __init__(
        self,
        base: Base,
        train: str = FULL,
        rank: int = 16,
        vision_layers: int = 2,
        localization: float = 1e-3,
        mask_probability: float = 0.5,
        seed: int = 0,
    ):
        super().__init__()
        layers = base.vision.vision_model.encoder.layers
        if not 0 <= vision_layers <= len(layers):
            raise ValueError(f"--vision-layers: expected 0 to {len(layers)} for this tower, got {vision_layers}")
        if rank < 1:
            raise ValueError(f"--rank: expected at least 1, got {rank}")
        if localization < 0:
            raise ValueError(f"--localization: expected at least 0, got {localization}")
        if not 0 <= mask_probability <= 1:
            raise ValueError(f"--mask-loss-probability: expected a share from 0 to 1, got {mask_probability}")
        self.base, self.localization, self.mask_probability = base, localization, mask_probability
        self.unet, self.towers, self.vision, self.autoencoder = base.unet, base.towers, base.vision, base.autoencoder
        torch.manual_seed(seed)
        self.requires_grad_(False)
        self.fuser = Fuser(sum(t.config.hidden_size for t in self.towers), self.vision.config.projection_dim)
        for layer in list(layers)[len(layers) - vision_layers :]:
            layer.requires_grad_(True)
        if train == FULL:
            self.unet.requires_grad_(True)
        else:
            from peft import LoraConfig

            self.unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=_ATTENTION_LAYERS))
        self.attention = OpenAttention(self.unet, middle_blocks(self.unet)) if localization else None

    @property
    def trainables(self) -> dict[str, nn.Parameter]:
        """What is trained, by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def keep_frozen_in(self, dtype: torch.dtype) -> None:
        """Stores what is not trained in half precision, except the autoencoder, because SDXL's overflows in it."""
        for part in (self.unet, self.towers, self.vision):
            for parameter in part.parameters():
                if not parameter.requires_grad:
                    parameter.data = parameter.data.to(dtype)

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Losses of a batch of `drawn_batches`: `noise` and, if it has a weight, `localization` times that weight."""
        present, t = batch["present"], batch["t"]
        with torch.no_grad(), torch.autocast(batch["noise"].device.type, enabled=False):
            latents = self.autoencoder.encode(batch["picture"], batch["latent"])
        noisy, target = self.base.noised(latents, batch["noise"], t)
        states = self.states(batch["tokens"], batch["objects"], batch["rows"], present)
        # A subject that stays plain text is not one for the losses either.
        masks, masked = batch["masks"] * present[..., None, None], batch["coin"] < self.mask_probability
        if self.attention is None:
            return {"noise": masked_noise_loss(self.base.predict(noisy, t, states), target, masks, masked)}
        with self.attention.collecting() as maps:
            prediction = self.base.predict(noisy, t, states)
        noise = masked_noise_loss(prediction, target, masks, masked)
        tokens = F.one_hot(batch["rows"], maps[0].shape[-1])
        located = localization_loss(maps, tokens, masks, mean_of_pictures(present))
        return {"noise": noise, "localization": self.localization * located}

    def states(self, tokens: torch.Tensor, objects: torch.Tensor, rows: torch.Tensor, present: torch.Tensor) -> States:
        """The UNet's conditioning: text states (n, 77, D) with the subjects fused into their rows and, with two towers,
        the pooled state (n, P) of the second, which stays plain text.

        Args:
            tokens: (n, towers, 77).
            objects: (n, subjects, 3, r, r) in [0, 1], at the vision tower's resolution.
            rows, present: (n, subjects), the row of each subject and whether there is one.
        """
        with torch.no_grad():
            text, pooled = self.base.read(tokens)
        picture, subject = present.nonzero(as_tuple=True)
        if not len(picture):
            # Vision tower and fuser run in every step, because processes that train together wait for all gradients;
            # this result is discarded below.
            picture = subject = torch.zeros(1, dtype=torch.long, device=tokens.device)
        row = rows[picture, subject]
        own = text[picture, row]
        seen = self.vision(normalize(objects[picture, subject])).image_embeds
        fused = fuse_rows(self.fuser, own, seen)
        fused = torch.where(present[picture, subject][:, None], fused, own)
        return text.index_put((picture, row), fused), pooled
