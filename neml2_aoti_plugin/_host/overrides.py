"""Overrides of an input file that reach a compiled model, and those that nobody would read.

neml2 adds `PATH:=VALUE` to an input file as it is parsed, whether there is such a block or not. The stub of a compiled
model has none of the blocks that the model was made of, so that most overrides of the source input lead nowhere.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import nmhit
import torch
from neml2 import factory as objects
from neml2.schema import HitSchema
from neml2.settings import Settings

from .._artifact.decode import read_metadata
from .._artifact.locate import locate
from .._artifact.schema import Parameter
from .._artifact.stub import SOLVERS, read_stub
from ..errors import AOTIError, InputError

# Sections from whose blocks neml2 builds objects, each by its `type`.
BUILT = ("Models", "Drivers", "Tensors", "Solvers", "EquationSystems", "Data")
# Those of which models are made.
SOURCE = ("Models", "Solvers", "EquationSystems", "Data")


class OpenSchema(HitSchema):  # type: ignore[misc]
    """The options of a block that may name promoted parameters besides; `parameter_values` refuses the others.

    Which parameters there are is known once the artifact has been read.
    """

    def reject_unknown_fields(self, node: nmhit.Node) -> None:
        """Refuse nothing yet."""

    def require_known(self, node: nmhit.Node) -> None:
        """Refuse all others, with a ValueError of neml2: for a block whose artifact cannot be loaded."""
        super().reject_unknown_fields(node)

    @property
    def names(self) -> list[str]:
        """Names of the options."""
        return [field.name for field in self.fields]


class Option(NamedTuple):
    """An option of an input file, `section/block/name`; the parts are empty from the right where there are fewer."""

    path: str
    section: str
    block: str
    name: str
    text: str  # the value, as it was written
    field: Any


def parameter_values(
    block: nmhit.Node, factory: Any, schema: OpenSchema, parameters: Mapping[str, Parameter]
) -> dict[str, Any]:
    """The values of promoted parameters (a number, a tensor or a typed one) among a file's options, by boundary name.

    `Models/creep/eta` stands for the parameter `creep.eta`, or for one whose name ends in `.creep.eta`; so does the
    option of the source input that neml2 keeps there, such as `Models/creep/reference_stress`. An override that nobody
    would read, or whose value does not fit, is an error.
    """
    root, model = factory._root, block.path()
    written = _as_written(factory._path)
    authored = {name: parameter.name for name, parameter in parameters.items()}
    # Stubs of neml2 3.0.0 to 3.0.3 name the metadata.
    old, solver = block.find("meta") is not None, block.param_optional_str("solver", "")
    values = {}
    for option in _options(root):
        section, name, key = option.section, option.block, option.name
        own = (section, name) == ("Models", model)
        if own and key in {"type", *schema.names}:
            continue
        holder = factory._find_in_section(section, name) if section in BUILT else None
        kind = holder.param_optional_str("type", "") if holder is not None else ""
        if old and section in SOURCE and kind != "AOTIModel" and name != solver:
            # It left the blocks of the source in the stub, which has the compiled model in the place of what read them.
            kind = ""
        # Where the file cannot be parsed alone, it is known only of a block that neml2 cannot build.
        given = (
            written.get(option.path) != option.text if written is not None else own or (section in BUILT and not kind)
        )
        if not (own or given):
            continue
        if section == "Models" and key and (own or not kind):
            # What is in the file would be read by `load_model` alone, not by others that read stubs.
            parameter = _parameter(option, authored, model) if given else None
            if parameter is not None:
                values[parameter] = _value(option, factory, parameters[parameter])
                continue
            if any(_parameter(option, names, other) is not None for other, names in _other_models(model, factory)):
                continue
        elif _is_read(option, holder, kind, written or ()):
            continue
        cure = _cure(option, kind, model, schema, authored, root)
        raise InputError(f"{option.path} is {option.text}, which nobody reads. {cure}")
    return values


def _as_written(path: Path) -> dict[str, str] | None:
    """The options of a file without overrides, by path; None where it cannot be parsed so."""
    try:
        return {option.path: option.text for option in _options(nmhit.parse_file(path))}
    except (nmhit.Error, OSError, ValueError, RuntimeError):
        return None


def _options(node: nmhit.Node) -> Iterator[Option]:
    """All options below a node."""
    for child in node.children():
        if child.type() == nmhit.NodeType.Field:
            path = child.fullpath()
            section, _, rest = path.partition("/")
            block, _, name = rest.partition("/")
            yield Option(path, section, block, name, str(child.raw_val()), child)
        elif child.type() == nmhit.NodeType.Section:
            yield from _options(child)


def _blocks(root: nmhit.Node, section: str) -> Iterator[nmhit.Node]:
    """The blocks of a section of a file that have a type."""
    for top in root.children(nmhit.NodeType.Section):
        if top.path() == section:
            yield from (b for b in top.children(nmhit.NodeType.Section) if b.param_optional_str("type", ""))


def _parameter(option: Option, authored: Mapping[str, str], model: str) -> str | None:
    """The promoted parameter, by its name at the boundary, that an option of `[Models]` stands for."""
    block, key = option.block, option.name.replace("/", ".")
    below = {name: inside for name, inside in authored.items() if f".{inside}".rpartition(".")[0].endswith(f".{block}")}
    keys = {key, *_attributes(key, {inside.rpartition(".")[2] for inside in below.values()})}
    found = [name for name, inside in below.items() if inside.rpartition(".")[2] in keys]
    found = found or [name for name, inside in authored.items() if block == model and inside == key]
    if len(found) > 1:
        raise InputError(
            f"{option.path} stands for several promoted parameters: {', '.join(found)}. Name one of them: "
            f"Models/{model}/{authored[found[0]]}:=VALUE."
        )
    return found[0] if found else None


def _attributes(key: str, promoted: Collection[str]) -> set[str]:
    """The parameters that hold an option in those types of neml2 that have all the promoted ones.

    The stub does not tell the type of a block that was compiled.
    """
    found = set()
    for kind in objects._registry.values():
        schema = _schema_of(kind)
        held = {f.name: f.ctor_name for f in schema.fields if f.kind == "parameter"} if schema is not None else {}
        if key in held and set(promoted) <= set(held.values()):
            found.add(held[key])
    return found


def _schema_of(kind: type | None) -> HitSchema | None:
    """The options of a type of neml2, where it declares them."""
    schema = getattr(kind, "hit", None)
    return schema if isinstance(schema, HitSchema) else None


def _value(option: Option, factory: Any, parameter: Parameter) -> Any:
    """The value that an option gives a parameter: numbers, or the name of a tensor of the file."""
    text = option.field.parent().param_str(option.field.path()).strip()
    if factory.has_tensor(text):
        return factory.get_tensor(text)
    try:
        numbers = [float(word) for word in text.split()]
    except ValueError:
        numbers = []
    count = math.prod(parameter.base_shape)
    if len(numbers) != count or not all(map(math.isfinite, numbers)):
        raise InputError(
            f"{option.path} is {option.text}; expected {count} finite number(s), or the name of a tensor in [Tensors], "
            f"for the promoted parameter {parameter.name!r}."
        )
    return torch.tensor(numbers, dtype=torch.float64).reshape(parameter.base_shape)


def _other_models(model: str, factory: Any) -> Iterator[tuple[str, dict[str, str]]]:
    """The promoted parameters of the other compiled models of a file, as far as these can be read."""
    for block in _blocks(factory._root, "Models"):
        if block.path() == model or block.param_str("type") != "AOTIModel":
            continue
        try:
            stub = read_stub(block, factory._path.parent, lambda name: factory._find_in_section("Solvers", name))
            place = locate(stub.artifact.resolve(), factory._device, factory._dtype)
            metadata = read_metadata(place)
        except AOTIError:
            continue
        renamed = metadata.aliases.parameters
        yield block.path(), {renamed.get(p.name, p.name): p.name for p in metadata.parameters}


def _is_read(option: Option, holder: Any, kind: str, written: Collection[str]) -> bool:
    """Whether neml2 may read an option that is not of `[Models]`, or of a block there that has a type."""
    section, block, key = option.section, option.block, option.name
    if not block:
        # A variable, which programs give to every input file, whether it refers to it or not.
        return True
    if section == "Settings":
        return block in {field.name for field in fields(Settings)}
    if section not in BUILT:
        return any(path.startswith(f"{section}/") for path in written)
    if not kind or holder.find(key) is None or holder.find(key).raw_val() != option.text:
        # A section that a file has twice gets the override in its second part, while neml2 reads the first.
        return False
    if key in SOLVERS.get(kind, ()):
        return True
    schema = _schema_of(objects._registry.get(kind))
    if schema is None:
        return True
    alone = nmhit.Section(block)
    alone.add_child(nmhit.Field(key, "0"))
    try:
        schema.reject_unknown_fields(alone)
    except ValueError:
        return False
    return True


def _cure(
    option: Option, kind: str, model: str, schema: OpenSchema, authored: Mapping[str, str], root: nmhit.Node
) -> str:
    """What can be changed instead."""
    section, block, key = option.section, option.block, option.name
    if section == "Solvers" and not kind:
        return (
            "The Newton settings are in the artifact. To change them, add a solver and name it: "
            f"'Models/{model}/solver:={block}' 'Solvers/{block}/type:=Newton' (or NewtonWithLineSearch) "
            f"'Solvers/{block}/{key or 'max_its'}:=VALUE'."
        )
    if section in ("Models", "EquationSystems", "Data") and (not kind or block == model):
        paths = ", ".join(f"Models/{model}/{name.removeprefix(f'{model}.')}" for name in authored.values())
        parameters = f"the promoted parameters, by overrides of {paths}, and " if paths else ""
        return (
            f"What the model {model!r} was made of is compiled. What can be changed here is {parameters}the options "
            f"{', '.join(schema.names)} of [Models/{model}]. For anything else compile the model again, with this "
            "override or with -p PARAMETER."
        )
    there = [found.path() for found in _blocks(root, section)]
    if kind:
        return f"[{section}/{block}] of type {kind} has no such option, or the file has [{section}] more than once."
    return f"In [{section}] there are: {', '.join(there) or 'none'}." if section in BUILT else "Correct the path."
