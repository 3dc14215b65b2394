"""Runs the host as a server with this pack loaded, and talks to it. Standard library only.

The server keeps everything it writes (user settings, outputs, temporary files) in its own base directory, so nothing of
a user's ComfyUI is touched. The pack is reached through a link named `conceptloom`, because the host names a pack after
its directory, and a checkout may have any name.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from environment import ROOT, Problem

PACK = "conceptloom"
START_SECONDS = 300
MOST_THREADS = 4


class PromptError(Exception):
    """A workflow that the server refused or that failed while it ran; the text is the server's."""


class Picture(NamedTuple):
    """One picture of a finished workflow: the node it came from, its file name, its bytes, and whether the workflow
    saves it (or only shows it)."""

    node: str
    name: str
    data: bytes
    saved: bool


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def check_port(port: int) -> None:
    """Raises Problem if another program listens on this port."""
    with socket.socket() as probe:
        probe.settimeout(1)
        if probe.connect_ex(("127.0.0.1", port)) == 0:
            raise Problem(f"Port {port} is in use by another program: name a free one with --port.")


def link_pack(folder: Path, name: str, pack: Path) -> None:
    """Puts a link with this name to a pack into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    link = folder / name
    if os.path.lexists(link):
        if os.path.realpath(link) == os.path.realpath(pack):
            return
        link.rmdir() if os.name == "nt" else link.unlink()
    if os.name == "nt":
        import _winapi  # a junction, unlike a symbolic link, needs no rights on Windows

        _winapi.CreateJunction(str(pack), str(link))
    else:
        link.symlink_to(pack, target_is_directory=True)


def has_accelerator(python: Path) -> bool:
    """Whether torch finds a device other than the CPU."""
    test = (
        "import sys, torch; xpu = getattr(torch, 'xpu', None); sys.exit(not "
        "(torch.cuda.is_available() or torch.backends.mps.is_available() or (xpu and xpu.is_available())))"
    )
    return subprocess.run([str(python), "-c", test], capture_output=True).returncode == 0


def thread_settings(environ: Mapping[str, str], processors: int) -> dict[str, str]:
    """Variables that keep torch's OpenMP threads from wasting time on a busy processor.

    Waiting threads sleep instead of spinning: on a busy processor, each of a small model's many short operations would
    otherwise wait for a thread that is not running. A few threads suffice, because models as small as Shapeland's gain
    nothing from more. What the user has set stays.

    Args:
        environ: the user's environment.
        processors: number of processors of this machine.
    """
    settings = {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": str(min(MOST_THREADS, processors))}
    if "MKL_NUM_THREADS" in environ:
        del settings["OMP_NUM_THREADS"]  # torch takes its number of threads from this too, if there is no other
    return {name: value for name, value in settings.items() if name not in environ}


class HostServer:
    """A ComfyUI server as a context manager: started on entry, ended on exit.

    `cpu` None asks torch. `log` is the file for the server's output; None shows it in the terminal. `more_packs` are
    loaded in addition to this pack, under the given names. `options` are added to the host's command line.
    """

    def __init__(
        self,
        python: Path,
        host: Path,
        base: Path,
        port: int | None = None,
        cpu: bool | None = None,
        log: Path | None = None,
        more_packs: Mapping[str, Path] = MappingProxyType({}),
        options: Sequence[str] = (),
    ) -> None:
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.base, self.log = base, log
        for name in ("custom_nodes", "input", "models", "output", "temp", "user/default/workflows"):
            (base / name).mkdir(parents=True, exist_ok=True)
        for name, pack in {PACK: ROOT, **more_packs}.items():
            link_pack(base / "packs", name, pack)
        paths = base / "extra_model_paths.yaml"
        # A JSON string is a YAML string too, whatever a path contains.
        folder = json.dumps(str(base / "packs"))
        paths.write_text(f"{PACK}:\n  custom_nodes: {folder}\n", encoding="utf-8")
        if cpu is None:
            cpu = not has_accelerator(python)
        self.command = [
            str(python),
            str(host / "main.py"),
            *("--port", str(self.port), "--base-directory", str(base), "--extra-model-paths-config", str(paths)),
            *("--database-url", "sqlite:///:memory:", "--disable-auto-launch", "--disable-api-nodes"),
            *(("--cpu",) if cpu else ()),
            *options,
        ]
        self.cwd = host
        self.process: subprocess.Popen | None = None

    def __enter__(self) -> HostServer:
        stream = open(self.log, "wb") if self.log else None
        threads = thread_settings(os.environ, os.cpu_count() or 1)
        environ = {**os.environ, **threads, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(
            self.command, cwd=self.cwd, env=environ, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream
        )
        if stream:
            stream.close()
        try:
            self._wait()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self.process.wait()

    def _wait(self) -> None:
        """Returns when the server answers."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                break
            with suppress(OSError):
                self.get("/system_stats")
                return
            time.sleep(0.25)
        what = "ended" if self.process.poll() is not None else f"did not answer within {START_SECONDS} s"
        last = (self.log_text().strip().splitlines() or ["it wrote nothing"])[-1]
        raise Problem(f"The ComfyUI server {what}: {last}")

    def log_text(self) -> str:
        """What the server has written so far (empty if it writes to the terminal)."""
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log else ""

    def request(self, path: str, data: bytes | None = None, timeout: float = 60) -> bytes:
        """The body of a response; a POST if there is data."""
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"} if data else {})
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            return answer.read()

    def get(self, path: str) -> dict:
        """A response as JSON."""
        return json.loads(self.request(path))

    def submit(self, workflow: dict, client_id: str = PACK) -> str:
        """Queues a workflow in API format and returns its id; raises PromptError if the server refuses it or one of its
        outputs, which the server would leave out."""
        body = json.dumps({"prompt": workflow, "client_id": client_id}).encode()
        try:
            answer = self.request("/prompt", body).decode()
        except urllib.error.HTTPError as error:
            raise PromptError(refusal(error.read().decode("utf-8", "replace"))) from None
        accepted = json.loads(answer)
        if accepted.get("node_errors"):
            self.request("/queue", json.dumps({"delete": [accepted["prompt_id"]]}).encode())
            raise PromptError(refusal(answer))
        return accepted["prompt_id"]

    def result(self, prompt_id: str) -> dict | None:
        """The history entry of a finished workflow, None while it waits or runs; raises PromptError if it failed."""
        entry = self.get(f"/history/{prompt_id}").get(prompt_id)
        if entry is None:
            return None
        for name, detail in entry["status"]["messages"]:
            if name == "execution_error":
                raise PromptError(f"{detail['node_type']}: {detail['exception_message'].strip()}")
            if name == "execution_interrupted":
                raise PromptError(f"interrupted at node {detail['node_id']}")
        return entry

    def finish(self, prompt_id: str, timeout: float = 3600) -> dict:
        """Waits for a workflow and returns its history entry; raises PromptError if it fails or `timeout` passes."""
        deadline, pause = time.monotonic() + timeout, 0.005
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise PromptError("the server ended while the workflow ran")
            entry = self.result(prompt_id)
            if entry is not None:
                return entry
            time.sleep(pause)
            pause = min(0.1, 1.5 * pause)
        raise PromptError(f"not finished after {timeout:.0f} s")

    def pictures(self, entry: dict) -> list[Picture]:
        """All pictures that a finished workflow output, saved ones and previews."""
        found = []
        for node, output in entry["outputs"].items():
            for image in output.get("images", ()):
                data = self.request("/view?" + urllib.parse.urlencode(image))
                found.append(Picture(node, image["filename"], data, image["type"] == "output"))
        return found


def refusal(body: str) -> str:
    """The readable part of a 400 response: node errors first, because the general message says little."""
    try:
        answer = json.loads(body)
    except ValueError:
        return f"the server said: {body.strip()[:300] or 'nothing'}"
    lines = [
        f"node {node} ({errors['class_type']}): {error['message']}: {error['details']}"
        for node, errors in (answer.get("node_errors") or {}).items()
        for error in errors["errors"]
    ]
    return "; ".join(lines) or answer["error"]["message"]
