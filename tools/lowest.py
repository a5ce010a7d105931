"""Test the service and the reading of artifacts with the lowest releases that pyproject.toml allows.

`python -m tools.lowest`, in the repository root; arguments are handed on to pytest. It makes the environment
build/lowest, with the lowest release of each package of the extra `serve`, and of the small packages that every
installation has. The rest, torch above all, is that of the environment that this runs in.
"""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Sequence
from pathlib import Path

from packaging.markers import default_environment
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "lowest"
# Their lowest releases belong to those of torch and of Python; see `make torch-matrix`.
OTHERS = ("neml2", "llvmlite", "numpy", "torch")
TESTS = ("tests/test_serve*.py", "tests/test_artifact_format.py")
# Other packages' clients need newer releases of the same packages.
LEFT_OUT = "not clients_of_the_protocol"


def main(arguments: Sequence[str]) -> int:
    """Make the environment, and run the tests in it; the exit status is pytest's."""
    wanted = lowest((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    print("lowest releases:", *wanted, flush=True)
    venv.create(FOLDER, clear=True, with_pip=True)
    python = FOLDER / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    # Only wheels: a release without one for this Python is to be told, not compiled for minutes.
    subprocess.run([*install, "--only-binary", ":all:", *wanted], check=True)
    paths = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    site = subprocess.run(
        [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    # What the new environment has itself comes first.
    Path(site, "the_rest.pth").write_text("\n".join(dict.fromkeys(paths)) + "\n", encoding="utf-8")
    subprocess.run([*install, "--no-deps", "--no-build-isolation", str(ROOT)], check=True)
    tests = [str(path) for pattern in TESTS for path in sorted(ROOT.glob(pattern))]
    # Old releases warn of what newer ones of other packages have replaced.
    command = [str(python), "-m", "pytest", "-W", "default", "-k", LEFT_OUT, *tests, *arguments]
    return subprocess.run(command, cwd=ROOT).returncode


def lowest(pyproject: str) -> list[str]:
    """The lowest release of each package that the service needs, as pip takes it.

    Args:
        pyproject: the text of pyproject.toml; read by hand, since Python 3.10 has no reader.
    """
    listed = [re.search(rf"^{name} = \[\n(.*?)^\]", pyproject, re.M | re.S) for name in ("dependencies", "serve")]
    found = []
    for block in listed:
        assert block is not None
        for text in re.findall(r'^\s+"(.*)",$', block[1], re.M):
            requirement = Requirement(text)
            least = [spec.version for spec in requirement.specifier if spec.operator == ">="]
            here = requirement.marker is None or requirement.marker.evaluate(default_environment())  # type: ignore[arg-type]
            if least and here and requirement.name not in OTHERS:
                found.append(f"{requirement.name}=={least[0]}")
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
