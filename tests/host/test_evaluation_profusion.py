"""The variants of ProFusion's report on the shipped Shapeland, in a step each."""

import pytest
import torch

pytestmark = pytest.mark.usefixtures("host")


@pytest.fixture(scope="module")
def studio(host):
    from conceptloom.evaluation.studio import Studio

    with torch.inference_mode():
        return Studio.open()


@pytest.fixture
def short(studio, monkeypatch):
    """The report with one sampling step, and fine-tuning of one step on two variants."""
    from conceptloom.evaluation.reports import profusion
    from conceptloom.training.promptnet.finetuning import FineTuning

    monkeypatch.setattr(profusion, "STEPS", 1)
    monkeypatch.setattr(profusion, "VARIANTS_OF_A_PICTURE", 2)
    monkeypatch.setattr(profusion.finetuning, "FineTuning", lambda: FineTuning(steps=1, batch_size=1))
    return profusion


def test_variants_are_drawn_from_one_noise_and_differ(studio, short):
    from conceptloom.evaluation.reports.fastcomposer import FILE, load_parts
    from conceptloom.evaluation.scenes import make_case
    from conceptloom.host.profusion import promptnet
    from conceptloom.host.shapeland import load_clip_vision

    vision = load_clip_vision()
    with torch.inference_mode():
        net, parts = promptnet.load(str(short.PROMPTNET)), load_parts(FILE, studio, vision)
        case = make_case(1, 0)
        drawn = short.draw_variants(studio, parts, net, vision, case, 1)
        plain = short._draw(studio, case, 1, short._plain(studio, studio.model, studio.encode(case.prompt)))
    assert torch.equal(drawn["plain"], plain)
    assert all(picture.shape == (1, 64, 64, 3) and picture.isfinite().all() for picture in drawn.values())
    # In a single step nothing is left to be reused, and its whole schedule is late.
    names = [name for name in drawn if name not in ("reuse", "late")]
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            assert not torch.equal(drawn[a], drawn[b]), (a, b)
    assert set(short.SHOWN) <= set(drawn) and {name for of in short.FRONTIERS.values() for name in of} <= set(drawn)


def test_a_concept_acts_in_the_whole_picture(studio, short):
    from conceptloom.evaluation.templates import load_bank, template_case

    case = template_case(1, 0)
    with torch.inference_mode():
        drawn = short.draw_concept(studio, load_bank(), case, 1)
        plain = short._draw(studio, case, 1, short._plain(studio, studio.model, studio.encode(case.prompt)))
    assert torch.equal(drawn["plain"], plain)
    for a, b in (("plain", "cfg"), ("plain", "default"), ("cfg", "default")):
        assert not torch.equal(drawn[a], drawn[b])


def test_the_plot_shows_each_point_where_it_was_measured(short):
    from conceptloom.evaluation.metrics import Row

    rows = [
        Row("profusion", "cfg_2", 1, metric, mean, mean, mean, 4) for metric, mean in (("prompt", 0.5), ("identity", 0))
    ]
    blue = (31, 119, 180)
    side, margin = 360, 44
    picture = short.frontier(rows, side)
    x, y = margin + (side - 2 * margin) // 2, side - margin
    assert picture.getpixel((x, y)) == blue
    assert short.frontier([], side).getpixel((x, y)) != blue
