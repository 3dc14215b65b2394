"""Concept fusion against the paper's equation written out token by token in float64."""

import pytest
import torch
from conceptloom.attention.fusion import Region, Voice, fuse
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

    def make(concepts, tokens=35, batch=2):
        query = torch.randn(batch, tokens, WIDTH, dtype=torch.float64)
        context = [
            tuple(torch.randn(1, 7 + 3 * i, WIDTH, dtype=torch.float64) for _ in "kv") for i in range(concepts + 1)
        ]
        shares = torch.rand(concepts + 1, tokens, dtype=torch.float64) ** 4
        masks = (shares / shares.sum(0))[1:]
        masks[masks < 0.05] = 0
        return query, context, masks

    return make


def voices_of(context, masks):
    made = [(Region.of(mask), *kv) for mask, kv in zip(masks, context[1:], strict=True)]
    return [Voice(region, key, value) for region, key, value in made if region is not None]


def base_of(query, context):
    return attend(query, *(x.expand(len(query), -1, -1) for x in context[0]))


@pytest.mark.parametrize("concepts", [1, 2, 3, 5])
@pytest.mark.parametrize("suppression", [-0.5, 0.0, 0.3, 1.0])
def test_fusion_is_the_papers_equation_for_any_number_of_concepts(scene, concepts, suppression):
    query, context, masks = scene(concepts)
    fused = fuse(query, base_of(query, context), voices_of(context, masks), attend, suppression)
    assert torch.allclose(fused, naive(query, context, masks, suppression), atol=1e-12)


def test_equal_concepts_over_any_partition_are_one_concept(scene):
    query, context, masks = scene(3)
    context = [context[0], context[1], context[1], context[1]]
    masks = masks / masks.sum(0).clamp(min=1e-9)
    base = base_of(query, context)
    one = fuse(query, base, [Voice(Region.of(masks.sum(0)), *context[1])], attend, 0.7)
    many = fuse(query, base, voices_of(context, masks), attend, 0.7)
    assert torch.allclose(one, many, atol=1e-12)


def test_concepts_equal_to_the_base_change_nothing_whatever_the_suppression(scene):
    query, context, masks = scene(2)
    base = base_of(query, context)
    fused = fuse(query, base, voices_of([context[0]] * 3, masks), attend, 0.9)
    assert torch.allclose(fused, base, atol=1e-12)


def test_a_concept_has_no_effect_where_its_mask_is_empty(scene):
    query, context, masks = scene(2)
    base = base_of(query, context)
    before = fuse(query, base, voices_of(context, masks), attend, 0.3)
    changed = [*context[:2], tuple(x + 1 for x in context[2])]
    after = fuse(query, base, voices_of(changed, masks), attend, 0.3)
    outside = masks[1] == 0
    assert 0 < outside.sum() < len(outside)
    assert torch.equal(before[:, outside], after[:, outside])
    assert not torch.allclose(before[:, ~outside], after[:, ~outside])


def test_mixing_before_the_output_projection_is_mixing_after_it(scene):
    query, context, masks = scene(2)
    base = base_of(query, context)
    weight, bias = torch.randn(WIDTH, WIDTH, dtype=torch.float64), torch.randn(WIDTH, dtype=torch.float64)
    projected = fuse(query, base, voices_of(context, masks), attend, 0.4) @ weight + bias
    after = fuse(
        query, base @ weight + bias, voices_of(context, masks), lambda q, k, v: attend(q, k, v) @ weight + bias, 0.4
    )
    assert torch.allclose(projected, after, atol=1e-12)


def test_the_norm_cap_bounds_what_suppression_adds(scene):
    query, context, masks = scene(2)
    base = base_of(query, context)
    voices = voices_of(context, masks)
    mixed, free, capped = (fuse(query, base, voices, attend, lam, cap) for lam, cap in ((0, 0), (3.0, 0), (3.0, 1.2)))
    lengths = [x.abs().sum(-1) for x in (mixed, free, capped)]
    assert (lengths[1] > 1.2 * lengths[0]).any()
    assert (lengths[2] <= 1.2 * lengths[0] + 1e-9).all()
    within = lengths[1] <= 1.2 * lengths[0]
    assert torch.equal(free[within], capped[within])


def test_an_empty_mask_has_no_region():
    assert Region.of(torch.zeros(4, 5)) is None
    region = Region.of(torch.eye(3))
    assert region.tokens.tolist() == [0, 4, 8]
    assert region.share.shape == (3, 1)
