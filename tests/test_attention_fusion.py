"""Concept fusion against the paper's equation written out token by token in float64."""

import pytest
import torch
from conceptloom.attention.fusion import fuse, group_concepts
from torch.nn.functional import scaled_dot_product_attention

HEADS, WIDTH = 2, 8


def attend(query, key, value):
    split = (x.unflatten(-1, (HEADS, -1)).transpose(1, 2) for x in (query, key, value))
    return scaled_dot_product_attention(*split).transpose(1, 2).flatten(2)


def naive(query, context, masks, suppression):
    """h_fuse at every token, from full attentions; `context` are (key, value) of the base and then of all masks."""
    answers = torch.stack(
        [attend(query, k.expand(len(query), -1, -1), v.expand(len(query), -1, -1)) for k, v in context]
    )
    out = torch.zeros_like(query)
    for b in range(query.shape[0]):
        for token in range(query.shape[1]):
            mixed = sum(masks[i, token] * answers[i + 1, b, token] for i in range(len(masks)))
            mixed = mixed + (1 - masks[:, token].sum()) * answers[0, b, token]
            out[b, token] = (1 + suppression) * mixed - suppression * answers[0, b, token]
    return out


@pytest.fixture
def scene():
    torch.manual_seed(0)

    def make(concepts, tokens=35, batch=2, longer=3):
        query = torch.randn(batch, tokens, WIDTH, dtype=torch.float64)
        context = [
            tuple(torch.randn(1, 7 + longer * i, WIDTH, dtype=torch.float64) for _ in "kv") for i in range(concepts + 1)
        ]
        shares = torch.rand(concepts + 1, tokens, dtype=torch.float64) ** 4
        masks = (shares / shares.sum(0))[1:]
        masks[masks < 0.05] = 0
        return query, context, masks

    return make


def base_of(query, context):
    return attend(query, *(x.expand(len(query), -1, -1) for x in context[0]))


@pytest.mark.parametrize("concepts", [1, 2, 3, 5])
@pytest.mark.parametrize("suppression", [-0.5, 0.0, 0.3, 1.0])
@pytest.mark.parametrize("longer", [0, 3])
def test_fusion_is_the_papers_equation_for_any_number_of_concepts(scene, concepts, suppression, longer):
    query, context, masks = scene(concepts, longer=longer)
    fused = fuse(query, base_of(query, context), group_concepts(masks, context[1:]), attend, suppression)
    assert torch.allclose(fused, naive(query, context, masks, suppression), atol=1e-12)


def test_equal_concepts_over_any_partition_are_one_concept(scene):
    query, context, masks = scene(3)
    context = [context[0], context[1], context[1], context[1]]
    masks = masks / masks.sum(0).clamp(min=1e-9)
    base = base_of(query, context)
    one = fuse(query, base, group_concepts(masks.sum(0, keepdim=True), context[1:2]), attend, 0.7)
    many = fuse(query, base, group_concepts(masks, context[1:]), attend, 0.7)
    assert torch.allclose(one, many, atol=1e-12)


def test_concepts_equal_to_the_base_change_nothing_whatever_the_suppression(scene):
    query, context, masks = scene(2)
    base = base_of(query, context)
    fused = fuse(query, base, group_concepts(masks, [context[0]] * 2), attend, 0.9)
    assert torch.allclose(fused, base, atol=1e-12)


def test_a_concept_has_no_effect_where_its_mask_is_empty(scene):
    query, context, masks = scene(2)
    base = base_of(query, context)
    before = fuse(query, base, group_concepts(masks, context[1:]), attend, 0.3)
    changed = [*context[:2], tuple(x + 1 for x in context[2])]
    after = fuse(query, base, group_concepts(masks, changed[1:]), attend, 0.3)
    outside = masks[1] == 0
    assert 0 < outside.sum() < len(outside)
    assert torch.equal(before[:, outside], after[:, outside])
    assert not torch.allclose(before[:, ~outside], after[:, ~outside])


def test_mixing_before_the_output_projection_is_mixing_after_it(scene):
    query, context, masks = scene(2)
    base = base_of(query, context)
    weight, bias = torch.randn(WIDTH, WIDTH, dtype=torch.float64), torch.randn(WIDTH, dtype=torch.float64)
    projected = fuse(query, base, group_concepts(masks, context[1:]), attend, 0.4) @ weight + bias
    groups = group_concepts(masks, context[1:])
    after = fuse(query, base @ weight + bias, groups, lambda q, k, v: attend(q, k, v) @ weight + bias, 0.4)
    assert torch.allclose(projected, after, atol=1e-12)


def test_the_norm_cap_bounds_what_suppression_adds(scene):
    query, context, masks = scene(2)
    base = base_of(query, context)
    groups = group_concepts(masks, context[1:])
    mixed, free, capped = (fuse(query, base, groups, attend, lam, cap) for lam, cap in ((0, 0), (3.0, 0), (3.0, 1.2)))
    lengths = [x.abs().sum(-1) for x in (mixed, free, capped)]
    assert (lengths[1] > 1.2 * lengths[0]).any()
    assert (lengths[2] <= 1.2 * lengths[0] + 1e-9).all()
    within = lengths[1] <= 1.2 * lengths[0]
    assert torch.equal(free[within], capped[within])


def test_the_norm_cap_measures_wide_tokens_of_half_precision():
    """1280 numbers of 100 add up to more than half precision holds."""
    base, key = torch.full((1, 4, 1280), 100.0).half(), torch.zeros(1, 2, 1280).half()
    groups = group_concepts(torch.ones(1, 4).half(), [(key, key)])
    capped = fuse(base, base, groups, lambda q, k, v: q * 0.5, 3.0, 1.2)
    assert torch.allclose(capped.float(), torch.full_like(base, -60.0).float(), rtol=1e-3)


def test_concepts_answer_together_where_prompts_are_as_long_and_regions_about_as_large():
    """Equal in length are 0, 1, 2 and 4; of these 0 and 1 have 4 and 6 tokens, 2 has 9, and 4 has none."""
    masks = torch.zeros(5, 4, 5)
    for mask, count in zip(masks, (4, 6, 9, 5, 0), strict=True):
        mask.view(-1)[20 - count :] = 0.2
    keys_values = [(torch.randn(1, 9 if i == 3 else 7, 8), torch.randn(1, 9 if i == 3 else 7, 8)) for i in range(5)]
    found = group_concepts(masks, keys_values)
    assert [len(groups.tokens) for groups in found] == [2, 1, 1]
    assert [groups.concepts for groups in found] == [(0, 1), (2,), (3,)]
    first = found[0]
    assert first.tokens.tolist() == [[16, 17, 18, 19, 0, 0], [14, 15, 16, 17, 18, 19]]
    assert first.share[..., 0].count_nonzero(1).tolist() == [4, 6]
    assert torch.equal(first.key, torch.cat([keys_values[0][0], keys_values[1][0]]))
    assert torch.equal(found[2].value, keys_values[3][1])
