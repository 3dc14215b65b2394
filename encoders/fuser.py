"""FastComposer's fuser: combines a subject noun's text state and a picture's embedding into one text state.

FastComposer (Xiao et al., arXiv 2305.10431), equation 3. Modules have the names of the published weights.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torch.nn import functional as F


class _FuserMLP(nn.Module):
    """LayerNorm, Linear, exact GELU, Linear; optionally with a residual, which needs equal input and output widths."""

    def __init__(self, width_in: int, width_out: int, residual: bool):
        super().__init__()
        self.layernorm = nn.LayerNorm(width_in)
        self.fc1 = nn.Linear(width_in, width_out)
        self.fc2 = nn.Linear(width_out, width_out)
        self.residual = residual

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.fc2(F.gelu(self.fc1(self.layernorm(x))))
        return y + x if self.residual else y


class Fuser(nn.Module):
    """The MLP fuser, for text states of any width: 768 for Stable Diffusion 1.5, 2048 for SDXL's two encoders.

    Args:
        text_width: width of a text state.
        image_width: width of a picture's embedding.
    """

    def __init__(self, text_width: int, image_width: int):
        super().__init__()
        self.text_width, self.image_width = text_width, image_width
        self.mlp1 = _FuserMLP(text_width + image_width, text_width, residual=False)
        self.mlp2 = _FuserMLP(text_width, text_width, residual=True)
        self.layer_norm = nn.LayerNorm(text_width)

    def forward(self, text: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        """Fuses text states (..., text_width) with embeddings (..., image_width); returns (..., text_width)."""
        fused = self.mlp1(torch.cat((text, image), dim=-1)) + text
        return self.layer_norm(self.mlp2(fused))

    @classmethod
    def from_state(cls, state: Mapping[str, torch.Tensor]) -> Fuser:
        """A fuser in fp32 with the widths of the given weights.

        Raises:
            ValueError: weights are missing, or do not fit together.
        """
        name = "mlp1.fc1.weight"
        if name not in state:
            raise ValueError(f"file: expected a fuser's weights, got {len(state)} tensors without {name}")
        text_width, both = state[name].shape
        shapes = {key: tuple(value.shape) for key, value in state.items()}
        fuser = cls(text_width, max(1, both - text_width))
        try:
            fuser.load_state_dict({key: value.float() for key, value in state.items()})
        except RuntimeError as error:
            raise ValueError(f"file: expected a fuser's weights in shapes that fit together, got {shapes}") from error
        return fuser.eval().requires_grad_(False)


def fuse_rows(
    fuser: Fuser,
    text: torch.Tensor,
    embeddings: torch.Tensor,
    strength: float = 1.0,
    emphasis: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """The text states that replace those of the subjects' nouns.

    Prompt emphasis (word:1.2) moves a state away from that of an empty prompt at the same position. The fuser ends in a
    normalization that would undo this, so emphasis is applied after it.

    Args:
        fuser: the trained fuser.
        text: (n, D), states of the subjects' nouns without emphasis.
        embeddings: (n, E), of the subjects.
        strength: 1 fuses as published, 0 keeps the text; linear in between.
        emphasis: weights (n,) of the nouns in the prompt, and the states (n, D) of an empty prompt at their positions;
            None means no emphasis.

    Returns:
        (n, D) in the dtype of `text`.
    """
    fused = fuser(text.float(), embeddings.float())
    rows = torch.lerp(text.float(), fused, strength)
    if emphasis is not None:
        weights, neutral = emphasis[0][:, None].float(), emphasis[1].float()
        rows = torch.where(weights == 1, rows, neutral + (rows - neutral) * weights)
    return rows.to(text.dtype)
