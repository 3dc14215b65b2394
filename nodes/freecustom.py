"""Nodes of FreeCustom: Multi-Reference Self-Attention, and attention shares to inspect it."""

from __future__ import annotations

import torch
from comfy_api.latest import io

from ..attention.heatmap import share_pictures
from ..attention.mrsa import FORMULAS
from ..host.advice import advise
from ..host.freecustom import attention as freecustom
from ..host.freecustom import bank, job
from ..host.freecustom.shares import ALL
from ..host.model import sites
from ..host.model.window import Window
from .types import ADVISES_LATER, CUSTOM_BLOCKS, Node, ShareRecordSocket, gather_subjects, subject_inputs, window_inputs

NOTHING_RECORDED = (
    "nothing recorded; sample with the model of Record Attention Share, which comes after "
    "Multi-Reference Self-Attention, and connect its record"
)


class MultiReferenceSelfAttention(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptLoomMultiReferenceSelfAttention",
            display_name="Multi-Reference Self-Attention (FreeCustom)",
            category="ConceptLoom/FreeCustom",
            description="Puts several subjects into one picture without training: self-attention also sees the masked "
            "parts of their references (FreeCustom, CVPR 2024). For SD 1.x, SD 2.x, SDXL and Shapeland.",
            **ADVISES_LATER,
            search_aliases=[
                "FreeCustom",
                "MRSA",
                "reference only",
                "multi concept",
                "subject",
                "consistory",
                "consistent character",
                "two characters",
                "ip adapter",
            ],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="The model to sample with. From another node of this kind, the subjects add up and the "
                    "settings of the last node hold for all. LoRAs may come before or after.",
                ),
                io.Clip.Input("clip", tooltip="Encodes the prompts of the references."),
                io.Vae.Input("vae", tooltip="Encodes the reference pictures, when sampling begins, at its size."),
                subject_inputs("The subjects. Two or three work best. Name each one in your prompt."),
                io.DynamicCombo.Input(
                    "blocks",
                    options=[
                        *(io.DynamicCombo.Option(preset, []) for preset in sites.PRESETS),
                        io.DynamicCombo.Option(
                            CUSTOM_BLOCKS,
                            [
                                io.String.Input(
                                    "numbers",
                                    default="10-15",
                                    tooltip='Self-attention layers by number, such as "10-15" or "3, 7-9". SD 1.x and '
                                    "2.x have 0-15, SDXL has 0-69.",
                                )
                            ],
                        ),
                    ],
                    tooltip="Where references are seen. Last two decoder stages: as published (stages 5 and 6 of "
                    "SD 1.5, layers 10-15; of SDXL layers 34-69). Stage before last: 5 alone, structure, cheaper. Last "
                    "stage: 6 alone, texture; the finest of SDXL. All blocks: much copying, little freedom. Custom "
                    "list: layers by number.",
                ),
                *window_inputs(
                    "References are seen from this part of sampling on.",
                    "References are seen up to this part of sampling. Ending at 0.6 to 0.8 is faster and "
                    "leaves the last details to the prompt.",
                ),
                io.Float.Input(
                    "style_fidelity",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="1 keeps the negative prompt's branch plain, as published. Below 1 it sees the references "
                    "too, which costs a second reference pass.",
                ),
                io.Int.Input(
                    "reference_seed",
                    default=0,
                    min=-1,
                    max=0xFFFFFFFF,
                    tooltip="Seed of the references' noise. While it stays, further pictures reuse the reference "
                    "passes from the bank. -1 follows the sampler's seed.",
                ),
                io.Combo.Input(
                    "formula",
                    options=list(FORMULAS),
                    default="official",
                    advanced=True,
                    tooltip="official: the published code, adds the weight to the logits and hides masked keys. paper: "
                    "multiplies logits by weight and mask, so masked keys keep a share. paper_drop: the same without "
                    "masked keys. The paper's formulas need weights of about 1 to 1.5.",
                ),
                io.Combo.Input(
                    "reference_noise",
                    options=[job.PER_STEP, job.FIXED],
                    default=job.PER_STEP,
                    advanced=True,
                    tooltip="per_step draws new noise for the references at each step, as published. fixed keeps one.",
                ),
                io.Float.Input(
                    "balance",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    advanced=True,
                    tooltip="Lifts subjects that are small in their reference against large ones: 0 off, as published; "
                    "1 makes their sizes irrelevant.",
                ),
                io.Float.Input(
                    "mask_threshold",
                    default=0.5,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    advanced=True,
                    tooltip="Mask value from which a pixel belongs to the subject.",
                ),
                io.Combo.Input(
                    "negative_references",
                    options=[job.NEGATIVE_PROMPT, job.SHARE_POSITIVE],
                    default=job.NEGATIVE_PROMPT,
                    advanced=True,
                    tooltip="For style_fidelity below 1. negative prompt: the references run again with the negative "
                    "prompt, as published. share positive: their first pass serves both, faster.",
                ),
                io.Int.Input(
                    "bank_mib",
                    default=1024,
                    min=0,
                    max=1 << 20,
                    step=64,
                    advanced=True,
                    tooltip="Most MiB the bank of reference passes may hold; 0 keeps none. 3 references with 50 steps "
                    "need about 750 on SD 1.5. The log says after each picture what it holds.",
                ),
                io.Combo.Input(
                    "bank_device",
                    options=[bank.RAM, bank.VRAM],
                    default=bank.RAM,
                    advanced=True,
                    tooltip="Where the bank lies. VRAM is faster if there is plenty.",
                ),
            ],
            outputs=[io.Model.Output("model", tooltip="The model with the references in its self-attention.")],
        )

    @classmethod
    def execute(cls, model, clip, vae, subjects, blocks, start_percent, end_percent, **settings) -> io.NodeOutput:
        chosen = blocks.get("numbers", blocks["blocks"])
        settings = job.MrsaSettings(blocks=chosen, window=Window(start_percent, end_percent), **settings)
        return io.NodeOutput(freecustom.apply(model, vae, clip, gather_subjects(subjects), settings))


