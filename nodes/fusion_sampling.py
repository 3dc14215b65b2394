"""Nodes of fusion sampling: guidance by several conditionings, and the sampler that fuses them (ProFusion)."""

from __future__ import annotations

import comfy.samplers
from comfy_api.latest import io

from ..host.model.window import Window
from ..host.profusion.guider import NAME, FusionGuider, Guidance
from ..host.profusion.sampler import fusion_sampler
from .types import Node, growing, in_order, window_inputs

CATEGORY = "ConceptLoom/ProFusion"


class FusionGuiderNode(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        subject = io.Conditioning.Input(
            "subject",
            tooltip="The whole prompt with one subject in it: an embedding, a trained concept or a fused word, or "
            "the plain prompt with a hook or a patch on the model. Conditioning (Set Mask) gives the subject a region.",
        )
        return io.Schema(
            node_id="ConceptLoomFusionGuider",
            display_name=NAME,
            category=CATEGORY,
            description="Guides by the text and by each subject at a scale of its own, for Fusion Sampler and any "
            "other sampler. For embeddings, LoRAs, IP-Adapters, trained concepts and every other subject that is a "
            "conditioning (ProFusion).",
            search_aliases=["ProFusion", "composable diffusion", "identity", "likeness", "LoRA", "ip adapter", "cfg"],
            inputs=[
                io.Model.Input(
                    "model", tooltip="A patch on it that shows subjects does so in their conditionings alone."
                ),
                io.Conditioning.Input(
                    "text", tooltip="The same prompt without subjects, each replaced by its class: a person, a cat."
                ),
                io.Conditioning.Input("negative", tooltip="The negative prompt; an empty one is published."),
                growing("subjects", subject, "One conditioning for each subject."),
                io.Float.Input(
                    "subject_scale",
                    default=7.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="Guidance towards each subject: more is more likeness, 0 is the picture without subjects. "
                    "The strength of a conditioning multiplies it.",
                ),
                io.Float.Input(
                    "text_scale",
                    default=5.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="Guidance towards the text: more follows the prompt better.",
                ),
                io.Float.Input(
                    "fusion_scale",
                    default=7.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="Guidance towards the subjects in the fusion stage of Fusion Sampler.",
                ),
                io.Float.Input(
                    "gamma",
                    default=0.6,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="Strength of the subject's word in the fusion stage. Lower it if the text is ignored. For "
                    "conditionings whose subject is in a word: from Fuse Subjects, for example.",
                ),
                io.Boolean.Input(
                    "reuse_differences",
                    default=False,
                    advanced=True,
                    tooltip="Evaluates the negative once per step instead of twice. Faster, and not the same. It "
                    "turns itself off, with a message, where the subjects' regions leave a part of the picture free.",
                ),
            ],
            outputs=[io.Guider.Output(tooltip="For SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(
        cls, model, text, negative, subjects, subject_scale, text_scale, fusion_scale, gamma, reuse_differences
    ) -> io.NodeOutput:
        found = in_order(subjects, "subjects", "the prompt with the subject, from CLIP Text Encode for example")
        guidance = Guidance(text_scale, subject_scale, fusion_scale, gamma, reuse_differences)
        return io.NodeOutput(FusionGuider(model, text, negative, found, guidance))


class FusionSampler(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptLoomFusionSampler",
            display_name="Fusion Sampler",
            category=CATEGORY,
            description="Puts a fusion stage before each step of a sampler: the subjects are drawn in, part of the "
            "noise is renewed, and the step then refines the picture towards text and subjects. For Fusion Guider.",
            search_aliases=["ProFusion", "identity", "likeness", "renoise", "restart", "two stage"],
            inputs=[
                io.Sampler.Input(
                    "sampler",
                    optional=True,
                    tooltip="Makes the steps; euler, as published, without one. Samplers that look back at earlier "
                    "steps run each like their first.",
                ),
                io.Int.Input(
                    "fusion_steps",
                    default=1,
                    min=0,
                    max=10,
                    tooltip="Fusion stages before each step. 0 is guidance alone, in which conditions are independent.",
                ),
                io.Float.Input(
                    "eta",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="How much of the noise each fusion stage renews; 0 turns the stage off.",
                ),
                *window_inputs(
                    "Where in the schedule fusion begins.",
                    "Where in the schedule fusion ends. Each step without it saves its evaluations.",
                ),
            ],
            outputs=[io.Sampler.Output(tooltip="For SamplerCustomAdvanced, with ddim_uniform as published.")],
        )

    @classmethod
    def execute(cls, fusion_steps, eta, start_percent, end_percent, sampler=None) -> io.NodeOutput:
        base = comfy.samplers.sampler_object("euler") if sampler is None else sampler
        return io.NodeOutput(fusion_sampler(base, fusion_steps, eta, Window(start_percent, end_percent)))


NODES: list[type[Node]] = [FusionGuiderNode, FusionSampler]
