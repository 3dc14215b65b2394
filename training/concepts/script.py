"""Training a concept on diffusers' models, by one process or many."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from ...encoders import concept_files
from ...encoders.concept_texts import Name
from ...encoders.concepts import Key
from ..base import LENGTH, Base, States, open_base
from ..loop import Run
from .learner import BOTH, ConceptWeights, Recipe, concept_losses, latent_mask
from .pictures import Pictures, called, name_of

FILE, NOTE = "concept.safetensors", "run.json"
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
STEPS, GUIDANCE, AT_ONCE = 25, 5.0, 8


def train(options, recipe: Recipe) -> None:
    """Runs the training of `options` (see the package) and writes the concept.

    Raises:
        ValueError, FileNotFoundError: an option cannot be used; says which and why.
    """
    from accelerate import Accelerator

    name = name_of(options.class_word, options.placeholder, recipe)
    for option, least in (("steps", 1), ("batch", 1), ("rank", 0), ("class_pictures", 0), ("log_every", 1)):
        if getattr(options, option) < least:
            given = getattr(options, option)
            raise ValueError(f"--{option.replace('_', '-')}: at least {least} is wanted, not {given}")
    _check_same(options, recipe)
    pictures = read_pictures(options.images, options.masks, options.caption)
    base = open_base(options.base, resolution=options.resolution, with_vision=False)
    accelerator = Accelerator(mixed_precision=options.precision)
    learner = Learner(base, name, recipe, accelerator.device, options.precision == "bf16")
    if options.checkpointing:
        base.unet.enable_gradient_checkpointing()
        base.unet.train()
    examples = learner.examples(pictures)
    prior = learner.draw_class(options.class_pictures, pictures.captions[0]) if options.class_pictures else None
    run = Run(
        options.out,
        learner,
        lambda step: recipe.rate,
        recipe.steps,
        recipe.seed,
        device=str(accelerator.device),
        optimizer=torch.optim.AdamW(learner.parameters(), lr=1.0, weight_decay=0.01),
        accelerator=accelerator,
    )
    draw = partial(_draw, examples, prior, pictures, name, recipe, base, accelerator)
    run.train(
        lambda _step, generator: run.module(*draw(generator)),
        options.log_every,
        save_seconds=60 * options.save_minutes,
    )
    if accelerator.is_main_process:
        concept = learner.weights.concept(name, "training.concepts")
        concept_files.save(concept, options.out / FILE)
        print(f"{options.out / FILE}: {(options.out / FILE).stat().st_size / 2**20:.1f} MiB")


def _check_same(options, recipe: Recipe) -> None:
    """Notes what the run is in its folder, and refuses to continue another one there."""
    kind = {k: v for k, v in asdict(recipe).items() if k != "steps"}
    for option in ("base", "class_word", "placeholder", "class_pictures", "resolution", "precision"):
        kind[option] = getattr(options, option)
    note = options.out / NOTE
    if (options.out / "checkpoint.pt").exists() and note.exists():
        begun = json.loads(note.read_text())
        for option, value in kind.items():
            if begun.get(option) != value:
                raise ValueError(
                    f"--out: a new folder, or one of a run with {option} {value}, is wanted, but {options.out} has one "
                    f"with {begun.get(option)}"
                )
    options.out.mkdir(parents=True, exist_ok=True)
    note.write_text(json.dumps(kind, indent=1))


def read_pictures(folder: Path, masks: Path | None, caption: str) -> Pictures:
    """The pictures of a folder in the order of their names, with captions and masks.

    Raises:
        FileNotFoundError: the folder holds no picture, or a picture has no mask.
        ValueError: a caption does not have {} exactly once.
    """
    files = sorted(file for file in folder.glob("*") if file.suffix.lower() in PICTURES)
    if not files:
        raise FileNotFoundError(f"--images: a folder with pictures ({', '.join(PICTURES)}) is wanted, not {folder}")
    shown, found = [], []
    for file in files:
        beside = file.with_suffix(".txt")
        found.append(beside.read_text(encoding="utf-8").strip() if beside.exists() else caption)
        mask = None
        if masks is not None:
            its_own = [masks / (file.stem + suffix) for suffix in PICTURES if (masks / (file.stem + suffix)).exists()]
            if not its_own:
                raise FileNotFoundError(f"--masks: a mask named {file.stem} is wanted for {file.name} in {masks}")
            mask = _open(its_own[0], "L")
        shown.append((_open(file, "RGB"), mask))
    return Pictures([image for image, _ in shown], [mask for _, mask in shown], found)


def _open(file: Path, mode: str) -> torch.Tensor:
    import numpy as np
    from PIL import Image, ImageOps

    picture = ImageOps.exif_transpose(Image.open(file)).convert(mode)
    return torch.from_numpy(np.asarray(picture, np.float32) / 255)


def cross_attentions(unet) -> dict[Key, torch.nn.Module]:
    """The cross-attentions of a diffusers UNet by the keys of their sites in Stable Diffusion's own numbering."""
    found: dict[Key, torch.nn.Module] = {}

    def add(block: str, number: int, transformer) -> None:
        for depth, one in enumerate(transformer.transformer_blocks):
            found[block, number, depth] = one.attn2

    number = 1
    for down in unet.down_blocks:
        for i in range(len(down.resnets)):
            if hasattr(down, "attentions"):
                add("input", number, down.attentions[i])
            number += 1
        number += bool(down.downsamplers)
    add("middle", 0, unet.mid_block.attentions[0])
    number = 0
    for up in unet.up_blocks:
        for i in range(len(up.resnets)):
            if hasattr(up, "attentions"):
                add("output", number, up.attentions[i])
            number += 1
    return found


