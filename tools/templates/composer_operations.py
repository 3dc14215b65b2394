"""Composer's thirteen operations (Huang et al., arXiv 2302.09778, section 3) on Shapeland, each as a workflow.

Each says which representations of which pictures make the new one. All have the same parts: drawn pictures, taken apart
with everything that is known of them, the composition, and a row of the pictures and the result.
"""

from __future__ import annotations

from dataclasses import dataclass

from workflow_builder import Output, Workflow

from .concept_parts import enlarged, stitched

ADAPTER = "shapeland.safetensors"
SIDE = 64
PREFIX = "conceptloom/composer"
NOTHING_ELSE = {"take_palette": False, "take_sketch": False, "take_intensity": False}


@dataclass(frozen=True)
class Loaded:
    """Shapeland with its Composer adapter."""

    model: Output
    adapter: Output
    clip: Output
    vae: Output
    vision: Output
    negative: Output


@dataclass(frozen=True)
class Source:
    """A drawn picture and its composition.

    Attributes:
        image, mask: of Draw Scene; a mask for each thing, from left to right.
        composition: everything that is known of it.
    """

    image: Output
    mask: Output
    composition: Output


def load(flow: Workflow) -> Loaded:
    """Loaders and an empty negative prompt."""
    base = flow.add("ConceptLoomLoadShapeland", column=0)
    adapted = flow.add("ConceptLoomLoadComposerAdapter", {"model": base["MODEL"], "file": ADAPTER}, column=0)
    negative = flow.add("CLIPTextEncode", {"clip": base["CLIP"], "text": ""}, column=0, title="Negative prompt (empty)")
    return Loaded(adapted["MODEL"], adapted["adapter"], base["CLIP"], base["VAE"], base["CLIP_VISION"], negative[0])


def source(flow: Workflow, parts: Loaded, caption: str, seed: int, identity: int) -> Source:
    """A scene, and its composition with caption, semantics, palette, sketch, instances, depth and intensity."""
    scene = flow.add(
        "ConceptLoomDrawScene",
        {"description": caption, "seed": seed, "identity_seed": identity, "size": SIDE},
        column=1,
        title=caption,
    )
    things = flow.add("ConceptLoomInstanceMap", {"masks": scene["MASK"], "nouns": _nouns(caption)}, column=1)
    taken = flow.add(
        "ConceptLoomDecomposeImage",
        {
            "image": scene["IMAGE"],
            "caption": caption,
            "clip_vision": parts.vision,
            "instances": things["instances"],
            "depth": scene["depth"],
        },
        column=2,
        title=f"Taken apart: {caption}",
    )
    return Source(scene["IMAGE"], scene["MASK"], taken["composition"])


def pick(flow: Workflow, composition: Output, *names: str) -> Output:
    """Some representations of a composition."""
    title = ", ".join(names)
    inputs = {"composition": composition, **dict.fromkeys(names, True)}
    return flow.add("ConceptLoomPickRepresentations", inputs, column=3, title=title)[0]


def merge(flow: Workflow, *compositions: Output) -> Output:
    """Compositions in one."""
    merged = compositions[0]
    for other in compositions[1:]:
        merged = flow.add("ConceptLoomMergeCompositions", {"composition1": merged, "composition2": other}, column=3)[0]
    return merged


def caption(flow: Workflow, given: Source, text: str) -> Output:
    """A caption alone, as a composition of the picture's size."""
    return flow.add(
        "ConceptLoomDecomposeImage", {"image": given.image, "caption": text, **NOTHING_ELSE}, column=2, title=text
    )["composition"]


def palette(flow: Workflow, given: Source, colors: str) -> Output:
    """A palette of given colours alone, as a composition of the picture's size."""
    chosen = flow.add("ConceptLoomPalette", {"colors": colors}, column=2, title=colors)
    return flow.add(
        "ConceptLoomDecomposeImage", {"image": given.image, "palette": chosen["palette"], **NOTHING_ELSE}, column=2
    )["composition"]


