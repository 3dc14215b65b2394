"""A pack with one node of every kind of input, so that the tools can be tested without our real nodes."""

from types import SimpleNamespace

import torch
from comfy_api.latest import ComfyExtension, io, ui

Yarn = io.Custom("TOY_YARN")


class ToyYarn(io.ComfyNode):
    """A custom socket type, a color, and a seed with its own control."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ToyYarn",
            display_name="Yarn",
            category="Toy",
            inputs=[
                io.Int.Input("shade", default=1, min=0, max=9, tooltip="How dark."),
                io.Int.Input("seed", default=0, min=0, max=99, control_after_generate=True, tooltip="Seed."),
                io.Color.Input("color", default="#22cc88", tooltip="Its color."),
            ],
            outputs=[Yarn.Output("yarn", display_name="yarn")],
        )

    @classmethod
    def execute(cls, shade, seed, color):
        return io.NodeOutput((shade, color))


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


class ToyTensor(io.ComfyNode):
    """A tensor of any shape and value as picture, mask, latent and conditioning: what no other node gives."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ToyTensor",
            display_name="Tensor",
            category="Toy",
            inputs=[
                io.String.Input("shape", default="1, 64, 64, 3", tooltip="Its sides."),
                io.String.Input("value", default="1", tooltip="A number, or nan."),
            ],
            outputs=[io.Image.Output(), io.Mask.Output(), io.Latent.Output(), io.Conditioning.Output()],
        )

    @classmethod
    def execute(cls, shape, value):
        tensor = torch.full([int(side) for side in shape.split(",")], float(value))
        return io.NodeOutput(tensor, tensor, {"samples": tensor}, [[tensor, {}]])


class ToyMisfits(io.ComfyNode):
    """A model of no known family, a CLIP and a VAE that a checkpoint does not hold, and a VAE of 16 channels."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ToyMisfits",
            display_name="Misfits",
            category="Toy",
            inputs=[],
            outputs=[
                io.Model.Output("model"),
                io.Clip.Output("clip"),
                io.Vae.Output("vae"),
                io.Vae.Output("wide_vae"),
                io.Conditioning.Output("conditioning"),
            ],
        )

    @classmethod
    def execute(cls):
        model = SimpleNamespace(model=SimpleNamespace(diffusion_model=torch.nn.Identity()))
        return io.NodeOutput(model, None, None, SimpleNamespace(latent_channels=16), [])


NODES = [ToyYarn, ToyWeave, ToyTensor, ToyMisfits]


class ToyExtension(ComfyExtension):
    async def get_node_list(self):
        return NODES


async def comfy_entrypoint():
    return ToyExtension()
