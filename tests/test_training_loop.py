"""An interrupted run and an uninterrupted one are the same run."""

import signal
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conceptloom.training.loop import Lanes, Run, replica
from conceptloom.training.optimizers import MuonAdamW, adamw, orthogonalize, warmup, warmup_cosine
from conceptloom.training.signals import Stopped, stop_requests


def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.SiLU(), torch.nn.Conv2d(8, 8, 3), torch.nn.Flatten())


def train(folder, steps, optimizer):
    net = model()
    chosen = MuonAdamW(net, 1e-2, 0.01, ("0.",)) if optimizer == "muon" else adamw(net, 1e-2)
    run = Run(folder, net, chosen, steps, seed=4, schedule=warmup_cosine(3, 12), average=0.9)

    def loss_of(step, generator):
        x = torch.randn(2, 3, 8, 8, generator=generator)
        return {"error": (net(x) - step / 10).square().mean()}

    run.train(loss_of, log_every=4)
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
        run = Run(folder, net, adamw(net, 1e-2), steps, average=0.9)
        run.train(Lanes([lane(replica(net), some) for some in rows]), log_every=2)
        return run.model.state_dict().values()

    alone, together = run_to(tmp_path / "one", 6, 1), run_to(tmp_path / "two", 6, 2)
    run_to(tmp_path / "parts", 4, 2)
    resumed = run_to(tmp_path / "parts", 6, 2)
    for a, b, c in zip(alone, together, resumed, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
        assert torch.equal(b, c)


def test_a_checkpoint_holds_what_is_trained_and_buffers(tmp_path):
    """Of what training leaves as it is, which may be a large base model, nothing."""
    net = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 1))
    net[0].requires_grad_(False)
    run = Run(tmp_path, net, adamw(net, 1e-2), 2, average=0.5, kind={"rank": 4})
    run.train(lambda step, generator: {"error": net(torch.randn(5, 3, generator=generator)).square().mean()}, 1)
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert saved.keys() == {"model", "optimizer", "averaged", "step", "kind"}
    assert saved["step"] == 2 and saved["kind"] == {"rank": 4}
    trained = ["1.weight", "1.bias", "2.weight", "2.bias"]
    buffers = ["1.running_mean", "1.running_var", "1.num_batches_tracked"]
    assert sorted(saved["model"]) == sorted(trained + buffers) and list(saved["averaged"]) == trained
    assert run.best_state().keys() == net.state_dict().keys()
    again = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 1))
    again.load_state_dict(net[0].state_dict(prefix="0."), strict=False)
    again[0].requires_grad_(False)
    Run(tmp_path, again, adamw(again, 1e-2), 2, average=0.5, kind={"rank": 4})
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), again.state_dict().values(), strict=True))


def constant(net):
    return lambda step, generator: {"error": net(torch.ones(1, 3, 8, 8)).square().mean()}


@pytest.mark.parametrize("other", [torch.nn.Conv2d(3, 8, 3), torch.nn.Sequential(*model(), torch.nn.LayerNorm(128))])
def test_another_models_checkpoint_is_refused(tmp_path, other):
    net = model()
    Run(tmp_path, net, adamw(net, 1e-2), 1).train(constant(net), 1)
    with pytest.raises(ValueError, match="--out: expected a new folder, or one of a run that trains the same, got"):
        Run(tmp_path, other, adamw(other, 1e-2), 1)


def test_a_run_of_another_kind_and_a_torn_checkpoint_are_refused(tmp_path):
    net = model()
    Run(tmp_path, net, adamw(net, 1e-2), 1, kind={"rank": 4}).train(constant(net), 1)
    with pytest.raises(ValueError, match="--out: expected a new folder, or one of a run with rank 8, got .* with 4"):
        Run(tmp_path, net, adamw(net, 1e-2), 1, kind={"rank": 8})
    (tmp_path / "checkpoint.pt").write_bytes(b"")
    with pytest.raises(ValueError, match="--out: expected a file of weights, got checkpoint.pt, .* empty"):
        Run(tmp_path, net, adamw(net, 1e-2), 1, kind={"rank": 4})


def test_groups_keep_their_learning_rates_under_one_schedule_also_when_continued(tmp_path):
    def told(steps):
        net, seen = model(), []
        groups = [{"params": net[0].parameters(), "lr": 0.5}, {"params": net[2].parameters(), "lr": 0.25}]
        optimizer = torch.optim.SGD(groups)
        run = Run(tmp_path, net, optimizer, steps, schedule=lambda step: 1 / (1 + step))
        run.train(constant(net), 1, after=lambda *_: seen.append([g["lr"] for g in optimizer.param_groups]))
        return seen

    assert told(2) == [[0.5, 0.25], [0.25, 0.125]]
    assert told(4) == [[0.5 / 3, 0.25 / 3], [0.125, 0.0625]]


def test_averages_that_begin_late_begin_with_the_weights_so_far(tmp_path):
    net = model()
    Run(tmp_path, net, adamw(net, 1e-2), 1).train(constant(net), 1)
    again = model()
    averaged = Run(tmp_path, again, adamw(again, 1e-2), 1, average=0.9).averaged
    assert all(torch.equal(averaged[name], p) for name, p in net.named_parameters())