def encoded(flow: Workflow, parts: Loaded, composition: Output) -> Output:
    """The conditioning of a composition."""
    return flow.add(
        "ConceptLoomComposerConditioning",
        {"adapter": parts.adapter, "clip": parts.clip, "composition": composition},
        column=4,
    )[0]


def sampled(flow: Workflow, parts: Loaded, positive: Output, latent: Output, denoise: float = 1.0) -> Output:
    """A latent of a composition's conditioning."""
    settings = {"seed": 1, "steps": 25, "cfg": 4.0, "sampler_name": "dpmpp_2m", "scheduler": "normal"}
    given = {"model": parts.model, "positive": positive, "negative": parts.negative, "latent_image": latent}
    return flow.add("KSampler", {**given, **settings, "denoise": denoise}, column=5)[0]


def empty(flow: Workflow) -> Output:
    """An empty latent."""
    return flow.add("EmptyLatentImage", {"width": SIDE, "height": SIDE, "batch_size": 1}, column=4)[0]


def drawn(flow: Workflow, parts: Loaded, composition: Output, latent: Output | None = None) -> Output:
    """A picture of a composition; `latent` may be one with a noise mask."""
    positive = encoded(flow, parts, composition)
    return decoded(flow, parts, sampled(flow, parts, positive, latent or empty(flow)))


def decoded(flow: Workflow, parts: Loaded, latent: Output) -> Output:
    """The picture of a latent."""
    return flow.add("VAEDecode", {"samples": latent, "vae": parts.vae}, column=6)[0]


def edited(flow: Workflow, parts: Loaded, given: Source, target: Output) -> Output:
    """A picture, inverted with all of its representations and sampled with others."""
    latent = flow.add("VAEEncode", {"pixels": given.image, "vae": parts.vae}, column=4)
    found = flow.add(
        "ConceptLoomBidirectionalGuidance",
        {
            "model": parts.model,
            "latent": latent[0],
            "source": encoded(flow, parts, given.composition),
            "target": encoded(flow, parts, target),
            "negative": parts.negative,
        },
        column=5,
    )
    return decoded(flow, parts, found["latent"])


def redrawn(flow: Workflow, parts: Loaded, given: Source, mask: Output, acts: Output, grow: int = 2) -> Output:
    """A picture, drawn anew inside a mask from what `acts`, and unchanged outside of it."""
    region = flow.add("ConceptLoomRegionMask", {"image": given.image, "mask": mask, "grow": grow}, column=2)
    hole = flow.add(
        "ConceptLoomDecomposeImage",
        {"image": given.image, "mask": region["mask"], **NOTHING_ELSE},
        column=2,
        title="Hole",
    )
    latent = flow.add("VAEEncode", {"pixels": given.image, "vae": parts.vae}, column=4)
    masked = flow.add("SetLatentNoiseMask", {"samples": latent[0], "mask": region["mask"]}, column=4)
    picture = drawn(flow, parts, merge(flow, hole["composition"], acts), latent=masked[0])
    return flow.add(
        "ImageCompositeMasked",
        {
            "destination": given.image,
            "source": picture,
            "x": 0,
            "y": 0,
            "resize_source": False,
            "mask": region["mask"],
        },
        column=6,
    )[0]


def show(flow: Workflow, given: list[Source], made: list[Output]) -> None:
    """One row of the pictures and the results, enlarged."""
    row = stitched(flow, [*(one.image for one in given), *made])
    enlarged(flow, row, 4.0, "Pictures, then what was made of them", PREFIX)


def variations(flow: Workflow) -> None:
    """Fewer representations give more room: semantics alone, then with the sketch."""
    parts = load(flow)
    one = source(flow, parts, "a red striped fish on a mint background", 3, 1)
    loose = drawn(flow, parts, pick(flow, one.composition, "semantics"))
    close = drawn(flow, parts, pick(flow, one.composition, "semantics", "sketch"))
    show(flow, [one], [loose, close])


