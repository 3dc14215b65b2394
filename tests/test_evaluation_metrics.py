"""The report's metrics against values worked out by hand."""

import math
import random

import numpy as np
import pytest
import torch
from conceptloom.evaluation import metrics
from conceptloom.evaluation.scenes import make_case
from conceptloom.evaluation.tables import report_table, write_section
from conceptloom.shapeland.judge import Reading
from conceptloom.shapeland.world import BACKGROUND_RGB, BACKGROUNDS, Mention

STAR, FISH, MUG = 1, 4, 5
A, B = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
BETWEEN = torch.tensor([0.8, 0.6])


def reading(noun, embedding, mask=None):
    """A thing as the judge would report it."""
    mask = torch.zeros(8, 8, dtype=torch.bool) if mask is None else mask
    return Reading(noun, 1.0, 0, 1, 0, torch.zeros(14), embedding, mask)


class TestFidelity:
    two = (Mention(STAR), Mention(FISH))
    references = torch.stack([A, B])

    def test_identity_is_the_mean_over_subjects(self):
        readings = [reading(FISH, BETWEEN), reading(STAR, A)]
        assert metrics.identity(self.two, readings, self.references, 0.1) == pytest.approx((1.0 + 0.6) / 2)

    def test_the_largest_thing_of_a_noun_counts(self):
        readings = [reading(STAR, BETWEEN), reading(STAR, A)]
        assert metrics.identity(self.two[:1], readings, self.references[:1], 0.1) == pytest.approx(0.8)

    def test_a_missing_thing_counts_as_chance(self):
        readings = [reading(STAR, A), reading(MUG, B)]
        assert metrics.identity(self.two, readings, self.references, 0.1) == pytest.approx((1.0 + 0.1) / 2)
        assert metrics.leakage(self.two, readings, self.references, 0.1) == pytest.approx((0.0 + 0.1) / 2)

    def test_leakage_is_likeness_to_the_others(self):
        swapped = [reading(STAR, B), reading(FISH, A)]
        right = [reading(STAR, A), reading(FISH, BETWEEN)]
        assert metrics.leakage(self.two, swapped, self.references, 0.1) == pytest.approx(1.0)
        assert metrics.leakage(self.two, right, self.references, 0.1) == pytest.approx((0.0 + 0.8) / 2)

    def test_leakage_of_three_means_over_six_pairs(self):
        mentions = (*self.two, Mention(MUG))
        references = torch.stack([A, B, BETWEEN])
        readings = [reading(STAR, A), reading(FISH, B), reading(MUG, BETWEEN)]
        expected = (0.0 + 0.8 + 0.0 + 0.6 + 0.8 + 0.6) / 6
        assert metrics.leakage(mentions, readings, references, 0.1) == pytest.approx(expected)

    def test_the_worst_pair_counts_whatever_its_noun(self):
        swapped = [reading(STAR, B), reading(FISH, BETWEEN), reading(MUG, A)]
        assert metrics.worst(swapped, self.references) == pytest.approx(0.8)
        assert metrics.worst([reading(STAR, A)], self.references) == metrics.worst([], self.references) == 0.0

    def test_prompt_wants_every_noun_and_nothing_else(self):
        star, fish = reading(STAR, A), reading(FISH, B)
        assert metrics.prompt(self.two, [fish, star]) == 1.0
        for wrong in ([star], [star, fish, fish], [star, reading(MUG, B)], []):
            assert metrics.prompt(self.two, wrong) == 0.0


class TestBackground:
    asked, left = torch.tensor([0.0, 0.0, 0.0]), torch.tensor([1.0, 0.5, 0.0])

    @pytest.mark.parametrize(("share", "expected"), [(0.0, 0.0), (0.25, 0.25), (1.0, 1.0), (1.5, 1.0), (-0.5, 0.0)])
    def test_is_the_place_on_the_line_between_the_colors(self, share, expected):
        picture = (self.asked + share * (self.left - self.asked)).expand(8, 8, 3)
        assert metrics.background(picture, [], self.asked, self.left) == pytest.approx(expected)

    def test_colors_off_the_line_do_not_count(self):
        picture = (self.asked + torch.tensor([0.0, 0.0, 1.0])).expand(8, 8, 3)
        assert metrics.background(picture, [], self.asked, self.left) == pytest.approx(0.0)

    def test_things_and_their_edges_do_not_count(self):
        picture = torch.zeros(8, 8, 3)
        picture[:, :6] = self.left
        mask = torch.zeros(8, 8, dtype=torch.bool)
        mask[:, :4] = True  # and two columns of edge
        assert metrics.background(picture, [reading(STAR, A, mask)], self.asked, self.left) == 0.0

    def test_a_picture_full_of_things_is_looked_at_as_a_whole(self):
        mask = torch.ones(8, 8, dtype=torch.bool)
        assert metrics.background(self.left.expand(8, 8, 3), [reading(STAR, A, mask)], self.asked, self.left) == 1.0


