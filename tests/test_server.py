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
