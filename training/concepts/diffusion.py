"""A concept on a diffusers model: its differences in cross-attention, its word in the text, and its losses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F

from ...encoders.concept_texts import Name
from ...encoders.concepts import keys_fingerprint
from ..base import LENGTH, Base, Vocabulary
from ..sampling import States
from .augment import View
from .learner import BOTH, ConceptWeights, Example, Recipe, concept_losses, latent_mask

STEPS, GUIDANCE = 25, 5.0


def cross_attentions(unet) -> dict[str, torch.nn.Module]:
    """The cross-attentions of a diffusers UNet under the names that concepts use: Stable Diffusion's own numbering of
    blocks and of the transformers in them, such as output.6.0."""
    found: dict[str, torch.nn.Module] = {}

    def add(block: str, number: int, transformer) -> None:
        for depth, one in enumerate(transformer.transformer_blocks):
            found[f"{block}.{number}.{depth}"] = one.attn2

    number = 1
    for down in unet.down_blocks:
        for i in range(len(down.resnets)):
            if hasattr(down, "attentions"):
                add("input", number, down.attentions[i])
            number += 1
        number += bool(down.downsamplers)
    if getattr(unet.mid_block, "attentions", None):
        add("middle", 0, unet.mid_block.attentions[0])
    number = 0
    for up in unet.up_blocks:
        for i in range(len(up.resnets)):
            if hasattr(up, "attentions"):
                add("output", number, up.attentions[i])
            number += 1
    return found


class _Gaining:
    """A diffusers attention processor that adds a concept's differences to keys and values."""

    def __init__(self, weights: ConceptWeights, key: str):
        self.weights, self.key = weights, key

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, **_):
        query = attn.to_q(hidden_states)
        key, value = (
            layer(encoder_hidden_states) + self.weights.addition(self.key, part, encoder_hidden_states)
            for part, layer in zip(BOTH, (attn.to_k, attn.to_v), strict=True)
        )
        heads = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in (query, key, value))
        out = F.scaled_dot_product_attention(*heads, scale=attn.scale)
        return attn.to_out[0](out.transpose(1, 2).flatten(2))


