"""Conditionings that carry something: through areas, parts of the schedule, interruption, and models without it."""

import pytest
import torch


@pytest.fixture(scope="module")
def toy(toy_type):
    return toy_type()


class Adding:
    """A run that adds a number to the text states, and counts."""

    def __init__(self, content, patcher, noise):
        self.content, self.calls = content, 0
        assert noise.ndim == 4 and patcher.model is not None
        content["runs"].append(self)

    def write(self, inputs, entry, x, sigma):
        import comfy.conds

        assert "cross_attn" in entry and len(sigma) == len(x)
        self.calls += 1
        states = inputs["c_crossattn"].cond + self.content["number"]
        return {**inputs, "c_crossattn": comfy.conds.CONDCrossAttn(states)}


def content(number):
    return {"number": number, "runs": []}


def carrying(conditioning, given, key="test"):
    from conceptloom.host.model.carried import carry

    return [[states, carry(extras, key, given, f"{key}: expected a prepared model")] for states, extras in conditioning]


def plus(conditioning, number):
    return [[states + number, extras] for states, extras in conditioning]


@pytest.fixture
def model(toy):
    from conceptloom.host.model.carried import prepared

    return prepared(toy.model, "test", Adding, lambda _: ())


def test_it_is_used_at_every_evaluation_and_gone_afterwards(toy, model):
    given = content(1.0)
    positive = carrying(toy.positive, given)
    found = toy.sample(model, positive=positive)
    assert torch.equal(found, toy.sample(positive=plus(toy.positive, 1.0)))
    assert [run.calls for run in given["runs"]] == [toy.steps]
    assert torch.equal(toy.sample(model), toy.sample())
    assert model.get_additional_models_with_key("test") == []


def test_what_it_needs_is_loaded_and_is_not_the_models(toy, monkeypatch):
    """ComfyUI makes a copy of what is the MODEL's for every further device, which only its own loaders can."""
    import comfy.model_management
    from conceptloom.host.model.carried import prepared
    from conceptloom.host.model.networks import in_patcher

    loaded, true = [], comfy.model_management.load_models_gpu

    def load(models, *args, **kwargs):
        loaded.append((list(models), models[0].get_additional_models()))
        return true(models, *args, **kwargs)

    monkeypatch.setattr(comfy.model_management, "load_models_gpu", load)
    network = in_patcher(torch.nn.Linear(1, 1))
    positive = carrying(toy.positive, content(1.0))
    toy.sample(prepared(toy.model, "test", Adding, lambda _: (network,)), positive=positive)
    ((models, of_the_model),) = loaded
    assert network in models and of_the_model == []
    assert "additional_models" not in positive[0][1]


def test_what_is_switched_off_is_not_made(toy, model):
    from nodes import ConditioningSetTimestepRange

    given = content(1.0)
    (early,) = ConditioningSetTimestepRange().set_range(carrying(toy.positive, given), 0.0, 0.1)
    (late,) = ConditioningSetTimestepRange().set_range(toy.positive, 0.1, 1.0)
    toy.sample(model, positive=[*early, *late])
    (run,) = given["runs"]
    assert 0 < run.calls < toy.steps


def test_each_side_has_its_own_also_in_areas(toy, model):
    area = {"area": (16, 8, 0, 0)}

    def sides(positive, negative):
        return {"positive": [[s, {**extras, **area}] for s, extras in positive], "negative": negative}

    found = toy.sample(model, **sides(carrying(toy.positive, content(1.0)), carrying(toy.negative, content(-1.0))))
    expected = toy.sample(**sides(plus(toy.positive, 1.0), plus(toy.negative, -1.0)))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
    found = toy.sample(model, **sides(carrying(toy.positive, content(1.0)), toy.negative))
    torch.testing.assert_close(found, toy.sample(**sides(plus(toy.positive, 1.0), toy.negative)), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("more", [{}, {"start_percent": 0.0}, {"area": (16, 8, 0, 0)}], ids=["plain", "part", "area"])
def test_a_model_without_it_refuses(toy, model, more):
    positive = [[states, {**extras, **more}] for states, extras in carrying(toy.positive, content(1.0))]
    with pytest.raises(ValueError, match="^test: expected a prepared model$"):
        toy.sample(positive=positive)
    both = carrying(positive, content(1.0), "other")
    with pytest.raises(ValueError, match="^other: expected a prepared model$"):
        toy.sample(model, positive=both)


def test_an_interruption_leaves_no_run(toy, model):
    import comfy.samplers

    given = content(1.0)
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(carrying(toy.positive, given), toy.negative)

    def fail(denoise, x, sigmas, extra_args, **_):
        denoise(x, torch.tensor([3.0]), **extra_args)
        raise InterruptedError

    x = torch.zeros(1, 4, 16, 16)
    with pytest.raises(InterruptedError):
        guider.sample(x, x, comfy.samplers.KSAMPLER(fail), torch.tensor([3.0, 0.0]))
    assert len(given["runs"]) == 1
    kept = [one for entries in guider.conds.values() for entry in entries for one in entry["model_conds"].values()]
    assert not any(hasattr(one, "run") for one in kept)
