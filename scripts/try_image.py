"""Runs a Dockerfile's steps without Docker, in a clean root file system, and then what the image is for.

The image that it begins with cannot be had without a registry of images: Debian with Python stands in for
it, so Triton's own files are not there. As in a container there are an environment of its own, the image's
user without rights, a root that is read-only but for /tmp and the image's volumes; the network is the
machine's.

python scripts/try_image.py docker/gateway.Dockerfile [--entrypoint="--triton localhost:8001"]
[--build-arg CUPY=] [--run "python3 -c ..."] [--bind FOLDER] [--root FOLDER]

Needs root, debootstrap, and Debian's and Python's package registries.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from dockerfile_parse import DockerfileParser
from dockerfile_parse.util import WordSplitter

CONTEXT = Path(__file__).resolve().parents[1]
BASE = "ca-certificates,python3,python3-pip,python3-venv"
MARK = "EXTERNALLY-MANAGED"  # pip must leave Debian's Python alone; images of Python have no such file
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
HEALTHY_WITHIN_S, STOPPED_WITHIN_S = 120, 30


@dataclass
class Image:
    """What the steps so far have made of the image; root: its files."""

    root: Path
    binds: list[Path]
    env: dict[str, str] = field(default_factory=lambda: {"PATH": PATH, "HOME": "/root"})
    args: dict[str, str] = field(default_factory=dict)
    shell: list[str] = field(default_factory=lambda: ["/bin/sh", "-c"])
    folder: str = "/"
    user: str = "0:0"
    volumes: list[str] = field(default_factory=list)
    entrypoint: list[str] = field(default_factory=list)
    health: list[str] = field(default_factory=list)

    def expand(self, text: str) -> str:
        """With the values of variables."""
        return WordSplitter(text, args=self.args, envs=self.env).dequote()

    def inside(self, command: list[str], env: dict[str, str], is_running: bool = False) -> list[str]:
        """What runs a command in the image as its user. is_running: not to build it, so the root is
        read-only.
        """
        root = shlex.quote(str(self.root))
        steps = [f"mount --bind {root} {root}"]
        for place in self.binds:
            steps.append(f"mkdir -p {root}{place}")
        if is_running:
            steps.append(f"mount -o remount,ro,bind {root}")
            steps += [f"mount --bind {self._volume(place)} {root}{place}" for place in self.volumes]
            steps.append(f"mount -t tmpfs -o mode=1777 tmpfs {root}/tmp")
        for place in self.binds:
            steps += [f"mkdir -p {root}{place}", f"mount --rbind {place} {root}{place}"]
        steps += [f"mount --rbind /dev {root}/dev", f"mount -t proc proc {root}/proc"]
        values = [f"{name}={value}" for name, value in env.items()]
        start = ["env", "-i", *values, "/bin/sh", "-c", f"cd {self.folder} && exec {shlex.join(command)}"]
        steps.append(f"exec chroot --userspec={self.user} {root} {shlex.join(start)}")
        return ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-ec", "\n".join(steps)]

    def _volume(self, place: str) -> Path:
        """A volume's files, which begin as the image has them."""
        folder = self.root.parent / f"{self.root.name}-volumes" / place.strip("/")
        if not folder.exists():
            subprocess.run(["mkdir", "-p", folder.parent], check=True)
            subprocess.run(["cp", "-a", f"{self.root}{place}", folder], check=True)
        return folder


class BrokenStepError(Exception):
    """A step that did not do what it should; the text says which."""


def build(image: Image, file: Path, build_args: dict[str, str]) -> None:
    """Runs a Dockerfile's steps. Raises BrokenStepError."""
    with tempfile.TemporaryDirectory() as folder:
        parser = DockerfileParser(path=str(shutil.copy(file, folder)), env_replace=False)
        steps = parser.structure
    for step in steps:
        name, value = step["instruction"], step["value"]
        if name == "COMMENT":
            continue
        print(f"\n=== {name} {value[:150]}", flush=True)
        if name == "ARG":
            variable, _, default = value.partition("=")
            image.args[variable] = build_args.get(variable, image.expand(default))
        elif name == "FROM":
            print(f"(Debian in place of {image.expand(value)})")
        elif name == "ENV":
            pairs = WordSplitter(value, args=image.args, envs=image.env).split()
            image.env |= dict(pair.split("=", 1) for pair in pairs)
        elif name == "WORKDIR":
            image.folder = str(Path(image.folder, image.expand(value)))
            Path(f"{image.root}{image.folder}").mkdir(parents=True, exist_ok=True)
        elif name == "RUN":
            _run(image, value)
        elif name == "COPY":
            _copy(image, shlex.split(value))
        elif name == "SHELL":
            image.shell = json.loads(value)
        elif name == "USER":
            image.user = value
        elif name == "VOLUME":
            image.volumes += value.split()
        elif name == "ENTRYPOINT":
            image.entrypoint = json.loads(value)
        elif name == "HEALTHCHECK":
            image.health = json.loads(value.partition("CMD ")[2])
        elif name != "EXPOSE":
            raise BrokenStepError(f"{file.name}: {name} is not known here")


