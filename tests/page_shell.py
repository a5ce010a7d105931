"""Runs a page of the documents: its Python blocks and its shell blocks, in the order of the page, in one process.

`script` makes a program of a page; `shell` is what it calls for a shell block. A compile takes minutes: its command is
looked up in the catalogue of stubs, whose entry was compiled by these very options, and is copied from the cache.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path

from stubs.build import compiled
from stubs.catalogue import CATALOGUE

ROOT = Path(__file__).resolve().parent.parent
FENCE = re.compile(r"^( *)(```+)(.*)$")
# What begins a line of a shell. A block without a language that begins with one is a shell block that is not labelled.
PROGRAMS = ("$ ", "cd ", "eval ", "make ", "neml2-", "pip ", "pre-commit ", "python ", "python3 ", "tar ", "NEML2_")
# Changes the machine, takes the network, or takes an artifact of an older neml2. `test_quickstart.py` runs what the
# quickstart installs, `test_tool_page.py` a migration, and `test_serve.py` the service.
ELSEWHERE = ("pip ", "python3 -m venv ", ". .venv/", "pre-commit ", "neml2-aoti migrate ", "neml2-aoti serve ")
# Run in the process of the page.
HERE = ("neml2-aoti ", "neml2-run ", "neml2-inspect ")


def script(text: str) -> str:
    """The program of a page, each block on its own lines, so that a traceback tells the line of the page."""
    lines: list[str] = []
    inside, opening = None, ""
    for line in text.splitlines():
        fence = FENCE.match(line)
        if fence and inside is None:
            opening, inside = fence[2], fence[3].strip()
            lines.append("shell(r'''" if inside == "sh" else "")
        elif fence and fence[2] == opening and not fence[3].strip():
            lines.append("''')" if inside == "sh" else "")
            inside = None
        else:
            lines.append(line if inside in ("python", "sh") else "")
    assert inside is None, "a block has no end"
    # Each page begins with its title, so that the first line is free.
    assert not lines[0], lines[0]
    return "\n".join(["from page_shell import shell", *lines[1:]])


def blocks(text: str) -> Iterator[tuple[str, str]]:
    """The blocks of a page: language and content."""
    for fence in re.finditer(r"^( *)(```+)(.*)\n((?:.*\n)*?)\1\2 *$", text, flags=re.MULTILINE):
        yield fence[3].strip(), fence[4]


def commands(block: str) -> list[str]:
    """The commands of a shell block, without comments, each on one line."""
    joined = re.sub(r"\\\n\s*", "", block)
    lines = (re.sub(r"(^|\s)#.*", "", line).strip() for line in joined.splitlines())
    return [line for line in lines if line]


def shell(block: str) -> None:
    """Run a shell block of a page, in the current folder."""
    for command in commands(block):
        if command.startswith(ELSEWHERE):
            continue
        if command.startswith("neml2-compile "):
            _compile(command)
        elif command.startswith("make "):
            # That there is such a target; continuous integration makes most of them.
            targets = {word for word in command.split()[1:] if "=" not in word}
            rules = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
            assert targets <= set(rules), f"{command}: the Makefile has no such target"
        elif command.startswith(HERE) and not set(command) & set("|>&;$"):
            _here(command)
        else:
            run(command)


def _here(command: str) -> None:
    """A command of the plugin or of neml2 by its entry point, in this process, which saves the import of torch."""
    import torch

    words = shlex.split(command)
    (entry,) = {point for point in entry_points(group="console_scripts", name=words[0])}
    dtype = torch.get_default_dtype()
    try:
        status = entry.load()(words[1:])
    finally:
        # neml2-run sets both.
        torch.set_default_dtype(dtype)
        torch.set_default_device(None)
    assert status in (0, None), f"{command}: exit status {status}"


def run(command: str, folder: Path | None = None, limit: float = 240) -> None:
    """Run a command in a shell, which finds the programs of this environment first."""
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
    with subprocess.Popen(
        command,
        shell=True,
        executable=shutil.which("bash"),
        cwd=folder,
        env={**os.environ, "PATH": path},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            printed, _ = process.communicate(timeout=limit)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)  # the shell and what it started
            raise
    assert process.returncode == 0, f"{command}: exit status {process.returncode}\n{printed}"


def _compile(command: str) -> None:
    """A compile, from the cache of stubs."""
    file, *options = shlex.split(command)[1:]
    assert Path(file).is_file(), f"{command}: there is no file {file}"
    output = Path("aoti")
    for name in ("--driver", "--model", "--output-dir"):
        if name in options:
            place = options.index(name)
            _, value = options[place : place + 2]
            del options[place : place + 2]
            output = Path(value) if name == "--output-dir" else output
    for name, stub in CATALOGUE.items():
        if stub.file == Path(file).name and sorted(options) == sorted(stub.flags):
            shutil.copytree(compiled(name), output, dirs_exist_ok=True)
            return
    raise AssertionError(f"{command}: no entry of stubs/catalogue.py is compiled with these options")
