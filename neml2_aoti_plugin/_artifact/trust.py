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
from .layout import artifact_at

REQUIRE_SEAL = "NEML2_AOTI_PLUGIN_REQUIRE_SEAL"
_OFF = ("", "0", "false", "no", "off")
# A seal that passed through a Windows editor or git has another end of line; no name in a seal ends so.
_LINE = re.compile(r"(?P<digest>[0-9a-f]{64}) [ *](?P<name>[^\r]+)\r?")


def seal(artifact: str | os.PathLike[str]) -> Path:
    """Seal an artifact as it is now: from then on it loads only as long as no byte of it changes.

    Args:
        artifact: the artifact's folder, its metadata file, or a folder inside it.

    Returns:
        The file of the seal, beside the artifact's folder: a list that `sha256sum -c` checks. One that was there is
        replaced.

    Raises:
        ArtifactNotFoundError: there is no artifact at the path.
        ArtifactError: it holds what cannot be sealed, or the seal cannot be written.
    """
    root = _real(artifact_at(Path(artifact)).root)
    lines = [f"{_digest_of(root, name)}  {name}\n" for name in sorted(_files(root))]
    target = _seal_of(root)
    try:
        with draft(target) as scratch:
            scratch.write_text("".join(lines), encoding="utf-8", errors="surrogateescape")
    except InputError as error:
        raise ArtifactError(
            f"{target}: cannot write the seal ({error}). It must stand beside the artifact; make {root.parent} "
            "writable, or seal a copy elsewhere."
        ) from error
    return target


def is_sealed(artifact: str | os.PathLike[str]) -> bool:
    """Whether an artifact has a seal; a load compares it with that. Any path that `seal` takes will do."""
    return os.path.lexists(_seal_of(_real(artifact_at(Path(artifact)).root)))


def admit(root: Path, metadata: Iterable[Path]) -> Folder:
    """Refuse an artifact that may not be loaded, by its folder and metadata files; nothing in it is opened before."""
    roots = files.allowed_roots()
    if roots is not None:
        for path in (root, *metadata):
            files.root_above(path, os.path.realpath(path), roots)
    folder = _real(root)
    sealed = _verified(folder)
    if sealed is None and os.environ.get(REQUIRE_SEAL, "").strip().lower() not in _OFF:
        raise ArtifactError(
            f"{root}: this artifact has no seal {_seal_of(folder)}, and {REQUIRE_SEAL} asks for one. If you trust "
            f"the artifact as it is, write the seal: neml2-aoti seal {root}"
        )
    return Folder(folder, sealed)


def _real(root: Path) -> Path:
    """The folder itself, also where the path leads over links: its seal is beside it, not beside them."""
    return Path(os.path.realpath(root))


def _seal_of(root: Path) -> Path:
    return root.with_name(f"{root.name}.sha256")


def _verified(root: Path) -> dict[str, str] | None:
    """Compare an artifact with its seal; the SHA-256 of each file by absolute path, None where there is no seal."""
    target = _seal_of(root)
    try:
        text = files.read_file(target, files.SEAL, None).decode("utf-8", "surrogateescape")
    except FileNotFoundError:
        if os.path.lexists(target):
            raise ArtifactError(f"{target}: a link to a seal that is not there. {_reseal(root)}") from None
        return None
    except ArtifactError as error:
        why = str(error).removeprefix(f"{target}: ").removesuffix(files.AGAIN).rstrip(". ")
        raise ArtifactError(f"{target}: cannot read the seal ({why}). {_reseal(root)}") from error
    wanted = _parsed(text, root, target)
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


def _parsed(text: str, root: Path, target: Path) -> dict[str, str]:
    """The SHA-256 of each file by the name that the seal has for it."""
    wanted: dict[str, str] = {}
    for number, line in enumerate(text.removesuffix("\n").split("\n"), 1):
        match = _LINE.fullmatch(line)
        name = match["name"] if match else ""
        parts = name.split("/")
        if match is None or parts[0] != root.name or len(parts) < 2 or any(part in ("", ".", "..") for part in parts):
            # Without its text: the file may be another one than a seal.
            what = f"a SHA-256 and {named(name)}" if match else f"{len(line)} characters of another kind"
            raise ArtifactError(
                f"{target}, line {number}: {what if line else 'an empty line'}, expected a SHA-256 and the name of a "
                f"file in {root.name}/. {_reseal(root)}"
            )
        if name in wanted:
            raise ArtifactError(f"{target}, line {number}: {named(name)} is there twice. {_reseal(root)}")
        wanted[name] = match["digest"]
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


def _fail(error: OSError) -> None:
    raise ArtifactError(f"{error.filename}: cannot be read ({error}). Copy the artifact again.") from error


def _reseal(root: Path) -> str:
    return f"Copy the seal again, or, if you trust the artifact as it is: neml2-aoti seal {root}"
