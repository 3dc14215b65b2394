"""Composer's thirteen operations (Huang et al., arXiv 2302.09778, section 3) on Shapeland, each as a workflow.

Each says which representations of which pictures make the new one. All have the same parts: drawn pictures, taken apart
with everything that is known of them, the composition, and a row of the pictures and the result.
"""

from __future__ import annotations

from dataclasses import dataclass

from workflow_builder import Output, Subgraph, Workflow

from .parts import SHAPELAND, SIDE
from .parts import show as show_row

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
    base = flow.add("ConceptLoomLoadShapeland")
    adapted = flow.add("ConceptLoomLoadComposerAdapter", {"model": base["MODEL"], "file": SHAPELAND}, column=1)
    negative = flow.add("CLIPTextEncode", {"clip": base["CLIP"], "text": ""}, column=1, title="Negative prompt (empty)")
    return Loaded(adapted["MODEL"], adapted["adapter"], base["CLIP"], base["VAE"], base["CLIP_VISION"], negative[0])


def source(flow: Workflow, parts: Loaded, caption: str, seed: int, identity: int) -> Source:
    """A scene, and its composition with caption, semantics, palette, sketch, instances, depth and intensity."""

    def describe(inner: Subgraph) -> None:
        text = inner.input("caption")
        scene = inner.add(
            "ConceptLoomDrawScene",
            {"description": text, "seed": inner.input("seed"), "identity_seed": inner.input("identity_seed")},
        )
        things = inner.add("ConceptLoomInstanceMap", {"masks": scene["MASK"], "nouns": inner.input("nouns")}, column=1)
        taken = inner.add(
            "ConceptLoomDecomposeImage",
            {
                "image": scene["IMAGE"],
                "caption": text,
                "clip_vision": inner.input("clip_vision"),
                "instances": things["instances"],
                "depth": scene["depth"],
            },
            column=2,
        )
        for name, output in (("image", scene["IMAGE"]), ("mask", scene["MASK"]), ("composition", taken["composition"])):
            inner.output(name, output)

    given = {"caption": caption, "seed": seed, "identity_seed": identity, "nouns": _nouns(caption)}
    given["clip_vision"] = parts.vision
    node = flow.place(flow.subgraph("Drawn Picture, Taken Apart", describe), given, 1)
    return Source(node["image"], node["mask"], node["composition"])


def pick(flow: Workflow, composition: Output, *names: str) -> Output:
    """Some representations of a composition."""

    def describe(inner: Subgraph) -> None:
        given = {"composition": inner.input("composition"), "strength": inner.input("strength")}
        inner.output("composition", inner.add("ConceptLoomPickRepresentations", given | dict.fromkeys(names, True))[0])

    return flow.place(flow.subgraph(f"Keep {', '.join(names)}", describe), {"composition": composition}, 2)[0]


def merge(flow: Workflow, *compositions: Output) -> Output:
    """Compositions in one."""
    if len(compositions) < 3:
        return _merged(flow, list(compositions), 3)

    def describe(inner: Subgraph) -> None:
        names = [f"composition {i + 1}" for i in range(len(compositions))]
        inner.output("composition", _merged(inner, [inner.input(name) for name in names], 0))

    given = {f"composition {i + 1}": one for i, one in enumerate(compositions)}
    return flow.place(flow.subgraph("Merge Several Compositions", describe), given, 3, width=230)[0]


def _merged(flow: Workflow, compositions: list, column: int) -> Output:
    merged = compositions[0]
    for place, other in enumerate(compositions[1:]):
        merged = flow.add(
            "ConceptLoomMergeCompositions",
            {"composition1": merged, "composition2": other},
            column=column + place,
            width=230,
        )[0]
    return merged


def caption(flow: Workflow, given: Source, text: str) -> Output:
    """A caption alone, as a composition of the picture's size."""
    return flow.add(
        "ConceptLoomDecomposeImage", {"image": given.image, "caption": text, **NOTHING_ELSE}, column=2, title="The text"
    )["composition"]


def palette(flow: Workflow, given: Source, colors: str) -> Output:
    """A palette of given colors alone, as a composition of the picture's size."""
    chosen = flow.add("ConceptLoomPalette", {"colors": colors}, column=1, title="The colors")
    return flow.add(
        "ConceptLoomDecomposeImage", {"image": given.image, "palette": chosen["palette"], **NOTHING_ELSE}, column=2
    )["composition"]


def encoded(flow: Workflow, parts: Loaded, composition: Output) -> Output:
    """The conditioning of a composition."""
    return flow.add(
        "ConceptLoomComposerConditioning",
        {"adapter": parts.adapter, "clip": parts.clip, "composition": composition},
        column=4,
        width=240,
    )[0]


