"""The commands with their options and help.

What each does is a function of its name, whose module is imported when the command runs: `--help` waits for none.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import click

from .. import __version__
from .options import (
    DTYPE,
    FILE,
    MOST_ROWS,
    MOST_THREADS,
    Finite,
    Function,
    by_name,
    command,
    counts,
    device_options,
    target_arguments,
)

set_option = by_name(
    "--set", "values", form="NAME=VALUE", numbers=True, help="Give a promoted parameter another value."
)

HELP = """Look at, check and run compiled NEML2 models.

ARTIFACT is the folder that neml2-compile wrote, and STUB the input file beside it, MODEL_aoti.i. Each command says
more with --help, and prints a JSON document with --json.

Exit status: 0 if all is well, 1 if the artifact or the model falls short, 2 for wrong use.

\b
Examples:
  neml2-aoti doctor aoti/elasticity
  neml2-aoti inspect aoti/elasticity
  neml2-aoti verify aoti/elasticity_aoti.i --against elasticity.i
"""


@command("What is installed, what is wrong, and what mends it.")
@click.option(
    "--try-binding",
    is_flag=True,
    help="Try neml2's own binding in a process of its own, with the artifact if one is given, instead of reporting "
    "what we measured.",
)
@partial(target_arguments, required=False)
def doctor() -> None:
    """Show what is installed, what is active, what is wrong, and what mends it.

    Exit status 1 if something is wrong.

    Examples:
      neml2-aoti doctor
      neml2-aoti doctor aoti/elasticity
      neml2-aoti doctor aoti/elasticity_aoti.i --try-binding
    """


@command("Write an input file to begin with.", "prepare")
@click.argument("folder", type=FILE, metavar="DIR")
def example() -> None:
    """Write a viscoplastic model with a driver to the folder DIR, and show the commands that compile and run it.

    The driver pulls three material points to 3 % strain. The folder is made if it is not there; a file that is there
    is not written over.

    Examples:
      neml2-aoti example first
    """


@command("What is in a compiled model, as a tree.")
@target_arguments
def inspect() -> None:
    """Show what is in a compiled model: leaves, inputs, outputs, parameters, derivatives, segments, files.

    Examples:
      neml2-aoti inspect aoti/elasticity
      neml2-aoti inspect aoti/elasticity_aoti.i elasticity
      neml2-aoti inspect aoti/elasticity --json
    """


@command("Compare a compiled model with its source.")
@click.option("--against", type=FILE, metavar="INPUT.i", help="The input file that was compiled.")
@click.option("--source-model", metavar="NAME", help="The model in INPUT.i, if it has another name there.")
@click.option("--golden", type=FILE, help="Compare with what --record has written.")
@click.option(
    "--record", type=FILE, help="Write points, values and derivatives to a golden file, if all comparisons pass."
)
@click.option("--points", type=FILE, help="Evaluate at these points: .npz, .pt or .safetensors, a tensor per input.")
@click.option("--driver", metavar="NAME", help="Evaluate where this driver of the stub calls the model.")
@click.option("--rows", type=click.IntRange(1, MOST_ROWS), default=16, help="Points of each kind.")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, help="Of the random points.")
@by_name("--scale", "scales", form="NAME=VALUE", numbers=True, help="Standard deviation of an input's random entries.")
@click.option("--rtol", type=Finite(0.0), default=1e-6, help="Tolerance against source and golden file.")
@click.option(
    "--difference-rtol", type=Finite(0.0), help="Tolerance against finite differences. [1e-5, of float32 1e-3]"
)
@click.option("--plot", "picture", type=FILE, help="Draw the worst errors to this file (.png, .svg or .pdf).")
@target_arguments
def verify() -> None:
    """Compare a compiled model's values and derivatives with its source.

    The points are those at which the stub's driver calls the model and random ones around them, or random ones alone
    if there is no driver. Where there is no source, derivatives are compared with finite differences. A golden file
    ARTIFACT.golden.safetensors beside the artifact is used without being named.

    Errors are relative to the largest entry of each quantity. Exit status 1 if one is above the tolerance.

    Examples:
      neml2-aoti verify aoti/elasticity_aoti.i --against elasticity.i
      neml2-aoti verify aoti/elasticity --record aoti/elasticity.golden.safetensors
      neml2-aoti verify aoti/elasticity
    """


@command("Rows per second by batch size and threads.")
@click.option("--rows", callback=counts(MOST_ROWS), default="1,10,100,1000,10000", help="Batch sizes.")
@click.option("--threads", callback=counts(MOST_THREADS), help="Numbers of threads. [as many as torch uses]")
@click.option(
    "--call",
    type=click.Choice(["forward", "jacobian", "solve"]),
    default="forward",
    help="Method of the model to time.",
)
@click.option("--seconds", type=Finite(0.0), default=0.5, help="For each measurement.")
@click.option("--points", type=FILE, help="Evaluate at these points; see verify.")
@click.option("--driver", metavar="NAME", help="Evaluate where this driver of the stub calls the model.")
@click.option("--plot", "picture", type=FILE, help="Draw rows per second over batch size to this file.")
@target_arguments
def bench() -> None:
    """Time a compiled model.

    The points are those of verify, repeated to fill a batch. Other programs on the machine disturb the measurement.

    Examples:
      neml2-aoti bench aoti/viscoplasticity_aoti.i
      neml2-aoti bench aoti/viscoplasticity_aoti.i --rows 1,100,10000 --threads 1,2 --plot speed.png
      neml2-aoti bench aoti/elasticity --call jacobian --json
    """


@command("Run a driver, with a progress bar.")
@click.argument("stub", type=FILE, metavar="STUB")
@click.argument("driver")
@click.argument("overrides", nargs=-1, metavar="[PATH:=VALUE]...")
@set_option
@click.option("--parameters", type=FILE, help="Take the promoted parameters from this file (see params).")
@click.option("--out", type=FILE, help="Write the result to this file: .pt (neml2's form), .npz, .csv or .nc (netCDF).")
@click.option("--device", metavar="DEVICE", help="Of tensors and of the leaf, such as cpu or cuda:1.")
@click.option("--dtype", type=DTYPE, default="float64", help="Of tensors and of the leaf.")
def run() -> None:
    """Run a driver of an input file.

    PATH:=VALUE overrides an option of the input file, as with neml2-run. Exit status 1 if a step does not converge;
    then no file is written.

    Examples:
      neml2-aoti run aoti/viscoplasticity_aoti.i driver --out result.npz
      neml2-aoti run aoti/promoted_aoti.i driver --set promoted.E=80000 --out soft.csv
      neml2-aoti run aoti/promoted_aoti.i driver 'Drivers/driver/save_as:=soft.pt'
    """


@command("Draw results of runs.")
@click.argument("results", type=FILE, metavar="RESULT...", nargs=-1, required=True)
@click.option("--out", type=FILE, required=True, help="The picture: .png, .svg or .pdf.")
@click.option("--x", metavar="NAME", help="Horizontal axis.")
@click.option("--y", "ys", multiple=True, metavar="NAME", help="Vertical axis; may be given several times.")
@click.option("--row", "rows", type=int, multiple=True, help="A point to draw; may be given several times. [all]")
@click.option("--label", metavar="NAME", help="Tell points apart by this quantity, or by @point, their number.")
@click.option("--title", help="Title of the picture.")
@click.option("--xlabel", metavar="TEXT", help="What the horizontal axis is called, with its unit.")
@click.option("--ylabel", "ylabels", multiple=True, metavar="TEXT", help="What each --y is called, in their order.")
def plot() -> None:
    """Draw results that `neml2-aoti run --out` or neml2-run have written, several into one picture.

    NAME is a scalar such as temperature, a component such as stress.xy, or an invariant of a symmetric tensor:
    .vonmises, .equivalent (of a strain, the square root of 2/3 of its deviator's product with itself), .norm, .trace,
    .mean. @time and @step are there in any case. Each site of a sub-batch is a line; stress[2].xy is one of them.

    Stresses share their axes, and so does what else has the last word of its name in common; other quantities have
    axes of their own, one above the other.

    Examples:
      neml2-aoti plot result.npz --out curve.png
      neml2-aoti plot result.npz --x strain.xx --y stress.xx --row 0 --ylabel 'axial stress (MPa)' --out uniaxial.svg
      neml2-aoti plot stiff.npz soft.npz --x @time --y stress.vonmises --out both.png
    """


@command("Promoted parameters: show, set, write to a file.", "inspect")
@click.option("--from", "file", type=FILE, help="Begin with the values in this file instead of the artifact's.")
@set_option
@click.option("--out", type=FILE, help="Write the values to this file (.safetensors).")
@click.option("--force", is_flag=True, help="Write over --out, whatever file it is.")
@target_arguments
def params() -> None:
    """Show the promoted parameters, and write values to a file that `Model(..., parameters=FILE)` takes.

    The artifact itself is never changed. A file is for one artifact, by the SHA-256 of its metadata: --from also takes
    that of another artifact with the same parameters, and --out writes it for this one. A file that is there is
    replaced if it holds parameters and is not that of --from; with --force in any case.

    Examples:
      neml2-aoti params aoti/promoted
      neml2-aoti params aoti/promoted --set promoted.E=80000 --out soft.safetensors
      neml2-aoti params aoti/promoted --from soft.safetensors
      python -c "from neml2.aoti import Model; Model('aoti/promoted', parameters='soft.safetensors')"
    """


@command("Write down what an artifact's files are.", "prepare")
@click.argument("paths", metavar="ARTIFACT|STUB...", nargs=-1, required=True)
def seal() -> None:
    """Write the SHA-256 of an artifact's files beside it.

    From then on the artifact loads only as long as none of its files changes. Under NEML2_AOTI_PLUGIN_REQUIRE_SEAL=1,
    only artifacts with a seal load.

    Examples:
      neml2-aoti seal aoti/elasticity
      cd aoti && sha256sum -c elasticity.sha256
    """


@command("Make the machine code of solves ahead.", "prepare")
def warm() -> None:
    """Make machine code for this processor and keep it, so that no first solve waits for it.

    NEML2_AOTI_PLUGIN_CACHE names another folder than the user's cache folder. Exit status 1 if it cannot be kept.

    Examples:
      neml2-aoti warm
      NEML2_AOTI_PLUGIN_CACHE=/opt/cache neml2-aoti warm
    """


@command("Rewrite an old artifact for neml2's own runtime.")
@click.option("--out", type=FILE, required=True, help="Folder for the new artifact and its stub.")
@click.option("--drop-derivatives", is_flag=True, help="Leave derivatives out whose graphs do not fit.")
@partial(target_arguments, leaf=False)
def migrate() -> None:
    """Rewrite an artifact of an older neml2 in the layout and schema of neml2 3.1.0.

    neml2's own C++ runtime loads only those; this plugin runs old ones as they are. The graphs are copied unchanged,
    so it works where they are what the newest schema expects: not for implicit models from before 3.0.7, whose Newton
    step is one graph, nor for promoted parameters from before 3.0.4. Exit status 1 if it cannot be done.

    Examples:
      neml2-aoti migrate old/elasticity_aoti.i --out new
      neml2-aoti migrate old/elasticity --out new --drop-derivatives
    """


# Each limit of a service with its kind, what it bounds, and what holds where it is not given.
LIMITS: tuple[tuple[str, click.ParamType[Any], str], ...] = (
    ("--gather-rows", click.IntRange(1), "Rows that a compiled call gathers; 1 gathers none. [2048]"),
    ("--wait-ms", click.FloatRange(0), "How long a request may wait for others to gather. [0]"),
    ("--queue-rows", click.IntRange(1), "Rows that may wait for each model. [65536]"),
    ("--request-rows", click.IntRange(1), "Rows of one request. [65536]"),
    ("--body-bytes", click.IntRange(1), "Size of the body of a request. [16777216]"),
    ("--bodies-bytes", click.IntRange(1), "Size of the bodies of all unanswered requests. [268435456]"),
    ("--header-bytes", click.IntRange(256), "Size of the headers of a request. [32768]"),
    ("--receive-seconds", click.FloatRange(0.01), "In which the body must arrive. [10]"),
    ("--answer-seconds", click.FloatRange(0.01), "In which a waiting request must be answered. [30]"),
    ("--idle-seconds", click.FloatRange(0.01), "That a connection may be open without another request. [75]"),
    ("--stop-seconds", click.FloatRange(1), "In which accepted requests are finished at the end. [20]"),
    ("--connections", click.IntRange(1), "Open connections of each process. [1024]"),
)


def limit_options(function: Function) -> Function:
    """The options of all limits."""
    for name, kind, text in reversed(LIMITS):
        function = click.option(name, type=kind, help=text)(function)
    return function


@command("Serve models over HTTP (Open Inference Protocol).")
@click.argument("paths", metavar="[ARTIFACT|STUB]...", nargs=-1)
@by_name("--name", "others", form="NAME=PATH", help="Serve this artifact or stub under NAME.")
@by_name("--parameters", form="NAME=FILE", help="Take values of promoted parameters from a file.")
@click.option("--host", default="127.0.0.1", help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=8080, help="0 for any free one.")
@click.option("--uds", type=FILE, help="Listen on this Unix socket instead.")
@click.option("--workers", type=click.IntRange(1, 1024), default=1, help="Number of processes.")
@click.option("--threads", type=click.IntRange(1, MOST_THREADS), default=1, help="Threads of torch in each.")
@click.option(
    "--token-file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Holds the token; else the environment variable NEML2_AOTI_SERVE_TOKEN does.",
)
@click.option("--no-token", is_flag=True, help="Listen beyond this machine without a token.")
@click.option("--allow-unsealed", is_flag=True, help="Listen beyond this machine with artifacts without a seal.")
@click.option("--quiet", is_flag=True, help="Log no requests but those that fail in the service.")
@click.option("--check", is_flag=True, help="Load and call the models, tell of them, and end.")
@limit_options
@device_options
def serve() -> None:
    """Serve compiled models over HTTP, by the Open Inference Protocol (V2).

    What waits is evaluated together: one compiled call takes all requests that came during the last one. SIGTERM or
    Ctrl-C stops the service once what it has accepted is answered. The log is one JSON object a line, on the standard
    output; --json is for --check. docs/service.md tells more.

    Examples:
      neml2-aoti serve aoti/elasticity
      neml2-aoti serve aoti/viscoplasticity_aoti.i --name soft=aoti/promoted --check
      neml2-aoti serve aoti/elasticity --host 0.0.0.0 --token-file /run/secrets/token --workers 4
    """


class Commands(click.Group):
    """The commands, in the order in which a user meets them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Their names."""
        return [*self.commands]


@click.group(
    cls=Commands,
    commands=[doctor, example, inspect, verify, bench, run, plot, params, seal, warm, migrate, serve],
    help=HELP,
    context_settings={"help_option_names": ["-h", "--help"], "show_default": True},
)
@click.version_option(__version__, prog_name="neml2-aoti")
def app() -> None:
    """Nothing happens before the command itself."""