class _Gaining:
    """A diffusers attention processor whose keys and values gain what the concept adds."""

    def __init__(self, weights: ConceptWeights, key: Key):
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
    """What is trained, on a base that is not: only `weights` is in its state.

    Args:
        base: its UNet gets the concept's processors.
        name: of the concept.
        recipe: of its training.
        device: where everything goes.
        half: whether UNet and text towers are kept in bfloat16.
    """

    def __init__(self, base: Base, name: Name, recipe: Recipe, device: torch.device, half: bool):
        super().__init__()
        self.name, self.recipe, self.device = name, recipe, device
        attentions = cross_attentions(base.unet)
        layers = {key: {"k": attn.to_k.weight, "v": attn.to_v.weight} for key, attn in attentions.items()}
        self.weights = ConceptWeights(layers, self._starts(base) if recipe.new_word else {}, recipe.rank, recipe.seed)
        for key, attn in attentions.items():
            attn.set_processor(_Gaining(self.weights, key))
        for part in (base.unet, base.towers, base.autoencoder):
            part.requires_grad_(False).to(device)
        if half:
            base.unet.to(torch.bfloat16)
            base.towers.to(torch.bfloat16)
        # In a tuple, so that the base is none of this module's parts.
        self._frozen = (base,)

    @property
    def base(self) -> Base:
        """What the concept is learnt for."""
        return self._frozen[0]

    def _starts(self, base: Base) -> dict[str, torch.Tensor]:
        """The class word's own embedding per encoder, so that training starts from what is known of the class."""
        return {
            encoder: tower.get_input_embeddings().weight[vocabulary.split(self.name.class_word)[:1]]
            for encoder, tower, vocabulary in zip(_encoders(base), base.towers, base.vocabularies, strict=True)
        }

    @torch.no_grad()
    def examples(self, pictures: Pictures) -> list[tuple[torch.Tensor, torch.Tensor, str]]:
        """Latent (C, h, w), mask (h, w) and caption of every view."""
        found = []
        views = pictures.views(self.recipe, self.base.resolution)
        generator = torch.Generator().manual_seed(self.recipe.seed)
        for start in range(0, len(views), AT_ONCE):
            chunk = views[start : start + AT_ONCE]
            images = torch.stack([view.image for view, _ in chunk]).movedim(-1, 1).to(self.device) * 2 - 1
            noise = torch.randn(len(chunk), *self.base.latent_shape, generator=generator).to(self.device)
            for latent, (view, caption) in zip(self.base.autoencoder.encode(images, noise), chunk, strict=True):
                found.append((latent, latent_mask(view.mask, tuple(latent.shape[-2:])).to(self.device), caption))
        return found

    @torch.no_grad()
    def draw_class(self, count: int, caption: str) -> torch.Tensor:
        """Latents (count, C, h, w) of the class in general, as the model draws them before it learns."""
        words, parts = caption.replace("{}", self.name.class_word), []
        half = self.base.unet.dtype == torch.bfloat16
        for start in range(0, count, AT_ONCE):
            n, seed = min(AT_ONCE, count - start), self.recipe.seed + start
            with torch.autocast(self.device.type, torch.bfloat16, enabled=half):
                spoken = self.states([words] * n)
                silent = self.states([""] * n)
                parts.append(self.base.sample(silent, lambda _, spoken=spoken: spoken, n, STEPS, GUIDANCE, seed))
        return torch.cat(parts)

    def states(self, captions: Sequence[str]) -> States:
        """Text states of captions, in which the placeholder stands for the new word.

        Raises:
            ValueError: the new word is beyond what the text towers read.
        """
        learnt = self.weights.tokens()
        rows, hooks = [], []
        for encoder, tower, vocabulary in zip(
            _encoders(self.base), self.base.towers, self.base.vocabularies, strict=True
        ):
            ids, places = [], []
            for row, caption in enumerate(captions):
                before, own, after = caption.partition(self.name.placeholder) if learnt else (caption, "", "")
                tokens = vocabulary.split(before)
                if own:
                    places.append((row, 1 + len(tokens)))
                    # The id only keeps the place.
                    tokens = [*tokens, *vocabulary.split(self.name.class_word)[:1], *vocabulary.split(after)]
                    if places[-1][1] > LENGTH - 2:
                        raise ValueError(f"captions: the concept among the first {LENGTH - 2} tokens is wanted")
                ids.append(vocabulary.around(tokens))
            rows.append(torch.tensor(ids, device=self.device))
            if places:
                at = tuple(torch.tensor(index, device=self.device) for index in zip(*places, strict=True))
                hook = partial(_put, at, learnt[encoder][0])
                hooks.append(tower.get_input_embeddings().register_forward_hook(hook))
        try:
            return self.base.read(torch.stack(rows, 1))
        finally:
            for hook in hooks:
                hook.remove()

    def forward(
        self, latents: torch.Tensor, masks: torch.Tensor, captions: list[str], noise: torch.Tensor, t: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """The losses of a batch whose first pictures are of the concept; see `concept_losses`."""
        noisy, target = self.base.noised(latents, noise, t)
        found = self.base.predict(noisy, t, self.states(captions))
        return concept_losses(found, target, masks, self.recipe)


def _encoders(base: Base) -> tuple[str, ...]:
    """The towers' names in a concept."""
    if len(base.towers) == 2:
        return ("l", "g")
    return ("h",) if base.towers[0].config.hidden_size == 1024 else ("l",)


def _put(at, row, _module, _inputs, embeddings):
    return embeddings.index_put(at, row.to(embeddings.dtype))


def _draw(examples, prior, pictures: Pictures, name: Name, recipe: Recipe, base: Base, accelerator, generator):
    """This process's batch of a step, drawn from all processes' lots."""
    lots = accelerator.num_processes, accelerator.process_index

    def mine(count: int) -> list[int]:
        return torch.randint(count, (lots[0], recipe.batch), generator=generator)[lots[1]].tolist()

    chosen = [examples[i] for i in mine(len(examples))]
    latents, masks, captions = (list(part) for part in zip(*chosen, strict=True))
    captions = [called(caption, name) for caption in captions]
    if prior is not None:
        latents += [prior[i] for i in mine(len(prior))]
        masks += [torch.ones_like(masks[0])] * recipe.batch
        captions += [pictures.captions[0].replace("{}", name.class_word)] * recipe.batch
    shape = (lots[0], len(latents))
    t = torch.randint(base.times, shape, generator=generator)[lots[1]]
    noise = torch.randn(*shape, *base.latent_shape, generator=generator)[lots[1]]
    device = accelerator.device
    return torch.stack(latents), torch.stack(masks), captions, noise.to(device), t.to(device)
