"""Pictures in half precision, which the host hands out under --fp16-intermediates: every function that takes a picture
gives what it gives of the same picture in single precision."""

import pytest
import torch

pytestmark = pytest.mark.usefixtures("host")

HALVES = [torch.float16, torch.bfloat16]


def generator():
    return torch.Generator().manual_seed(0)


def picture():
    """(40, 60, 3), of levels that every precision holds exactly."""
    return torch.randint(0, 128, (40, 60, 3), generator=generator()) / 128


def mask():
    shown = torch.zeros(40, 60)
    shown[10:30, 10:40] = 1
    return shown


def subject(dtype):
    from conceptloom.subjects.subject import Subject

    return Subject(picture().to(dtype), "dog", mask().to(dtype))


def shares(dtype, opacity):
    from conceptloom.attention.heatmap import share_pictures

    maps = torch.rand(2, 3, 5, 8, generator=generator())
    return share_pictures(maps, picture().to(dtype).expand(2, -1, -1, -1), opacity, stretched=True)


def collage(dtype, placement):
    from conceptloom.subjects.collage import place

    given = None if placement is None else placement.to(dtype)
    seen, masks, placed = place(picture().to(dtype), [subject(dtype)], given, feather_radius=2.0, flip=True)
    return seen, masks, placed[0].image


def divided(dtype):
    from conceptloom.subjects.partition import assemble
    from conceptloom.subjects.partition import picture as to_look_at

    partition = assemble([mask().to(dtype)], 0.05, 0.05)
    return partition, to_look_at(partition, picture().to(dtype))


def prepared(dtype, background, crop):
    from conceptloom.encoders.reference import prepare_reference

    return prepare_reference(picture().to(dtype), mask().to(dtype), 32, background, crop)


def encoded(dtype, clip_vision):
    from conceptloom.host.fastcomposer.conditioning import encode_subjects

    return encode_subjects(clip_vision, [subject(dtype)], "noise", True)[0].encodings["fastcomposer"].vector


def views(dtype, augmentation):
    from conceptloom.training.concepts.learner import Recipe
    from conceptloom.training.concepts.pictures import Pictures

    pictures = Pictures([picture().to(dtype)], [mask().to(dtype)], ["a {}"])
    recipe = Recipe(steps=1, batch_size=1, augmentation=augmentation)
    return [part for view, _ in pictures.views(recipe, 32) for part in (view.image, view.mask)]


def found(dtype):
    from conceptloom.host.segmenting.segmenters import ShapelandJudge, text_to_masks

    masks, _, seen = text_to_masks(ShapelandJudge(), picture().to(dtype), "fish", "whole frame")
    return masks, seen


def read(dtype):
    from conceptloom.host.shapeland import read_pictures
    from conceptloom.shapeland import world

    drawn, _ = world.draw_description("a red striped fish on a mint background", 0, 0, 1)
    return [thing.embedding for thing in read_pictures(torch.from_numpy(drawn.image)[None].to(dtype))[0]]


def fitted(dtype):
    from conceptloom.subjects.pictures import fit

    return fit(picture().to(dtype), (16, 24))


def lit(dtype):
    from conceptloom.subjects.masks import spotlight

    return spotlight(subject(dtype).image, subject(dtype).mask)


FUNCTIONS = {
    "Attention Share": lambda dtype: shares(dtype, 0.6),
    "Attention Share, the picture alone": lambda dtype: shares(dtype, 0.0),
    "Concept Collage": lambda dtype: collage(dtype, None),
    "Concept Collage, placed": lambda dtype: collage(dtype, mask()[None]),
    "Concept Masks": divided,
    "Reference Subject": lit,
    "Multi-Reference Self-Attention": fitted,
    "Subject Encoder": lambda dtype: prepared(dtype, "noise", True),
    "Subject Encoder, black": lambda dtype: prepared(dtype, "black", False),
    "Train Concept": lambda dtype: views(dtype, "none"),
    "Train Concept, varied": lambda dtype: views(dtype, "strong"),
    "Text to Masks": found,
    "Read Picture": read,
}


def tensors(result):
    return [result] if torch.is_tensor(result) else list(result)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_half_pictures_give_what_single_ones_give(name, dtype):
    with torch.inference_mode():
        single, half = (tensors(FUNCTIONS[name](d)) for d in (torch.float32, dtype))
    assert len(single) == len(half) > 0
    for expected, given in zip(single, half, strict=True):
        # The judge measures edges, where a level more or less counts.
        close = dict(atol=0.02, rtol=0) if name == "Read Picture" else dict(atol=1 / 255, rtol=0)
        torch.testing.assert_close(given.float(), expected.float(), **close)


@pytest.mark.parametrize("dtype", HALVES)
def test_the_subject_encoder_sees_the_same(dtype):
    from conceptloom.host.shapeland import load_clip_vision

    clip_vision = load_clip_vision()
    with torch.inference_mode():
        torch.testing.assert_close(encoded(dtype, clip_vision), encoded(torch.float32, clip_vision), atol=0.02, rtol=0)


@pytest.mark.parametrize("dtype", HALVES)
def test_previews_are_made_of_them(dtype, monkeypatch, tmp_path):
    import folder_paths
    from conceptloom.nodes.subjects import ReferenceSubject

    monkeypatch.setattr(folder_paths, "get_temp_directory", lambda: str(tmp_path))
    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path))
    out = ReferenceSubject.execute(picture().to(dtype)[None], "dog", "", 1.0, mask().to(dtype)[None])
    assert out[0].image.dtype == dtype and len(out.ui.as_dict()["images"]) == 1
