"""Tell whether, how and over what the plugin is active, importing neither torch nor neml2."""

from __future__ import annotations

import platform
import sys
from dataclasses import dataclass
from importlib import metadata
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

from neml2_aoti_plugin import _autoload

# What the binding in neml2's wheels does, by torch (major, minor); measured with this neml2.
_MEASURED_WITH = "3.1.0"
_WRONG_SHAPES = "imports, then reads wrong tensor shapes, so that compiled models fail"
_MEASURED = {
    (2, 10): "works",
    (2, 11): "works",
    (2, 12): "works",
    (2, 13): _WRONG_SHAPES,
    (2, 14): _WRONG_SHAPES,
    (2, 15): "does not import, so that AOTIModel is not registered",
}


@dataclass(frozen=True)
class Status:
    """Whether the plugin is active, and what it stands on.

    Attributes:
        active: neml2 uses the plugin, or will once it is imported.
        reason: Why that is so.
        armed: How the plugin came in: "entry point", "import", "late" (after neml2), or None.
        owner: The class that owns the HIT type `AOTIModel`; None while neml2 has none registered.
        plugin: The plugin's version.
        neml2: neml2's version; None where it is not installed.
        torch: torch's version; None where it is not installed.
        python: Python's version.
        native_on_disk: Whether neml2's own binding is installed; None without neml2.
        native_binding: What neml2's own binding would do with this torch.
        kernels: What the Newton loop runs on, "native" or "torch", and why.
        graphs: How compiled graphs are called on a CPU: "by their C interface", but for those that cannot be called so,
            or "by torch's runner", and why. A function that torch lacks is known once a model has been loaded.
    """

    active: bool
    reason: str
    armed: str | None
    owner: str | None
    plugin: str
    neml2: str | None
    torch: str | None
    python: str
    native_on_disk: bool | None
    native_binding: str
    kernels: str
    graphs: str

    def __str__(self) -> str:
        on_disk = {True: "on disk", False: "not on disk", None: "no neml2"}[self.native_on_disk]
        rows = {
            "because": self.reason,
            "armed by": {"late": "import, after neml2"}.get(self.armed or "", self.armed or "nothing"),
            "AOTIModel": self.owner or "not registered",
            "versions": f"neml2 {self.neml2 or '-'}, torch {self.torch or '-'}, Python {self.python}",
            "neml2's binding": f"{on_disk}; {self.native_binding}",
            "Newton loop": self.kernels,
            "compiled graphs": self.graphs,
        }
        head = f"neml2-aoti-plugin {self.plugin}: {'active' if self.active else 'not active'}"
        return "\n".join([head, *(f"  {name:<16} {value}" for name, value in rows.items())])


def status() -> Status:
    """Tell whether the plugin is active and what neml2's own binding would have done, in this process as it is now."""
    from ._solve import machine_code

    neml2, torch = installed("neml2"), installed("torch")
    registered = getattr(sys.modules.get("neml2.factory"), "_registry", {}).get(_autoload.HIT_TYPE)
    owner = None if registered is None else f"{registered.__module__}.{registered.__qualname__}"
    active, reason = _activity(neml2, torch, owner)
    finder = _autoload.current()
    on_disk = _native_on_disk()
    try:
        implementation, why = machine_code.chosen()
        by = "their C interface" if implementation == machine_code.NATIVE else "torch's runner"
        kernels, graphs = f"{implementation} ({why})", f"by {by} ({why})"
    except ValueError as error:
        kernels = graphs = str(error)
    return Status(
        active=active,
        reason=reason,
        armed=None if finder is None else finder.route,
        owner=owner,
        plugin=installed(__name__.partition(".")[0]) or "",
        neml2=neml2,
        torch=torch,
        python=platform.python_version(),
        native_on_disk=on_disk,
        native_binding=native_verdict(neml2, torch, on_disk),
        kernels=kernels,
        graphs=graphs,
    )


def native_verdict(neml2: str | None, torch: str | None, on_disk: bool | None) -> str:
    """What neml2's own binding does with a torch, in words that begin with "unknown" for what was not measured."""
    if not on_disk or torch is None:
        return "cannot be used"
    if neml2 != _MEASURED_WITH:
        return f"unknown: measured with neml2 {_MEASURED_WITH} only"
    major, _, rest = torch.partition(".")
    minor = rest.partition(".")[0]
    key = (int(major), int(minor)) if major.isdigit() and minor.isdigit() else (0, 0)
    return _MEASURED.get(key, "unknown: not measured with this torch")


def _activity(neml2: str | None, torch: str | None, owner: str | None) -> tuple[bool, str]:
    finder = _autoload.current()
    if finder is None:
        return False, _autoload.problem or "its import finder was taken out of sys.meta_path"
    if finder.failure is not None:
        return False, f"it stepped aside: {type(finder.failure).__name__}: {finder.failure}"
    for name, version in {"neml2": neml2, "torch": torch}.items():
        if version is None:
            return False, f"{name} is not installed"
    if "neml2" not in sys.modules:
        return True, "it is in place for when neml2 is imported"
    aoti = sys.modules.get("neml2.aoti._aoti")
    home = getattr(getattr(aoti, "Model", None), "__module__", None) or ""
    if not home.startswith("neml2_aoti_plugin."):
        return False, "neml2 has not taken it up" if aoti is None else "neml2's own binding is loaded"
    if owner is None or not owner.startswith("neml2_aoti_plugin."):
        return False, f"the HIT type {_autoload.HIT_TYPE} belongs to another class"
    return True, "it stands in for neml2's binding"


def installed(name: str) -> str | None:
    """The version of a package: of what is imported, else of what is installed; None where it is not there."""
    version = getattr(sys.modules.get(name), "__version__", None)
    if version is not None:
        # neml2's own begins with a v.
        return str(version).removeprefix("v")
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _native_on_disk() -> bool | None:
    module: ModuleType | None = sys.modules.get("neml2")
    spec = find_spec("neml2") if module is None else module.__spec__
    folders = None if spec is None else spec.submodule_search_locations
    if not folders:
        return None
    return any(
        (Path(folder) / "aoti" / f"_aoti{suffix}").is_file() for folder in folders for suffix in EXTENSION_SUFFIXES
    )