class Learner(torch.nn.Module):
    """What is trained, on a frozen base; its state dict holds `weights` alone.

    Args:
        base: its UNet gets the concept's attention processors.
        name: name of the concept.
        recipe: how it is trained.
        device: device of all parts.
        half: whether UNet and text towers are kept in bfloat16.

    Attributes:
        fingerprint: fingerprint of the base.
    """

    def __init__(self, base: Base, name: Name, recipe: Recipe, device: torch.device, half: bool):
        super().__init__()
        self.base, self.name, self.recipe, self.device, self.half = base, name, recipe, device, half
        attentions = cross_attentions(base.unet)
        layers = {key: {"k": attn.to_k.weight, "v": attn.to_v.weight} for key, attn in attentions.items()}
        self.fingerprint = keys_fingerprint(next(iter(layers.values()))["k"])
        starts = self._starts() if recipe.new_word else {}
        self.weights = ConceptWeights(layers, starts, recipe.rank, recipe.seed).to(device)
        for key, attn in attentions.items():
            attn.set_processor(_Gaining(self.weights, key))
        for part in (base.unet, base.towers, base.autoencoder):
            part.requires_grad_(False).to(device)
        if half:
            base.unet.to(torch.bfloat16)
            base.towers.to(torch.bfloat16)

    def _starts(self) -> dict[str, torch.Tensor]:
        """The class word's own embedding per encoder, so that training starts from what is known about the class."""
        return {
            encoder: tower.get_input_embeddings().weight[vocabulary.split(self.name.class_word)[:1]]
            for encoder, tower, vocabulary in self._towers()
        }

    def _towers(self) -> Iterator[tuple[str, torch.nn.Module, Vocabulary]]:
        """The text towers, each with its name in a concept and its vocabulary."""
        towers = self.base.towers
        one = "h" if towers[0].config.hidden_size == 1024 else "l"
        return zip(("l", "g") if len(towers) == 2 else (one,), towers, self.base.vocabularies, strict=True)

    def check(self, captions: Sequence[str]) -> None:
        """Raises ValueError if a caption has the concept beyond the tokens that the text towers read."""
        for caption in captions:
            for _, _, vocabulary in self._towers():
                _, place = self._ids(vocabulary, caption)
                if place is not None and place > LENGTH - 2:
                    raise ValueError(
                        f"captions: expected {{}} among the first {LENGTH - 2} tokens, got it at {place} in {caption!r}"
                    )

    def _ids(self, vocabulary: Vocabulary, caption: str) -> tuple[list[int], int | None]:
        """The 77 ids of a caption in which {} stands for the concept, and the position of the new word or None."""
        if "{}" not in caption:
            return vocabulary.row(caption), None
        before, after = caption.split("{}")
        word = self.name.class_word
        if not self.recipe.new_word:
            return vocabulary.row(f"{before}{word}{after}"), None
        tokens = vocabulary.split(before)
        # This id only reserves the new word's place.
        held = vocabulary.split(word)[:1]
        return vocabulary.around([*tokens, *held, *vocabulary.split(f"{word}{after}")]), 1 + len(tokens)

    @torch.no_grad()
    def examples(self, views: Sequence[tuple[View, str]]) -> list[Example]:
        """Encodes every view with its caption."""
        found, at_once = [], self.recipe.batch_size
        generator = torch.Generator().manual_seed(self.recipe.seed)
        for start in range(0, len(views), at_once):
            chunk = views[start : start + at_once]
            images = torch.stack([view.image for view, _ in chunk]).movedim(-1, 1).to(self.device) * 2 - 1
            noise = torch.randn(len(chunk), *self.base.latent_shape, generator=generator).to(self.device)
            for latent, (view, caption) in zip(self.base.autoencoder.encode(images, noise), chunk, strict=True):
                mask = latent_mask(view.mask, tuple(latent.shape[-2:])).to(self.device)
                found.append(Example(latent, mask, caption))
        return found

    @torch.no_grad()
    def draw_class(self, caption: str, count: int) -> torch.Tensor:
        """Latents (count, C, h, w) of the class in general, as the model draws them before training."""
        parts, at_once = [], self.recipe.batch_size
        for start in range(0, count, at_once):
            n, seed = min(at_once, count - start), self.recipe.seed + start
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
                states, unconditional = self.states([caption] * n), self.states([""] * n)
                parts.append(self.base.sample(unconditional, lambda *_, s=states: s, n, STEPS, GUIDANCE, seed))
        return torch.cat(parts)

    def states(self, captions: Sequence[str]) -> States:
        """Text states of captions in which {} stands for the concept: its new word and its class word."""
        learned = self.weights.tokens()
        rows, hooks = [], []
        for encoder, tower, vocabulary in self._towers():
            ids, places = zip(*(self._ids(vocabulary, caption) for caption in captions), strict=True)
            rows.append(torch.tensor(ids, device=self.device))
            at = [(row, place) for row, place in enumerate(places) if place is not None]
            if at:
                index = tuple(torch.tensor(numbers, device=self.device) for numbers in zip(*at, strict=True))
                hook = partial(_put, index, learned[encoder][0])
                hooks.append(tower.get_input_embeddings().register_forward_hook(hook))
        try:
            return self.base.read(torch.stack(rows, 1))
        finally:
            for hook in hooks:
                hook.remove()

    def forward(
        self, latents: torch.Tensor, masks: torch.Tensor, captions: list[str], noise: torch.Tensor, t: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """The losses of a batch whose first pictures show the concept; see `concept_losses`."""
        noisy, target = self.base.noised(latents, noise, t)
        found = self.base.predict(noisy, t, self.states(captions))
        return concept_losses(found, target, masks, torch.ones(len(t), device=self.device), self.recipe)


def _put(index, row, _module, _inputs, embeddings):
    return embeddings.index_put(index, row.to(embeddings.dtype))
