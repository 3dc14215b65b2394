"""A pack with one node of every kind of input, so that the tools can be tested without our real nodes."""

import torch
from comfy_api.latest import ComfyExtension, io, ui

Yarn = io.Custom("TOY_YARN")


class ToyYarn(io.ComfyNode):
    """A custom socket type, a colour, and a seed with its own control."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ToyYarn",
            display_name="Yarn",
            category="Toy",
            inputs=[
                io.Int.Input("shade", default=1, min=0, max=9, tooltip="How dark."),
                io.Int.Input("seed", default=0, min=0, max=99, control_after_generate=True, tooltip="Seed."),
                io.Color.Input("colour", default="#22cc88", tooltip="Its colour."),
            ],
            outputs=[Yarn.Output("yarn", display_name="yarn")],
        )

    @classmethod
    def execute(cls, shade, seed, colour):
        return io.NodeOutput((shade, colour))


class ToyWeave(io.ComfyNode):
    """Growing and switching inputs, and a preview."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ToyWeave",
            display_name="Weave",
            category="Toy",
            inputs=[
                io.Autogrow.Input(
                    "yarns",
                    template=io.Autogrow.TemplatePrefix(Yarn.Input("yarn", tooltip="A yarn."), "yarn", min=1, max=4),
                    tooltip="All yarns.",
                ),
                io.Int.Input("size", default=64, min=8, max=512, tooltip="Side in pixels."),
                io.DynamicCombo.Input(
                    "binding",
                    options=[
                        io.DynamicCombo.Option("plain", []),
                        io.DynamicCombo.Option(
                            "twill",
                            [
                                io.Int.Input("shift", default=1, min=1, max=3, tooltip="Shift from row to row."),
                                io.Mask.Input("region", optional=True, tooltip="Where."),
                            ],
                        ),
                    ],
                    tooltip="How threads cross.",
                ),
                io.String.Input("label", default="", optional=True, tooltip="A word on it."),
            ],
            outputs=[io.Image.Output("image", display_name="image")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, yarns, size, binding, label=""):
        image = torch.full((1, size, size, 3), len(yarns) / 4)
        return io.NodeOutput(image, ui=ui.PreviewImage(image, cls=cls))


NODES = [ToyYarn, ToyWeave]


class ToyExtension(ComfyExtension):
    async def get_node_list(self):
        return NODES


async def comfy_entrypoint():
    return ToyExtension()
