"""The fuser of CoAdapter: several T2I-Adapters and a style adapter that are used together see one another.

CoAdapter is part of T2I-Adapter (Mou et al., arXiv 2302.08453; TencentARC/T2I-Adapter, Apache-2.0), whose authors name
Composer as what inspired it. Each adapter's feature maps become one token per level, the style's tokens come beside
them, a small transformer reads all, and its result scales every channel of every map, and the style's tokens. Modules
have the names of the published weights, with their spelling.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from .files import load_exactly

KINDS = ("sketch", "keypose", "segmentation", "depth", "canny", "style", "color", "openpose")
"""Kinds of adapters in the order of their embeddings."""
STYLE = "style"
_TASKS = 16
"""Embeddings in the published weights; only the first are used."""


class CoAdapterFuser(nn.Module):
    """See the module.

    Args:
        channels: of the adapters' maps, from fine to coarse.
        width: of the tokens, and of the text states.
        heads, layers: of the transformer.
    """

    def __init__(
        self, channels: Sequence[int] = (320, 640, 1280, 1280), width: int = 768, heads: int = 8, layers: int = 3
    ):
        super().__init__()
        self.task_embedding = nn.Parameter(torch.zeros(_TASKS, width))
        self.positional_embedding = nn.Parameter(torch.zeros(len(channels), width))
        self.spatial_feat_mapping = nn.ModuleList(nn.Sequential(nn.SiLU(), nn.Linear(c, width)) for c in channels)
        self.transformer_layes = nn.Sequential(*(_Block(width, heads) for _ in range(layers)))
        self.ln_post, self.ln_pre = nn.LayerNorm(width), nn.LayerNorm(width)
        projections = [nn.Linear(width, c) for c in channels]
        for layer in projections:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.spatial_ch_projs = nn.ModuleList(projections)
        self.seq_proj = nn.Parameter(torch.zeros(width, width))

    def forward(
        self, maps: Mapping[str, Sequence[torch.Tensor]], style: torch.Tensor | None = None
    ) -> tuple[list[torch.Tensor] | None, torch.Tensor | None]:
        """The summed maps, one (n, C, h, w) for each level, and the tokens of the style (n, k, D).

        Args:
            maps: of each adapter by its kind (of KINDS), one (n, C, h, w) for each level, already weighted.
            style: (n, k, D), the style adapter's tokens, already weighted, or None.
        """
        parts = [self._tokens(kind, levels) for kind, levels in maps.items()]
        if style is not None:
            parts.append(style + self.task_embedding[KINDS.index(STYLE)])
        if not parts:
            return None, None
        x = self.ln_post(self.transformer_layes(self.ln_pre(torch.cat(parts, 1))))
        fused: list[torch.Tensor] | None = None
        start = 0
        for levels in maps.values():
            scaled = [
                level * (1 + project(x[:, start + i]))[..., None, None]
                for i, (level, project) in enumerate(zip(levels, self.spatial_ch_projs, strict=True))
            ]
            fused = scaled if fused is None else [a + b for a, b in zip(fused, scaled, strict=True)]
            start += len(levels)
        return fused, None if style is None else style * (1 + x[:, start:] @ self.seq_proj)

    def _tokens(self, kind: str, levels: Sequence[torch.Tensor]) -> torch.Tensor:
        means = [mapping(level.mean((2, 3))) for mapping, level in zip(self.spatial_feat_mapping, levels, strict=True)]
        return torch.stack(means, 1) + self.task_embedding[KINDS.index(kind)] + self.positional_embedding

    @classmethod
    def from_state(cls, state: Mapping[str, torch.Tensor]) -> CoAdapterFuser:
        """A fuser with published weights.

        Raises:
            ValueError: these are the weights of something else.
        """
        missing = next((key for key in ("task_embedding", "seq_proj", "ln_pre.weight") if key not in state), None)
        if missing:
            raise ValueError(f"file: expected the weights of CoAdapter's fuser, got a file without {missing}")
        levels = sum(key.startswith("spatial_ch_projs.") and key.endswith(".weight") for key in state)
        layers = len({key.split(".")[1] for key in state if key.startswith("transformer_layes.")})
        channels = [len(state.get(f"spatial_ch_projs.{i}.weight", ())) for i in range(levels)]
        width = state["seq_proj"].shape[0]
        return load_exactly(lambda _: cls(channels, width, layers=layers), state, "CoAdapter's fuser")


class _Block(nn.Module):
    """A transformer block as CLIP has it."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            OrderedDict(c_fc=nn.Linear(width, 4 * width), gelu=_QuickGELU(), c_proj=nn.Linear(4 * width, width))
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.ln_1(x)
        x = x + self.attn(h, h, h, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class _QuickGELU(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(1.702 * x)
