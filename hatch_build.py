"""Compile the machine code of solves when the package is built; see `machine/emit.py`."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FILE = "neml2_aoti_plugin/_solve/code_file.py"


class MachineCodeHook(BuildHookInterface):  # type: ignore[type-arg]
    """Has the file of machine code there, for wheels, sdists and editable installs."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Make the file if it is not there or older than its sources; what is built holds it."""
        code_file = _load(Path(self.root) / FILE)
        try:
            code_file.read()
        except code_file.Unusable:
            command = [sys.executable, "-m", "machine.emit"]
            subprocess.run(command, cwd=self.root, check=True)
        build_data["artifacts"].append(str(code_file.PATH.relative_to(Path(self.root).resolve())))


def _load(file: Path) -> Any:
    """A module of the package without the package, whose requirements are not those of its build."""
    spec = importlib.util.spec_from_file_location("code_file", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Its dataclass looks for its module there.
    sys.modules["code_file"] = module
    spec.loader.exec_module(module)
    return module
