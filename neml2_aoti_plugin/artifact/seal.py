"""The seal of an artifact: a list of the SHA-256 of each of its files, beside it, as `sha256sum` writes and checks it.

The seal of the folder `aoti/elasticity` is the file `aoti/elasticity.sha256`. It tells of every change since it was
written; it does not tell who wrote it.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ..errors import ArtifactError, ArtifactNotFoundError

SUFFIX = ".sha256"
_LINE = re.compile(r"(?P<digest>[0-9a-f]{64}) [ *](?P<name>.+)")
_CHUNK = 1 << 20

# What the files of verified artifacts must be, by absolute path of the artifact and of the file. A graph is loaded long
# after its artifact was verified, and must still be the one that was.
_verified: dict[str, dict[str, str]] = {}


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
    lines = [f"{_digest_of(root.parent / name)}  {name}\n" for name in sorted(_files(root))]
    target = seal_file(root)
    try:
        handle, scratch = tempfile.mkstemp(prefix=f".{target.name}-", dir=root.parent)
        with os.fdopen(handle, "w", encoding="utf-8", errors="surrogateescape") as out:
            out.writelines(lines)
        os.chmod(scratch, 0o644)
        os.replace(scratch, target)
    except OSError as error:
        raise ArtifactError(
            f"{target}: cannot write the seal ({error}). It must stand beside the artifact; make {root.parent} "
            "writable, or seal a copy elsewhere."
        ) from error
    return target


def verify(root: Path) -> bool:
    """Compare an artifact with its seal.

    Args:
        root: its folder.

    Returns:
        Whether it has a seal.

    Raises:
        ArtifactError: a file was changed, added or removed since, or the seal is damaged.
    """
    root = _real(root)
    target = seal_file(root)
    try:
        text = target.read_bytes().decode("utf-8", "surrogateescape")
    except FileNotFoundError:
        _verified.pop(str(root), None)
        return False
    except OSError as error:
        raise ArtifactError(f"{target}: cannot read the seal ({error}). {_reseal(root)}") from error
    wanted = _parse(text, root, target)
    present = set(_files(root))
    found = [f"{name}: is gone" for name in sorted(set(wanted) - present)]
    found += [f"{name}: was added" for name in sorted(present - set(wanted))]
    found += [
        f"{name}: was changed"
        for name in sorted(present & set(wanted))
        if _digest_of(root.parent / name) != wanted[name]
    ]
    if found:
        raise ArtifactError(
            f"{root} is not as it was sealed in {target.name}:\n"
            + "\n".join(f"- {line}." for line in found)
            + "\nCopy "
            f"the artifact again from where it came. Only if you know the change and trust it: neml2-aoti seal {root}"
        )
    _verified[str(root)] = {str(root.parent / name): digest for name, digest in wanted.items()}
    return True


def expected(file: Path) -> str | None:
    """The SHA-256 that a file of a verified artifact must have; None where it is of none."""
    folder = os.path.realpath(os.path.dirname(file) or ".")
    path = os.path.join(folder, os.path.basename(file))
    while True:
        if folder in _verified:
            return _verified[folder].get(path)
        above = os.path.dirname(folder)
        if above == folder:
            return None
        folder = above


def require(file: Path, data: bytes, digest: str | None) -> None:
    """Refuse the bytes of a file that are not those that were sealed.

    Args:
        file: for messages.
        data: its bytes.
        digest: its SHA-256 when it was verified; None for a file that has no seal.

    Raises:
        ArtifactError: the bytes are others.
    """
    if digest is not None and hashlib.sha256(data).hexdigest() != digest:
        raise ArtifactError(
            f"{file}: was changed after the sealed artifact was verified. Copy the artifact again from where it came, "
            "and load the model anew."
        )


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
                f"{target}, line {number}: {line[:100]!r}, expected a SHA-256 and the name of a file in {root.name}/. "
                f"{_reseal(root)}"
            )
        if name in wanted:
            raise ArtifactError(f"{target}, line {number}: {name!r} is there twice. {_reseal(root)}")
        wanted[name] = match["digest"]
    if not wanted:
        raise ArtifactError(f"{target}: the seal is empty. {_reseal(root)}")
    return wanted


def _files(root: Path) -> Iterator[str]:
    """Names of all files of an artifact, as the seal writes them: from beside the artifact, with slashes."""
    for folder, folders, files in os.walk(root, onerror=_fail):
        inside = Path(folder).relative_to(root.parent).as_posix()
        for name in (*folders, *files):
            if any(ord(c) < 32 or c == "\\" for c in name):
                raise ArtifactError(f"{folder}: holds a file named {name!r}, which a seal cannot list. Rename it.")
        for name in folders:
            if os.path.islink(os.path.join(folder, name)):
                raise ArtifactError(
                    f"{os.path.join(folder, name)}: a link to a folder, which a seal does not cover. Copy the folder "
                    "itself to its place."
                )
        for name in files:
            if not os.path.isfile(os.path.join(folder, name)):
                raise ArtifactError(f"{os.path.join(folder, name)}: not a file, which a seal cannot cover. Remove it.")
            yield f"{inside}/{name}"


def _digest_of(file: Path) -> str:
    digest = hashlib.sha256()
    try:
        with file.open("rb", buffering=0) as source:
            while chunk := source.read(_CHUNK):
                digest.update(chunk)
    except OSError as error:
        raise ArtifactError(f"{file}: cannot be read ({error}). Copy the artifact again.") from error
    return digest.hexdigest()


def _fail(error: OSError) -> None:
    raise ArtifactError(f"{error.filename}: cannot be read ({error}). Copy the artifact again.") from error


def _reseal(root: Path) -> str:
    return f"Copy the seal again, or, if you trust the artifact as it is: neml2-aoti seal {root}"