def sampled(
    flow: Workflow, parts: Loaded, positive: Output, latent: Output, denoise: float = 1.0, column: int = 5
) -> Output:
    """A latent of a composition's conditioning."""
    settings = {"seed": 1, "steps": 25, "cfg": 4.0, "sampler_name": "dpmpp_2m", "scheduler": "normal"}
    given = {"model": parts.model, "positive": positive, "negative": parts.negative, "latent_image": latent}
    return flow.add("KSampler", {**given, **settings, "denoise": denoise}, column=column)[0]


def empty(flow: Workflow) -> Output:
    """An empty latent."""
    return flow.add("EmptyLatentImage", {"width": SIDE, "height": SIDE, "batch_size": 1}, column=4, width=240)[0]


def drawn(flow: Workflow, parts: Loaded, composition: Output, latent: Output | None = None) -> Output:
    """A latent of a composition; `latent` may be one with a noise mask."""
    return sampled(flow, parts, encoded(flow, parts, composition), latent or empty(flow))


def decoded(flow: Workflow, parts: Loaded, latent: Output) -> Output:
    """The picture of a latent."""
    return flow.add("VAEDecode", {"samples": latent, "vae": parts.vae}, column=6)[0]


def edited(flow: Workflow, parts: Loaded, given: Source, target: Output) -> Output:
    """The latent of a picture, inverted with all of its representations and sampled with others."""
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
    return found["latent"]


def redrawn(
    flow: Workflow, parts: Loaded, given: Source, acts: Output, grow: int = 2
) -> tuple[Output, tuple[Output, Output]]:
    """The latent of a picture, drawn anew inside its mask from what `acts`; and the picture and the region, outside of
    which it stays."""

    def describe(inner: Subgraph) -> None:
        image = inner.input("image")
        chosen = {"image": image, "mask": inner.input("mask"), "grow": inner.input("grow")}
        region = inner.add("ConceptLoomRegionMask", chosen)
        hole = inner.add(
            "ConceptLoomDecomposeImage", {"image": image, "mask": region["mask"], **NOTHING_ELSE}, column=1
        )
        latent = inner.add("VAEEncode", {"pixels": image, "vae": inner.input("vae")})
        masked = inner.add("SetLatentNoiseMask", {"samples": latent[0], "mask": region["mask"]}, column=1)
        for name, output in (("composition", hole["composition"]), ("latent", masked[0]), ("region", region["mask"])):
            inner.output(name, output)

    inputs = {"image": given.image, "mask": given.mask, "vae": parts.vae, "grow": grow}
    hole = flow.place(flow.subgraph("Region to Draw Anew", describe), inputs, 2)
    latent = drawn(flow, parts, merge(flow, hole["composition"], acts), latent=hole["latent"])
    return latent, (given.image, hole["region"])


def show(
    flow: Workflow,
    parts: Loaded,
    given: list[Source],
    made: list[Output],
    paste: tuple[Output, Output] | None = None,
    column: int = 6,
) -> None:
    """One row of the pictures and the results, enlarged; of `paste`, see `parts.show`."""
    pictures = {f"picture {i + 1}": one.image for i, one in enumerate(given)}
    pictures |= {f"result {i + 1}" if len(made) > 1 else "result": one for i, one in enumerate(made)}
    title = "Pictures, then what was made of them"
    show_row(flow, column, pictures, PREFIX, title, parts.vae, paste=paste)


def variations(flow: Workflow) -> None:
    """Fewer representations give more room: semantics alone, then with the sketch."""
    parts = load(flow)
    one = source(flow, parts, "a red striped fish on a mint background", 3, 1)
    loose = drawn(flow, parts, pick(flow, one.composition, "semantics"))
    close = drawn(flow, parts, pick(flow, one.composition, "semantics", "sketch"))
    show(flow, parts, [one], [loose, close])


def interpolation(flow: Workflow) -> None:
    """Meaning and colors go from one picture to another, with the sketch of the first."""
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
    show(flow, parts, [one, two], [drawn(flow, parts, between[0])])


def reconfiguration(flow: Workflow) -> None:
    """An edit by one changed representation: other colors, the rest as in the picture."""
    parts = load(flow)
    one = source(flow, parts, "a red striped house on a mint background", 3, 1)
    kept = pick(flow, one.composition, "sketch", "instances", "depth")
    target = merge(flow, kept, palette(flow, one, "#e8e8e4 12, #2040c0 2, #e0c020 1"))
    show(flow, parts, [one], [edited(flow, parts, one, target)])


def region_editing(flow: Workflow) -> None:
    """A thing replaced where it stands."""
    parts = load(flow)
    one = source(flow, parts, "a red heart on a white background", 3, 1)
    acts = caption(flow, one, "a blue star on a white background")
    latent, place = redrawn(flow, parts, one, acts, grow=8)
    show(flow, parts, [one], [latent], place)


