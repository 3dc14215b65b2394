"""Nodes for DDIM inversion, which Concept Weaver applies to its template picture."""

from __future__ import annotations

import comfy.samplers
import latent_preview
from comfy_api.latest import io

from ..host.structure import inversion as host
from ..samplers.inversion import MODES, PNP
from .types import Node, PartitionSocket, TrajectorySocket


class DDIMInversion(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptLoomDDIMInversion",
            display_name="DDIM Inversion",
            category="ConceptLoom/Concept Weaver",
            description="Finds the noise from which the Euler sampler makes a given picture, and keeps the way there "
            "for systems that take the picture's structure from it. For models of noise or v prediction.",
            search_aliases=["invert", "inversion", "unsampler", "Plug-and-Play", "PnP", "ReNoise", "Concept Weaver"],
            inputs=[
                io.Model.Input(
                    "model", tooltip="The model to invert with; sample with the same one, or the picture changes."
                ),
                io.Latent.Input(
                    "latent",
                    tooltip="The picture from VAE Encode, or a sampler's output as it is: that one need not be decoded "
                    "and encoded, which would lose detail. A batch is inverted picture by picture.",
                ),
                io.Conditioning.Input(
                    "conditioning",
                    tooltip="The prompt that describes the picture, or the one that made it. Inversion runs at cfg 1, "
                    "so there is no negative prompt.",
                ),
                io.Int.Input(
                    "steps",
                    default=50,
                    min=1,
                    max=999,
                    tooltip="More steps follow the picture more closely. Each takes one evaluation of the model, "
                    "one for every refinement, and one to sample the picture again.",
                ),
                io.Combo.Input(
                    "scheduler",
                    options=comfy.samplers.SCHEDULER_NAMES,
                    default="ddim_uniform",
                    tooltip="The noise levels. ddim_uniform, as published, divides the model's 1000 times evenly; "
                    "where steps is no divisor of 1000 it can take a step more.",
                ),
                io.Int.Input(
                    "refinements",
                    default=1,
                    min=0,
                    max=20,
                    tooltip="Fixed-point refinements of each step. 1 makes the reconstruction several times more "
                    "exact; more converge to it, and stop by themselves where a step does not converge.",
                ),
                io.Combo.Input(
                    "mode",
                    options=list(MODES),
                    default=PNP,
                    advanced=True,
                    tooltip="At which noise level a step asks the model. pnp: at the one it goes to, as Plug-and-Play "
                    "does, the more exact. euler: at the one it comes from, the same as ComfyUI's FlipSigmas with "
                    "the euler sampler.",
                ),
            ],
            outputs=[
                io.Latent.Output(
                    display_name="noise",
                    tooltip="Sample it with DisableNoise, or a KSampler (Advanced) with add_noise disabled.",
                ),
                TrajectorySocket.Output("trajectory", tooltip="The latents of every noise level, with the prompt."),
                io.Sigmas.Output(tooltip="The schedule to sample the noise along, for SamplerCustomAdvanced."),
                io.Latent.Output(
                    display_name="reconstruction",
                    tooltip="What the euler sampler makes of the noise at cfg 1: it should be the picture.",
                ),
                io.Float.Output(
                    display_name="error",
                    tooltip="How far the reconstruction is from the picture, relative to the latent's norm; of a batch "
                    "the largest. Above 0.15 the node warns.",
                ),
            ],
        )

    @classmethod
    def execute(cls, model, latent, conditioning, steps, scheduler, mode, refinements) -> io.NodeOutput:
        callback = latent_preview.prepare_callback(model, steps)
        return io.NodeOutput(*host.invert(model, latent, conditioning, steps, scheduler, mode, refinements, callback))


_OTHER = 0x52656E6577
"""XORed with the seed, because the template may have been sampled from the noise of the same seed."""


class RenewNoise(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptLoomRenewNoise",
            display_name="Renew Noise",
            category="ConceptLoom/Concept Weaver",
            description="Puts fresh noise where concepts go. The noise of an inversion remembers its picture's "
            "colors, which would tint the concepts; their shapes are kept by Plug-and-Play Injection all the same.",
            search_aliases=["fresh noise", "noise inject", "color", "colour", "inversion", "Concept Weaver"],
            inputs=[
                io.Latent.Input("noise", tooltip="From DDIM Inversion."),
                PartitionSocket.Input("partition", tooltip="From Concept Masks; the background keeps its noise."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="Seed of the fresh noise: another one varies the concepts and leaves the rest.",
                ),
                io.Float.Input(
                    "strength",
                    default=0.6,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="How much of the noise is fresh. 0 keeps the template's colors, 1 forgets them, and with "
                    "several concepts their shapes as well.",
                ),
            ],
            outputs=[
                io.Latent.Output(display_name="noise", tooltip="To be sampled in place of the inversion's noise.")
            ],
        )

    @classmethod
    def execute(cls, noise, partition, seed, strength) -> io.NodeOutput:
        return io.NodeOutput(host.renew(noise, partition.weights, seed ^ _OTHER, strength))


NODES: list[type[Node]] = [DDIMInversion, RenewNoise]
