"""Read a stub: which compiled model it has, and the options of its block, whichever neml2-compile wrote it.

Since neml2 3.0.4 the artifact is an `artifact_path`, before it was the metadata file, `meta`. The stubs of 3.0.4 to
3.0.6 name a `solver` besides, because their artifacts do not hold its settings.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._checks import first_line
from .._files import require_plain
from ..errors import ArtifactNotFoundError, InputError, UnknownNameError
from .files import is_there
from .locate import artifact_at

if TYPE_CHECKING:
    import nmhit

AOTI_MODEL = "AOTIModel"
# Of its block.
OPTIONS = ("artifact_path", "meta", "solver")
# What to give where an input file was expected.
STUB = "an input file, such as the stub that neml2-compile wrote beside the artifact, MODEL_aoti.i"

# Option of a solver block: how to read it, and the field of `NewtonSettings` it is; None for one that changes nothing.
_LINE_SEARCH = {
    "linesearch_type": ("param_str", "ls_type"),
    "max_linesearch_iterations": ("param_int", "ls_max_iters"),
    "linesearch_cutback": ("param_float", "ls_cutback"),
    "linesearch_stopping_criteria": ("param_float", "ls_c"),
    "check_negative_criterion": ("param_bool", None),
}
_NEWTON = {
    "abs_tol": ("param_float", "atol"),
    "rel_tol": ("param_float", "rtol"),
    "max_its": ("param_int", "miters"),
    "verbose": ("param_bool", None),
    "linear_solver": ("param_str", None),
}
SOLVERS = {"Newton": _NEWTON, "NewtonWithLineSearch": _NEWTON | _LINE_SEARCH}
TRIALS = 10


@dataclass(frozen=True)
class Stub:
    """What a block asks for."""

    artifact: Path  # path of the artifact's folder or metadata
    # Newton settings by the field names of `NewtonSettings`; None where the block names none.
    solver: dict[str, Any] | None = None


def is_input_file(path: Path) -> bool:
    """Whether a path leads to a file that may be an input file: none of an artifact."""
    return is_there(path) and path.suffix not in (".json", ".pt2")


def model_in(path: Path, model: str | None = None, overrides: tuple[str, ...] = ()) -> tuple[str, Stub]:
    """A compiled model in a stub, the only one unless it is named, and what its block asks for, its path resolved."""
    import nmhit

    root = parse_input(path, overrides)
    found = blocks(root, "Models")
    compiled = {name: block for name, block in found.items() if block.param_optional_str("type", "") == AOTI_MODEL}
    if model is None:
        if not compiled:
            raise InputError(
                f"{path} has no compiled model (no block in [Models] of type {AOTI_MODEL}). Give the stub that "
                "neml2-compile wrote, MODEL_aoti.i, or the artifact's folder."
            )
        if len(compiled) > 1:
            raise InputError(
                f"{path} has several compiled models: {', '.join(compiled)}. Give the name of one: behind the path in "
                f"a command, or Model(..., name={next(iter(compiled))!r})."
            )
        (model,) = compiled
    elif model not in compiled:
        there = ", ".join(compiled) or "none"
        raise UnknownNameError(f"{path} has no compiled model {model!r}; there are: {there}.")
    # An override may be of a promoted parameter, which neml2's side knows.
    overridden = {item.partition(":=")[0] for item in overrides}
    try:
        for option in compiled[model].children(nmhit.NodeType.Field):
            if option.path() not in ("type", *OPTIONS) and option.fullpath() not in overridden:
                raise InputError(
                    f"{option.path()} is {option.raw_val()}, which nobody reads. The block takes {', '.join(OPTIONS)}; "
                    "all else is compiled: compile the model again, with -p PARAMETER for one that is to be changed. "
                    "Solver settings can be given at the load: Model(..., solver={'atol': 1e-9})."
                )
        stub = read_stub(compiled[model], path.parent, lambda name: blocks(root, "Solvers").get(name))
        artifact = stub.artifact.resolve()
        artifact_at(artifact)
    except (ArtifactNotFoundError, InputError) as error:
        raise InputError(f"[Models/{model}] in {path}: {error}") from None
    return model, Stub(artifact, stub.solver)


def parse_input(path: Path, overrides: tuple[str, ...] = (), what: str = STUB) -> nmhit.Root:
    """Parse an input file, with overrides such as `Models/elastic/E:=210000`; `what` is what to give if it is none."""
    import nmhit

    if path.is_dir():
        raise InputError(f"{path}: is a folder. Give {what}.")
    if not is_there(path):
        raise InputError(f"{path}: no such file. Give {what}.")
    require_plain(path, what)
    try:
        return nmhit.parse_file(str(path), [], list(overrides))
    except (nmhit.Error, UnicodeDecodeError, OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as an input file ({first_line(error)[:200]}). Give {what}.") from None


def blocks(root: nmhit.Node, section: str) -> dict[str, nmhit.Node]:
    """The blocks of a section of an input file, by name; a file may have the section several times."""
    import nmhit

    kind = nmhit.NodeType.Section
    tops = [top for top in root.children(kind) if top.path() == section]
    return {block.path(): block for top in tops for block in top.children(kind)}


def read_stub(block: nmhit.Node, folder: Path, solver_block: Callable[[str], nmhit.Node | None]) -> Stub:
    """What a block of type `AOTIModel` asks for; `solver_block` gives the block of a name in the file's `[Solvers]`."""
    options = {option: block.param_optional_str(option, "") for option in OPTIONS}
    given = [option for option in ("artifact_path", "meta") if options[option]]
    if len(given) != 1:
        raise InputError(
            f"{' and '.join(given) or 'no artifact'} given, expected one of artifact_path (the folder that "
            "neml2-compile wrote) and meta (the metadata file, in stubs of neml2 3.0.0 to 3.0.3)."
        )
    # A path is relative to the file that the option itself is in, which the input file may include, or to that of the
    # input file. Overrides count as written in the input file; a text that was no file has no name.
    field = block.find(given[0])
    own = [Path(field.filename).parent] if field is not None and str(field.filename or "") else []
    artifact = find(options[given[0]], *dict.fromkeys([*own, folder]))
    name = options["solver"]
    if not name:
        return Stub(artifact)
    node = solver_block(name)
    if node is None:
        raise InputError(f"solver is {name!r}, but the file has no block [Solvers/{name}]. Add it, or remove solver.")
    return Stub(artifact, read_solver(node))


