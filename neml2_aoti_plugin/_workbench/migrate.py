"""Rewrite an old artifact in the newest layout and schema, so that neml2's own C++ runtime loads it."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .._artifact.compatibility import files_of
from .._artifact.decode import read_metadata
from .._artifact.files import METADATA as METADATA_KIND
from .._artifact.files import PACKAGE
from .._artifact.layout import METADATA
from .._artifact.locate import Place, locate
from .._artifact.rewrite import Rewritten, rewrite
from .._artifact.stub import AOTI_MODEL, parse_input
from .._artifact.upgrade import NEWEST
from .._files import require_outside_artifacts
from ..errors import AOTIError, ArtifactError, InputError
from .describe import name_of, release_of
from .target import Target, places, require_block

STUB = """[Models]
  [{model}]
    type = {kind}
    artifact_path = '{model}'
  []
[]
"""


@dataclass(frozen=True)
class MigrateReport:
    """What was rewritten.

    Args:
        artifact: the old artifact.
        model: name of the model.
        schema: of the old artifact.
        release: the neml2 releases that write that schema.
        new_schema: of the new one.
        written: folder of the new artifact.
        stub: the stub beside it.
        leaves: as `device/dtype`.
        dropped: derivatives that the new artifact lacks, as `out:in`.
    """

    artifact: str
    model: str
    schema: int
    release: str
    new_schema: int
    written: str
    stub: str
    leaves: tuple[str, ...]
    dropped: tuple[str, ...]


def migrate(target: Target, out: Path, *, drop_derivatives: bool = False) -> MigrateReport:
    """Write an artifact anew in the newest form; the graphs are copied as they are.

    Args:
        target: the old artifact, or its stub; neither is changed.
        out: folder to write to, as neml2-compile's `--output-dir`.
        drop_derivatives: whether derivatives whose graphs do not fit may be left out.

    Returns:
        What was written: the artifact `out/MODEL` and the stub `out/MODEL_aoti.i`.

    Raises:
        InputError: there is something in the place of what would be written, or it cannot be written.
        ArtifactError: the graphs do not allow it, or the old artifact may not be loaded or is damaged.
    """
    there = places(target)
    if not there:
        raise ArtifactError(f"{target.artifact} has metadata and no leaf (a folder DEVICE/DTYPE). Copy it whole.")
    rewritten = [_rewritten(place, drop_derivatives) for place in there]
    schema = read_metadata(there[0].metadata, there[0].folder).schema
    reasons = list(dict.fromkeys(reason for found in rewritten for reason in found.reasons))
    if any(found.document != rewritten[0].document for found in rewritten):
        reasons.append("its leaves have metadata that differ, and the newest layout has one for all")
    if reasons:
        release = release_of(schema)
        told = f"{target.artifact} (schema {schema}, neml2 {release}) cannot be rewritten: {'; '.join(reasons)}."
        cure = f"For neml2's own runtime compile the model again: neml2-compile INPUT.i --model {target.model}"
        raise ArtifactError(f"{told} It runs with this plugin as it is. {cure}")
    folder, stub = out / target.model, out / f"{target.model}_aoti.i"
    for path in (folder, stub):
        require_outside_artifacts(path)
        if os.path.lexists(path):
            raise InputError(f"{path}: is there already. Give another folder to --out, or move it away.")
    text = _stub(target)
    _write(folder, stub, there, rewritten[0], text)
    return MigrateReport(
        artifact=str(target.artifact),
        model=target.model,
        schema=schema,
        release=release_of(schema),
        new_schema=NEWEST,
        written=str(folder),
        stub=str(stub),
        leaves=tuple(f"{place.device.type}/{name_of(place)}" for place in there),
        dropped=rewritten[0].dropped,
    )


def _rewritten(place: Place, drop_derivatives: bool) -> Rewritten:
    # First as a load reads it, which finds what is wrong with it.
    read_metadata(place.metadata, place.folder)
    document: dict[str, Any] = json.loads(place.folder.read(place.metadata, METADATA_KIND).data)
    return rewrite(document, str(place.metadata), drop_derivatives=drop_derivatives)


def _write(folder: Path, stub: Path, there: list[Place], found: Rewritten, text: str) -> None:
    """Write all of it to a folder beside its place, look it over, and move it there."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise _unwritable(folder.parent, error) from None
    try:
        draft = scratch / folder.name
        draft.mkdir()
        (draft / METADATA).write_text(json.dumps(found.document, indent=2) + "\n", encoding="utf-8")
        for place in there:
            leaf = draft / place.device.type / name_of(place)
            leaf.mkdir(parents=True)
            for name in sorted(files_of(read_metadata(draft / METADATA))):
                (leaf / name).write_bytes(place.folder.read(place.leaf / name, PACKAGE).data)
            _require_readable(draft, place)
        (scratch / stub.name).write_text(text, encoding="utf-8")
        draft.replace(folder)
        try:
            (scratch / stub.name).replace(stub)
        except OSError:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    except AOTIError:
        raise
    except OSError as error:
        raise _unwritable(folder, error) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _require_readable(draft: Path, place: Place) -> None:
    """What was written must be an artifact of the newest schema with the leaf."""
    new = locate(draft, place.device.type, name_of(place))
    read_metadata(new.metadata, new.folder)


def _stub(target: Target) -> str:
    """The old stub with the model where the new artifact will be; a short one where there is none."""
    if target.stub is None:
        return STUB.format(model=target.model, kind=AOTI_MODEL)
    import nmhit

    root = parse_input(target.stub)
    block = require_block(root, "Models", target.model, target.stub)
    for name in [field.path() for field in block.children(nmhit.NodeType.Field)]:
        if name != "type":
            block.remove_child(name)
    block.add_child(nmhit.Field("artifact_path", f"'{target.model}'"))
    text: str = root.render()
    return text.strip("\n") + "\n"


def _unwritable(path: Path, error: OSError) -> InputError:
    why = error.strerror or type(error).__name__
    return InputError(f"{path}: cannot be written ({why}). Give a folder that can be written to.")
