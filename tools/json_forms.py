"""Write the tables of docs/tool.md that tell the form of each JSON document, from the dataclasses themselves.

`python -m tools.json_forms` writes them between the marks in that page; a test holds them together.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
import typing
from pathlib import Path
from typing import Any

from neml2_aoti_plugin._cli.bench import BenchReport
from neml2_aoti_plugin._cli.doctor import Diagnosis
from neml2_aoti_plugin._cli.inspect import ArtifactReport, ParametersReport
from neml2_aoti_plugin._cli.migrate import MigrateReport
from neml2_aoti_plugin._cli.plot import PlotReport
from neml2_aoti_plugin._cli.prepare import ExampleReport, SealReport, WarmReport
from neml2_aoti_plugin._cli.run import RunReport
from neml2_aoti_plugin._cli.serve import ServeReport
from neml2_aoti_plugin._cli.verify import Verification

PAGE = Path(__file__).resolve().parent.parent / "docs" / "tool.md"
BEGIN, END = "<!-- forms: python -m tools.json_forms -->", "<!-- end of forms -->"

REPORTS: dict[str, type] = {
    "doctor": Diagnosis,
    "example": ExampleReport,
    "inspect": ArtifactReport,
    "verify": Verification,
    "bench": BenchReport,
    "run": RunReport,
    "plot": PlotReport,
    "params": ParametersReport,
    "seal": SealReport,
    "warm": WarmReport,
    "migrate": MigrateReport,
    "serve": ServeReport,
}

_SIMPLE = {
    str: "string",
    int: "whole number",
    float: "number",
    bool: "true or false",
    types.NoneType: "null",
    Any: "any",
}


def tables() -> str:
    """All forms: a table for each command, and one for each kind of object that they hold."""
    parts = []
    inner: dict[str, type] = {}
    for command, report in REPORTS.items():
        parts += [f"### `{command}`", "", *_table(report, inner), ""]
    parts += ["### Objects", ""]
    done: set[str] = set()
    while waiting := [name for name in inner if name not in done]:
        for name in waiting:
            parts += [f"**{_title(inner[name])}**: {_sentence(inner[name])}", "", *_table(inner[name], inner), ""]
            done.add(name)
    return "\n".join(parts).rstrip()


def page(text: str) -> str:
    """The page with its tables as they should be."""
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n\n{tables()}\n\n{END}{tail}"


def fields_of(report: type) -> dict[str, Any]:
    """The fields of a dataclass with their types."""
    hints = typing.get_type_hints(report)
    return {field.name: hints[field.name] for field in dataclasses.fields(report)}


def explanations(report: type) -> dict[str, str]:
    """What is said of each field: by a comment behind it or above it, or in the docstring of a public class."""
    found: dict[str, str] = {}
    name = above = ""
    parts = re.split("^(?:Args|Attributes):$", inspect.cleandoc(report.__doc__ or ""), flags=re.MULTILINE)
    for line in parts[1].splitlines() if len(parts) > 1 else ():
        start = re.match(r"    (\w+): (.*)", line)
        if start:
            name = start[1]
            found[name] = start[2]
        elif line.strip():
            found[name] += " " + line.strip()
    for line in inspect.getsource(report).splitlines() if not found else ():
        comment, field = re.match(r"    # (.*)", line), re.match(r"    (\w+): [^#]*(?:# (.*))?$", line)
        if comment:
            above += f" {comment[1]}"
        elif field:
            found[field[1]] = (above.strip() or field[2] or "") + "."
            above = ""
    return found


def _table(report: type, inner: dict[str, type]) -> list[str]:
    said = explanations(report)
    lines = ["| key | value | meaning |", "|---|---|---|"]
    for name, hint in fields_of(report).items():
        lines.append(f"| `{name}` | {_words(hint, inner)} | {said[name].replace('|', chr(92) + '|')} |")
    return lines


def _words(hint: Any, inner: dict[str, type]) -> str:
    if hint in _SIMPLE:
        return _SIMPLE[hint]
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        inner[hint.__name__] = hint
        return f"*{_title(hint)}*"
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(_words(argument, inner) for argument in arguments)
    if origin is typing.Literal:
        return " or ".join(f"`{word}`" for word in arguments)
    if origin is tuple:
        if arguments[-1] is Ellipsis:
            return f"list of {_words(arguments[0], inner)}"
        return f"list: {', '.join(_words(argument, inner) for argument in arguments)}"
    if origin is dict:
        return f"object: {_words(arguments[1], inner)} by name"
    raise TypeError(f"{hint} has no place in a JSON document")


def _title(report: type) -> str:
    """`VariableReport` as `variable`."""
    words = re.findall("[A-Z][a-z]+", report.__name__)
    return " ".join(word.lower() for word in words if word != "Report")


def _sentence(report: type) -> str:
    first = inspect.cleandoc(report.__doc__ or "").splitlines()[0]
    return first[0].lower() + first[1:]


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
