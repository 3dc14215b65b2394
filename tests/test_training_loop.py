"""An interrupted run and an uninterrupted one are the same run."""

import numpy as np
import pytest
import torch
from conceptloom.training.loop import Lanes, MuonAdamW, Run, orthogonalize, replica, warmup_cosine


def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.SiLU(), torch.nn.Conv2d(8, 8, 3), torch.nn.Flatten())


def train(folder, steps, optimizer):
    net = model()
    chosen = MuonAdamW(net, 0.01, ("0.",)) if optimizer == "muon" else None
    run = Run(folder, net, warmup_cosine(1e-2, 3, 12), steps, seed=4, average=0.9, optimizer=chosen)

    def loss_of(step, generator):
        x = torch.randn(2, 3, 8, 8, generator=generator)
        return {"error": (net(x) - step / 10).square().mean()}

    run.train(loss_of, every=4)
    return run


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_resumed_run_is_bit_identical(tmp_path, optimizer):
    whole = train(tmp_path / "whole", 12, optimizer)
    train(tmp_path / "parts", 5, optimizer)
    resumed = train(tmp_path / "parts", 12, optimizer)
    for a, b in zip(whole.model.state_dict().values(), resumed.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(whole.best_state().values(), resumed.best_state().values(), strict=True):
        assert torch.equal(a, b)


def test_lanes_take_the_gradient_of_the_whole_batch_and_resume_exactly(tmp_path):
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))

    def lane(net, rows):
        return lambda step, generator: {"error": (net(x[rows]) - step / 10).square().mean()}

    def run_to(folder, steps, lanes):
        net = model()
        rows = [slice(part, None, lanes) for part in range(lanes)]
        run = Run(folder, net, lambda step: 1e-2, steps, average=0.9)
        run.train(Lanes([lane(replica(net), some) for some in rows]), every=2)
        return run.model.state_dict().values()

    alone, together = run_to(tmp_path / "one", 6, 1), run_to(tmp_path / "two", 6, 2)
    run_to(tmp_path / "parts", 4, 2)
    resumed = run_to(tmp_path / "parts", 6, 2)
    for a, b, c in zip(alone, together, resumed, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
        assert torch.equal(b, c)


def test_a_run_stops_when_its_time_is_over_and_keeps_what_it_has(tmp_path):
    net = model()
    run = Run(tmp_path, net, lambda step: 1e-2, 1000)
    run.train(lambda step, generator: {"error": net(torch.ones(1, 3, 8, 8)).square().mean()}, every=2, seconds=0.2)
    assert 0 < run.step < 1000
    assert Run(tmp_path, model(), lambda step: 1e-2, 1000).step == run.step


def test_steps_on_the_gram_matrix_are_muon_s_own():
    matrices = torch.randn(3, 8, 20, generator=torch.Generator().manual_seed(0))
    # The iteration as published, in float64, one matrix at a time.
    for given, got in zip(matrices, orthogonalize(matrices), strict=True):
        x = given.double() / given.double().norm()
        for _ in range(5):
            square = x @ x.T
            x = 3.4445 * x - 4.7750 * square @ x + 2.0315 * square @ square @ x
        torch.testing.assert_close(got.double(), x, rtol=1e-4, atol=1e-5)


def test_muon_moves_kernels_by_updates_of_one_size():
    net = model()
    optimizer = MuonAdamW(net, 0.0, ("0.",))
    optimizer.param_groups[0]["lr"] = 0.1
    before = [p.detach().clone() for p in net.parameters()]
    net(torch.randn(2, 3, 8, 8)).square().sum().backward()
    optimizer.step()
    update = (net[2].weight - before[2]).view(8, -1)
    # Orthogonalised: all directions of the kernel move alike, whatever the gradient's size.
    spread = torch.linalg.svdvals(update.detach())
    assert spread.max() / spread.min() < 2
    assert all(not torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))


def test_learning_rate_rises_and_falls():
    rate = warmup_cosine(1.0, 10, 110, floor=0.1)
    assert rate(0) == pytest.approx(0.1)
    assert rate(10) == pytest.approx(1.0)
    assert rate(60) == pytest.approx(0.55)
    assert rate(110) == pytest.approx(0.1)


def test_every_picture_is_seen_once_an_epoch():
    from conceptloom.training.shapeland.common import rows_of

    seen = np.concatenate([rows_of(step, 7, 20) for step in range(20)])
    for epoch in seen.reshape(7, 20):
        assert sorted(epoch) == list(range(20))
    assert not np.array_equal(seen[:20], seen[20:40])
