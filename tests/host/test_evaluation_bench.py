"""The benchmark on the tiny architecture: its rows, and what it counts."""

import json
import logging
import mmap
import time
from dataclasses import replace

import pytest
import torch

ROW = {"system", "variant", "arch", "subjects", "ratio", "seconds", "peak_mib", "unet_evaluations", "gpu_ratio"}


@pytest.fixture
def quick(host, monkeypatch, tmp_path):
    """The benchmark with one reference, two steps, one round, and memory measured in this process."""
    from conceptloom.evaluation import bench, memory, rigs
    from conceptloom.evaluation.benches import freecustom

    plan = replace(rigs.PLANS["tiny", "cpu"], steps=1, rounds=1)
    monkeypatch.setitem(rigs.PLANS, ("tiny", "cpu"), plan)
    monkeypatch.setattr(freecustom, "SUBJECTS", (1,))
    monkeypatch.setattr(bench, "peak_memory", lambda system, session, arch, device: memory.growth(session))
    monkeypatch.setattr(bench, "DOCUMENT", tmp_path / "bench.md")
    return bench


def test_rows_and_document(quick, tmp_path, capsys):
    file = tmp_path / "rows.json"
    assert quick.main(["freecustom", "--device", "cpu", "--json", str(file), "--docs"]) == 0
    assert logging.getLogger("conceptloom").level == logging.NOTSET, "the log stays silent afterwards"
    rows = json.loads(file.read_text())
    assert all(set(row) == ROW for row in rows)
    assert [(r["system"], r["variant"], r["subjects"]) for r in rows] == [
        ("host", "plain", 0),
        ("freecustom", "default", 1),
        ("freecustom", "banked", 1),
    ]
    plain, first, banked = rows
    # A step of cond and uncond; the reference's row stops after the last layer in use.
    assert plain["unet_evaluations"] == banked["unet_evaluations"] == 2.0
    assert 2.75 < first["unet_evaluations"] < 3.0
    assert plain["ratio"] == 1.0 and all(row["ratio"] > 0 and row["seconds"] > 0 for row in rows)
    page = (tmp_path / "bench.md").read_text()
    assert "## tiny on cpu, freecustom\n" in page and "| 1.55 " in page and "| 1.10 " in page
    assert page.count("| freecustom") == capsys.readouterr().out.count("| freecustom") == 2


def test_fusion_sampling_is_measured_with_words_made_in_each_step_and_once(quick, monkeypatch):
    from conceptloom.evaluation import rigs
    from conceptloom.evaluation.benches import profusion
    from conceptloom.host.profusion.promptnet import PromptNet

    calls, forward = [], PromptNet.forward
    monkeypatch.setattr(PromptNet, "forward", lambda net, *given: (calls.append(1), forward(net, *given))[1])
    with torch.inference_mode():
        session = profusion.sessions(rigs.Rig.build(replace(rigs.PLANS["tiny", "cpu"], steps=2)))[0]
        counted = {}
        for name, sample in session.begin().items():
            if name.startswith("words"):
                calls.clear()
                assert sample().isfinite().all()
                counted[name] = len(calls)
    assert counted == {"words": 2, "words_once": 1}


def test_memory_is_measured_in_a_process_of_its_own(host):
    from conceptloom.evaluation import bench
    from conceptloom.evaluation.benches import Session

    peaks = bench.peak_memory(bench.HOST, Session(0, dict), "tiny", torch.device("cpu"))
    assert list(peaks) == ["plain"]
    # What a sampling takes above the model, whose 13 million weights alone are 50 MiB; measured 32 to 40.
    assert 10 < peaks["plain"] < 80


def test_over_budget_is_marked(host):
    from conceptloom.evaluation.bench import Cost, cost_table

    rows = [Cost("freecustom", v, "tiny", 1, 1.3, 1.0, 5.0, 4.0) for v in ("default", "banked")]
    table = cost_table(rows, {("freecustom", "default", 1): 1.55, ("freecustom", "banked", 1): 1.1})
    default, banked = table.splitlines()[2:]
    assert "1.30 " in default and "over" not in default
    assert "1.30 over" in banked
    rows = [Cost("freecustom", "default", "tiny", 1, ratio, 1.0, 5.0, 4.0) for ratio in (1.5549, 1.5551)]
    at, above = cost_table(rows, {("freecustom", "default", 1): 1.55}).splitlines()[2:]
    assert "GPU ratio" not in cost_table(rows, {})
    assert "1.55 " in at and "over" not in at and "1.56 over" in above


