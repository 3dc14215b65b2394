"""The pack in a real server: it loads, and a workflow can be run and followed over HTTP."""

from hostserver import PACK


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
    motion = {"smallest": 0.6, "largest": 1.0, "translate": 0.2, "degrees": 10.0, "flip": True}
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