class TestInterval:
    def test_by_hand(self):
        # Means of the cases 1, 2, 3: mean 2, standard error 1 / sqrt(3), t(0.975, 2) = 4.302653.
        values, cases = [0.5, 1.5, 2.0, 3.5, 2.5], "aabcc"
        mean, low, high, n = metrics.interval(values, cases, -10, 10)
        assert (mean, n) == (2.0, 5)
        assert (2.0 - low, high - 2.0) == pytest.approx((4.302653 / math.sqrt(3),) * 2, abs=1e-5)

    def test_ends_stay_in_range(self):
        assert metrics.interval([0.0, 1.0], [0, 1], 0, 1) == (0.5, 0.0, 1.0, 2)

    def test_one_case_says_nothing_of_the_spread(self):
        assert metrics.interval([0.4, 0.6], [0, 0], 0, 1) == (0.5, 0, 1, 2)

    def test_no_value_is_refused(self):
        with pytest.raises(ValueError, match="at least one value"):
            metrics.interval([], [], 0, 1)

    def test_covers_the_truth_95_times_in_100_although_pictures_of_a_case_are_alike(self):
        lot = random.Random(0)
        cases = [case for case in range(16) for _ in range(4)]
        hits = naive_hits = 0
        for _ in range(600):
            shift = [lot.gauss(0, 1) for _ in range(16)]
            values = [shift[case] + lot.gauss(0, 0.5) for case in cases]
            _, low, high, _ = metrics.interval(values, cases, -9, 9)
            hits += low <= 0 <= high
            _, low, high, _ = metrics.interval(values, range(64), -9, 9)
            naive_hits += low <= 0 <= high
        assert 0.93 <= hits / 600 <= 0.97
        assert naive_hits / 600 < 0.85


class TestRows:
    values = {
        "default": {"identity": [0.9, 0.8], "prompt": [1.0, 1.0]},
        "plain": {"identity": [0.2, 0.1], "prompt": [1.0, 0.0]},
    }

    def test_have_the_documented_form_and_paired_leads(self):
        rows = metrics.report_rows("freecustom", 2, self.values, [0, 1], ["plain"])
        assert all(
            set(row.as_json()) == {"system", "variant", "subjects", "metric", "mean", "low", "high", "n"}
            for row in rows
        )
        means = {(row.variant, row.metric): row.mean for row in rows}
        assert means == pytest.approx(
            {
                ("default", "identity"): 0.85,
                ("default", "prompt"): 1.0,
                ("plain", "identity"): 0.15,
                ("plain", "identity_lead"): 0.7,
                ("plain", "prompt"): 0.5,
                ("plain", "prompt_lead"): 0.5,
            }
        )
        # Both pictures lead by the same amount, so the pairing leaves no doubt although the values spread.
        lead = next(row for row in rows if row.metric == "identity_lead")
        assert (lead.low, lead.high) == pytest.approx((0.7, 0.7))

    def test_the_table_marks_what_differs_from_the_default(self):
        table = report_table(metrics.report_rows("freecustom", 2, self.values, [0, 1], ["plain"]))
        header, _, default, plain = table.splitlines()
        assert header.split() == ["|", "subjects", "|", "variant", "|", "identity", "|", "prompt", "|", "pictures", "|"]
        assert "0.150*" in plain and "0.500 " in plain and "*" not in default
        assert len({len(line) for line in table.splitlines()}) == 1


def test_sections_are_replaced_and_the_others_kept(tmp_path):
    page = tmp_path / "docs" / "page.md"
    write_section(page, "# Page", "one", "first")
    write_section(page, "# Page", "two", "second")
    write_section(page, "# Page", "one", "changed\n\n| a |")
    assert page.read_text() == "# Page\n\n## one\n\nchanged\n\n| a |\n\n## two\n\nsecond\n"


class TestCases:
    @pytest.mark.parametrize("subjects", [1, 2, 3])
    def test_ask_for_the_nouns_of_their_references_on_another_background(self, subjects):
        for index in range(8):
            case = make_case(subjects, index)
            nouns = [r.noun for r in case.references]
            assert len(set(nouns)) == len(case.mentions) == subjects
            new = BACKGROUNDS[case.background]
            assert case.prompt == " and ".join(f"a {noun}" for noun in nouns) + f" on a {new} background"
            assert all(r.noun in r.prompt and f"on a {new}" not in r.prompt for r in case.references)
            assert torch.allclose(case.asked, torch.tensor(BACKGROUND_RGB[new]))
            assert not torch.allclose(case.asked, case.left, atol=0.1)

    def test_are_fixed(self):
        one, same, other = make_case(2, 3), make_case(2, 3), make_case(2, 4)
        assert all(torch.equal(a.image, b.image) for a, b in zip(one.references, same.references, strict=True))
        assert one.seed == same.seed != other.seed

    def test_references_carry_their_identity_and_exact_mask(self):
        for reference in make_case(3, 0).references:
            inside = reference.mask > 0.99
            colors = reference.image[inside]
            main = torch.tensor(reference.identity.rgb)
            assert inside.sum() > 100
            assert ((colors - main).abs().amax(1) < 0.02).float().mean() > 0.3

    def test_draws_what_was_asked_with_and_without_the_identities(self):
        case = make_case(1, 0)
        identity = case.references[0].identity
        truth, other = case.draw(2, [identity]), case.draw(2, None)
        near = [
            float(((p - torch.tensor(identity.rgb)).abs().amax(-1) < 0.05).float().mean()) for p in (*truth, *other)
        ]
        assert min(near[:2]) > 0.02 > max(near[2:])
        corner = truth[0, :2, :2].mean((0, 1)).numpy()
        assert np.abs(corner - case.asked.numpy()).max() < 0.08
