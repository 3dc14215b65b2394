"""The report of Composer from start to end, with an adapter and a prior of random weights: its form."""

import pytest
import torch


@pytest.fixture
def adapter(host, tmp_path):
    from conceptloom.compositions.palette import table_colors
    from conceptloom.encoders.composer_adapter import ComposerAdapter, ComposerAdapterConfig, save, table_hash

    torch.manual_seed(0)
    config = ComposerAdapterConfig(
        (64, 128, 128, 128), 128, 128, 128, table=table_hash(table_colors("156 colors")), local_width=4, body=(4,) * 4
    )
    net = ComposerAdapter(config)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.05)
    save(net, tmp_path / "adapter.safetensors")
    return tmp_path / "adapter.safetensors"


@pytest.fixture
def prior(host, tmp_path):
    from conceptloom.encoders.caption_prior import HEADS, CaptionPrior, PriorConfig
    from safetensors.torch import save_file

    torch.manual_seed(0)
    net = CaptionPrior(PriorConfig(128, 32, 2, 1))
    for weight in (*net.parameters(), net.clip_mean, net.clip_std):
        torch.nn.init.normal_(weight, std=0.5)
    save_file(net.state_dict(), tmp_path / "prior.safetensors", {HEADS: "2"})
    return tmp_path / "prior.safetensors"


def test_every_variant_is_measured_by_every_representation(adapter, prior, monkeypatch):
    from conceptloom.evaluation import obedience, studio
    from conceptloom.evaluation.reports import composer

    monkeypatch.setattr(studio, "STEPS", 1)
    monkeypatch.setattr(composer, "SUBJECTS", (2,))
    with torch.inference_mode():
        room = studio.Studio.open()
        result = composer.report(room, 2, 0.0, lambda _: None, adapter, prior)
    rows = {(row.variant, row.metric): row for row in result.rows}
    for variant in composer.VARIANTS:
        for metric in (*obedience.METRICS, obedience.VARIETY):
            row = rows[variant, metric]
            assert row.low <= row.mean <= row.high and row.n == 2
        assert rows[variant, obedience.VARIETY].mean > 0.01
    assert ("plain", "palette_lead") in rows and "{" not in result.about
    # Three sources and the shown variants.
    assert result.sheet.width > 12 * 128


def test_a_target_obeys_itself(host):
    """The scene whose maps are asked for, as a picture drawn."""
    from conceptloom.compositions.composition import DEPTH, INTENSITY, MASK, NAMES, PALETTE, SKETCH
    from conceptloom.compositions.palette import palette_of_picture
    from conceptloom.compositions.semantics import Semantics
    from conceptloom.evaluation.reports.composer import make_target, measure
    from conceptloom.evaluation.studio import Studio

    def look(picture):
        return Semantics(picture.mean((0, 1)))

    with torch.inference_mode():
        room = Studio.open()
        for index in range(3):
            target = make_target(2, index, look)
            assert set(target.composition.parts) == set(NAMES)
            (scores,) = measure(room, target, target.shown[0][None], look)
            assert scores[SKETCH] == scores[MASK] == 1 and scores[INTENSITY] == pytest.approx(1, abs=1e-4)
            assert scores[DEPTH] > 0.85
            own = palette_of_picture(target.shown[1]).distance(target.composition[PALETTE])
            assert own == 0 and scores[PALETTE] < 0.9


def test_without_an_adapter_it_says_so(host, tmp_path):
    from conceptloom.evaluation.reports.composer import report

    with pytest.raises(FileNotFoundError, match="the adapter is missing: none.safetensors"):
        report(None, 1, 0.0, lambda _: None, tmp_path / "none.safetensors", tmp_path)
    with pytest.raises(FileNotFoundError, match="the prior is missing: none.safetensors"):
        report(None, 1, 0.0, lambda _: None, tmp_path, tmp_path / "none.safetensors")
