"""Trains a concept in ComfyUI, on a copy of the model, through the same sites as in sampling.

The model's own weights are frozen. At every cross-attention layer the concept's part is added to keys and values, as
Multi-Concept Fusion does later.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import comfy.model_management
import comfy.model_sampling
import comfy.sampler_helpers
import torch

from ...encoders.concept_texts import Name
from ...encoders.concepts import Concept
from ...training.concepts.learner import (
    BOTH,
    ConceptWeights,
    Example,
    Recipe,
    concept_losses,
    concept_optimizer,
    draw_batch,
    latent_mask,
    prediction_weight,
)
from ...training.concepts.pictures import Pictures, called, name_of
from ...training.loop import Run
from ..model import passes
from ..model.copies import encoded, load_copies, trainable_copies
from ..model.families import family_of, network_of
from ..model.patching import POSITIVE
from ..model.sites import CROSS, AttentionCall
from .concepts import layer_module
from .prompts import splice

Report = Callable[[int, float, Callable[[], Concept]], None]
"""Called after each step with the index of the step, the loss, and a function that returns the current concept."""


def train(
    model,
    clip,
    vae,
    pictures: Pictures,
    class_word: str,
    placeholder: str,
    recipe: Recipe,
    side: int,
    prior: torch.Tensor | None = None,
    report: Report = lambda *_: None,
    folder: Path | None = None,
) -> Concept:
    """Trains a concept on pictures.

    Args:
        model, clip, vae: ComfyUI's, from one checkpoint; they are not changed.
        pictures: of the concept.
        class_word: class of the concept, such as "dog".
        placeholder: its new word.
        recipe: how to train.
        side: side of the square training pictures, in pixels.
        prior: latents (n, C, h, w) from a sampler that show the class in general; None for no prior.
        report: called after each step.
        folder: for a checkpoint every minute, from which the same training continues after a cancellation or a crash;
            it is removed at the end. None keeps no checkpoint.

    Raises:
        ValueError: an input cannot be used.
    """
    name = check(vae, class_word, placeholder, recipe, side)
    with torch.inference_mode(False), torch.enable_grad(), trainable_copies(model, clip) as (patcher, text):
        trainer = _Trainer(patcher, text, pictures, name, recipe, side, prior)
        trainer.encode(vae)
        trainer.run(report, folder)
        concept = trainer.concept()
        if folder:
            # A file that another program holds open must not cost the concept.
            shutil.rmtree(folder, ignore_errors=True)
        return concept


def check(vae, class_word: str, placeholder: str, recipe: Recipe, side: int) -> Name:
    """Checks the inputs of a training and returns the concept's name.

    Raises:
        ValueError: an input cannot be used.
    """
    factor = vae.spacial_compression_encode()
    if side % factor or side < factor:
        raise ValueError(f"size: expected a multiple of {factor} for this VAE, got {side}")
    return name_of(class_word, placeholder, recipe)


class _Trainer:
    def __init__(self, patcher, clip, pictures: Pictures, name: Name, recipe: Recipe, side: int, prior):
        self.model, self.device = patcher.model, patcher.load_device
        self.patchers = [patcher, clip.patcher]
        self.clip, self.pictures, self.name, self.recipe, self.side = clip, pictures, name, recipe, side
        self.network = network_of(self.model)
        self.family = family_of(self.network)
        self.sites = [site for site in self.family.sites(self.network) if site.kind == CROSS]
        layers = {
            site.key: {part: layer_module(self.model, site.key, part).weight.detach() for part in BOTH}
            for site in self.sites
        }
        starts = self._start_of_word() if recipe.new_word else {}
        self.weights = ConceptWeights(layers, starts, recipe.rank, recipe.seed).to(self.device)
        self.examples: list[Example] = []
        self.prior: list[Example] = []
        if prior is not None:
            latents = self.model.process_latent_in(prior.clone())
            everywhere, caption = torch.ones(latents.shape[-2:]), pictures.captions[0].replace("{}", name.class_word)
            self.prior = [Example(latent, everywhere, caption) for latent in latents]
        self._texts: dict[str, dict[str, torch.Tensor]] = {}

    def _start_of_word(self) -> dict[str, torch.Tensor]:
        """The class word's own embedding, with which the new word starts."""
        starts = {}
        for encoder, chunks in self.clip.tokenize(self.name.class_word).items():
            tower = getattr(self.clip.cond_stage_model, f"clip_{encoder}")
            table = tower.transformer.get_input_embeddings().weight
            first = chunks[0][1][0]
            starts[encoder] = table[first : first + 1].detach().clone()
        return starts

    def encode(self, vae) -> None:
        """Encodes the views of all pictures as latents."""
        views = self.pictures.views(self.recipe, self.side)
        with torch.no_grad():
            for start in range(0, len(views), 8):
                comfy.model_management.throw_exception_if_processing_interrupted()
                chunk = views[start : start + 8]
                latents = encoded(vae, torch.stack([view.image for view, _ in chunk]))
                for latent, (view, caption) in zip(self.model.process_latent_in(latents), chunk, strict=True):
                    mask = latent_mask(view.mask, tuple(latent.shape[-2:]))
                    self.examples.append(Example(latent, mask, caption))
        if not all(torch.isfinite(example.latent).all() for example in self.examples):
            raise ValueError("vae: expected finite latents, got NaN or infinity for a picture")

    def run(self, report: Report, folder: Path | None) -> None:
        """Runs all remaining steps."""
        optimizer = concept_optimizer(self.weights, self.recipe)
        run = Run(folder, self.weights, optimizer, self.recipe.steps, self.recipe.seed)

        def loss_of(_step, generator):
            comfy.model_management.throw_exception_if_processing_interrupted()
            # A report may sample a preview, for which ComfyUI may have unloaded the models.
            load_copies(self.patchers)
            return self._losses(generator)

        def after(step, losses):
            report(step, float(losses["concept"]), self.concept)

        half = self.model.get_dtype_inference() != torch.float32
        run.train(loss_of, self.recipe.steps, after=after, half=half, save_seconds=60.0)

    def _losses(self, generator: torch.Generator) -> dict[str, torch.Tensor]:
        sampling = self.model.model_sampling
        batch = draw_batch(
            self.examples, self.prior, self.recipe.batch_size, len(sampling.sigmas), generator, self.device
        )
        captions = [called(caption, self.name) for caption in batch.captions]
        x0, sigma = batch.latents, sampling.sigmas.to(self.device)[batch.times].float()
        conds = self._conds(captions, x0[:1])
        denoised = self._denoise(x0 + sigma[:, None, None, None] * batch.noise, sigma, conds)
        v_prediction = isinstance(sampling, comfy.model_sampling.V_PREDICTION)
        weight = prediction_weight(sigma, v_prediction)
        return concept_losses(denoised, x0, batch.masks, weight, self.recipe)

    def _conds(self, captions: Sequence[str], latent: torch.Tensor) -> dict[str, torch.Tensor]:
        """Inputs of a model call for captions, one row each; captions without the new word are encoded once."""
        rows = []
        for caption in captions:
            conds = self._texts.get(caption)
            if conds is None:
                own = self.name.placeholder and self.name.placeholder in caption
                words = {self.name.placeholder: self.weights.tokens()} if own else {}
                spliced = splice(self.clip, caption, words)
                cond, pooled = self.clip.encode_from_tokens(spliced, return_pooled=True)
                entry = comfy.sampler_helpers.convert_cond([[cond, {"pooled_output": pooled}]])[0]
                conds = passes.encode(self.model, entry, latent, POSITIVE, self.recipe.seed)
                if not own:
                    conds = self._texts[caption] = {key: value.detach() for key, value in conds.items()}
            rows.append(dict(conds))
        length = math.lcm(*(row["c_crossattn"].shape[1] for row in rows))
        for row in rows:
            # As ComfyUI does for prompts of different lengths.
            context = row["c_crossattn"]
            row["c_crossattn"] = context.repeat(1, length // context.shape[1], 1)
        return {key: torch.cat([row[key] for row in rows]) for key in rows[0]}

    def _denoise(self, x: torch.Tensor, sigma: torch.Tensor, conds: dict[str, torch.Tensor]) -> torch.Tensor:
        context = conds["c_crossattn"].to(self.model.get_dtype_inference())

        def attend(site, call: AttentionCall) -> torch.Tensor:
            key, value = (
                (own + self.weights.addition(site.key, part, context)).to(own.dtype)
                for part, own in zip(BOTH, (call.k, call.v), strict=True)
            )
            return call.attend(call.q, key, value)

        handlers = {site: partial(attend, site) for site in self.sites}
        options = self.family.install(self.network, {"cond_or_uncond": [0], "sigmas": sigma}, handlers)
        return passes.evaluate(self.model, x, sigma, conds, options)

    def concept(self) -> Concept:
        """The concept in its current state."""
        return self.weights.concept(self.name, "Train Concept")