def _run(image: Image, command: str) -> None:
    # As the host asks for packages, the image does: mirrors and certificates.
    host = {k: v for k, v in os.environ.items() if k.startswith("PIP_") or k.lower().endswith("_proxy")}
    env = {"DEBIAN_FRONTEND": "noninteractive"} | host | image.args | image.env
    if subprocess.run(image.inside([*image.shell, command], env)).returncode:
        raise BrokenStepError(f"this step failed: RUN {command}")


def _copy(image: Image, paths: list[str]) -> None:
    *sources, target = paths
    place = Path(f"{image.root}{Path(image.folder, target)}")
    for source in (CONTEXT / path for path in sources):
        if source.is_dir():
            shutil.copytree(source, place, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
        elif source.is_file():
            is_folder = target.endswith("/") or place.is_dir()
            place.mkdir(parents=True, exist_ok=True) if is_folder else None
            shutil.copy2(source, place)
        else:
            raise BrokenStepError(f"COPY: there is no {source.relative_to(CONTEXT)}")


def make_base(root: Path, suite: str) -> None:
    """Debian with Python, as images of Python have it: pip may install into it, `python` is it."""
    subprocess.run(["debootstrap", "--variant=minbase", f"--include={BASE}", suite, root], check=True)
    for mark in root.glob(f"usr/lib/python3*/{MARK}"):
        mark.unlink()
    shutil.copy2("/etc/resolv.conf", root / "etc/resolv.conf")


@contextmanager
def running(image: Image, arguments: list[str]) -> Iterator[None]:
    """The image's entrypoint, healthy. Raises BrokenStepError if it does not become so."""
    command = image.inside([*image.entrypoint, *arguments], image.env, is_running=True)
    health = image.inside(image.health, image.env, is_running=True)
    if subprocess.run(health, capture_output=True).returncode == 0:
        raise BrokenStepError(
            "something else is healthy already where the image would be: the network is one"
        )
    print(f"\n=== {shlex.join([*image.entrypoint, *arguments])}", flush=True)
    begin, process = time.monotonic(), subprocess.Popen(command)
    try:
        while subprocess.run(health, capture_output=True).returncode:
            if process.poll() is not None or time.monotonic() > begin + HEALTHY_WITHIN_S:
                raise BrokenStepError(f"not healthy after {time.monotonic() - begin:.0f} s")
            time.sleep(0.5)
        print(f"=== healthy after {time.monotonic() - begin:.1f} s", flush=True)
        yield
        if process.poll() is not None:
            raise BrokenStepError("it has ended by itself")
        print(f"=== stopped after {_stop(process):.1f} s", flush=True)
    finally:
        process.kill()
        process.wait()


def _stop(process: subprocess.Popen[bytes]) -> float:
    """Tells the image's first process to end, as `docker stop` does; seconds until it has."""
    begin = time.monotonic()
    for child in psutil.Process(process.pid).children():
        child.terminate()
    try:
        process.wait(STOPPED_WITHIN_S)
    except subprocess.TimeoutExpired:
        raise BrokenStepError(f"still there {STOPPED_WITHIN_S} s after SIGTERM") from None
    return time.monotonic() - begin


def check(image: Image, arguments: str | None, command: str | None) -> None:
    """Starts the image, if there are arguments for that, and runs the command in it."""
    with running(image, shlex.split(arguments)) if arguments is not None else nullcontext():
        if command is not None:
            print(f"\n=== {command}", flush=True)
            if subprocess.run(
                image.inside(["/bin/sh", "-c", command], image.env, is_running=True)
            ).returncode:
                raise BrokenStepError(f"this failed: {command}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("dockerfile", type=Path)
    parser.add_argument("--build-arg", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--entrypoint", metavar="ARGUMENTS", help="start the image with these, till healthy")
    parser.add_argument(
        "--run", metavar="COMMAND", help="then run this in the image; %(prog)s fails if it does"
    )
    parser.add_argument(
        "--bind", type=Path, action="append", default=[], help="a host's folder to show inside"
    )
    parser.add_argument(
        "--root", type=Path, help="where the files go, and stay; otherwise a temporary folder"
    )
    parser.add_argument("--suite", default="bookworm", help="the Debian that stands in for the base image")
    given = parser.parse_args()
    for tool in ("debootstrap", "unshare", "chroot"):
        if shutil.which(tool) is None or os.geteuid():
            sys.exit(f"{parser.prog} needs {tool}, and to be run by root")
    with tempfile.TemporaryDirectory() as folder:
        root = (given.root or Path(folder) / "root").resolve()
        image = Image(root, [place.resolve() for place in given.bind])
        try:
            make_base(root, given.suite)
            build(image, given.dockerfile, dict(pair.split("=", 1) for pair in given.build_arg))
            check(image, given.entrypoint, given.run)
        except BrokenStepError as error:
            sys.exit(f"\n{given.dockerfile}: {error}")
        size = subprocess.run(["du", "-sh", root], capture_output=True, text=True).stdout.split()[0]
    print(f"\n{given.dockerfile}: every step works; {size}, Debian and Python included")


if __name__ == "__main__":
    main()
