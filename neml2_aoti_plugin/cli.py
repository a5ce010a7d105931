"""The command `neml2-aoti`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: in place of those of the process.

    Returns:
        The exit status: 0, or 1 if the artifact cannot be dealt with.
    """
    parser = argparse.ArgumentParser(prog="neml2-aoti", description="Tend artifacts that neml2-compile wrote.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    seal = commands.add_parser(
        "seal",
        help="write the SHA-256 of an artifact's files beside it, after which no change of them loads",
        description="Write the SHA-256 of an artifact's files beside it. From then on the artifact loads only as long "
        "as none of its files changes. The list can also be checked with: cd PARENT && sha256sum -c NAME.sha256",
    )
    seal.add_argument("path", nargs="+", metavar="PATH", help="the artifact's folder, as neml2-compile wrote it")
    options = parser.parse_args(arguments)
    return _seal(options.path)


def _seal(paths: Sequence[str]) -> int:
    # Late, so that --help does not wait for torch.
    from .errors import AOTIError
    from .sealing import seal

    for path in paths:
        try:
            print(seal(path))
        except AOTIError as error:
            print(f"neml2-aoti: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