def test_the_gpu_s_own_ratio_is_beside_that_of_the_clock(host):
    from conceptloom.evaluation.bench import HOST, Cost, cost_table

    rows = [Cost(HOST, "plain", "sd15", 0, 1.0, 1.0, 5.0, 4.0)]
    rows.append(Cost("freecustom", "default", "sd15", 1, 2.0, 1.0, 5.0, 6.0, 1.48))
    header, _, plain, freecustom = (
        [cell.strip() for cell in line.split("|")] for line in cost_table(rows, {}).splitlines()
    )
    column = header.index("GPU ratio")
    assert plain[column] == "1.00" and freecustom[column] == "1.48" and freecustom[header.index("ratio")] == "2.00"


@pytest.mark.parametrize("arch", ["tiny", "sd15", "sdxl"])
def test_architectures_are_the_true_ones(host, arch):
    """Layers and widths as the papers count them, without building the large ones' weights."""
    from conceptloom.evaluation.rigs import PLANS
    from conceptloom.host.model.families.unet import UNetFamily
    from conceptloom.host.model.sites import LAST_TWO_STAGES, choose_self_attention

    config = PLANS[arch, "cuda"].config()
    config.set_inference_dtype(torch.float16, None)
    with torch.device("meta"):
        unet = config.get_model({}, device=torch.device("meta")).diffusion_model
    sites = UNetFamily().sites(unet)
    counts = {"tiny": 16, "sd15": 16, "sdxl": 70}
    assert sum(site.kind == "self" for site in sites) == counts[arch]
    chosen = [site.index for site in choose_self_attention(sites, LAST_TWO_STAGES)]
    assert chosen == {"tiny": [*range(10, 16)], "sd15": [*range(10, 16)], "sdxl": [*range(34, 70)]}[arch]
    millions = sum(p.numel() for p in unet.parameters()) / 1e6
    assert round(millions) == {"tiny": 13, "sd15": 860, "sdxl": 2567}[arch]


class TestCalls:
    def test_whole_calls_count_rows_and_ended_ones_their_part(self):
        from conceptloom.evaluation.meters import counted_calls

        class Model(torch.nn.Sequential):
            def forward(self, x, stop=False):
                x = self[0](x)
                if stop:
                    raise StopIteration
                return self[1](x)

        model = Model(torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 4, bias=False))
        with counted_calls(model) as counted:
            model(torch.ones(2, 4))
            with pytest.raises(StopIteration):
                model(torch.ones(3, 4), stop=True)
            model(torch.ones(2, 4))
        per_row = counted.flops_per_row()
        assert per_row == 2 * (4 * 4 * 2)
        assert [call.rows for call in counted.calls] == [2, 3, 2]
        assert counted.evaluations(per_row) == 2 + 3 / 2 + 2

    def test_the_model_is_left_as_it_was(self):
        from conceptloom.evaluation.meters import counted_calls

        model = torch.nn.Linear(2, 2)
        with counted_calls(model):
            pass
        assert not model._forward_hooks and not model._forward_pre_hooks


def test_resident_peak_sees_passing_memory():
    from conceptloom.evaluation.meters import ResidentPeak

    before = ResidentPeak().resident()
    # Fresh pages, for a tensor may be given memory that an earlier test left resident.
    with ResidentPeak() as watch, mmap.mmap(-1, 64 * 2**20) as passing:
        passing.write(b"1" * len(passing))
        deadline = time.monotonic() + 10  # a busy machine lets the watch wait
        while watch.peak - before <= 48 * 2**20 and time.monotonic() < deadline:
            time.sleep(0.05)
    assert 48 * 2**20 < watch.peak - before < 400 * 2**20


def test_facts_of_a_concept_are_its_true_sizes(host, monkeypatch):
    """A tiny model's layers counted by hand: keys and values of all cross-attentions."""
    import re

    from conceptloom.evaluation.benches import concept_weaver
    from conceptloom.evaluation.rigs import PLANS, Rig

    monkeypatch.setattr(concept_weaver, "BANK", 2)
    with torch.inference_mode():
        rig = Rig.build(PLANS["tiny", "cpu"])
        said = concept_weaver.facts(rig)
    state = rig.model.model.diffusion_model.state_dict()
    shapes = [w.shape for name, w in state.items() if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))]
    on_disk, spoken = (float(number) for number in re.findall(r"([\d.]+) MiB", said[0]))
    factors = sum((rows + columns) * concept_weaver.RANK * 2 for rows, columns in shapes) / 2**20
    assert on_disk == pytest.approx(factors, rel=0.05)
    assert spoken == pytest.approx(sum(rows for rows, _ in shapes) * 77 * 4 / 2**20, abs=0.006)
    assert said[1].startswith("A bank of 2 such concepts is read in ")
