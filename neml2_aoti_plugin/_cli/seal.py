"""`neml2-aoti seal`: write down what an artifact's files are, after which no change of them loads."""

from __future__ import annotations

from dataclasses import dataclass

import click

from .options import json_option
from .output import show

EPILOG = """\b
Examples:
  neml2-aoti seal aoti/elasticity
  cd aoti && sha256sum -c elasticity.sha256
"""


@dataclass(frozen=True)
class SealReport:
    """What was sealed."""

    seals: tuple[str, ...]  # the files that were written, one for each artifact


@click.command(epilog=EPILOG)
@click.argument("paths", metavar="ARTIFACT|STUB...", nargs=-1, required=True)
@json_option
def command(paths: tuple[str, ...], as_json: bool) -> int:
    """Write the SHA-256 of an artifact's files beside it.

    From then on the artifact loads only as long as none of its files changes. Under NEML2_AOTI_PLUGIN_REQUIRE_SEAL=1,
    only artifacts with a seal load.
    """
    from .._artifact.trust import seal
    from .target import find_target

    # All are looked for before one is sealed.
    targets = [find_target(path) for path in paths]
    return show("seal", SealReport(tuple(str(seal(found.artifact)) for found in targets)), as_json, render)


def render(report: SealReport) -> tuple[str, ...]:
    """The files."""
    return report.seals