class RecordAttentionShare(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptLoomRecordAttentionShare",
            display_name="Record Attention Share",
            category="ConceptLoom/FreeCustom",
            description="Records, while this model samples, how much of each place's attention goes to each subject. "
            "The picture stays the same. Attention Share shows the record. A model without references passes through.",
            search_aliases=["attention map", "heat map", "visualize attention", "FreeCustom", "debug"],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="A model from Multi-Reference Self-Attention (FreeCustom). Sample with the model that "
                    "comes out of this node; other branches are not recorded.",
                ),
                io.String.Input(
                    "steps",
                    default=ALL,
                    tooltip='Sampling steps to record, counted from 0: "all", or a list such as "0-4, 10".',
                ),
                io.String.Input(
                    "blocks",
                    default=ALL,
                    advanced=True,
                    tooltip='Self-attention layers to record: "all" where references are seen, or a list such as '
                    '"13-15".',
                ),
            ],
            outputs=[
                io.Model.Output("model", tooltip="The model to sample with."),
                ShareRecordSocket.Output("record", tooltip="Filled while the model samples; for Attention Share."),
            ],
        )

    @classmethod
    def execute(cls, model, steps, blocks) -> io.NodeOutput:
        return io.NodeOutput(*freecustom.record_shares(model, steps, blocks))


class AttentionShare(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptLoomAttentionShare",
            display_name="Attention Share",
            category="ConceptLoom/FreeCustom",
            description="Heat maps of how much of each place's attention went to each subject while it was sampled. "
            "Where nothing was recorded, the picture passes through and the node says so.",
            search_aliases=["attention map", "heat map", "visualize attention", "leakage", "FreeCustom"],
            inputs=[
                io.Latent.Input(
                    "latent",
                    tooltip="The sampler's output, unchanged. It makes this node run after sampling, and says which "
                    "picture's maps to show: the record keeps the last 16, so cached pictures are right too.",
                ),
                io.Image.Input("image", tooltip="The decoded picture, to lay the maps over."),
                io.Float.Input("opacity", default=0.6, min=0.0, max=1.0, step=0.05, tooltip="1 shows the maps alone."),
                io.Boolean.Input(
                    "stretch",
                    default=False,
                    tooltip="Stretches each map to the full color range. Off, colors are shares from 0 to 1 and "
                    "compare between subjects.",
                ),
                ShareRecordSocket.Input(
                    "record",
                    optional=True,
                    tooltip="From Record Attention Share. Without it the picture passes through.",
                ),
            ],
            outputs=[
                io.Image.Output("heat_maps", tooltip="One picture per subject, for each picture of the batch in turn."),
                io.Mask.Output("shares", tooltip="The same as plain shares from 0 to 1, at the picture's size."),
            ],
        )

    @classmethod
    def execute(cls, latent, image, opacity, stretch, record=None) -> io.NodeOutput:
        shares = None if record is None else record.find(latent["samples"])
        if shares is None:
            advise("Attention Share", NOTHING_RECORDED)
            return io.NodeOutput(image, torch.zeros(image.shape[:3]))
        return io.NodeOutput(*share_pictures(shares, image, opacity, stretch))


NODES: list[type[Node]] = [MultiReferenceSelfAttention, RecordAttentionShare, AttentionShare]
