"""The pack in a real server: it loads, and a workflow can be run and followed over HTTP."""

import io

from hostserver import PACK
from PIL import Image


def test_pack_loads(server):
    log = server.log_text()
    assert "IMPORT FAILED" not in log
    assert "Error while calling comfy_entrypoint" not in log
    assert f"/{PACK}" in log, "the host never met the pack"


def test_every_listed_node_is_registered(host, object_info):
    from conceptloom.nodes import NODES

    ids = {node.GET_SCHEMA().node_id for node in NODES}
    assert ids == {name for name in object_info if name.startswith("ConceptLoom")}


def test_workflow_runs_and_is_followed(server):
    workflow = {
        "1": {"class_type": "EmptyImage", "inputs": {"width": 32, "height": 16, "batch_size": 1, "color": 255}},
        "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}},
    }
    run = server.run(workflow)
    assert [picture.node for picture in run.pictures] == ["2"]
    assert run.pictures[0].data.startswith(b"\x89PNG")
    assert [data["node"] for data in run.named("executed")] == ["2"]
    assert server.run(workflow).cached == {"1", "2"}


def test_promptnet_is_fine_tuned_saved_and_drawn_with_the_hosts_lora_nodes(server):
    from conceptloom.encoders.promptnet import PromptNet, PromptNetConfig, save

    folder = server.base / "models" / "promptnet"
    folder.mkdir(parents=True, exist_ok=True)
    config = PromptNetConfig((32,) * 4, (2,) * 4, latent_channels=8, vision_width=128, context_width=128, region=2)
    save(PromptNet(config), folder / "random.safetensors")
    models = {"clip": ["world", 1], "vae": ["world", 2], "clip_vision": ["world", 3]}
    recipe = {"steps": 4, "learning_rate": 0.001, "batch_size": 2, "rank": 2, "size": 64, "seed": 0}
    recipe |= {"captions": "a {} on a navy background", "preview_every": 2, "keep_checkpoint": True}
    encoding = {"subjects.subject0": ["subject", 0], "prompt": "a house", "update": "once", "marker": "@subject"}
    scene = {"description": "a house on a navy background", "seed": 1, "identity_seed": 0, "size": 64}
    motion = {"smallest": 0.6, "largest": 1.0, "translate": 0.2, "degrees": 10.0, "flip": True, "with_photo": True}
    sampling = {"seed": 0, "steps": 2, "cfg": 3.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
    ours = {
        "world": ("LoadShapeland", {}),
        "scene": ("DrawScene", scene),
        "subject": ("ReferenceSubject", {"image": ["scene", 0], "noun": "house", "weight": 1.0, "prompt": ""}),
        "variants": (
            "AugmentSubject",
            {"image": ["scene", 0], "mask": ["scene", 1], "count": 3, "size": 64, "seed": 0, **motion},
        ),
        "net": ("LoadPromptNet", {"model": ["world", 0], "file": "random.safetensors"}),
        "tuned": (
            "FineTunePromptNet",
            {"model": ["net", 0], "promptnet": ["net", 1], **models, **recipe}
            | {"images": ["variants", 0], "masks": ["variants", 2]},
        ),
        "saved": ("SavePromptNet", {"promptnet": ["tuned", 0], "filename": "house"}),
        "words": ("PromptNetEncode", {"promptnet": ["tuned", 0], **models, **encoding}),
    }
    workflow = {key: {"class_type": f"ConceptLoom{kind}", "inputs": inputs} for key, (kind, inputs) in ours.items()}
    hosts = {
        "lora file": ("SaveLoRA", {"lora": ["tuned", 1], "prefix": "loras/house"}),
        "model": (
            "LoraModelLoader",
            {"model": ["net", 0], "lora": ["tuned", 1], "strength_model": 1.0, "bypass": False},
        ),
        "canvas": ("EmptyLatentImage", {"width": 64, "height": 64, "batch_size": 1}),
        "drawn": (
            "KSampler",
            {"model": ["model", 0], "positive": ["words", 1], "negative": ["words", 0]}
            | {"latent_image": ["canvas", 0], **sampling},
        ),
        "picture": ("VAEDecode", {"samples": ["drawn", 0], "vae": ["world", 2]}),
        "shown": ("PreviewImage", {"images": ["picture", 0]}),
    }
    workflow |= {key: {"class_type": kind, "inputs": inputs} for key, (kind, inputs) in hosts.items()}
    before = len(server.log_text())
    run = server.run(workflow)
    assert {picture.node for picture in run.pictures} >= {"tuned", "shown", "variants"}
    assert "not loaded" not in server.log_text()[before:]
    output = server.base / "output"
    assert (output / "promptnet" / "house.safetensors").is_file() and list((output / "loras").glob("house*"))
    assert not list((output / "promptnet_training").iterdir())
    progress = [data for data in run.named("progress") if data["node"] == "tuned"]
    assert progress[-1]["value"] == progress[-1]["max"] == 4
    assert (
        "house.safetensors"
        in server.get("/object_info/ConceptLoomLoadPromptNet")["ConceptLoomLoadPromptNet"]["input"]["required"]["file"][
            1
        ]["options"]
    ), "what was saved can be loaded"


def test_compositions_are_taken_apart_combined_and_kept(server):
    """Sketch and instances of one picture, colors and meaning of another, on a larger canvas."""

    def ours(kind, **inputs):
        return {"class_type": f"ConceptLoom{kind}", "inputs": inputs}

    def decomposed(picture, **inputs):
        options = {"take_palette": True, "take_sketch": True, "take_intensity": True}
        more = {"intensity_weights": "Rec. 601", "depth_is_distance": False, "caption": "", "sketch_polarity": "auto"}
        return ours("DecomposeImage", image=[picture, 0], **{**options, **more, **inputs})

    def picked(composition, *names):
        every = ("caption", "semantics", "palette", "sketch", "instances", "depth", "intensity", "mask")
        window = {"strength": 0.5, "start_percent": 0.0, "end_percent": 1.0}
        return ours("PickRepresentations", composition=[composition, 0], **{n: n in names for n in every}, **window)

    scene = {"identity_seed": 0, "size": 64}
    workflow = {
        "world": ours("LoadShapeland"),
        "star": ours("DrawScene", description="a star on a navy background", seed=1, **scene),
        "house": ours("DrawScene", description="a house on a mint background", seed=2, **scene),
        "map": ours("InstanceMap", masks=["star", 1], nouns="star", coding="composition"),
        "edges": ours("Sketch", image=["star", 0], method="canny", polarity="auto", simplify=True, stroke=1),
        "colors": ours(
            "Palette", image=["house", 0], colors="#ff8000", color_share=0.2, table="156 colors", sigma=10.0
        ),
        "strip": ours("PaletteToImage", palette=["colors", 0], width=96, height=64, layout="tiles", count=8, seed=1),
        "region": ours("RegionMask", image=["star", 0], mask=["star", 1], grow=2),
        "gray": ours("Intensity", image=["house", 0], weights="mean"),
        "one": decomposed(
            "star",
            sketch=["edges", 0],
            instances=["map", 0],
            mask=["region", 1],
            depth=["gray", 0],
            caption="a star on a navy background",
        ),
        "two": decomposed("house", clip_vision=["world", 3], palette=["colors", 0]),
        "shape": picked("one", "sketch", "instances", "mask", "depth", "caption"),
        "look": picked("two", "semantics", "palette"),
        "both": ours("MergeCompositions", composition1=["shape", 0], composition2=["look", 0], policy="refuse"),
        "large": ours("AlignComposition", composition=["both", 0], width=96, height=96, fit="pad"),
        "way": ours(
            "InterpolateCompositions",
            composition1=["one", 0],
            composition2=["two", 0],
            shares="0, 0.5, 1",
            local_from="second",
        ),
        "seen": ours("InspectComposition", composition=["large", 0]),
        "steps": ours("InspectComposition", composition=["way", 0]),
        "kept": ours("SaveComposition", composition=["large", 0], filename="two pictures"),
        "thing": ours("CompositionSubject", composition=["one", 0], noun="star", weight=1.0),
        "again": ours("DecomposeSubject", subject=["thing", 0], clip_vision=["world", 3]),
        "recolored": ours("LumaMerge", light=["star", 0], color=["house", 0], mode="CIELab", strength=1.0),
        **{
            f"show {name}": {"class_type": "PreviewImage", "inputs": {"images": [name, 0]}}
            for name in ("strip", "recolored")
        },
        "end": ours("InspectComposition", composition=["again", 0]),
    }
    run = server.run(workflow)
    shown = [picture.node for picture in run.pictures]
    assert {"seen", "steps", "end", "show strip", "show recolored", "both"} <= set(shown)
    assert shown.count("steps") == 3, "what follows runs once for each share"
    (said,) = run.entry["outputs"]["kept"]["text"]
    assert said.splitlines()[1:] == [
        "caption: a star on a navy background; strength 0.5",
        "semantics: 128 numbers and tokens; strength 0.5",
        *[line for line in said.splitlines() if line.startswith("palette: ")],
        "sketch: 96 x 96; strength 0.5",
        "instances: star; strength 0.5",
        "depth: 96 x 96; strength 0.5",
        *[line for line in said.splitlines() if line.startswith("mask: ")],
    ]
    file = "two pictures.safetensors"
    assert said.startswith(f"compositions/{file}: ")
    reading = {
        "read": ours("LoadComposition", file=file),
        "seen": ours("InspectComposition", composition=["read", 0]),
    }
    read = server.run(reading)
    one, other = (
        Image.open(io.BytesIO(next(p.data for p in each.pictures if p.node == "seen"))).convert("RGB")
        for each in (run, read)
    )
    assert one.tobytes() == other.tobytes(), "the file holds all that the sheet shows"
    # A file that is replaced by another one is read again.
    (server.base / "output" / "compositions" / file).unlink()
    server.run(workflow | {"kept": ours("SaveComposition", composition=["two", 0], filename="two pictures")})
    (new,) = (picture.data for picture in server.run(reading).pictures if picture.node == "seen")
    assert Image.open(io.BytesIO(new)).convert("RGB").tobytes() != other.tobytes()
