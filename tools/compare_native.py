"""Compare lockstep mode with neml2's C++ binding, stub by stub, in an environment where that binding works.

`python tools/compare_native.py` makes such an environment in .venv-native (torch 2.12.1 and neml2 3.1.0, without the
plugin), compiles the stubs there, and writes docs/lockstep.md. `--python` names an environment that exists;
`--compile-with` names another that compiles, or has compiled, the stubs.

For each stub one process holds both models, the binding's `Model` and ours. The stub's driver takes ours through its
load history; at each step both models are called with the same tensors. Their outputs are compared, the number of
Newton updates (from the lines that both write to the channel `newton` of the log), the cuts of substepping (channel
`substep`), and, at the last step, the compiled derivatives.

The exit status is 0 if all that was compared agrees, else 1.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import venv
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from neml2_aoti_plugin.model import Model

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from stubs.catalogue import CATALOGUE, Stub  # noqa: E402

TABLE = ROOT / "docs" / "lockstep.md"
NATIVE_VENV = ROOT / ".venv-native"
# Prints the versions of an environment.
VERSIONS = (
    "import json, platform; from importlib import metadata; "
    "print(json.dumps({d.metadata['Name']: d.version for d in metadata.distributions()} "
    "| {'Python': platform.python_version()}))"
)
REQUIRED = {"torch": "2.12.1", "neml2": "3.1.0"}
TOLERANCE = 1e-14
# Ours are chained over segments in another order than the binding's.
DERIVATIVE_TOLERANCE = 1e-12

# Stubs that the binding cannot be compared on, and why.
LEFT_OUT = {
    **dict.fromkeys(
        ("elasticity_float32", "elasticity_stiff"),
        "its graphs compute in float64 under a float32 label; the binding feeds them float32",
    ),
}
# Stubs that both are given one row at a time, and why.
ONE_BY_ONE = {
    "cross_group": "row by row, because the binding fails on two rows (docs/differences.md, sub-batched systems)",
}
# Batch shape in place of a flat one, for stubs whose graphs want another; the metadata do not tell.
BATCH_SHAPES = {"elasticity_static": (3,), "elasticity_rank2": (2, 3)}


@dataclass
class Comparison:
    """What was found on one stub.

    Args:
        stub: Name of the entry of the catalogue.
        steps: Calls compared.
        rows: Material points in each.
        native_updates: Newton updates of the binding, over all calls.
        our_updates: Newton updates of ours.
        unequal: Calls whose Newton updates, or cuts, are not the same in number and order.
        cuts: Spans of substepping of the binding; None for a stub without.
        values: Largest relative difference of an output.
        derivatives: Largest difference of a derivative, times the input over the output; None if none was compiled.
        trouble: What kept the comparison from being made.
    """

    stub: str
    steps: int = 0
    rows: int = 0
    native_updates: int = 0
    our_updates: int = 0
    unequal: list[int] = field(default_factory=list)
    cuts: int | None = None
    values: float = 0.0
    derivatives: float | None = None
    trouble: str = ""

    @property
    def agrees(self) -> bool:
        """Whether counts are equal, and numbers within their tolerances."""
        return (
            not self.trouble
            and not self.unequal
            and self.values <= TOLERANCE
            and (self.derivatives or 0.0) <= DERIVATIVE_TOLERANCE
        )


# -- one stub, in a process of the environment with the binding ----------------------------------------------------


def compare(stub: Stub, folder: Path) -> Comparison:
    """Compare both models on one compiled stub."""
    import neml2
    import neml2.log
    import torch
    from neml2.aoti._aoti import Model as Native
    from neml2.factory import register_neml2_object

    from neml2_aoti_plugin import _log as our_log
    from neml2_aoti_plugin._host.hit import AOTIModel
    from neml2_aoti_plugin.model import Model

    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)  # as neml2-run does
    assert Native.__module__ == "neml2.aoti._aoti", "the C++ binding is not in force"
    native = Native(str(folder / stub.model))
    ours = Model(folder / stub.model, mode="lockstep")
    native_lines: list[str] = []
    our_lines: list[str] = []
    neml2.log.set_sink(lambda _, line: native_lines.append(line))
    our_log.set_sink(lambda _, line: our_lines.append(line))

    # The driver is to run on our model, for the binding's cannot be driven on every stub.
    register_neml2_object("AOTIModel")(AOTIModel)
    found = Comparison(stub.name)
    for step, inputs in enumerate(history(folder / f"{stub.model}_aoti.i", stub)):
        native_lines.clear()
        our_lines.clear()
        wanted = native.forward(inputs)
        got = ours.forward(inputs)
        found.steps += 1
        found.rows = max(found.rows, rows_of(inputs, ours))
        mine, theirs = updates(our_lines), updates(native_lines)
        found.our_updates += sum(mine)
        found.native_updates += sum(theirs)
        spans = [cuts(lines) for lines in (native_lines, our_lines)]
        if spans[0]:
            found.cuts = (found.cuts or 0) + len(spans[0])
        if mine != theirs or spans[0] != spans[1]:
            found.unequal.append(step + 1)
        for name, value in wanted.items():
            found.values = max(found.values, difference(got[name], value))
    if ours.derivative_pairs:
        outputs, theirs_blocks = native.jacobian(inputs)
        _, our_blocks = ours.jacobian(inputs)
        found.derivatives = max(
            difference(our_blocks[out][wrt], plain(block, our_blocks[out][wrt]), size(outputs[out]) / size(inputs[wrt]))
            for out, row in theirs_blocks.items()
            for wrt, block in row.items()
        )
    return found


def history(path: Path, stub: Stub) -> Iterator[dict[str, Tensor]]:
    """Run a stub's driver, and give the inputs of each call as the binding takes them."""
    import neml2

    driver = neml2.load_input(path).get_driver(stub.driver)
    model = driver.model
    calls: list[tuple[Any, ...]] = []
    model.register_forward_pre_hook(lambda _, arguments: calls.append(arguments))
    driver.run()
    for arguments in calls:
        typed = dict(zip(model.input_spec, arguments, strict=True))
        inputs = flat(typed, model.input_sub_batch, BATCH_SHAPES.get(stub.name))
        if stub.name in ONE_BY_ONE:
            for row in range(len(next(iter(inputs.values())))):
                yield {name: value[row : row + 1] for name, value in inputs.items()}
        else:
            yield inputs


