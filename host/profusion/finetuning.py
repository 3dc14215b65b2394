"""Fine-tunes PromptNet on a subject's pictures in ComfyUI, together with the UNet's attention.

It runs on copies of the model and the text encoder (see `model.copies`), and through the functions that make the
subject's word in sampling.
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import comfy.model_management
import comfy.model_sampling
import comfy.sampler_helpers
import comfy.sd
import torch

from ...encoders.files import free_file
from ...encoders.promptnet import PromptNet, save
from ...training.concepts.augment import NONE, View, augment
from ...training.concepts.learner import Example, latent_mask, masked_error, prediction_weight
from ...training.concepts.pictures import Pictures
from ...training.loop import Run
from ...training.promptnet.finetuning import FineTuning, Tuned, draw_step, lora_state
from ..model import passes
from ..model.copies import encoded, load_copies, trainable_copies
from ..model.families import family_of, network_of
from ..model.patching import POSITIVE
from ..model.sampling import sample
from ..model.sites import CROSS
from ..progress import PREVIEW_STEPS, Progress, loss_picture, training_folder
from ..weaver.weights import Weights
from ..words import stand_in
from . import promptnet as words
from .spliced import SplicedText, slots_of

PREFIX = "diffusion_model."
"""Of the UNet's layers in a LoRA."""


class Result(NamedTuple):
    """What a fine-tuning gives.

    Attributes:
        promptnet: the fine-tuned PromptNet.
        lora: the UNet's differences, as ComfyUI's Load LoRA Model takes them.
        loss: a plot (H, W, 3).
        report: a sentence.
    """

    promptnet: words.LoadedPromptNet
    lora: dict[str, torch.Tensor]
    loss: torch.Tensor
    report: str


