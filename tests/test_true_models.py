"""The workflows for Stable Diffusion on files of the true key names, shapes and dtype with random values.

SDXL's file has reduced depth (see true_models.py); what depth changes is tested on its layer list without weights.
"""

import io
import json
import time

import numpy as np
import pytest
import torch
from environment import ROOT
from PIL import Image
from safetensors.torch import save_file
from templates.composer_sd15 import CLIP_L, COADAPTERS, DEPTH, SCRIBBLE
from true_models import coadapter_state, fastcomposer_state, kohya_lora, write_checkpoint

SIDE = 64
FORGOTTEN = "Using LRU cache"
FREECUSTOM = {
    "sd15": "21_Two_subjects_FreeCustom_needs_SD15",
    "sdxl": "22_Two_subjects_FreeCustom_needs_SDXL",
}
NAMES = {"sd15": "v1-5-pruned-emaonly-fp16.safetensors", "sdxl": "sd_xl_base_1.0.safetensors"}
TWO_LORAS = {"sd15": "24_Two_LoRAs_Concept_Weaver_needs_SD15", "sdxl": "25_Two_LoRAs_Concept_Weaver_needs_SDXL"}


@pytest.fixture(scope="module")
def checkpoint(server, host, request):
    """Puts a checkpoint where the server finds it, for all tests that need it, and takes it away again. Until then
    the server keeps it loaded."""
    path = server.base / "models" / "checkpoints" / NAMES[request.param]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_checkpoint(request.param, path)
    yield request.param
    forget(server)
    path.unlink()


def forget(server):
    """Frees the models of true size, and waits until the server has done so: freed later, the models of the next
    workflow would be loaded twice."""
    forgotten = server.log_text().count(FORGOTTEN)
    server.request("/free", json.dumps({"unload_models": True, "free_memory": True}).encode())
    deadline = time.monotonic() + 30
    while server.log_text().count(FORGOTTEN) == forgotten and time.monotonic() < deadline:
        time.sleep(0.1)
    assert server.log_text().count(FORGOTTEN) > forgotten


@pytest.mark.parametrize("checkpoint", list(NAMES), indirect=True)
def test_workflow_runs_on_a_file_of_true_shapes(checkpoint, server):
    log, picture = draw(server, FREECUSTOM[checkpoint])
    assert "missing" not in log.lower(), [line for line in log.splitlines() if "missing" in line.lower()]
    assert "reference passes: 1" in log
    assert picture.std() > 1


@pytest.mark.parametrize("checkpoint", list(NAMES), indirect=True)
def test_concept_weaver_runs_with_two_loras(checkpoint, server):
    """Masks come from a drawn scene, for SAM3's weights cannot be had here; all else is the workflow's own. One of the
    LoRAs has changes to the text encoders."""
    loras = server.base / "models" / "loras"
    loras.mkdir(parents=True, exist_ok=True)
    files = [loras / f"{which} subject.safetensors" for which in ("first", "second")]
    for seed, file in enumerate(files):
        save_file(kohya_lora(checkpoint, seed, with_text=seed == 0), file)
    try:
        log, picture = draw(server, TWO_LORAS[checkpoint], with_drawn_masks)
    finally:
        for file in files:
            file.unlink()
    assert "left out" not in log
    assert picture.std() > 1


@pytest.mark.parametrize("checkpoint", ["sd15"], indirect=True)
def test_fusion_sampling_runs_with_a_lora_on_one_conditioning(checkpoint, server):
    file = server.base / "models" / "loras" / "my subject.safetensors"
    file.parent.mkdir(parents=True, exist_ok=True)
    # The host copies all of its layers whenever a conditioning with it follows one without.
    save_file(kohya_lora(checkpoint, 0, layer=".attn2."), file)
    try:
        log, picture = draw(server, "27_A_LoRA_and_a_prompt_ProFusion_needs_SD15")
    finally:
        file.unlink()
    # Two and three conditionings; those with the LoRA have weights of their own, and so calls.
    assert "UNet evaluations: 5," in log
    assert picture.std() > 1


@pytest.mark.parametrize("checkpoint", ["sd15"], indirect=True)
def test_representations_go_to_controlnets(checkpoint, server):
    folder = server.base / "models" / "controlnet"
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / file["name"] for file in (SCRIBBLE, DEPTH)]
    write_checkpoint("sd15_controlnet", files[0])
    files[1].hardlink_to(files[0])
    try:
        log, picture = draw(server, "29_Two_ControlNets_Composer_needs_SD15")
    finally:
        for file in files:
            file.unlink()
    assert "missing" not in log.lower() and "unexpected" not in log.lower()
    assert picture.std() > 1


