"""The workflows for Stable Diffusion on files of the true key names, shapes and dtype with random values.

SDXL's file has reduced depth (see true_models.py); what depth changes is tested on its layer list without weights.
"""

import io
import json

import numpy as np
import pytest
import torch
from environment import ROOT
from PIL import Image
from true_models import fastcomposer_state, write_checkpoint

SIDE = 128


@pytest.fixture
def checkpoint(server, host, request):
    """Puts the checkpoint of a workflow where the server finds it, and takes it away again."""
    kind, name = request.param
    path = server.base / "models" / "checkpoints" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    write_checkpoint(kind, path)
    yield kind
    server.request("/free", json.dumps({"unload_models": True, "free_memory": True}).encode())
    path.unlink()


@pytest.mark.parametrize(
    "checkpoint",
    [("sd15", "v1-5-pruned-emaonly-fp16.safetensors"), ("sdxl", "sd_xl_base_1.0.safetensors")],
    indirect=True,
    ids=["sd15", "sdxl"],
)
def test_workflow_runs_on_a_file_of_true_shapes(checkpoint, server):
    log, picture = draw(server, f"freecustom_{checkpoint}")
    assert "missing" not in log.lower(), [line for line in log.splitlines() if "missing" in line.lower()]
    assert "2 reference passes" in log
    assert picture.std() > 1


@pytest.mark.parametrize("checkpoint", [("sd15", "v1-5-pruned-emaonly-fp16.safetensors")], indirect=True, ids=["sd15"])
def test_fastcomposer_runs_on_the_published_layout(checkpoint, server):
    path = server.base / "models" / "fastcomposer" / "pytorch_model.bin"
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(fastcomposer_state(), path)
    try:
        _, picture = draw(server, "fastcomposer_sd15")
    finally:
        path.unlink()
    assert picture.std() > 1


def draw(server, name):
    """The last picture of a workflow, made small and in 2 steps, and what the server logged; NaN would be black."""
    api = json.loads((ROOT / "workflows" / "api" / f"{name}.json").read_text(encoding="utf-8"))
    for node in api.values():
        if node["class_type"] == "KSampler":
            node["inputs"]["steps"] = 2
        if node["class_type"] == "EmptyLatentImage":
            node["inputs"].update(width=SIDE, height=SIDE)
        if node["class_type"] == "ConceptLoomDrawScene":
            node["inputs"]["size"] = SIDE
    before = len(server.log_text())
    run = server.run(api)
    picture = Image.open(io.BytesIO(run.pictures[-1].data)).convert("RGB")
    assert picture.size == (SIDE, SIDE)
    return server.log_text()[before:], np.asarray(picture)