def fine_tune(
    model,
    promptnet: words.LoadedPromptNet,
    clip,
    clip_vision,
    vae,
    pictures: Pictures,
    recipe: FineTuning,
    side: int,
    preview_every: int = 0,
    checkpoints: Path | None = None,
) -> Result:
    """Fine-tunes under ComfyUI's progress bar.

    Args:
        model, clip, clip_vision, vae: ComfyUI's, those that the PromptNet is for; they are not changed.
        promptnet: the PromptNet to begin with, which is not changed either.
        pictures: of the subject; {} in their captions stands for its word.
        recipe: how to train.
        side: side of the square training pictures, in pixels.
        preview_every: steps between two previews; 0 shows none.
        checkpoints: folder for a checkpoint every minute, from which the same fine-tuning continues after a
            cancellation or a crash; it is removed at the end. None keeps no checkpoint.

    Raises:
        ValueError: an input cannot be used, or the folder cannot be written.
    """
    tokenizer = words.checked_tokenizer(promptnet, clip)
    words.check_channels(promptnet, model.model.latent_format.latent_channels)
    _check_side(side, vae, promptnet.module.config)
    _check_room(pictures.captions, clip, tokenizer, side // vae.spacial_compression_encode(), promptnet.module.config)
    network_of(model.model, CROSS)
    state = promptnet.module.state_dict()
    # On the CPU, for sums differ from device to device.
    sign = [float(weight.cpu().float().sum()) for weight in state.values()]
    kind = [sign, Weights.of(model).fingerprint(), asdict(recipe), side, list(pictures.captions)]
    folder = training_folder(checkpoints, kind, pictures, model, clip, vae.first_stage_model, clip_vision.model)
    views = [augment(image, mask, side, NONE, torch.Generator()) for image, mask in pictures.pairs]
    seen = [words.look(promptnet, clip_vision, view.image) for view in views]
    progress = Progress(recipe.steps, preview_every)
    with torch.inference_mode(False), torch.enable_grad(), trainable_copies(model, clip) as (patcher, text):
        trainer = _Trainer(patcher, text, tokenizer, promptnet.module, recipe)
        trainer.encode(vae, views, seen, pictures.captions)

        def after(step: int, loss: float) -> None:
            progress.after(step, loss, lambda: _draw(model, clip, vae, trainer, seen[0], pictures.captions[0], side))

        trainer.run(after, folder)
        found = trainer.result()
    if folder:
        # A file that another program holds open must not cost the result.
        shutil.rmtree(folder, ignore_errors=True)
    return Result(*found, loss_picture(progress.losses), progress.sentence("PromptNet", recipe.batch_size))


def _check_side(side: int, vae, config) -> None:
    step, factor = vae.spacial_compression_encode(), config.factor
    least = config.region_side * step
    if side % (step * factor) or side < least:
        raise ValueError(f"size: expected a multiple of {step * factor}, at least {least}, got {side}")


def _check_room(captions, clip, tokenizer, cells: int, config) -> None:
    count = (cells // config.region_side) ** 2
    for caption in dict.fromkeys(captions):
        prompt, end = with_stand_in(caption, tokenizer)
        room = SplicedText(clip, slots_of(clip, prompt, [end])[0], count).room
        if room < 0:
            raise ValueError(
                f"captions: expected {{}} earlier (it becomes {count} vectors at this size), got it {-room} too late; "
                "shorten the text before it"
            )


class _Trainer:
    def __init__(self, patcher, clip, tokenizer, promptnet: PromptNet, recipe: FineTuning):
        self.model, self.device = patcher.model, patcher.load_device
        self.patchers = [patcher, clip.patcher]
        self.clip, self.tokenizer, self.recipe = clip, tokenizer, recipe
        self.network = network_of(self.model)
        layers = {name: self.network.get_submodule(name) for name in family_of(self.network).projections(self.network)}
        net = PromptNet(promptnet.config)
        net.load_state_dict({name: weight.float() for name, weight in promptnet.state_dict().items()})
        weights = {name: layer.weight.detach() for name, layer in layers.items()}
        self.tuned = Tuned(net, weights, recipe).to(self.device)
        for name, layer in layers.items():
            layer.register_forward_hook(_adding(self.tuned.differences, name))
        self.examples: list[Example] = []
        self.tokens = self.positions = None
        self._texts: dict[str, tuple[SplicedText, dict]] = {}

    def encode(self, vae, views: list[View], seen: list[words.Seen], captions) -> None:
        """Encodes the pictures as latents."""
        with torch.no_grad():
            self.tokens = torch.stack([one.tokens for one in seen]).clone().to(self.device, torch.float32)
            for i, view in enumerate(views):
                comfy.model_management.throw_exception_if_processing_interrupted()
                (latent,) = self.model.process_latent_in(encoded(vae, view.image[None]))
                mask = latent_mask(view.mask, tuple(latent.shape[-2:])).to(self.device)
                self.examples.append(Example(latent.to(self.device), mask, captions[i % len(captions)]))
        if not all(torch.isfinite(example.latent).all() for example in self.examples):
            raise ValueError("vae: expected finite latents, got NaN or infinity for a picture")

    def run(self, after: Callable[[int, float], None], folder: Path | None) -> None:
        """Runs all remaining steps."""
        run = Run(folder, self.tuned, self.tuned.optimizer(self.recipe), self.recipe.steps, self.recipe.seed)
        # Gradients and the two moments of every weight.
        room = 3 * sum(p.numel() * p.element_size() for p in self.tuned.parameters())
        with torch.inference_mode():
            comfy.model_management.free_memory(room, self.device)

        def loss_of(_step, generator):
            comfy.model_management.throw_exception_if_processing_interrupted()
            # A preview may have made ComfyUI unload the models.
            load_copies(self.patchers)
            return {"noise": self._loss(generator)}

        half = self.model.get_dtype_inference() != torch.float32
        run.train(
            loss_of,
            self.recipe.steps,
            after=lambda step, losses: after(step, float(losses["noise"])),
            half=half,
            save_seconds=60.0,
        )

    def _loss(self, generator: torch.Generator) -> torch.Tensor:
        """The error of the network's own prediction, as in the published training."""
        sampling, first = self.model.model_sampling, self.examples[0]
        drawn = draw_step(
            len(self.examples),
            self.recipe.batch_size,
            tuple(first.latent.shape),
            len(sampling.sigmas),
            generator,
            self.device,
        )
        targets = [self.examples[number] for number in drawn.targets]
        x0 = torch.stack([example.latent for example in targets]).float()
        masks = torch.stack([example.mask for example in targets])
        references = torch.stack([self.examples[number].latent for number in drawn.references])
        sigma = sampling.sigmas.to(self.device)[drawn.times].float()
        x = x0 + sigma[:, None, None, None] * drawn.noise
        net, tokens = self.tuned.promptnet, self.tokens[drawn.references]
        vectors = words.vectors_of(net, sampling, references, tokens, x, sigma)
        conds = self._conds([example.caption for example in targets], vectors, x0[:1])
        denoised = passes.evaluate(self.model, x, sigma, conds, {"cond_or_uncond": [0], "sigmas": sigma})
        weight = prediction_weight(sigma, isinstance(sampling, comfy.model_sampling.V_PREDICTION))
        return masked_error(denoised, x0, masks, weight)

    def _conds(self, captions: list[str], vectors: torch.Tensor, latent: torch.Tensor) -> passes.Conds:
        """Inputs of a model call for captions, one row each, with vectors (B, n, D) in the place of {}."""
        rows: list = [None] * len(captions)
        conds: passes.Conds = {}
        for caption in dict.fromkeys(captions):
            mine = [i for i, one in enumerate(captions) if one == caption]
            text, conds = self._text(caption, vectors.shape[1], latent)
            states = text.write(conds["c_crossattn"], text.encode(vectors[None, mine]))
            for i, row in zip(mine, states, strict=True):
                rows[i] = row
        length = math.lcm(*map(len, rows))
        states = torch.stack([row.repeat(length // len(row), 1) for row in rows])
        shared = {
            name: value.expand(len(rows), *value.shape[1:]) if torch.is_tensor(value) else value
            for name, value in conds.items()
        }
        return {**shared, "c_crossattn": states}

    def _text(self, caption: str, count: int, latent: torch.Tensor) -> tuple[SplicedText, passes.Conds]:
        """A caption with slots for vectors, and the inputs of a model call for it without them."""
        if caption not in self._texts:
            prompt, end = with_stand_in(caption, self.tokenizer)
            slots, tokens = slots_of(self.clip, prompt, [end])
            with torch.no_grad():
                cond, pooled = self.clip.encode_from_tokens(tokens, return_pooled=True)
                (entry,) = comfy.sampler_helpers.convert_cond([[cond, {"pooled_output": pooled}]])
                conds = passes.encode(self.model, entry, latent, POSITIVE, self.recipe.seed)
            self._texts[caption] = SplicedText(self.clip, slots, count), conds
        return self._texts[caption]

    def result(self) -> tuple[words.LoadedPromptNet, dict[str, torch.Tensor]]:
        """PromptNet and the LoRA in their current state."""
        net = self.tuned.promptnet
        with torch.no_grad():
            state = {name: weight.detach().cpu() for name, weight in net.state_dict().items()}
            return words.made_of(state, net.config.heads), lora_state(self.tuned.differences, PREFIX)


def with_stand_in(caption: str, tokenizer) -> tuple[str, int]:
    """A caption with a word of one token in the place of {}, and where that word ends."""
    _, word = stand_in(tokenizer, caption)
    before, after = caption.split("{}")
    # Apart from what it touches, or it would not be a token of its own.
    before, after = re.sub(r"(?<=\w)$", " ", before), re.sub(r"^(?=\w)", " ", after)
    return f"{before}{word}{after}", len(before) + len(word)


def _adding(differences, name: str) -> Callable:
    return lambda _layer, inputs, output: output + differences.output(name, inputs[0]).to(output.dtype)


def _draw(model, clip, vae, trainer: _Trainer, seen: words.Seen, caption: str, side: int) -> torch.Tensor:
    """A quick picture (side, side, 3) of a caption, as the result would draw it now."""
    net, lora = trainer.result()
    prompt, end = with_stand_in(caption, trainer.tokenizer)
    positive = words.conditioning(net, clip, vae, prompt, [end], [seen])
    negative = clip.encode_from_tokens_scheduled(clip.tokenize(""))
    tuned, _ = comfy.sd.load_lora_for_models(words.prepared(model), None, lora, 1.0, 0)
    cells = side // vae.spacial_compression_encode()
    latent = sample(tuned, positive, negative, cells, trainer.recipe.seed, PREVIEW_STEPS)
    return vae.decode(latent)[0, ..., :3]


def save_promptnet(promptnet: words.LoadedPromptNet, folder: Path, filename: str) -> str:
    """Saves a PromptNet in fp16 as `filename`.safetensors in a folder, and returns a report. If a file of this name
    exists, a number is appended.

    Raises:
        ValueError: the filename cannot be used, or the folder cannot be written.
    """
    file = free_file(folder, filename)
    save(promptnet.module, file)
    return f"{folder.name}/{file.name}: {file.stat().st_size / 2**20:.1f} MiB"