def flat(
    typed: dict[str, Any], sub_batch: dict[str, tuple[int, ...]], shape: tuple[int, ...] | None
) -> dict[str, Tensor]:
    """Bring typed inputs to one flat batch axis, or to the given batch shape by repeating rows."""
    import torch

    spread: dict[str, Tensor] = {}
    bases: dict[str, tuple[int, ...]] = {}
    for name, value in typed.items():
        sub, base, data = sub_batch[name], tuple(value.BASE_SHAPE), value.data.detach()
        batch = data.shape[: data.ndim - len(base) - value.sub_batch_ndim]
        if sub and not value.sub_batch_ndim:
            data = data.reshape((*batch, *(1,) * len(sub), *base))
        spread[name] = data.expand((*batch, *sub, *base))
        bases[name] = (*sub, *base)
    common = torch.broadcast_shapes(*(t.shape[: t.ndim - len(bases[name])] for name, t in spread.items()))
    rows = {name: t.expand((*common, *bases[name])).reshape((-1, *bases[name])) for name, t in spread.items()}
    if shape is not None:
        number = int(torch.Size(shape).numel())
        rows = {
            name: t.repeat(-(-number // len(t)), *(1,) * (t.ndim - 1))[:number].reshape(*shape, *bases[name])
            for name, t in rows.items()
        }
    return {name: t.contiguous() for name, t in rows.items()}


def rows_of(inputs: dict[str, Tensor], ours: Model) -> int:
    """Count the points of a call by the first input."""
    name, variable = next(iter(ours.inputs.items()))
    value = inputs[name]
    return int(value.shape[: value.ndim - len(variable.natural_shape)].numel())


def updates(lines: list[str]) -> list[int]:
    """Read the Newton updates of each solve off the log: the last number of each run of iteration lines."""
    counts: list[int] = []
    for line in lines:
        found = re.search(r"\] ITERATION +(\d+),", line)
        if found is None:
            continue
        number = int(found[1])
        if number <= 1 and not (counts and counts[-1] == 0 and number == 1):
            counts.append(number)
        else:
            counts[-1] = number
    return counts


def cuts(lines: list[str]) -> list[str]:
    """Read the spans of substepping off the log."""
    return [line[line.index("span [") :] for line in lines if "span [" in line]


def size(value: Tensor) -> float:
    """Give the largest absolute value, 1 where all is zero."""
    return (float(value.abs().max()) if value.numel() else 0.0) or 1.0


def plain(block: Tensor, like: Tensor) -> Tensor:
    """Bring a constant block, which the binding may leave with batch axes of length 1, to the shape of ours."""
    while block.ndim > 0 and block.ndim >= like.ndim and block.shape[0] == 1 and block.shape != like.shape:
        block = block[0]
    return block.expand(like.shape) if block.shape == like.shape[like.ndim - block.ndim :] else block


def difference(ours: Tensor, native: Tensor, scale: float | None = None) -> float:
    """Give the largest difference over the largest number, or over a scale; infinite if the shapes differ."""
    if ours.shape != native.shape:
        return float("inf")
    gap = float((ours - native).abs().max()) if native.numel() else 0.0
    return gap / (scale or size(native))


def child(name: str, folder: str) -> None:
    """Print the comparison of one stub as a line of JSON."""
    try:
        found = compare(CATALOGUE[name], Path(folder))
    except Exception as error:
        if os.environ.get("COMPARE_NATIVE_TRACEBACK"):
            raise
        found = Comparison(name, trouble=f"{type(error).__name__}: {str(error).splitlines()[0][:200]}")
    print("\n" + json.dumps(asdict(found)))


# -- all stubs -----------------------------------------------------------------------------------------------------


def environment() -> Path:
    """Make the environment with the binding, or find it, and return its Python."""
    python = NATIVE_VENV / ("Scripts" if os.name == "nt" else "bin") / "python"
    if not python.exists():
        print(f"making {NATIVE_VENV} ...", flush=True)
        venv.create(NATIVE_VENV, with_pip=True)
        wanted = [*(f"{name}=={version}" for name, version in REQUIRED.items()), "filelock", "llvmlite", "msgspec"]
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *wanted], check=True)
    return python


