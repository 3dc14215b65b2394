"""FastComposer's evaluation protocol (spec section 4, oracle O11)."""

import json

import pytest
import torch
from conceptloom.evaluation import protocol
from conceptloom.evaluation.metrics import greedy_minimum
from PIL import Image


def test_pairs_are_found_greedily_and_the_worst_counts():
    # The assignment of the largest sum would score 0.8.
    assert greedy_minimum(torch.tensor([[0.9, 0.8], [0.85, 0.1]])) == pytest.approx(0.1)
    assert greedy_minimum(torch.tensor([[0.2, 0.7], [0.6, 0.1]])) == pytest.approx(0.6)


@pytest.mark.parametrize("similarity", [torch.zeros(0, 1), torch.zeros(0, 2), torch.tensor([[0.9, 0.8]])])
def test_a_missing_face_scores_nothing(similarity):
    assert greedy_minimum(similarity) == 0.0


def test_negative_likeness_counts_as_none():
    assert greedy_minimum(torch.tensor([[-0.4]])) == 0.0


@pytest.fixture
def runs(tmp_path):
    """Pictures whose color stands for the faces they show."""
    for name, color in {"ann": "#ff0000", "bob": "#00ff00", "both": "#ffff00", "nobody": "#000000"}.items():
        Image.new("RGB", (4, 4), color).save(tmp_path / f"{name}.png")
    entries = [
        {"picture": "both.png", "prompt": "two", "references": ["ann.png", "bob.png"]},
        {"picture": "ann.png", "prompt": "two", "references": ["ann.png", "bob.png"]},
        {"picture": "ann.png", "prompt": "one", "references": ["ann.png"]},
        {"picture": "nobody.png", "prompt": "one", "references": ["ann.png"]},
    ]
    file = tmp_path / "runs.json"
    file.write_text(json.dumps(entries))
    return file


def faces(picture):
    red, green, _ = picture.getpixel((0, 0))
    return torch.eye(2)[[i for i, shown in enumerate((red, green)) if shown]]


def test_rows_of_a_folder(runs):
    rows = protocol.score(protocol.read_runs(runs), faces, lambda _, prompt: float(len(prompt)))
    by_name = {(row["subjects"], row["metric"]): row for row in rows}
    assert by_name["multi", "identity"]["mean"] == pytest.approx(0.5)
    assert by_name["single", "identity"]["mean"] == pytest.approx(0.5)
    assert by_name["single", "identity"]["std"] == pytest.approx(0.5)
    assert by_name["multi", "prompt"] == {"metric": "prompt", "subjects": "multi", "mean": 3.0, "std": 0.0, "n": 2}
    assert {metric for _, metric in by_name} == {"identity", "prompt"}
    assert len(protocol.score(protocol.read_runs(runs), None, lambda *_: 0.0)) == 2


def test_a_reference_without_a_face_gets_its_sentence(runs):
    entries = [{"picture": "ann.png", "prompt": "one", "references": ["nobody.png"]}]
    runs.write_text(json.dumps(entries))
    with pytest.raises(ValueError, match="shows a face, got nobody.png"):
        protocol.score(protocol.read_runs(runs), faces, lambda *_: 0.0)


@pytest.mark.parametrize(
    "content",
    ["[]", "{", '[{"picture": "ann.png"}]', '[{"picture": "no.png", "prompt": "", "references": []}]', "3"],
)
def test_other_files_get_their_sentence(runs, content):
    runs.write_text(content)
    with pytest.raises(ValueError, match="runs.json"):
        protocol.read_runs(runs)


def test_prompts_are_read_by_a_clip_from_a_folder(tmp_path, host_path):
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    small = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config={**small, "eos_token_id": 49407},
        vision_config={**small, "image_size": 32, "patch_size": 16},
        projection_dim=8,
    )
    model = CLIPModel(config).eval()
    tokenizer = CLIPTokenizer.from_pretrained(host_path / "comfy" / "sd1_tokenizer")
    crop = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    processor = CLIPProcessor(CLIPImageProcessor(**crop), tokenizer)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    picture = Image.effect_noise((40, 50), 80).convert("RGB")
    likeness = protocol.prompt_reader(tmp_path)(picture, "a man")
    inputs = processor(text=["a man"], images=picture, return_tensors="pt")
    with torch.no_grad():
        out = model(**inputs)
    assert likeness == pytest.approx(float((out.text_embeds * out.image_embeds).sum()), abs=1e-5)
