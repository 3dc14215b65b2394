"""What is allowed but rarely meant is said on the node it is about, as a client of a real server sees it."""

from __future__ import annotations

import pytest
from environment import absent_weights
from test_refusals import GOOD, NODE, PARTS, PREFIX, encoded, fusion, masks, sampled, solid, subject, text, workflow_of

pytestmark = pytest.mark.skipif(bool(absent_weights()), reason="Shapeland's weights are incomplete")


@pytest.fixture
def advised(server, object_info, monkeypatch):
    """Runs a node, with parts of its own, to what is then said on nodes: pairs of a node and the last text on it."""

    def run(kind: str, inputs: dict, **parts: tuple[str, dict]) -> dict[str, str]:
        for name, part in parts.items():
            monkeypatch.setitem(PARTS, name, part)
        events = server.run(workflow_of(kind, inputs, object_info)).named("progress_text")
        return {data["node"]: data["text"] for data in events}

    return run


def free(*subjects: str) -> tuple[str, dict]:
    links = {f"subjects.subject{i}": [name, 0] for i, name in enumerate(subjects)}
    return f"{PREFIX}MultiReferenceSelfAttention", {
        "model": ["world", 0],
        "clip": ["world", 1],
        "vae": ["world", 2],
        **links,
    }


DROWNED = (
    'The references outweigh the picture {} to 1: lower the weight of "star" ({}) to about 0.3, or tighten the masks.'
)
LACKING = 'Name "star" in the prompt: a subject appears where the picture shows its noun.'


def test_freecustom_says_it_on_its_own_node_and_takes_it_back(advised):
    """While another node, the sampler, runs; the recorder in between does not catch it."""
    record = (f"{PREFIX}RecordAttentionShare", {"model": ["patch", 0]})
    drowned = {name: subject(weight=8.2) for name in ("star 1", "star 2")}
    drowned |= {"patch": free("star 1", "star 2"), "record": record}
    house = {"about": text("a house on a navy background")}
    sampler = {**sampled(model=["record", 0], positive=["about", 0])[1], "seed": 100}
    assert advised("KSampler", sampler, **drowned, **house) == {"patch": f"{DROWNED.format(7282, 8.2)}\n{LACKING}"}
    stars = {"about": text("two stars on a navy background")}
    assert advised("KSampler", sampler, **drowned, **stars) == {"patch": DROWNED.format(7282, 8.2)}
    published = {**drowned, "star 1": subject(weight=3.0), "star 2": subject(weight=0.0)}
    assert advised("KSampler", sampler, **published, **stars) == {"patch": DROWNED.format(20, 3)}
    mild = {**drowned, "star 1": subject(weight=0.1), "star 2": subject(weight=0.0)}
    assert advised("KSampler", sampler, **mild, **stars) == {"patch": "No warnings."}
    assert advised("KSampler", {**sampler, "seed": 101}, **mild, **stars) == {}


def test_a_noun_that_fastcomposers_prompt_lacks(advised):
    inputs = {**GOOD["FuseSubjects"], "subjects.subject0": ["embedded", 0], "prompt": "a star @subject at night"}
    said = """The prompt does not say "mug"; subject 1 is fused into 'star'."""
    assert advised(f"{PREFIX}FuseSubjects", inputs, embedded=encoded("mug"), mug=subject(noun="mug")) == {NODE: said}


def test_a_concept_smaller_than_a_cell_is_said_on_the_fusion(advised):
    speck = {"destination": ["black", 0], "source": ["dot", 0], "x": 30, "y": 30, "operation": "add"}
    parts = {"dot": solid(2, 2), "speck": ("MaskComposite", speck), "place": masks("speck", dilation=0.0)}
    sampler = sampled(model=["fused", 0], positive=["fused", 1], negative=["fused", 2])
    (said,) = advised("KSampler", sampler[1], fused=fusion("place"), **parts).items()
    assert said[0] == "fused" and said[1].startswith("The concept star is smaller than a cell of every layer, even of")