def versions(python: Path) -> dict[str, str]:
    """Ask an environment for its versions, and refuse one that the comparison means nothing in."""
    done = subprocess.run([str(python), "-c", VERSIONS], check=True, capture_output=True, text=True, env=plugin_off())
    found: dict[str, str] = json.loads(done.stdout)
    for name, version in REQUIRED.items():
        if found.get(name, "none").partition("+")[0] != version:
            raise SystemExit(f"{python} has {name} {found.get(name, 'none')}, but {version} is needed.")
    return found


def plugin_off() -> dict[str, str]:
    """Give the environment variables for a process with the binding in force and our package on the path."""
    return {
        **os.environ,
        "NEML2_AOTI_PLUGIN": "0",
        "NEML2_AOTI_PLUGIN_MODE": "lockstep",
        "NEML2_LOGS": "newton=debug,substep=debug",
        "PYTHONPATH": str(ROOT),
    }


def folder_of(name: str, python: Path) -> Path:
    """Let an environment compile a stub, or find it compiled."""
    code = f"from stubs.build import compiled; print(compiled({name!r}))"
    done = subprocess.run([str(python), "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name} could not be compiled by {python}:\n{done.stderr}")
    return Path(done.stdout.splitlines()[-1])


def compare_in(python: Path, name: str, folder: Path) -> Comparison:
    """Compare one stub in a process of its own, which the binding may crash."""
    command = [str(python), str(Path(__file__).resolve()), "--child", name, str(folder)]
    done = subprocess.run(command, env=plugin_off(), capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [""])[-1]
        return Comparison(name, trouble=f"exit status {done.returncode}: {last}")
    return Comparison(**json.loads(done.stdout.splitlines()[-1]))


HEAD = ("stub", "calls", "rows", "updates: binding", "ours", "spans", "values", "derivatives", "")


def cells(found: Comparison) -> tuple[str, ...]:
    """Give one row of the table."""
    if found.trouble:
        return found.stub, "", "", "", "", "", "", "", found.trouble
    implicit = found.native_updates or found.our_updates
    verdict = "equal" if found.agrees else "DIFFERS"
    if found.stub in ONE_BY_ONE:
        verdict += f"; {ONE_BY_ONE[found.stub]}"
    if found.unequal:
        verdict += f": counts in {len(found.unequal)} call(s), first {found.unequal[0]}"
    return (
        found.stub,
        str(found.steps),
        str(found.rows),
        str(found.native_updates) if implicit else "-",
        str(found.our_updates) if implicit else "-",
        "-" if found.cuts is None else str(found.cuts),
        f"{found.values:.0e}" if found.values else "0",
        "-" if found.derivatives is None else f"{found.derivatives:.0e}" if found.derivatives else "0",
        verdict,
    )


def page(rows: list[tuple[str, ...]], found: dict[str, str], command: str) -> str:
    """Write docs/lockstep.md."""
    lines = [
        "# Lockstep mode against neml2's C++ binding",
        "",
        f"Made on {date.today()} with neml2 {found['neml2']}, torch {found['torch']} and Python {found['Python']}, "
        "where the binding works, by",
        "",
        f"    {command}",
        "",
        "Each stub's driver takes the model through its load history. At every step the binding's `Model` and this",
        'package\'s `Model(..., mode="lockstep")` are called with the same tensors, in one process. *Updates* are',
        "Newton updates over all calls, counted from the log of each; *spans* are those of substepping. *Values* is",
        "the largest difference of an output in any call, over the largest number in that output. *Derivatives* is the",
        "largest difference of a compiled derivative at the last step, times the largest number in the input, over",
        f"that in the output. *Equal* means: values to {TOLERANCE:.0e}, derivatives to {DERIVATIVE_TOLERANCE:.0e}, and",
        "the same number of updates and the same spans in each solve of each call.",
        "",
        f"| {' | '.join(HEAD)} |",
        "|---|" + "--:|" * (len(HEAD) - 2) + "---|",
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
        "Not compared:",
        "",
        *(f"- `{name}`: {reason}." for name, reason in LEFT_OUT.items()),
        "",
    ]
    return "\n".join(lines)


def main() -> int:
    """Compare all stubs, print the table, and write the page."""
    parser = argparse.ArgumentParser(description="Compare lockstep mode with neml2's C++ binding.")
    parser.add_argument("names", nargs="*", help="entries of the catalogue; all if none is named")
    parser.add_argument("--python", type=Path, help="Python of an environment with the binding; made if not given")
    parser.add_argument("--compile-with", type=Path, help="Python of the environment that compiles the stubs")
    options = parser.parse_args()
    # Not resolved: the Python of a virtual environment is a link to another.
    python = options.python.absolute() if options.python else environment()
    found = versions(python)
    names = [name for name in options.names or CATALOGUE if name not in LEFT_OUT]
    comparisons: list[Comparison] = []
    for name in names:
        folder = folder_of(name, options.compile_with or python)
        comparisons.append(compare_in(python, name, folder))
        shown = zip(HEAD, cells(comparisons[-1]), strict=True)
        print("  ".join(f"{cell:>{max(len(head), 6)}}" for head, cell in shown), flush=True)
    rows = [cells(one) for one in comparisons]
    if not options.names:
        TABLE.write_text(page(rows, found, shlex.join(["python", *sys.argv])), encoding="utf-8")
        print(f"written to {TABLE.relative_to(ROOT)}")
    return 0 if all(one.agrees for one in comparisons) else 1


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:])
    else:
        raise SystemExit(main())
