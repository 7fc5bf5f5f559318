"""Images built and run without an engine: buildah builds them, and a process of its own namespaces is a container."""

from __future__ import annotations

import ast
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from tests.support.compose import ROOT

TOOLS = ("buildah", "debootstrap", "setpriv", "unshare")
BASE_IMAGE = "localhost/debian-base"
# Where pip looks for the configuration of a whole machine.
_PIP_DIR = Path("/etc/xdg/pip")

# What compose.yaml asks of an engine: a read-only root, /tmp and the cache writable, init as process 1, no capability
# left and no way to get one.
_ENTER = """
mount --bind "$ROOT" "$ROOT"
mount --rbind /dev "$ROOT/dev"
mount -t proc proc "$ROOT/proc"
mount -t tmpfs -o mode=1777,noexec tmpfs "$ROOT/tmp"
mount -t tmpfs -o uid=10001,gid=10001 tmpfs "$ROOT/var/cache/darkroom"
mount -o remount,bind,ro "$ROOT"
exec chroot "$ROOT" /usr/bin/env -i "$@"
"""


def what_is_missing() -> str | None:
    """Why images cannot be built here, or None."""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        return f"not installed: {', '.join(missing)}"
    return None if os.geteuid() == 0 else "building and entering images takes root"


class Images:
    """Image storage in `directory`; `close` removes what is mounted there."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._volumes, self._has_pip_sources = _pip_configuration(directory / "pip")

    def buildah(self, *arguments: str) -> str:
        """Run buildah and return what it printed, without the last newline. Raises `CalledProcessError`."""
        storage = ["--root", str(self._directory / "storage"), "--runroot", str(self._directory / "run")]
        done = subprocess.run(
            ["buildah", *storage, *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
        )
        return done.stdout.rstrip("\n")

    def make_base(self) -> None:
        """A Debian of this machine's release with its required packages alone, no Python among them."""
        container = self.buildah("from", "scratch")
        release = _os_release()["VERSION_CODENAME"]
        root = self.buildah("mount", container)
        subprocess.run(["debootstrap", "--variant=minbase", release, root], stdout=subprocess.DEVNULL, check=True)
        self.buildah("commit", "-q", "--rm", container, BASE_IMAGE)

    def build(self, target: str) -> None:
        """Build a target of the Dockerfile as the image of that name."""
        arguments = {"BASE": BASE_IMAGE}
        if self._has_pip_sources:
            arguments["TORCH_CPU_INDEX"] = ""
        self.buildah(
            *("bud", "-q", "--layers", "--format=docker", "--isolation=chroot"),
            *(f"--volume={volume}:ro" for volume in self._volumes),
            *(f"--build-arg={name}={value}" for name, value in arguments.items()),
            *("--file=docker/Dockerfile", f"--target={target}", f"--tag={target}", "."),
        )

    def config(self, image: str) -> dict[str, Any]:
        """The image's Entrypoint, Cmd, Env, User and so on."""
        loaded: dict[str, Any] = json.loads(self.buildah("inspect", "--type=image", image))["Docker"]["config"]
        return loaded

    def start(self, image: str, environment: Mapping[str, str], log: Path) -> Container:
        root = self.buildah("mount", self.buildah("from", image))
        return Container(Path(root), self.config(image), environment, log)

    def close(self) -> None:
        self.buildah("umount", "--all")
        self.buildah("rm", "--all")


class Container:
    """An image's ENTRYPOINT and CMD, running as its USER on the network of this machine."""

    def __init__(self, root: Path, config: dict[str, Any], environment: Mapping[str, str], log: Path) -> None:
        self._config = config
        self._variables = [*config["Env"], *(f"{name}={value}" for name, value in environment.items())]
        self.log = log
        namespaces = ["--mount", "--pid", "--ipc", "--fork", "--kill-child"]
        command = [*config["Entrypoint"], *config["Cmd"]]
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                ["unshare", *namespaces, "sh", "-euc", _ENTER, "sh", *self._as_its_user(command)],
                stdout=output,
                stderr=output,
                env={**os.environ, "ROOT": str(root)},
            )
        while self.process.poll() is None and not self._has_begun():
            time.sleep(0.05)

    def _has_begun(self) -> bool:
        """Whether process 1 is what the image names, no longer what leads there."""
        children = psutil.Process(self.process.pid).children()
        return bool(children) and children[0].name() == Path(self._config["Entrypoint"][0]).name

    def _as_its_user(self, command: list[str]) -> list[str]:
        user, _, group = self._config["User"].partition(":")
        rights = [f"--reuid={user}", f"--regid={group}", "--clear-groups", "--bounding-set=-all", "--no-new-privs"]
        return ["-C", self._config["WorkingDir"], *self._variables, "setpriv", *rights, *command]

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command beside the service, in its namespaces and as its user."""
        entry = ["nsenter", f"--target={self.init.pid}", "--mount", "--pid", "--ipc", "--root", "--wd"]
        return subprocess.run(
            [*entry, "/usr/bin/env", "-i", *self._as_its_user(list(command))],
            capture_output=True,
            text=True,
            check=False,
        )

    def check_health(self) -> bool:
        """What the image's HEALTHCHECK says."""
        kind, *command = self._config["Healthcheck"]["Test"]
        assert kind == "CMD", kind
        return self.run(*command).returncode == 0

    @property
    def init(self) -> psutil.Process:
        """Process 1 of the container."""
        (init,) = psutil.Process(self.process.pid).children()
        return init

    def stop(self, grace_s: float) -> int:
        """What an engine does: SIGTERM to process 1, SIGKILL after the grace period. Returns the exit code."""
        if self.process.poll() is None:
            self.init.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(grace_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()


def _os_release() -> dict[str, str]:
    lines = Path("/etc/os-release").read_text().splitlines()
    return {name: value.strip('"') for name, _, value in (line.partition("=") for line in lines)}


def _pip_configuration(directory: Path) -> tuple[list[str], bool]:
    """Volumes that give a build the pip of this machine, and whether that is told where packages come from.

    Files that the configuration names, such as a CA bundle, are copied beside it; directories are mounted where they
    are.
    """
    directory.mkdir()
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True)
    volumes = [f"{directory}:{_PIP_DIR}"]
    options: dict[str, str] = {}
    # Variables are listed before files and win over them.
    for line in reversed(listed.stdout.splitlines()):
        key, _, quoted = line.partition("=")
        words = str(ast.literal_eval(quoted)).split()
        for index, word in enumerate(words):
            path = Path(word.removeprefix("file://"))
            if path.is_absolute() and path.is_file():
                shutil.copy(path, directory / path.name)
                words[index] = str(_PIP_DIR / path.name)
            elif path.is_absolute() and path.is_dir():
                # The pages of an index on disk point to files beside it.
                source = path.parent if word.startswith("file://") else path
                volumes.append(f"{source}:{source}")
        options[key.rpartition(".")[2]] = " ".join(words)
    lines = [f"{name} = {value}" for name, value in options.items()]
    (directory / "pip.conf").write_text("\n".join(["[global]", *lines, ""]))
    return volumes, bool({"index-url", "find-links"} & options.keys())
