"""Measure the service under load, and write the measured part of docs/service.md.

`python -m benchmarks.service`, in the repository root. It needs the extra `serve`, and wrk on the PATH.
"""

from __future__ import annotations

import argparse
import shlex
import sys

import torch

from .. import machine
from .load import measure
from .report import draw, measured, write_page
from .soak import soak
from .states import make_states

WORK = machine.ROOT / "out" / "service"
PAGE = machine.ROOT / "docs" / "service.md"


def main() -> int:
    """Do what the command line says; the exit status is 1 where the long run found something wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.service", description=__doc__)
    parser.add_argument("--seconds", type=int, default=4, help="of each measurement (default: 4)")
    parser.add_argument("--rounds", type=int, default=5, help="how often each is made (default: 5)")
    parser.add_argument("--soak", type=int, default=1_000_000, help="requests of the long run; 0 for none")
    parser.add_argument("--keep", action="store_true", help="print the text, and leave the page as it is")
    options = parser.parse_args()
    # As the service has it.
    torch.set_num_threads(1)
    states = make_states()
    loads = measure(states, WORK, options.seconds, options.rounds)
    long = soak(states, WORK, options.soak) if options.soak else None
    command = shlex.join(["python", "-m", "benchmarks.service", *sys.argv[1:]])
    text = measured(loads, long, options.seconds, command)
    if options.keep:
        print(text)
    else:
        write_page(PAGE, text)
        draw(loads, PAGE.with_suffix(".png"))
    return 1 if long is not None and long.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
