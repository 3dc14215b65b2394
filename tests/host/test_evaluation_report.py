"""The report from start to end, with random weights: its form, and that plain sampling is the host's own."""

import json
from dataclasses import replace

import pytest
import torch

ROW = {"system", "variant", "subjects", "metric", "mean", "low", "high", "n"}


class ToyCLIP:
    """A text's context is noise seeded by the text."""

    def tokenize(self, text):
        return text

    def encode_from_tokens_scheduled(self, text):
        generator = torch.Generator().manual_seed(sum((i + 1) * ord(c) for i, c in enumerate(text)))
        return [[torch.randn(1, 77, 128, generator=generator), {}]]


@pytest.fixture(scope="module")
def shapeland(host):
    """The module that loads Shapeland, with random weights in place of files."""
    import comfy.model_patcher
    from conceptloom.evaluation.rigs import PLANS, Rig
    from conceptloom.host import shapeland
    from conceptloom.shapeland.autoencoder import Autoencoder
    from conceptloom.shapeland.judge import Judge

    torch.manual_seed(0)
    with torch.inference_mode():
        model = Rig.build(PLANS["tiny", "cpu"]).model
    state, judge = Autoencoder().state_dict(), Judge().eval().requires_grad_(False)
    cpu = torch.device("cpu")
    loaders = {
        "load_model": lambda: model,
        "load_clip": ToyCLIP,
        "load_vae": lambda load=shapeland.load_vae: load(state),
        "load_judge": lambda: comfy.model_patcher.ModelPatcher(judge, cpu, cpu),
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, loader in loaders.items():
            patch.setattr(shapeland, name, loader)
        yield shapeland


@pytest.fixture
def report(shapeland, tmp_path, monkeypatch):
    """The report of one and two subjects, writing into an empty folder, with one step and few pictures to judge."""
    from conceptloom.evaluation import judging, report, studio
    from conceptloom.evaluation.reports import freecustom

    monkeypatch.setattr(studio, "STEPS", 1)
    monkeypatch.setattr(freecustom, "SUBJECTS", (1, 2))
    monkeypatch.setattr(judging, "PICTURES", 4)
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(report, "DOCUMENT", tmp_path / "docs" / "report.md")
    return report


@pytest.fixture
def few_variants(monkeypatch):
    """Names of some variants, to which the report is limited."""
    from conceptloom.evaluation.reports import freecustom

    few = ("default", "plain", "no_mask")
    monkeypatch.setattr(freecustom, "VARIANTS", {name: freecustom.VARIANTS[name] for name in few})
    return few


def test_rows_table_sheet_and_document(report, few_variants, tmp_path, capsys):
    from PIL import Image

    file = tmp_path / "rows.json"
    assert report.main(["freecustom", "--pictures", "2", "--json", str(file), "--docs"]) == 0
    rows = json.loads(file.read_text())
    assert all(set(row) == ROW for row in rows)
    assert all(row["low"] <= row["mean"] <= row["high"] for row in rows)
    ours = [row for row in rows if row["system"] == "freecustom"]
    assert {row["n"] for row in ours} == {2}
    assert {row["variant"] for row in ours} == {*few_variants, "truth", "unrelated"}
    for subjects in (1, 2):
        metrics = {row["metric"] for row in ours if row["subjects"] == subjects and row["variant"] == "default"}
        assert metrics == {"identity", "leakage", "prompt"} | ({"background", "worst"} if subjects > 1 else set())
    leads = {row["variant"] for row in ours if row["metric"] == "identity_lead"}
    assert leads == set(few_variants) - {"default"}
    assert {"found", "prompt"} <= {row["metric"] for row in rows if row["system"] == "judge"}

    printed, page = capsys.readouterr().out, (tmp_path / "docs" / "report.md").read_text()
    for table in (printed, page):
        assert "no_mask" in table and "unrelated" in table
    assert "python tools/dev.py eval freecustom --pictures 2 --docs" in page and "{" not in page
    # Two references and the variants wide, one row per number of subjects.
    assert "(images/eval_freecustom_sheet.jpg)" in page
    sheet = Image.open(tmp_path / "docs" / "images" / "eval_freecustom_sheet.jpg")
    assert sheet.width > 5 * 128 and sheet.height > 2 * 128


def test_plain_is_the_untouched_host(report, few_variants, host, shapeland):
    """Bit for bit what the host's own KSampler and VAE Decode give, before and after the other variants ran."""
    from conceptloom.evaluation import studio
    from conceptloom.evaluation.reports.freecustom import draw_variants
    from conceptloom.evaluation.scenes import make_case

    case = make_case(2, 0)
    with torch.inference_mode():
        drawn = draw_variants(studio.Studio.open(), case, 2)
        model, clip, vae = shapeland.load_model(), ToyCLIP(), shapeland.load_vae()
        (latent,) = host.common_ksampler(
            model,
            case.seed,
            studio.STEPS,
            studio.CFG,
            studio.SAMPLER,
            studio.SCHEDULER,
            clip.encode_from_tokens_scheduled(case.prompt),
            clip.encode_from_tokens_scheduled(studio.NEGATIVE_PROMPT),
            {"samples": torch.zeros(2, 8, 16, 16)},
        )
        expected = vae.decode(latent["samples"])
    assert torch.equal(drawn["plain"], expected)
    assert not torch.equal(drawn["default"], expected)


def test_every_variant_is_the_node_with_one_thing_changed(report, shapeland):
    from conceptloom.evaluation.reports.freecustom import VARIANTS, WEIGHT, WEIGHTS, patched
    from conceptloom.evaluation.scenes import make_case
    from conceptloom.evaluation.studio import Studio
    from conceptloom.host.freecustom.attention import KEY
    from conceptloom.host.freecustom.job import MrsaSettings
    from conceptloom.host.model.patching import attached
    from conceptloom.host.model.sites import ALL_BLOCKS, LAST_STAGE

    studio, case = Studio.open(), make_case(2, 0)
    systems = {name: attached(patched(studio, case, *c), KEY) for name, c in VARIANTS.items() if c is not None}
    own = MrsaSettings()
    assert systems["default"].settings == own
    assert systems["last_stage"].settings == replace(own, blocks=LAST_STAGE)
    assert systems["all_blocks"].settings == replace(own, blocks=ALL_BLOCKS)
    assert systems["paper"].settings == replace(own, formula="paper")
    assert systems["published"].settings == MrsaSettings()
    subjects = {name: [e.subject for e in system.encoded] for name, system in systems.items()}
    weights = {"default": WEIGHT, **{f"weight_{weight:g}": weight for weight in WEIGHTS}}
    assert all(s.mask is not None and s.weight == weights[name] for name in weights for s in subjects[name])
    assert all(s.mask is not None and s.weight == 3.0 for s in subjects["published"])
    assert all(s.mask is None for s in subjects["no_mask"])
    assert all(0 < s.weight < 1e-3 and s.mask is not None for s in subjects["zero_bias"])
    assert len(systems["zero_bias"].active) == 2


def test_absent_weights_are_said_in_one_sentence(report, shapeland, monkeypatch, capsys):
    def absent():
        raise FileNotFoundError("Shapeland's unet weights are not here.")

    monkeypatch.setattr(shapeland, "load_model", absent)
    assert report.main(["freecustom"]) == 1
    assert capsys.readouterr().err == "dev.py eval: Shapeland's unet weights are not here.\n"


def test_unknown_systems_are_named(report, capsys):
    with pytest.raises(SystemExit):
        report.main(["dreambooth"])
    assert "choose from composer, concept_weaver, fastcomposer, freecustom" in capsys.readouterr().err


class TestJudging:
    def test_grades_the_truth_as_right(self, host):
        from conceptloom.evaluation.judging import grade
        from conceptloom.evaluation.scenes import held_out
        from conceptloom.shapeland.judge import Reading

        picture = held_out(4)[2]
        readings = [
            Reading(
                thing.noun, 1.0, thing.identity.color, thing.identity.second, thing.identity.pattern,
                torch.zeros(14), torch.zeros(32), torch.from_numpy(mask) > 0.5,
            )
            for thing, mask in zip(picture.scene.things, picture.masks, strict=True)
        ]  # fmt: skip
        assert set(grade(picture, readings).values()) == {1.0}
        wrong = [replace(readings[0], color=(readings[0].color + 1) % 8), *readings[1:]]
        assert grade(picture, wrong)["color"] == pytest.approx(1 - 1 / len(readings))
        assert grade(picture, []) == {"found": 0.0, "prompt": 0.0}

    def test_chance_is_the_mean_of_unlike_pairs(self, host):
        from conceptloom.evaluation.judging import mean_off_diagonal

        assert mean_off_diagonal(torch.tensor([[9.0, 1.0], [3.0, 9.0]])) == 2.0
