"""`neml2-aoti migrate`: an old artifact in the newest layout and schema, so that neml2's own C++ runtime loads it."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .._artifact.decode import metadata, read_metadata
from .._artifact.files import PACKAGE
from .._artifact.locate import METADATA, Place, locate
from .._artifact.rewrite import rewrite
from .._artifact.stub import AOTI_MODEL, parse_input
from .._artifact.upgrade import NEWEST
from .._files import require_outside_artifacts
from ..errors import AOTIError, ArtifactError, InputError
from .output import Report, written
from .target import Target, leaf_name, release_of, require_block

STUB = """[Models]
  [{model}]
    type = {kind}
    artifact_path = '{model}'
  []
[]
"""


@dataclass(frozen=True)
class MigrateReport(Report):
    """What was rewritten."""

    artifact: str  # the old artifact
    model: str  # name of the model
    schema: int  # of the old artifact
    release: str  # the neml2 releases that write that schema
    new_schema: int  # of the new one
    written: str  # folder of the new artifact
    stub: str  # the stub beside it
    leaves: tuple[str, ...]  # as `device/dtype`
    dropped: tuple[str, ...]  # derivatives that the new artifact lacks, as `out:in`

    def render(self) -> Iterator[str]:
        old, new = f"schema {self.schema} (neml2 {self.release})", f"schema {self.new_schema}"
        yield f"{self.model}: {old} -> {new}, {', '.join(self.leaves)}"
        yield from written(self.written, self.stub)
        if self.dropped:
            yield f"without the derivatives {', '.join(self.dropped)}"


def migrate(target: Target, out: Path, drop_derivatives: bool) -> MigrateReport:
    """Rewrite an artifact in the newest schema, in a folder of its own, with its stub."""
    there = target.places()
    for place in there:
        # As a load reads it, which finds what is wrong with it.
        read_metadata(place)
    rewritten = [rewrite(p.document, str(p.metadata), drop_derivatives=drop_derivatives) for p in there]
    schema = there[0].document["schema_version"]
    release = release_of(schema)
    reasons = list(dict.fromkeys(reason for found in rewritten for reason in found.reasons))
    if any(found.document != rewritten[0].document for found in rewritten):
        reasons.append("its leaves have metadata that differ, and the newest layout has one for all")
    if reasons:
        raise ArtifactError(
            f"{target.artifact} (schema {schema}, neml2 {release}) cannot be rewritten: {'; '.join(reasons)}. It runs "
            "with this plugin as it is. For neml2's own runtime compile the model again: neml2-compile INPUT.i --model "
            f"{target.model}"
        )
    folder, stub = out / target.model, out / f"{target.model}_aoti.i"
    for path in (folder, stub):
        require_outside_artifacts(path)
        if os.path.lexists(path):
            raise InputError(f"{path}: is there already. Give another folder to --out, or move it away.")
    _write(folder, stub, there, rewritten[0].document, _stub(target))
    return MigrateReport(
        artifact=str(target.artifact),
        model=target.model,
        schema=schema,
        release=release,
        new_schema=NEWEST,
        written=str(folder),
        stub=str(stub),
        leaves=tuple(map(leaf_name, there)),
        dropped=rewritten[0].dropped,
    )


def _write(folder: Path, stub: Path, there: list[Place], document: dict[str, Any], text: str) -> None:
    """Write all of it to a folder beside its place, look it over, and move it there."""
    out = folder.parent
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=out, ignore_cleanup_errors=True) as scratch:
            draft, draft_stub = Path(scratch, folder.name), Path(scratch, stub.name)
            draft.mkdir()
            (draft / METADATA).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
            for place in there:
                leaf = draft / leaf_name(place)
                leaf.mkdir(parents=True)
                for name in sorted(metadata(document, str(draft / METADATA)).files):
                    (leaf / name).write_bytes(place.folder.read(place.leaf / name, PACKAGE).data)
                # What was written must be an artifact of the newest schema with the leaf.
                read_metadata(locate(draft, place.device.type, place.dtype))
            draft_stub.write_text(text, encoding="utf-8")
            draft.replace(folder)
            try:
                draft_stub.replace(stub)
            except OSError:
                shutil.rmtree(folder, ignore_errors=True)
                raise
    except AOTIError:
        raise
    except OSError as error:
        why = error.strerror or type(error).__name__
        raise InputError(f"{out}: cannot be written ({why}). Give a folder that can be written to.") from error


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