def interpolation(flow: Workflow) -> None:
    """Meaning and colours go from one picture to another, with the sketch of the first."""
    parts = load(flow)
    one = source(flow, parts, "a red heart on a white background", 3, 1)
    two = source(flow, parts, "a blue ball on a navy background", 4, 2)
    between = flow.add(
        "ConceptLoomInterpolateCompositions",
        {
            "composition1": pick(flow, one.composition, "semantics", "palette", "sketch"),
            "composition2": pick(flow, two.composition, "semantics", "palette"),
            "shares": "0, 0.5, 1",
            "local_from": "first",
        },
        column=3,
    )
    show(flow, [one, two], [drawn(flow, parts, between[0])])


def reconfiguration(flow: Workflow) -> None:
    """An edit by one changed representation: other colours, the rest as in the picture."""
    parts = load(flow)
    one = source(flow, parts, "a red striped house on a mint background", 3, 1)
    kept = pick(flow, one.composition, "sketch", "instances", "depth")
    target = merge(flow, kept, palette(flow, one, "#e8e8e4 12, #2040c0 2, #e0c020 1"))
    show(flow, [one], [edited(flow, parts, one, target)])


def region_editing(flow: Workflow) -> None:
    """A thing replaced where it stands."""
    parts = load(flow)
    one = source(flow, parts, "a red heart on a white background", 3, 1)
    acts = caption(flow, one, "a blue star on a white background")
    show(flow, [one], [redrawn(flow, parts, one, one.mask, acts, grow=8)])


def compositional_generation(flow: Workflow) -> None:
    """Sketch and depth of one picture, meaning of a second, colours of a third, and a text."""
    parts = load(flow)
    one = source(flow, parts, "a house and a tree on a gray background", 3, 1)
    two = source(flow, parts, "a green dotted house and a tree on a white background", 7, 4)
    three = source(flow, parts, "a yellow striped ball on a navy background", 5, 2)
    text = caption(flow, one, "a house and a tree on a navy background")
    composed = merge(
        flow,
        pick(flow, one.composition, "sketch", "depth"),
        pick(flow, two.composition, "semantics"),
        pick(flow, three.composition, "palette"),
        text,
    )
    show(flow, [one, two, three], [drawn(flow, parts, composed)])


def colorization(flow: Workflow) -> None:
    """A picture in grey, in chosen colours."""
    parts = load(flow)
    one = source(flow, parts, "a red striped fish on a mint background", 3, 1)
    colors = palette(flow, one, "#202c40 12, #7030a0 2, #f0a030 2")
    composed = merge(flow, pick(flow, one.composition, "intensity"), colors)
    show(flow, [one], [drawn(flow, parts, composed)])


def style_transfer(flow: Workflow) -> None:
    """The shapes of one picture in the look of another."""
    parts = load(flow)
    content = source(flow, parts, "a house and a star on a gray background", 3, 1)
    style = source(flow, parts, "a purple dotted mug on a navy background", 5, 2)
    composed = merge(
        flow,
        pick(flow, content.composition, "sketch", "instances", "depth"),
        pick(flow, style.composition, "semantics", "palette"),
    )
    show(flow, [content, style], [drawn(flow, parts, composed)])


def translation(flow: Workflow) -> None:
    """The layout of a picture with another text."""
    parts = load(flow)
    one = source(flow, parts, "a red heart on a white background", 3, 1)
    text = caption(flow, one, "a green dotted heart on a navy background")
    composed = merge(flow, pick(flow, one.composition, "sketch", "instances", "depth"), text)
    show(flow, [one], [drawn(flow, parts, composed)])


def pose_transfer(flow: Workflow) -> None:
    """The thing of one picture in the place and shape of another's."""
    parts = load(flow)
    one = source(flow, parts, "a red striped fish on a mint background", 3, 1)
    two = source(flow, parts, "a fish on a mint background", 9, 5)
    target = merge(flow, pick(flow, one.composition, "semantics", "palette"), pick(flow, two.composition, "instances"))
    show(flow, [one, two], [edited(flow, parts, one, target)])