def test_a_report_sees_averaged_weights_and_leaves_the_current_ones(tmp_path):
    net, seen = model(), []
    run = Run(tmp_path, net, adamw(net, 1e-2), 3, average=0.9)

    def report(step):
        assert not torch.is_grad_enabled()
        seen.append({name: p.clone() for name, p in net.named_parameters()})
        return {"half": step / 2}

    current = []
    run.train(
        constant(net), 1, report=report, report_every=3, after=lambda *_: current.append(net[0].weight.detach().clone())
    )
    (averaged,) = seen
    assert all(torch.equal(averaged[name], run.averaged[name]) for name in averaged)
    assert torch.equal(net[0].weight, current[-1]) and not torch.equal(net[0].weight, averaged["0.weight"])
    assert (tmp_path / "report.csv").read_text().splitlines() == ["step,half", "3,1.5"]


def test_a_loader_is_asked_for_the_steps_that_are_left(tmp_path):
    def told(steps):
        net, seen = model(), []

        def losses(batch, _generator):
            seen.append(batch)
            return {"error": net(torch.ones(1, 3, 8, 8)).square().mean()}

        Run(tmp_path, net, adamw(net, 1e-2), steps).train(losses, 1, lambda first: (f"b{i}" for i in range(first, 9)))
        return seen

    assert told(2) == ["b0", "b1"] and told(4) == ["b2", "b3"]


def test_a_log_keeps_the_columns_it_began_with(tmp_path):
    net = model()
    Run(tmp_path, net, adamw(net, 1e-2), 1).train(constant(net), 1)
    table = tmp_path / "log.csv"
    names = table.read_text().splitlines()[0].split(",")
    assert names == ["step", "loss", "error", "gradient_norm", "learning_rate", "seconds"]
    table.write_text("step,error,lost\n1,0.5,2\n7,0.5,2\n")
    Run(tmp_path, net, adamw(net, 1e-2), 2).train(constant(net), 1)
    head, first, second = table.read_text().splitlines()
    assert (head, first) == ("step,error,lost", "1,0.5,2")
    assert second.startswith("2,") and second.endswith(",") and float(second.split(",")[1]) > 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_request_waits_for_the_end_of_the_step(tmp_path, number):
    net = model()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def losses(step, generator):
        if step == 1:
            signal.raise_signal(number)
        return constant(net)(step, generator)

    try:
        with pytest.raises(Stopped, match="stopped after step 2 of 5; the same command continues"):
            Run(tmp_path, net, adamw(net, 1e-2), 5).train(losses, 1)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert Run(tmp_path, net, adamw(net, 1e-2), 5).step == 2
        # The second request does not wait.
        if number == signal.SIGINT:
            with pytest.raises(KeyboardInterrupt), stop_requests():
                signal.raise_signal(number)
                signal.raise_signal(number)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with stop_requests() as asked:
            signal.raise_signal(signal.SIGINT)
        assert not asked
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_run_in_another_thread_leaves_signals_alone(tmp_path):
    net = model()
    with ThreadPoolExecutor(1) as threads:
        threads.submit(Run(tmp_path, net, adamw(net, 1e-2), 1).train, constant(net), 1).result()
    assert (tmp_path / "checkpoint.pt").exists()


def test_a_run_stops_when_its_time_is_over_and_keeps_what_it_has(tmp_path):
    net, again = model(), model()
    run = Run(tmp_path, net, adamw(net, 1e-2), 1000)
    run.train(lambda step, generator: {"error": net(torch.ones(1, 3, 8, 8)).square().mean()}, log_every=2, seconds=0.2)
    assert 0 < run.step < 1000
    assert Run(tmp_path, again, adamw(again, 1e-2), 1000).step == run.step


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
    optimizer = MuonAdamW(net, 0.1, 0.0, ("0.",))
    before = [p.detach().clone() for p in net.parameters()]
    net(torch.randn(2, 3, 8, 8)).square().sum().backward()
    optimizer.step()
    update = (net[2].weight - before[2]).view(8, -1)
    # Orthogonalised: all directions of the kernel move alike, whatever the gradient's size.
    spread = torch.linalg.svdvals(update.detach())
    assert spread.max() / spread.min() < 2
    assert all(not torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))


def test_learning_rate_rises_and_falls():
    factor = warmup_cosine(10, 110, floor=0.1)
    assert factor(0) == pytest.approx(0.1)
    assert factor(10) == pytest.approx(1.0)
    assert factor(60) == pytest.approx(0.55)
    assert factor(110) == pytest.approx(0.1)
    assert [warmup(4)(step) for step in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert warmup(0)(0) == 1


def test_every_picture_is_seen_once_an_epoch():
    from conceptloom.training.shapeland.common import step_rows

    seen = np.concatenate([step_rows(step, 7, 20) for step in range(20)])
    for epoch in seen.reshape(7, 20):
        assert sorted(epoch) == list(range(20))
    assert not np.array_equal(seen[:20], seen[20:40])
