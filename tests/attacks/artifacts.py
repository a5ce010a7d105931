"""Copies of the elasticity artifact, which tests damage, and what is said when they are loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from neml2_aoti_plugin import ArtifactError, Model
from neml2_aoti_plugin._artifact.package import GraphSignature, open_archive, signature_in

INPUTS = {"strain": torch.zeros(6, dtype=torch.float64)}


def package(artifact: Path, name: str = "elasticity") -> Path:
    """One of its packages: that of values, or of derivatives (`elasticity_jvp`)."""
    return artifact / f"cpu/float64/{name}.pt2"


def damage(artifact: Path, make: Callable[[bytes], bytes], name: str = "elasticity") -> Path:
    """Change the bytes of one of its packages; give the file."""
    file = package(artifact, name)
    file.write_bytes(make(file.read_bytes()))
    return file


def old_metadata(artifact: Path, **changes: Any) -> str:
    """Its metadata as neml2 wrote it before 3.0.7, in a file per device."""
    document = json.loads((artifact / "metadata.json").read_text())
    return json.dumps({**document, "device": "cpu", "dtype": "float64", **changes})


def signature_of(file: Path) -> GraphSignature | None:
    """What the graph of a package takes."""
    with open_archive(file, file.read_bytes()) as archive:
        return signature_in(archive)


def refusal(artifact: Path, kind: type[Exception] = ArtifactError, **options: Any) -> str:
    """The error that loading it raises."""
    with pytest.raises(kind) as raised:
        Model(artifact, **options)
    return str(raised.value)


def runs(artifact: Path) -> bool:
    """Whether it loads and gives a stress."""
    return Model(artifact).forward(INPUTS)["stress"].shape == (6,)