def compositional_generation(flow: Workflow) -> None:
    """Sketch and depth of one picture, meaning of a second, colors of a third, and a text."""
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
    show(flow, parts, [one, two, three], [drawn(flow, parts, composed)])


def colorization(flow: Workflow) -> None:
    """A picture in gray, in chosen colors."""
    parts = load(flow)
    one = source(flow, parts, "a red striped fish on a mint background", 3, 1)
    colors = palette(flow, one, "#202c40 12, #7030a0 2, #f0a030 2")
    composed = merge(flow, pick(flow, one.composition, "intensity"), colors)
    show(flow, parts, [one], [drawn(flow, parts, composed)])


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
    show(flow, parts, [content, style], [drawn(flow, parts, composed)])


def translation(flow: Workflow) -> None:
    """The layout of a picture with another text."""
    parts = load(flow)
    one = source(flow, parts, "a red heart on a white background", 3, 1)
    text = caption(flow, one, "a green dotted heart on a navy background")
    composed = merge(flow, pick(flow, one.composition, "sketch", "instances", "depth"), text)
    show(flow, parts, [one], [drawn(flow, parts, composed)])


def pose_transfer(flow: Workflow) -> None:
    """The thing of one picture in the place and shape of another's."""
    parts = load(flow)
    one = source(flow, parts, "a red striped fish on a mint background", 3, 1)
    two = source(flow, parts, "a fish on a mint background", 9, 5)
    target = merge(flow, pick(flow, one.composition, "semantics", "palette"), pick(flow, two.composition, "instances"))
    show(flow, parts, [one, two], [edited(flow, parts, one, target)])


def recoloring(flow: Workflow) -> None:
    """Other colors, with the lightness of the original."""
    parts = load(flow)
    one = source(flow, parts, "a red striped house on a mint background", 3, 1)
    colors = palette(flow, one, "#c8b898 12, #2040c0 2, #e0c020 1")
    composed = merge(flow, pick(flow, one.composition, "intensity", "sketch"), colors)
    picture = decoded(flow, parts, drawn(flow, parts, composed))
    merged = flow.add("ConceptLoomLumaMerge", {"light": one.image, "color": picture, "mode": "Rec. 601"}, column=7)
    show(flow, parts, [one], [picture, merged[0]], column=8)


def try_on(flow: Workflow) -> None:
    """A thing in one picture, redrawn in the look of another picture's."""
    parts = load(flow)
    one = source(flow, parts, "a red mug on a white background", 3, 1)
    two = source(flow, parts, "a blue striped mug on a gray background", 8, 6)
    look = pick(flow, two.composition, "semantics")
    latent, place = redrawn(flow, parts, one, look)
    show(flow, parts, [one, two], [latent], place)


def text_to_image(flow: Workflow) -> None:
    """A caption alone."""
    parts = load(flow)
    one = source(flow, parts, "a yellow star and a tree on a navy background", 3, 1)
    show(flow, parts, [], [drawn(flow, parts, pick(flow, one.composition, "caption"))])


def color_sweep(flow: Workflow) -> None:
    """One sketch and text in colors between two palettes."""
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
    show(flow, parts, [one], [drawn(flow, parts, between[0])])


def refinement(flow: Workflow) -> None:
    """A composition drawn small, and refined at twice the size with its maps carried along: on a latent host, the
    second pass takes the place of the paper's upsampling models."""
    parts = load(flow)
    one = source(flow, parts, "a house and a star on a gray background", 3, 1)
    acts = pick(flow, one.composition, "caption", "sketch", "instances", "depth")
    positive = encoded(flow, parts, acts)
    small = sampled(flow, parts, positive, empty(flow))
    larger = flow.add("LatentUpscaleBy", {"samples": small, "upscale_method": "bicubic", "scale_by": 2.0}, column=6)
    fine = sampled(flow, parts, positive, larger[0], denoise=0.3, column=7)
    pictures = {"picture": one.image, "drawn small": small, "refined": fine}
    show_row(flow, 8, pictures, PREFIX, "Picture, drawn small, refined", parts.vae)


def caption_prior(flow: Workflow) -> None:
    """A caption alone, and with the semantics that a prior draws for it, twice: from the same noise, two looks."""
    parts = load(flow)
    loaded = flow.add("ConceptLoomLoadCaptionPrior", {"file": SHAPELAND}, column=1)
    text = "a star and a tree on a navy background"
    found = [
        flow.add(
            "ConceptLoomCaptionPrior",
            {"prior": loaded["prior"], "clip": parts.clip, "caption": text, "seed": seed},
            column=2,
        )[0]
        for seed in (1, 2)
    ]
    alone = pick(flow, found[0], "caption")
    show(flow, parts, [], [drawn(flow, parts, composition) for composition in (alone, *found)])


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
CASCADE = {"refinement": refinement, "caption_prior": caption_prior}
"""What stands around Composer in the paper: the prior before it, and what refines its pictures."""
