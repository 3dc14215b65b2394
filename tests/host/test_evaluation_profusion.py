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
    # In a single step nothing is left to be reused or made anew, and its whole schedule is late.
    names = [name for name in drawn if name not in ("reuse", "once", "late", "last_fifth")]
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            assert not torch.equal(drawn[a], drawn[b]), (a, b)
    points = [*short.GUIDED, *short.FUSED, short.COMPOSABLE]
    kinds = [kind for kind in short.KINDS.values() if kind != "concept"]
    assert {*short.SHOWN, *(short._variant(kind, name) for kind in kinds for name in points)} <= set(drawn)


def test_two_subjects_are_drawn_together_and_apart(studio, short, monkeypatch):
    """Apart, each is a conditioning of its own; what another test draws is left out."""
    from conceptloom.evaluation.reports.fastcomposer import FILE, load_parts
    from conceptloom.evaluation.scenes import make_case
    from conceptloom.host.profusion import promptnet
    from conceptloom.host.shapeland import load_clip_vision

    monkeypatch.setattr(short, "_frontier", lambda *_: {})
    monkeypatch.setattr(short, "CHANGED", {"default": (1, short.Window(), {})})
    vision = load_clip_vision()
    with torch.inference_mode():
        net, parts = promptnet.load(str(short.PROMPTNET)), load_parts(FILE, studio, vision)
        drawn = short.draw_variants(studio, parts, net, vision, make_case(2, 0), 1)
    assert not torch.equal(drawn["separate"], drawn["default"])


def test_a_concept_acts_in_the_whole_picture(studio, short):
    from conceptloom.evaluation.templates import load_bank, template_case

    case = template_case(1, 0)
    with torch.inference_mode():
        drawn = short.draw_concept(studio, load_bank(), case, 1)
        plain = short._draw(studio, case, 1, short._plain(studio, studio.model, studio.encode(case.prompt)))
    assert torch.equal(drawn["plain"], plain)
    names = ["plain", *(short._variant("", name) for name in (*short.GUIDED, *short.FUSED, short.COMPOSABLE))]
    assert set(drawn) == set(names)
    for i, a in enumerate(names):
        assert not any(torch.equal(drawn[a], drawn[b]) for b in names[i + 1 :])


def test_the_plot_shows_each_point_where_it_was_measured(short):
    from conceptloom.evaluation.metrics import Row

    rows = [
        Row("profusion", "cfg_2", 1, metric, mean, mean, mean, 4) for metric, mean in (("prompt", 0.5), ("identity", 0))
    ]
    rows += [Row("profusion", "mrsa_fusion", 2, metric, 1, 1, 1, 4) for metric in ("prompt", "identity")]
    blue, red = (31, 119, 180), (214, 39, 40)
    side, margin = 240, 36
    picture = short.frontier(rows, side)
    x, y = margin + (side - 2 * margin) // 2, side - margin
    assert picture.getpixel((x, y)) == blue
    assert picture.getpixel((4 * side - margin, side + margin)) == red
    nothing = short.frontier([], side)
    assert nothing.getpixel((x, y)) != blue and nothing.getpixel((4 * side - margin, side + margin)) != red