def find(given: str, *folders: Path) -> Path:
    """What a path in a stub leads to; `folders` are those where the stub may be, the likeliest first."""
    path = Path(given)
    candidates = [folder / path for folder in folders]
    if path.is_absolute():
        # The artifact may have moved together with the stub, and is beside it.
        depths = range(1, len(path.parts))
        candidates = [path, *(folder.joinpath(*path.parts[-depth:]) for folder in folders for depth in depths)]
    for candidate in candidates:
        # Unlike Path.exists, this raises nothing for a path that is too long.
        if os.path.exists(candidate):
            return candidate
    if not path.is_absolute():
        return candidates[0]
    beside = (*candidates[1:], folders[0])[0]
    raise ArtifactNotFoundError(
        f"there is neither {path}, which the stub names, nor {beside} beside the stub. Put the artifact back there, or "
        "correct the path; it may be relative to the stub."
    )


def drivers_of(stub: Path, model: str) -> list[str]:
    """Names of the drivers of a model in its stub; none where there is no stub, or it cannot be read."""
    try:
        drivers = blocks(parse_input(stub), "Drivers")
    except InputError:
        return []
    return [name for name, block in drivers.items() if block.param_optional_str("model", "") == model]


def read_solver(block: nmhit.Node) -> dict[str, Any]:
    """A Newton solver's block as fields of `NewtonSettings`, with the defaults of the release that wrote it."""
    import nmhit

    kind, where = block.param_optional_str("type", ""), f"[Solvers/{block.path()}]"
    if kind not in SOLVERS:
        raise InputError(f"{where}: type is {kind!r}, expected {' or '.join(SOLVERS)} for a compiled model.")
    settings: dict[str, Any] = {"ls_max_iters": TRIALS if kind == "NewtonWithLineSearch" else 1}
    for option in (field.path().rsplit("/", 1)[-1] for field in block.children(nmhit.NodeType.Field)):
        if option == "type":
            continue
        if option not in SOLVERS[kind]:
            raise InputError(f"{where}: a {kind} has no option {option!r}; there are {', '.join(SOLVERS[kind])}.")
        reader, setting = SOLVERS[kind][option]
        try:
            value = getattr(block, reader)(option)
        except nmhit.Error as error:
            raise InputError(f"{where}: {option} is {block.param_str(option)!r}: {error}.") from error
        if setting is not None:
            settings[setting] = value
    return settings
