"""Nodes of Composer's adapter and guidance."""

from __future__ import annotations

import comfy.samplers
import folder_paths
import latent_preview
from comfy_api.latest import io

from ..host.composer import adapter as host
from ..host.composer import guidance
from .types import ComposerAdapterSocket, CompositionSocket, Node, own_places, register_folder, stamp

CATEGORY = "ConceptLoom/Composer"
FOLDER = "composer_adapters"

register_folder(FOLDER, *own_places(FOLDER))


class LoadComposerAdapter(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptLoomLoadComposerAdapter",
            display_name="Load Composer Adapter",
            category=CATEGORY,
            description="Loads an adapter that makes a model follow compositions, and prepares the model for it.",
            search_aliases=["Composer", "adapter", "control", "palette control", "sketch control", "multi control"],
            inputs=[
                io.Model.Input("model", tooltip="The model that the adapter was trained for."),
                io.Combo.Input(
                    "file",
                    options=folder_paths.get_filename_list(FOLDER),
                    tooltip="A file in models/composer_adapters or output/composer_adapters.",
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The same model, which follows compositions in conditionings."),
                ComposerAdapterSocket.Output("adapter", tooltip="For Composer Conditioning and Compose Guidance."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, file, **_):
        return stamp(folder_paths.get_full_path(FOLDER, file))

    @classmethod
    def execute(cls, model, file) -> io.NodeOutput:
        loaded = host.load(folder_paths.get_full_path_or_raise(FOLDER, file), model)
        return io.NodeOutput(host.prepared(model), loaded)


class ComposerConditioning(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptLoomComposerConditioning",
            display_name="Composer Conditioning",
            category=CATEGORY,
            description="A composition as a conditioning: its caption as text, and all else through the adapter. A "
            "representation that is not there adds nothing.",
            search_aliases=["Composer", "apply composition", "control", "palette", "sketch", "depth"],
            inputs=[
                ComposerAdapterSocket.Input("adapter", tooltip="From Load Composer Adapter."),
                io.Clip.Input("clip", tooltip="The text encoder of the model, for the caption."),
                CompositionSocket.Input("composition", tooltip="What the picture is to have."),
                io.Conditioning.Input(
                    "conditioning", optional=True, tooltip="Text in place of the composition's caption, from any node."
                ),
            ],
            outputs=[
                io.Conditioning.Output(tooltip="For a sampler with the model of Load Composer Adapter."),
            ],
        )

    @classmethod
    def execute(cls, adapter, clip, composition, conditioning=None) -> io.NodeOutput:
        return io.NodeOutput(host.encode(adapter, clip, composition, conditioning))


class ComposeGuidance(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptLoomComposeGuidance",
            display_name="Compose Guidance",
            category=CATEGORY,
            description="Guides away from one composition towards another. What both have acts once, what only the "
            "second has acts scale times (Composer).",
            search_aliases=["Composer", "classifier-free guidance", "cfg", "direction", "guider"],
            inputs=[
                io.Model.Input("model", tooltip="From Load Composer Adapter."),
                ComposerAdapterSocket.Input("adapter", tooltip="From Load Composer Adapter."),
                io.Clip.Input("clip", tooltip="The text encoder of the model."),
                CompositionSocket.Input(
                    "composition1", tooltip="Where guidance comes from: a part of the second, or another."
                ),
                CompositionSocket.Input("composition2", tooltip="Where it goes."),
                io.Float.Input(
                    "scale",
                    default=3.0,
                    min=0.0,
                    max=30.0,
                    step=0.1,
                    tooltip="1 is the second composition alone, 0 the first; 3 is the published value.",
                ),
            ],
            outputs=[io.Guider.Output(tooltip="For SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(cls, model, adapter, clip, composition1, composition2, scale) -> io.NodeOutput:
        return io.NodeOutput(guidance.guider_between(model, adapter, clip, composition1, composition2, scale))


class BidirectionalGuidance(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConceptLoomBidirectionalGuidance",
            display_name="Bidirectional Guidance",
            category=CATEGORY,
            description="Edits a picture: inverts it under one conditioning and samples its noise under another, so "
            "that what both share stays (Composer). For models of noise or v prediction.",
            search_aliases=["Composer", "edit", "inversion", "reconfigure", "image translation", "pose transfer"],
            inputs=[
                io.Model.Input("model", tooltip="With Composer Conditioning, that of Load Composer Adapter."),
                io.Latent.Input("latent", tooltip="The picture, from VAE Encode."),
                io.Conditioning.Input("source", tooltip="Describes the picture, best with all its representations."),
                io.Conditioning.Input("target", tooltip="Describes what it is to become: one or a few things changed."),
                io.Conditioning.Input("negative", tooltip="To guide away from; unused at cfg 1."),
                io.Int.Input(
                    "steps", default=50, min=1, max=999, tooltip="Of the inversion and of the sampling. 50 or more."
                ),
                io.Combo.Input(
                    "scheduler",
                    options=comfy.samplers.SCHEDULER_NAMES,
                    default="ddim_uniform",
                    tooltip="The noise levels of both.",
                ),
                io.Float.Input(
                    "cfg",
                    default=1.0,
                    min=1.0,
                    max=30.0,
                    step=0.1,
                    tooltip="Guidance scale of the sampling. Above 1 it leaves the picture further behind.",
                ),
                io.Int.Input(
                    "refinements",
                    default=1,
                    min=0,
                    max=20,
                    advanced=True,
                    tooltip="Of each step of the inversion, as in DDIM Inversion.",
                ),
            ],
            outputs=[
                io.Latent.Output(display_name="latent", tooltip="The edited picture."),
                io.Latent.Output(
                    display_name="reconstruction", tooltip="The picture as it comes back without a change."
                ),
                io.Float.Output(
                    display_name="error",
                    tooltip="How far the reconstruction is from the picture, relative to its norm.",
                ),
            ],
        )

    @classmethod
    def execute(cls, model, latent, source, target, negative, steps, scheduler, cfg, refinements) -> io.NodeOutput:
        callback = latent_preview.prepare_callback(model, steps)
        found = guidance.edit(model, latent, source, target, negative, steps, scheduler, refinements, cfg, callback)
        return io.NodeOutput(*found)


NODES: list[type[Node]] = [LoadComposerAdapter, ComposerConditioning, ComposeGuidance, BidirectionalGuidance]
