"""The command `neml2-aoti` in this process, which saves the import of torch, and the document that it prints."""

from __future__ import annotations

import json
import shlex
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict
from io import StringIO
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

import references
from neml2_aoti_plugin import _cli
from tools.json_forms import REPORTS


def printed(*words: object, status: int = 0) -> tuple[str, str]:
    """What a command that ends with this status prints to stdout and stderr."""
    out, err = StringIO(), StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        found = _cli.main([*map(str, words)])
    assert found == status, f"exit status {found}:\n{out.getvalue()}\n{err.getvalue()}"
    return out.getvalue(), err.getvalue()


def answer(*words: object, status: int = 0) -> Any:
    """The result of a command."""
    out, err = printed(*words, "--json", status=status)
    assert err == ""
    document = json.loads(out)
    assert document.keys() == {"form", "command", "status", "result", "error"} and document["error"] is None
    assert (document["form"], document["command"], document["status"]) == (1, words[0], status)
    return document["result"]


def refused(*words: object, status: int = 2) -> str:
    """What a command says that refuses what it is given, which is one line, unless click says how it is used."""
    out, err = printed(*words, "--json", status=status)
    document = json.loads(out)
    assert (document["status"], document["result"]) == (status, None)
    message: str = document["error"]["message"]
    assert message in err and "Traceback" not in err
    return message


def require_form(result: object, command: str) -> None:
    """That a result is what docs/tool.md says of it: these fields, in this order, with values of these types."""
    found: Any = msgspec.convert(result, REPORTS[command])
    assert json.dumps(asdict(found)) == json.dumps(result)


def stub_of(name: str) -> Path:
    """The stub of a model of the catalogue."""
    return references.case(name).file


def copy_of(name: str, folder: Path) -> Path:
    """The stub in a copy of a compiled model, which a test may change."""
    artifact = references.copied(name, folder)
    return artifact.with_name(f"{artifact.name}_aoti.i")


def write_points(file: Path, **tensors: Tensor) -> None:
    """Write tensors by name, in the format of the file's ending."""
    if file.suffix == ".npz":
        np.savez(file, **{name: value.numpy() for name, value in tensors.items()})  # type: ignore[arg-type]
    elif file.suffix == ".pt":
        torch.save(tensors, file)
    else:
        save_file(tensors, file)


def source_input(text: str) -> str:
    """An input file, of a line for each block: `Section/name Type option=value ...`, quoted as in a shell."""
    sections: dict[str, list[str]] = {}
    for line in text.strip().splitlines():
        where, kind, *options = shlex.split(line)
        section, _, name = where.partition("/")
        fields = [f"type = {kind}", *("{} = '{}'".format(*option.split("=", 1)) for option in options)]
        sections.setdefault(section, []).append("\n".join([f"[{name}]", *fields, "[]"]))
    return "\n".join(f"[{section}]\n{chr(10).join(blocks)}\n[]" for section, blocks in sections.items())


# It runs without a compile.
LAW = """
Tensors/times Python expr="Scalar(torch.linspace(0.0, 2.0, 3, dtype=torch.float64))"
Tensors/strains Python expr="SR2(torch.linspace(0.0, 1.0e-3, 3, dtype=torch.float64).reshape(-1, 1, 1) * torch.ones(SHAPE, 6))"
Drivers/driver TransientDriver model=law prescribed_time=times prescribed_SR2_names=STRAIN prescribed_SR2_values=strains
Models/law LinearIsotropicElasticity strain=STRAIN stress=STRESS coefficients='1000 0.25' coefficient_types='YOUNGS_MODULUS POISSONS_RATIO'
"""  # noqa: E501


def elastic_law(path: Path, strain: str = "strain", stress: str = "stress", shape: str = "2") -> Path:
    """An input file of elasticity, by any names and with points of any shape, that takes three steps."""
    text = LAW.replace("STRAIN", strain).replace("STRESS", stress).replace("SHAPE", shape)
    path.write_text(source_input(text))
    return path
