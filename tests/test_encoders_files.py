"""Files of weights: whole ones are read whatever their ending, and all others say what they seem to be."""

import io
import pickle
import zipfile

import pytest
import torch
from conceptloom.encoders.files import SAFETENSORS, TORCH, check, check_folder, read, read_state
from safetensors.torch import save as safetensors_bytes

TENSORS = {"a": torch.arange(600.0).reshape(20, 30), "b": torch.zeros(3)}


class Gadget:
    """Something that a pickle would have to run code for."""


def torch_bytes(content, old=False):
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=not old)
    return file.getvalue()


def zip_bytes(*names):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in names:
            archive.writestr(name, "x")
    return file.getvalue()


WHOLE = {
    "safetensors": (safetensors_bytes(TENSORS, {"format": "pt"}), SAFETENSORS),
    "torch": (torch_bytes(TENSORS), TORCH),
    "old torch": (torch_bytes(TENSORS, old=True), TORCH),
}


@pytest.mark.parametrize("ending", ["safetensors", "bin", "pt"])
@pytest.mark.parametrize("kind", WHOLE)
def test_whole_files_are_read_whatever_their_ending(kind, ending, tmp_path):
    content, wanted = WHOLE[kind]
    path = tmp_path / f"dog.{ending}"
    path.write_bytes(content)
    assert check(path) == wanted
    found, metadata = read(path)
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items()) and len(found) == 2
    assert metadata == ({"format": "pt"} if wanted == SAFETENSORS else {})
    assert read_state(path).keys() == TENSORS.keys()


def test_the_size_of_a_header_is_no_sign_of_another_format(tmp_path):
    """Safetensors begin with the size of their header, whose bytes may be those of a zip archive or a pickle."""
    for start in (0x80, int.from_bytes(b"PK", "little"), int.from_bytes(b"\x1f\x8b", "little")):
        header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'.ljust(start)
        path = tmp_path / "dog.safetensors"
        path.write_bytes(start.to_bytes(8, "little") + header + torch.ones(1).numpy().tobytes())
        assert torch.equal(read(path).value["a"], torch.ones(1))


CUT = "a damaged file of torch, or a part of one: fetch it again"
CODE = "which could run code: get the weights as safetensors"
BROKEN = {
    "pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n",
        "a git-lfs pointer: fetch the file itself (git lfs pull)",
    ),
    "page": (b"\n <!DOCTYPE html><html>", "a web page: fetch the file itself, not the page about it"),
    "empty": (b"", "empty: fetch it again"),
    "half of safetensors": (
        WHOLE["safetensors"][0][:900],
        f"the beginning of a safetensors file, 900 of at least {len(WHOLE['safetensors'][0])} bytes: fetch it again",
    ),
    "a byte too few": (
        WHOLE["safetensors"][0][:-1],
        "the beginning of a safetensors file, {} of at least {} bytes: fetch it again".format(
            len(WHOLE["safetensors"][0]) - 1, len(WHOLE["safetensors"][0])
        ),
    ),
    "a byte too many": (WHOLE["safetensors"][0] + b"x", "a damaged safetensors file: fetch it again"),
    "half of torch": (WHOLE["torch"][0][:1500], CUT),
    "half of old torch": (WHOLE["old torch"][0][:1500], CUT),
    "objects": (torch_bytes({"x": Gadget()}), f"a pickle of Python objects, {CODE}"),
    "objects in old torch": (torch_bytes({"x": Gadget()}, old=True), f"a pickle of Python objects, {CODE}"),
    "pickle": (pickle.dumps({"a": [1.0] * 9}), f"a pickle that torch did not write, {CODE}"),
    "zip": (zip_bytes("dog/readme.txt"), "a zip archive: unpack it"),
    "script": (zip_bytes("dog/data.pkl", "dog/constants.pkl"), f"a TorchScript program, {CODE}"),
    "gzip": (b"\x1f\x8b\x08\x00", "a gzip archive: unpack it"),
    "json": (b'{"error": "no"}', 'text that begins with \'{"error": "no"}\': fetch the file itself'),
    "other": (bytes(range(256)) * 3, "of another program than safetensors or torch"),
}


@pytest.mark.parametrize("ending", ["safetensors", "bin", "pt"])
@pytest.mark.parametrize("kind", BROKEN)
def test_broken_files_say_what_they_seem_to_be(kind, ending, tmp_path):
    content, what = BROKEN[kind]
    path = tmp_path / f"dog.{ending}"
    path.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        read(path, "token_file")
    assert str(caught.value) == f"token_file: expected a file of weights, got dog.{ending}, which seems to be {what}"


@pytest.mark.parametrize("file", ["model-00002-of-00002.safetensors", "diffusion_pytorch_model.bin"])
def test_folders_of_saved_models_are_checked(file, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(WHOLE["safetensors"][0])
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    check_folder(tmp_path)
    (tmp_path / file).write_bytes(BROKEN["pointer"][0])
    with pytest.raises(
        ValueError, match=f"^--base: expected a file of weights, got {file}, which seems to be a git-lfs"
    ):
        check_folder(tmp_path, "--base")


def test_what_is_not_there_and_folders_have_their_sentence(tmp_path):
    with pytest.raises(
        ValueError, match=r"^file: expected a file of weights, got none.pt, which cannot be read \(No such"
    ):
        read(tmp_path / "none.pt")
    with pytest.raises(ValueError, match=f"got {tmp_path.name}, which is a folder$"):
        read(tmp_path)