def recoloring(flow: Workflow) -> None:
    """Other colours, with the lightness of the original."""
    parts = load(flow)
    one = source(flow, parts, "a red striped house on a mint background", 3, 1)
    colors = palette(flow, one, "#c8b898 12, #2040c0 2, #e0c020 1")
    composed = merge(flow, pick(flow, one.composition, "intensity", "sketch"), colors)
    picture = drawn(flow, parts, composed)
    merged = flow.add("ConceptLoomLumaMerge", {"light": one.image, "color": picture, "mode": "Rec. 601"}, column=6)
    show(flow, [one], [picture, merged[0]])


def try_on(flow: Workflow) -> None:
    """A thing in one picture, redrawn in the look of another picture's."""
    parts = load(flow)
    one = source(flow, parts, "a red mug on a white background", 3, 1)
    two = source(flow, parts, "a blue striped mug on a gray background", 8, 6)
    look = pick(flow, two.composition, "semantics")
    show(flow, [one, two], [redrawn(flow, parts, one, one.mask, look)])


def text_to_image(flow: Workflow) -> None:
    """A caption alone."""
    parts = load(flow)
    one = source(flow, parts, "a yellow star and a tree on a navy background", 3, 1)
    show(flow, [], [drawn(flow, parts, pick(flow, one.composition, "caption"))])


def color_sweep(flow: Workflow) -> None:
    """One sketch and text in colours between two palettes."""
    parts = load(flow)
    one = source(flow, parts, "a heart on a white background", 3, 1)
    kept = pick(flow, one.composition, "sketch", "caption")
    warm, cold = (
        palette(flow, one, f"#f0f0ee 10, {colors}") for colors in ("#e03020 2, #f0c040 2", "#2050e0 2, #60d0e0 2")
    )
    between = flow.add(
        "ConceptLoomInterpolateCompositions",
        {"composition1": merge(flow, kept, warm), "composition2": cold, "shares": "0, 0.5, 1", "local_from": "first"},
        column=3,
    )
    show(flow, [one], [drawn(flow, parts, between[0])])


def refinement(flow: Workflow) -> None:
    """A composition drawn small, and refined at twice the size with its maps carried along: on a latent host, the
    second pass takes the place of the paper's upsampling models."""
    parts = load(flow)
    one = source(flow, parts, "a house and a star on a gray background", 3, 1)
    acts = pick(flow, one.composition, "caption", "sketch", "instances", "depth")
    positive = encoded(flow, parts, acts)
    small = sampled(flow, parts, positive, empty(flow))
    larger = flow.add("LatentUpscaleBy", {"samples": small, "upscale_method": "bicubic", "scale_by": 2.0}, column=5)
    fine = decoded(flow, parts, sampled(flow, parts, positive, larger[0], denoise=0.3))
    before = (_doubled(flow, image) for image in (one.image, decoded(flow, parts, small)))
    enlarged(flow, stitched(flow, [*before, fine]), 2.0, "Picture, drawn small, refined", PREFIX)


def _doubled(flow: Workflow, image: Output) -> Output:
    scaled = {"image": image, "upscale_method": "nearest-exact", "scale_by": 2.0}
    return flow.add("ImageScaleBy", scaled, column=6)[0]


def _nouns(description: str) -> str:
    """The nouns of a description such as "a red heart and a star on a white background"."""
    things, _, _ = description.partition(" on a ")
    return ", ".join(thing.split()[-1] for thing in things.split(" and "))


OPERATIONS = {
    "variations": variations,
    "interpolation": interpolation,
    "reconfiguration": reconfiguration,
    "region_editing": region_editing,
    "compositional_generation": compositional_generation,
    "colorization": colorization,
    "style_transfer": style_transfer,
    "translation": translation,
    "pose_transfer": pose_transfer,
    "recoloring": recoloring,
    "try_on": try_on,
    "text_to_image": text_to_image,
    "color_sweep": color_sweep,
}
"""The paper's operations."""
REFINEMENT = {"refinement": refinement}