@pytest.mark.parametrize("checkpoint", ["sd15"], indirect=True)
def test_representations_go_to_coadapters(checkpoint, server):
    files = {kind: server.base / "models" / file["directory"] / file["name"] for kind, file in COADAPTERS.items()}
    vision = server.base / "models" / CLIP_L["directory"] / CLIP_L["name"]
    for file in (*files.values(), vision):
        file.parent.mkdir(parents=True, exist_ok=True)
    for kind, file in files.items():
        torch.save(coadapter_state(kind), file)
    write_checkpoint("clip_l_vision", vision)
    try:
        log, picture = draw(server, "30_Lines_colors_and_style_CoAdapter_needs_SD15")
    finally:
        for file in (*files.values(), vision):
            file.unlink()
    assert "missing" not in log.lower() and "unexpected" not in log.lower()
    assert picture.std() > 1


@pytest.mark.parametrize("checkpoint", ["sd15"], indirect=True)
def test_fastcomposer_runs_on_the_published_layout(checkpoint, server):
    path = server.base / "models" / "fastcomposer" / "pytorch_model.bin"
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(fastcomposer_state(), path)
    forget(server)
    try:
        _, picture = draw(server, "23_Two_people_FastComposer_needs_SD15", with_its_own_autoencoder)
    finally:
        path.unlink()
    assert picture.std() > 1


def with_its_own_autoencoder(api):
    """Decodes with the autoencoder of FastComposer's file, which saves loading a whole checkpoint for its own."""
    (loader,) = (number for number, node in api.items() if node["class_type"].endswith("LoadFastComposer"))
    (decoder,) = (node for node in api.values() if node["class_type"] == "VAEDecode")
    decoder["inputs"]["vae"] = [loader, 3]
    return api


def with_drawn_masks(api):
    """Takes out what needs SAM3 and puts the masks of a drawn scene in its place; inversion is not refined, and the
    negative prompt is the positive, which is encoded once."""
    gone = {number for number, node in api.items() if node["class_type"].endswith(("LoadSegmenter", "TextToMasks"))}
    sam = {number for number, node in api.items() if "sam3" in str(node["inputs"].get("ckpt_name", ""))}
    assert len(gone) == 2 and len(sam) == 1
    masks = next(node for node in api.values() if node["class_type"] == "ConceptLoomConceptMasks")["inputs"]
    (given,) = [name for name, value in masks.items() if name.startswith("masks.") and value[0] in gone]
    masks[given] = ["scene", 1]
    del masks["detections"]
    for node in api.values():
        if node["class_type"] == "ConceptLoomDDIMInversion":
            node["inputs"]["refinements"] = 0
        if node["class_type"] == "KSampler":
            node["inputs"]["negative"] = node["inputs"]["positive"]
    scene = {"description": "a mug and a star on a gray background", "seed": 1, "identity_seed": 0, "size": SIDE}
    kept = {number: node for number, node in api.items() if number not in gone | sam}
    return {**kept, "scene": {"class_type": "ConceptLoomDrawScene", "inputs": scene}}


def draw(server, name, change=lambda api: api):
    """The last saved picture of a workflow, made small and in one step, and the log; NaN would be black."""
    api = json.loads((ROOT / "workflows" / "api" / f"{name}.json").read_text(encoding="utf-8"))
    for node in api.values():
        if node["class_type"] in ("KSampler", "ConceptLoomDDIMInversion", "BasicScheduler"):
            node["inputs"]["steps"] = 1
        if node["class_type"] == "ImageScale":
            node["inputs"].update(width=SIDE, height=SIDE)
        if node["class_type"] == "EmptyLatentImage":
            node["inputs"].update(width=SIDE, height=SIDE)
        if node["class_type"] == "ConceptLoomDrawScene":
            node["inputs"]["size"] = SIDE
    before = len(server.log_text())
    run = server.run(change(api))
    # Previews of cached nodes come after the picture.
    saved = [picture for picture in run.pictures if picture.saved]
    picture = Image.open(io.BytesIO(saved[-1].data)).convert("RGB")
    assert picture.size == (SIDE, SIDE)
    return server.log_text()[before:], np.asarray(picture)
