"""pyproject.toml as the registry and the Manager read it; their own check passes files that fail later."""

import re

import pytest
from environment import ROOT
from PIL import Image

tomllib = pytest.importorskip("tomllib", reason="tomllib needs Python 3.11")

GPU_CLASSIFIERS = {"NVIDIA CUDA", "AMD ROCm", "Intel Arc", "Apple Metal", "NPU :: Huawei Ascend"}


@pytest.fixture(scope="module")
def settings():
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_name_can_be_a_directory_and_a_registry_id(settings):
    name = settings["project"]["name"]
    assert re.fullmatch(r"[a-z][a-z0-9._-]{0,98}", name) and "comfyui" not in name


def test_version_has_three_parts(settings):
    assert re.fullmatch(r"\d+\.\d+\.\d+", settings["project"]["version"])


def test_version_is_in_the_changelog(settings):
    assert f"\n## {settings['project']['version']}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_what_the_registry_requires_is_there(settings):
    assert settings["tool"]["comfy"]["PublisherId"]
    assert settings["tool"]["comfy"]["DisplayName"]
    assert settings["project"]["urls"]["Repository"].startswith("https://")
    assert (ROOT / settings["project"]["license"]["file"]).is_file()
    assert (ROOT / settings["project"]["readme"]).is_file()


def test_required_host_is_one_comparator_with_three_parts(settings):
    # Any other form is read as "incompatible" by one of the two tools that read it.
    assert re.fullmatch(r">=\d+\.\d+\.\d+", settings["tool"]["comfy"]["requires-comfyui"])


def test_dependencies_have_no_upper_bound(settings):
    extras = settings["project"]["optional-dependencies"].values()
    for requirement in sum(extras, settings["project"]["dependencies"]):
        assert not re.search(r"<|==|~=", requirement), f"{requirement} could downgrade a package of the host"


def test_classifiers_are_known(settings):
    # One wrong entry empties the whole list in the registry.
    for classifier in settings["project"]["classifiers"]:
        group, _, rest = classifier.partition(" :: ")
        assert group in ("License", "Operating System", "Environment")
        if group == "Environment":
            assert rest.removeprefix("GPU :: ") in GPU_CLASSIFIERS


def test_icon_is_a_small_square_of_this_repository(settings):
    repository = settings["project"]["urls"]["Repository"].removeprefix("https://github.com/")
    path = settings["tool"]["comfy"]["Icon"].partition(f"{repository}/main/")[2]
    with Image.open(ROOT / path) as icon:
        assert icon.width == icon.height <= 400


def test_web_folder_is_named_once(settings):
    # [tool.comfy] web registers under the project's name, node help is looked up by directory name.
    assert "web" not in settings["tool"]["comfy"]
