"""Composer's thirteen operations on the real server, with an adapter of random weights: they run and show pictures."""

import pytest
from environment import absent_weights
from templates.composer_operations import ADAPTER, OPERATIONS
from workflow_builder import Workflow
from workflow_format import to_api, ui_problems

pytestmark = pytest.mark.skipif(bool(absent_weights()), reason="Shapeland's weights are incomplete")


@pytest.fixture(scope="module")
def adapter(server):
    import torch
    from conceptloom.compositions.palette import table_colors
    from conceptloom.encoders.composer_adapter import ComposerAdapter, ComposerAdapterConfig, save, table_hash

    torch.manual_seed(0)
    config = ComposerAdapterConfig(
        levels=(64, 128, 128, 128),
        context_width=128,
        sentence_width=128,
        semantics_width=128,
        table=table_hash(table_colors("156 colors")),
        local_width=8,
        body=(8, 8, 8, 8),
    )
    adapter = ComposerAdapter(config)
    for weight in adapter.parameters():
        torch.nn.init.normal_(weight, std=0.05)
    folder = server.base / "models" / "composer_adapters"
    folder.mkdir(parents=True, exist_ok=True)
    save(adapter, folder / ADAPTER)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_it_runs(adapter, server, object_info, operation):
    flow = Workflow(server.get("/object_info"), f"composer_{operation}_shapeland")
    OPERATIONS[operation](flow)
    ui = flow.ui()
    assert ui_problems(ui, object_info) == []
    api = to_api(ui, object_info)
    for node in api.values():
        if node["class_type"] in ("KSampler", "ConceptLoomBidirectionalGuidance"):
            node["inputs"]["steps"] = 2
    run = server.run(api)
    assert any(picture.saved for picture in run.pictures)
