"""Is a leaf of the compile that its metadata is of? A leaf of an earlier compile may have been left beside newer ones.

neml2-compile writes one metadata file for all leaves of an artifact, each time it compiles one, and nothing in it says
which leaf is of which compile. So leaves are compared with each other, and the times of the files tell which is the
latest. In a copy they may not; then nothing is refused.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from . import perdevice
from .compatibility import files_of
from .generated import of_one_source, read_generated
from .locate import METADATA, leaves
from .place import Place, dtype_name
from .schema import Metadata

# neml2-compile writes the metadata right behind the last package; some file systems and archives round times to two
# seconds. It takes longer than this to start again and compile a package, and a copy takes less.
_AT_ONCE = 2.0
_COMPILED = 3.0


@dataclass(frozen=True)
class Kinship:
    """How a leaf goes with the others of its artifact.

    Args:
        fault: why it does not belong to the metadata, with the cure; empty if it does for all that can be told.
        doubt: why it may not belong to it, with the cure; empty if there is no doubt.
        left: packages in the leaf that the metadata does not name; an earlier compile left them.
        absent: packages that the metadata names and the leaf does not have.
    """

    fault: str = ""
    doubt: str = ""
    left: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()


def kinship(metadata: Metadata, place: Place) -> Kinship:
    """Compare a leaf with the others of its artifact.

    Args:
        metadata: of the artifact.
        place: of the leaf.

    Returns:
        What was found. An artifact of one leaf has nothing to compare it with.
    """
    names = files_of(metadata)
    here = {file.name for file in place.leaf.glob("*.pt2")}
    fault, doubt = _judged(names & here, place)
    return Kinship(fault, doubt, tuple(sorted(here - names)), tuple(sorted(names - here)))


def _judged(names: set[str], place: Place) -> tuple[str, str]:
    """What speaks against a leaf, and what may."""
    shared = place.metadata.name == METADATA
    root = place.metadata.parent if shared else place.metadata.parent.parent
    if shared:
        folders = [root / device / dtype for device, dtype in leaves(root)]
    else:
        folders = [f.parent for f in perdevice.files_below(root) if f.name == place.metadata.name]
    others = [folder for folder in folders if folder != place.leaf]
    if place.leaf not in folders or not others:
        return "", ""
    # Before neml2 3.0.7 each device has its own metadata, so that none of them is of another compile than that.
    latest = _latest(folders, names, place.metadata) if shared else None
    if latest == place.leaf:
        return "", ""
    verdicts = {other: _of_one_source(names, place, other) for other in ([latest] if latest else others)}
    strange = [other for other, same in verdicts.items() if same is False]
    unclear = [other for other, same in verdicts.items() if same is None]
    if latest is not None and strange:
        options = f"--device {place.device.type} --dtype {dtype_name(place.dtype)}"
        return (
            f"{place.leaf}: is of an earlier compile, of another source than the metadata, which was written with "
            f"{latest}: the constants of the graphs differ. It would give the numbers of the earlier model. Compile "
            f"it again, by the command of the latest compile with {options}, or remove the folder.",
            "",
        )
    if strange:
        return (
            "",
            f"{place.leaf}: is of another source than {_listed(strange)}: the constants of the graphs differ, and "
            "nothing tells which of them is of the latest compile. The earlier one gives the numbers of an earlier "
            "model. Remove it, or compile all leaves again from one source.",
        )
    if unclear and place.folder.sealed is None:
        return (
            "",
            f"{place.leaf}: may be of another source than {_listed(unclear)}: the graphs and their constants differ. "
            "Then the earlier one gives the numbers of an earlier model. Compile all leaves again from one source; or, "
            f"if they are of one, seal the artifact, which ends this warning: neml2-aoti seal {root}",
        )
    return "", ""


def _listed(folders: Iterable[Path]) -> str:
    return " and ".join(map(str, folders))


def _of_one_source(names: Iterable[str], place: Place, other: Path) -> bool | None:
    """Whether two leaves are of one source: False if a package tells that they are not, None if one leaves it open."""
    same_device = place.metadata.name == METADATA and other.parent.name == place.leaf.parent.name
    clear = True
    for name in sorted(names):
        mine, theirs = (read_generated(folder / name, place.folder) for folder in (place.leaf, other))
        if mine is None or theirs is None:
            continue
        same = of_one_source(mine, theirs, same_device)
        if same is False:
            return False
        clear = clear and same is True
    return True if clear else None


def _latest(folders: list[Path], names: Iterable[str], metadata: Path) -> Path | None:
    """The leaf that the metadata was written with, as far as the times of the files tell."""
    try:
        spans = {}
        for folder in folders:
            times = [os.stat(folder / name).st_mtime for name in names if os.path.exists(folder / name)]
            if times:
                spans[folder] = (min(times), max(times))
        written = os.stat(metadata).st_mtime
    except OSError:
        return None
    latest = max(spans, key=lambda folder: spans[folder][1], default=None)
    if latest is None or abs(written - spans[latest][1]) > _AT_ONCE:
        return None
    before = max((end for folder, (_, end) in spans.items() if folder != latest), default=0.0)
    return latest if spans[latest][0] - before >= _COMPILED else None
