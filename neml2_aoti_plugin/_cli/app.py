"""The group of commands, and which exit status an error means."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from io import StringIO

import click

from .. import __version__, errors
from . import output
from .process import FINE, INTERRUPTED, SHORT, WRONG_USE, say

# The commands with what the help says of each, for which none of their modules is imported.
COMMANDS = {
    "doctor": "What is installed, what is wrong, and what mends it.",
    "example": "Write an input file to begin with.",
    "inspect": "What is in a compiled model, as a tree.",
    "verify": "Compare a compiled model with its source.",
    "bench": "Rows per second by batch size and threads.",
    "run": "Run a driver, with a progress bar.",
    "plot": "Draw results of runs.",
    "params": "Promoted parameters: show, set, write to a file.",
    "seal": "Write down what an artifact's files are.",
    "warm": "Make the machine code of solves ahead.",
    "migrate": "Rewrite an old artifact for neml2's own runtime.",
    "serve": "Serve models over HTTP (Open Inference Protocol).",
}

# Those that share a module; the others have one of their name.
PREPARE = dict.fromkeys(("example", "seal", "warm"), "prepare")

# In what torch says, of a CPU and of a GPU; it has no class for the former.
NO_MEMORY = ("can't allocate memory", "out of memory")

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


class Commands(click.Group):
    """The commands, each imported when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names of the commands, in the order of the help."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of a name; None if there is none."""
        if cmd_name not in COMMANDS:
            return None
        module = import_module(f"{__package__}.{PREPARE.get(cmd_name, cmd_name)}")
        command: click.Command = getattr(module, cmd_name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=Commands, help=HELP, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="neml2-aoti")
def app() -> None:
    """Nothing happens before the command itself."""


def run(arguments: Sequence[str]) -> int:
    """Run a command and give its exit status; an error that a user can mend becomes a line."""

    def failed(kind: str, message: str, status: int, line: str = "") -> int:
        say(line or f"neml2-aoti: {message}")
        if "--json" in arguments:
            # An error is a document too.
            command = next((word for word in arguments if word in COMMANDS), "")
            output.write_json(command, status, error={"kind": kind, "message": message})
        return status

    try:
        status = app.main(list(arguments), prog_name="neml2-aoti", standalone_mode=False)
    except click.ClickException as error:
        shown = StringIO()
        error.show(shown)
        return failed("UsageError", error.format_message(), WRONG_USE, shown.getvalue().rstrip())
    except (click.Abort, KeyboardInterrupt):
        say("Interrupted.")
        return INTERRUPTED
    except ModuleNotFoundError as error:
        message = output.missing(error.name)
        if message is None:
            raise
        return failed("MissingPackage", message, WRONG_USE)
    except errors.AOTIError as error:
        of_artifact = isinstance(error, (errors.ArtifactError, errors.DerivativeNotCompiledError))
        return failed(type(error).__name__, str(error), SHORT if of_artifact else WRONG_USE)
    except (MemoryError, RuntimeError) as error:
        # neml2's own class where neml2 came first, ours else.
        if type(error).__name__ == "ConvergenceError":
            return failed("ConvergenceError", str(error), SHORT)
        if not isinstance(error, MemoryError) and not any(text in str(error) for text in NO_MEMORY):
            raise
        message = f"this takes more memory than there is ({str(error)[:200] or 'MemoryError'}). Take fewer rows."
        return failed("MemoryError", message, WRONG_USE)
    return status if isinstance(status, int) else FINE
