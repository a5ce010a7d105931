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
from importlib.metadata import entry_points
from pathlib import Path

from environments import ROOT
from stubs.build import compiled
from stubs.catalogue import CATALOGUE

# A block: its indent, fence, language and content.
BLOCK = re.compile(r"^( *)(```+)(.*)\n((?:.*\n)*?)\1\2 *$", flags=re.MULTILINE)
# What begins a line of a shell. A block without a language that begins with one is a shell block that is not labelled.
PROGRAMS = ("$ ", "cd ", "eval ", "make ", "neml2-", "pip ", "pre-commit ", "python ", "python3 ", "tar ", "NEML2_")
# Changes the machine, takes the network, or takes an artifact of an older neml2. `test_documents.py` runs what the
# quickstart installs, `test_cli.py` a migration, and `test_serve.py` the service.
ELSEWHERE = ("pip ", "python3 -m venv ", ". .venv/", "pre-commit ", "neml2-aoti migrate ", "neml2-aoti serve ")
# Run in the process of the page.
HERE = ("neml2-aoti ", "neml2-run ", "neml2-inspect ")


def blocks(text: str) -> list[tuple[str, str]]:
    """The blocks of a page: language and content."""
    return [(block[3].strip(), block[4]) for block in BLOCK.finditer(text)]


def script(text: str) -> str:
    """The program of a page, each block on its own lines, so that a traceback tells the line of the page."""
    lines = [""] * (text.count("\n") + 1)
    for block in BLOCK.finditer(text):
        first, language, content = text.count("\n", 0, block.start()), block[3].strip(), block[4].splitlines()
        last = first + 1 + len(content)
        if language in ("python", "sh"):
            lines[first + 1 : last] = content
        if language == "sh":
            lines[first], lines[last] = "shell(r'''", "''')"
    # Each page begins with its title, so that the first line is free.
    assert not lines[0], lines[0]
    return "\n".join(["from page_shell import shell", *lines[1:]])


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


def run(command: str, folder: Path | None = None, limit: float = 240, variables: dict[str, str] | None = None) -> str:
    """Run a command in a shell, which finds the programs of this environment first; give what it printed."""
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
    with subprocess.Popen(
        ["bash", "-c", command],
        cwd=folder,
        env={**(os.environ if variables is None else variables), "PATH": path},
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
    return printed


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
