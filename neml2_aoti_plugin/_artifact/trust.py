"""May an artifact be loaded at all: does it lie where artifacts may, is it sealed, and is it as it was sealed?

The seal of the folder `aoti/elasticity` is the file `aoti/elasticity.sha256`: a list of the SHA-256 of each of its
files, as `sha256sum` writes and checks it. It shows every change since it was written; it does not show who wrote it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from .._files import draft
from ..errors import ArtifactError, ArtifactNotFoundError, InputError
from . import files
from .files import Folder, named

REQUIRE_SEAL = "NEML2_AOTI_PLUGIN_REQUIRE_SEAL"
_OFF = ("", "0", "false", "no", "off")
# A seal that passed through a Windows editor or git has another end of line; no name in a seal ends so.
_LINE = re.compile(r"(?P<digest>[0-9a-f]{64}) [ *](?P<name>[^\r]+)\r?")


def write_seal(root: Path) -> Path:
    """List the files of an artifact as they are now in the file beside its folder; one that was there is replaced."""
    root, target = _folder_and_seal(root)
    lines = [f"{_digest_of(root, name)}  {name}\n" for name in sorted(_files(root))]
    try:
        with draft(target) as scratch:
            scratch.write_text("".join(lines), encoding="utf-8", errors="surrogateescape")
    except InputError as error:
        raise ArtifactError(
            f"{target}: cannot write the seal ({error}). It must stand beside the artifact; make {root.parent} "
            "writable, or seal a copy elsewhere."
        ) from error
    return target


def has_seal(root: Path) -> bool:
    """Whether an artifact has a seal; a load compares it with that."""
    return os.path.lexists(_folder_and_seal(root)[1])


def admit(root: Path, metadata: Iterable[Path]) -> Folder:
    """Refuse an artifact that may not be loaded, by its folder and metadata files; nothing in it is opened before."""
    for path in (root, *metadata):
        files.allowed_root(path, os.path.realpath(path))
    folder, target = _folder_and_seal(root)
    sealed = _verified(folder, target)
    if sealed is None and os.environ.get(REQUIRE_SEAL, "").strip().lower() not in _OFF:
        raise ArtifactError(
            f"{root}: this artifact has no seal {target}, and {REQUIRE_SEAL} asks for one. If you trust the artifact "
            f"as it is, write the seal: neml2-aoti seal {root}"
        )
    return Folder(folder, sealed)


def _folder_and_seal(root: Path) -> tuple[Path, Path]:
    """The folder itself, also where the path leads over links, and its seal, which is beside it, not beside them."""
    real = Path(os.path.realpath(root))
    return real, real.with_name(f"{real.name}.sha256")


def _verified(root: Path, target: Path) -> dict[str, str] | None:
    """Compare an artifact with its seal; the SHA-256 of each file by absolute path, None where there is no seal."""
    reseal = f"Copy the seal again, or, if you trust the artifact as it is: neml2-aoti seal {root}"
    try:
        text = files.read_file(target, files.SEAL, None).data.decode("utf-8", "surrogateescape")
    except FileNotFoundError:
        if os.path.lexists(target):
            raise ArtifactError(f"{target}: a link to a seal that is not there. {reseal}") from None
        return None
    except ArtifactError as error:
        why = str(error).removeprefix(f"{target}: ").removesuffix(files.AGAIN).rstrip(". ")
        raise ArtifactError(f"{target}: cannot read the seal ({why}). {reseal}") from error
    wanted: dict[str, str] = {}
    for number, line in enumerate(text.removesuffix("\n").split("\n"), 1):
        match = _LINE.fullmatch(line)
        name = match["name"] if match else ""
        first, *inside = name.split("/")
        if match is None or first != root.name or not inside or not {"", ".", ".."}.isdisjoint(inside):
            # Without its text: the file may be another one than a seal.
            what = f"a SHA-256 and {named(name)}" if match else f"{len(line)} characters of another kind"
            raise ArtifactError(
                f"{target}, line {number}: {what if line else 'an empty line'}, expected a SHA-256 and the name of a "
                f"file in {root.name}/. {reseal}"
            )
        if name in wanted:
            raise ArtifactError(f"{target}, line {number}: {named(name)} is there twice. {reseal}")
        wanted[name] = match["digest"]
    present = set(_files(root))
    found = [f"{name}: is gone" for name in sorted(wanted.keys() - present)]
    found += [f"{name}: was added" for name in sorted(present - wanted.keys())]
    changed = (name for name in sorted(present & wanted.keys()) if _digest_of(root, name) != wanted[name])
    found += [f"{name}: was changed" for name in changed]
    if found:
        raise ArtifactError(
            f"{root} is not as it was sealed in {target.name}:\n"
            + "\n".join(f"- {line}." for line in found)
            + "\nCopy the artifact again from where it came; or, if you have compiled the model again since, seal it "
            f"again: neml2-aoti seal {root}"
        )
    return {str(root.parent / name): digest for name, digest in wanted.items()}


def _files(root: Path) -> Iterator[str]:
    """Names of all files of an artifact, as the seal writes them: from beside the artifact, with slashes."""

    def fail(error: OSError) -> None:
        raise ArtifactError(f"{error.filename}: cannot be read ({error}). Copy the artifact again.") from error

    for folder, folders, plain in os.walk(root, onerror=fail):
        for name in (*folders, *plain):
            path = os.path.join(folder, name)
            if any(ord(c) < 32 or c == "\\" for c in name):
                raise ArtifactError(f"{folder}: holds a file named {name!r}, which a seal cannot list. Rename it.")
            if name in folders and os.path.islink(path):
                raise ArtifactError(
                    f"{path}: a link to a folder, which a seal does not cover. Copy the folder itself to its place."
                )
            if name in plain and not os.path.isfile(path):
                raise ArtifactError(f"{path}: not a file, which a seal cannot cover. Remove it.")
        yield from (Path(folder, name).relative_to(root.parent).as_posix() for name in plain)


def _digest_of(root: Path, name: str) -> str:
    try:
        return files.read_file(root.parent / name, files.ANY, root).digest
    except FileNotFoundError:
        raise ArtifactNotFoundError(f"{root.parent / name}: is gone. Copy the artifact again.") from None
