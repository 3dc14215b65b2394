"""Reports keep what they have drawn."""

import pytest
import torch
from conceptloom.evaluation import kept
from conceptloom.evaluation.kept import Kept, weights_sum


def test_pictures_are_drawn_once_and_are_the_same_again(tmp_path):
    calls = []

    def draw():
        calls.append(1)
        # As a decoder gives them, with the channels first in memory.
        pictures = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(len(calls))).movedim(1, -1)
        return {"plain": pictures, "default": pictures, "other": 1 - pictures}

    first = Kept(tmp_path).drawn("case", draw)
    again = Kept(tmp_path).drawn("case", draw)
    assert len(calls) == 1 and list(first) == list(again) == ["plain", "default", "other"]
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert (
        first["plain"] - torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(1)).movedim(1, -1)
    ).abs().max() < 1e-3
    Kept(tmp_path).drawn("another", draw)
    Kept().drawn("case", draw)
    assert len(calls) == 3


def test_pictures_of_other_weights_are_refused(tmp_path, monkeypatch):
    Kept(tmp_path / "run")
    monkeypatch.setattr(kept, "weights_sum", lambda: "others")
    with pytest.raises(ValueError, match="--keep: expected a new folder, or one of the same weights, got .*run"):
        Kept(tmp_path / "run")


def test_any_weight_changes_the_sum(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"1")
    one = weights_sum(tmp_path)
    assert weights_sum(tmp_path) == one
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "c.safetensors").write_bytes(b"2")
    two = weights_sum(tmp_path)
    (tmp_path / "b" / "c.safetensors").rename(tmp_path / "b" / "d.safetensors")
    assert len({one, two, weights_sum(tmp_path)}) == 3
