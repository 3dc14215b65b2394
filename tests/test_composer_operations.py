"""Composer's thirteen operations, a second pass and the prior, as workflows on the real server, with Shapeland's
weights; a judge reads what they draw."""

import io
import json

import numpy as np
import pytest
import torch
from environment import ROOT, absent_weights
from PIL import Image
from templates.composer import TEMPLATES
from templates.composer_operations import CASCADE, OPERATIONS
from test_workflows import SHORT, judge

pytestmark = pytest.mark.skipif(bool(absent_weights()), reason="Shapeland's weights are incomplete")

FOLDER = ROOT / "workflows" / "api"
STEPS, SIDE = 12, 64


class Row:
    """A saved row of pictures (64, 64, 3) in [0, 1], and what the judge reads of them."""

    def __init__(self, data: bytes):
        with Image.open(io.BytesIO(data)) as image:
            scale = image.height // SIDE
            row = torch.from_numpy(np.array(image.convert("RGB")))[::scale, ::scale].float() / 255
        # What is left of the width is between the pictures.
        count = row.shape[1] // SIDE
        step = SIDE + (row.shape[1] - count * SIDE) // max(1, count - 1)
        self.pictures = [row[:, i * step : i * step + SIDE] for i in range(count)]
        with torch.no_grad():
            self.readings = judge().read(torch.stack(self.pictures).movedim(-1, 1))

    def nouns(self, at: int) -> list[str]:
        from conceptloom.shapeland.world import NOUNS

        return sorted(NOUNS[reading.noun] for reading in self.readings[at])

    def colors(self, at: int) -> set[str]:
        """Of all things of a picture."""
        from conceptloom.shapeland.world import COLORS

        return {COLORS[c] for reading in self.readings[at] for c in (reading.color, reading.second)}

    def covered(self, at: int) -> torch.Tensor:
        return torch.stack([reading.mask for reading in self.readings[at]]).any(0)

    def overlap(self, one: int, other: int) -> float:
        """Of what the things of two pictures cover."""
        a, b = self.covered(one), self.covered(other)
        return float((a & b).sum() / (a | b).sum())

    def ground(self, at: int) -> torch.Tensor:
        """The mean color of a picture where no thing is."""
        return self.pictures[at][~self.covered(at)].mean(0)


@pytest.fixture(scope="module")
def rows_of(server):
    def rows(operation: str) -> list[Row]:
        name = TEMPLATES.get(operation) or f"operations/composer_{operation}"
        file = FOLDER / f"{name}.json"
        api = json.loads(file.read_text(encoding="utf-8"))
        # With these a template is the prompt that test_workflows.py has run.
        steps = SHORT["KSampler"]["steps"] if operation in TEMPLATES else STEPS
        for node in api.values():
            if node["class_type"] in ("KSampler", "ConceptLoomBidirectionalGuidance"):
                second_pass = node["inputs"].get("denoise", 1.0) < 0.5
                node["inputs"]["steps"] = steps // 2 if second_pass else steps
        return [Row(picture.data) for picture in server.run(api).pictures if picture.saved]

    return rows


def light(colors: torch.Tensor) -> torch.Tensor:
    """The lightness of colors (..., 3), as Luma Merge has it."""
    return colors @ torch.tensor([0.299, 0.587, 0.114])


def check_variations(row):
    """With its sketch the thing stays in place; either way it has the picture's colors."""
    assert row.nouns(2) == ["fish"] and row.overlap(0, 2) > 0.5
    assert all({"red", "teal"} <= row.colors(at) for at in (0, 1, 2))


def check_interpolation(first, between, last):
    """The first's shape throughout; the ground goes from the first's to the second's."""
    assert all(row.nouns(2) == ["heart"] and row.overlap(0, 2) > 0.8 for row in (first, between, last))
    shares = [float((row.ground(2) - row.ground(0)).norm()) for row in (first, between, last)]
    assert shares[0] < 0.15 < shares[2] and (last.ground(2) - last.ground(1)).abs().max() < 0.1


def check_reconfiguration(row):
    """The house stays where it is, on the palette's ground."""
    assert row.nouns(1) == ["house"] and row.overlap(0, 1) > 0.85
    assert (row.ground(1) - 0.91).abs().max() < 0.08 < (row.ground(0) - 0.91).abs().max()


