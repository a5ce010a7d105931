"""The seal of an artifact: a list of the SHA-256 of each of its files, beside it, as `sha256sum` writes and checks it.

The seal of the folder `aoti/elasticity` is the file `aoti/elasticity.sha256`. It tells of every change since it was
written; it does not tell who wrote it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from .._files import draft
from ..errors import ArtifactError, ArtifactNotFoundError, InputError
from . import files
from .telling import named

SUFFIX = ".sha256"
# A seal that passed through a Windows editor or git has another end of line; no name in a seal ends so.
_LINE = re.compile(r"(?P<digest>[0-9a-f]{64}) [ *](?P<name>[^\r]+)\r?")


def seal_file(root: Path) -> Path:
    """Where the seal of an artifact is, or would be."""
    root = _real(root)
    return root.with_name(root.name + SUFFIX)


def write_seal(root: Path) -> Path:
    """Seal an artifact as it is now.

    Args:
        root: its folder.

    Returns:
        The file of the seal; one that was there is replaced.

    Raises:
        ArtifactNotFoundError: there is no such folder.
        ArtifactError: the folder holds what cannot be sealed, or the seal cannot be written.
    """
    root = _real(root)
    if not root.is_dir():
        raise ArtifactNotFoundError(f"{root}: no such folder. Give the artifact's folder that neml2-compile wrote.")
    lines = [f"{_digest_of(root, name)}  {name}\n" for name in sorted(_files(root))]
    target = seal_file(root)
    try:
        with draft(target) as scratch:
            scratch.write_text("".join(lines), encoding="utf-8", errors="surrogateescape")
    except InputError as error:
        raise ArtifactError(
            f"{target}: cannot write the seal ({error}). It must stand beside the artifact; make {root.parent} "
            "writable, or seal a copy elsewhere."
        ) from error
    return target


def verify(root: Path) -> dict[str, str] | None:
    """Compare an artifact with its seal.

    Args:
        root: its folder.

    Returns:
        The SHA-256 of each file by absolute path; None where there is no seal.

    Raises:
        ArtifactError: a file was changed, added or removed since, or the seal is damaged.
    """
    root = _real(root)
    target = seal_file(root)
    try:
        text = files.read_file(target, files.SEAL, None).decode("utf-8", "surrogateescape")
    except FileNotFoundError:
        if os.path.lexists(target):
            raise ArtifactError(f"{target}: a link to a seal that is not there. {_reseal(root)}") from None
        return None
    except ArtifactError as error:
        reason = str(error).removeprefix(f"{target}: ").removesuffix(files.AGAIN).rstrip(". ")
        raise ArtifactError(f"{target}: cannot read the seal ({reason}). {_reseal(root)}") from error
    wanted = _parse(text, root, target)
    present = set(_files(root))
    found = [f"{name}: is gone" for name in sorted(set(wanted) - present)]
    found += [f"{name}: was added" for name in sorted(present - set(wanted))]
    found += [
        f"{name}: was changed" for name in sorted(present & set(wanted)) if _digest_of(root, name) != wanted[name]
    ]
    if found:
        raise ArtifactError(
            f"{root} is not as it was sealed in {target.name}:\n"
            + "\n".join(f"- {line}." for line in found)
            + "\nCopy the artifact again from where it came; or, if you have compiled the model again since, seal it "
            f"again: neml2-aoti seal {root}"
        )
    return {str(root.parent / name): digest for name, digest in wanted.items()}


def _real(root: Path) -> Path:
    """The folder itself, also where the path leads over links: its seal is beside it, not beside them."""
    return Path(os.path.realpath(root))


def _parse(text: str, root: Path, target: Path) -> dict[str, str]:
    wanted: dict[str, str] = {}
    for number, line in enumerate(text.removesuffix("\n").split("\n"), 1):
        match = _LINE.fullmatch(line)
        name = match["name"] if match else ""
        parts = name.split("/")
        if match is None or parts[0] != root.name or len(parts) < 2 or any(part in ("", ".", "..") for part in parts):
            raise ArtifactError(
                f"{target}, line {number}: {_told(line)}, expected a SHA-256 and the name of a file in {root.name}/. "
                f"{_reseal(root)}"
            )
        if name in wanted:
            raise ArtifactError(f"{target}, line {number}: {named(name)} is there twice. {_reseal(root)}")
        wanted[name] = match["digest"]
    if not wanted:
        raise ArtifactError(f"{target}: the seal is empty. {_reseal(root)}")
    return wanted


def _files(root: Path) -> Iterator[str]:
    """Names of all files of an artifact, as the seal writes them: from beside the artifact, with slashes."""
    for folder, folders, plain in os.walk(root, onerror=_fail):
        inside = Path(folder).relative_to(root.parent).as_posix()
        for name in (*folders, *plain):
            if any(ord(c) < 32 or c == "\\" for c in name):
                raise ArtifactError(f"{folder}: holds a file named {name!r}, which a seal cannot list. Rename it.")
        for name in folders:
            if os.path.islink(os.path.join(folder, name)):
                raise ArtifactError(
                    f"{os.path.join(folder, name)}: a link to a folder, which a seal does not cover. Copy the folder "
                    "itself to its place."
                )
        for name in plain:
            if not os.path.isfile(os.path.join(folder, name)):
                raise ArtifactError(f"{os.path.join(folder, name)}: not a file, which a seal cannot cover. Remove it.")
            yield f"{inside}/{name}"


def _digest_of(root: Path, name: str) -> str:
    try:
        return files.digest_file(root.parent / name, files.ANY, root)
    except FileNotFoundError:
        raise ArtifactNotFoundError(f"{root.parent / name}: is gone. Copy the artifact again.") from None


def _told(line: str) -> str:
    """What is wrong with a line of a seal, without its text: the file may be another one than a seal."""
    if not line:
        return "an empty line"
    match = _LINE.fullmatch(line)
    return f"{len(line)} characters of another kind" if match is None else f"a SHA-256 and {named(match['name'])}"


def _fail(error: OSError) -> None:
    raise ArtifactError(f"{error.filename}: cannot be read ({error}). Copy the artifact again.") from error


def _reseal(root: Path) -> str:
    return f"Copy the seal again, or, if you trust the artifact as it is: neml2-aoti seal {root}"