def check_region_editing(row):
    """Another thing where the first was, and nothing changed outside."""
    assert row.nouns(1) == ["star"] and "blue" in row.colors(1)
    changed = (row.pictures[1] - row.pictures[0]).abs().amax(-1) > 0.02
    near = torch.nn.functional.max_pool2d(row.covered(0).float()[None], 19, 1, 9)[0] > 0
    assert changed.any() and not changed[~near].any()


def check_compositional_generation(row):
    """The first's things in their places, the second's colors on them, the third's ground."""
    assert row.nouns(3) == ["house", "tree"] and row.overlap(0, 3) > 0.6
    assert "green" in row.colors(3) and (row.ground(3) - row.ground(2)).abs().max() < 0.15


def check_colorization(row):
    """The shape of the gray picture, in the palette's colors."""
    assert row.nouns(1) == ["fish"] and row.overlap(0, 1) > 0.8
    assert row.colors(1) & {"purple", "orange", "yellow"} and not row.colors(1) & row.colors(0)
    assert float(light(row.ground(1))) < 0.35


def check_style_transfer(row):
    """The first's things, in the second's colors and on its ground."""
    assert row.nouns(2) == ["house", "star"] and row.overlap(0, 2) > 0.8
    assert "purple" in row.colors(2) and not row.colors(2) & {"green", "teal"}
    assert (row.ground(2) - row.ground(1)).abs().max() < 0.1


def check_translation(row):
    """The same layout, as the new text says."""
    assert row.nouns(1) == ["heart"] and row.overlap(0, 1) > 0.85
    assert "green" in row.colors(1) and float(light(row.ground(1))) < 0.3 < float(light(row.ground(0)))


def check_pose_transfer(row):
    """The first's fish in the second's place."""
    assert row.nouns(2) == ["fish"] and row.overlap(1, 2) > 0.8 > row.overlap(0, 2)
    assert {"red", "teal"} <= row.colors(2)


def check_recoloring(row):
    """Other colors with exactly the lightness of the original, as far as colors can have it."""
    assert row.nouns(1) == ["house"] and row.overlap(0, 1) > 0.8 and "blue" in row.colors(1)
    assert float((light(row.pictures[2]) - light(row.pictures[0])).abs().mean()) < 0.02
    assert (row.ground(2) - row.ground(0)).abs().max() > 0.1


def check_try_on(row):
    """A mug in the other mug's colors, and nothing changed outside."""
    assert row.nouns(2) == ["mug"] and row.colors(2) & {"blue", "orange"} and not row.colors(2) & {"red", "teal"}
    changed = (row.pictures[2] - row.pictures[0]).abs().amax(-1) > 0.02
    near = torch.nn.functional.max_pool2d(row.covered(0).float()[None], 9, 1, 4)[0] > 0
    assert changed.any() and not changed[~near].any()


def check_text_to_image(row):
    assert row.nouns(0) == ["star", "tree"] and "yellow" in row.colors(0)


def check_color_sweep(warm, between, cold):
    """One heart, from warm to cold."""
    assert all(row.nouns(1) == ["heart"] and row.overlap(0, 1) > 0.8 for row in (warm, between, cold))
    red, _, blue = zip(
        *(row.pictures[1][row.covered(1)].mean(0).tolist() for row in (warm, between, cold)), strict=True
    )
    assert red[0] > red[2] and blue[0] < blue[2]


def check_refinement(row):
    """The same things in the same places at twice the size."""
    assert row.nouns(1) == row.nouns(2) == ["house", "star"]
    assert row.overlap(0, 2) > 0.75 and row.overlap(1, 2) > 0.75


def check_caption_prior(row):
    """The caption's things, with other looks for other semantics."""
    assert all(row.nouns(at) == ["star", "tree"] for at in range(3))
    looks = [row.colors(at) for at in range(3)]
    assert looks[1] != looks[2] and looks[0] not in looks[1:]


@pytest.mark.parametrize("operation", [*OPERATIONS, *CASCADE])
def test_it_does_what_it_says(rows_of, operation):
    globals()[f"check_{operation}"](*rows_of(operation))
