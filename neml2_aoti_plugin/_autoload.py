"""Put the plugin in neml2's way: one import finder that answers for neml2's binding and its HIT class.

torch calls `autoload` while it is imported, so nothing here may raise, import torch or neml2, or take time: only
built-in modules are imported at the top.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

SWITCH = "NEML2_AOTI_PLUGIN"
HIT_TYPE = "AOTIModel"
HIT_MODULE, BINDING = "neml2_aoti_plugin._host.hit", "neml2_aoti_plugin._host.binding"
# neml2's module -> the module of ours whose names stand in for it.
STAND_INS = {"neml2.aoti._aoti": BINDING, "neml2.aoti._shim": HIT_MODULE}

# Why the plugin was not armed, for status().
problem: str | None = None


class Finder:
    """The import finder; the one in `sys.meta_path` also remembers how it came there and what became of it.

    It is also the loader of neml2's modules that others of the plugin stand in for: it fills them with their names.
    """

    # Found by this mark rather than by class, so that reloading this module does not put a second one in place.
    neml2_aoti_plugin = True

    def __init__(self, route: str, torch_was_imported: bool) -> None:
        self.route = route
        self.torch_was_imported = torch_was_imported
        self.failure: BaseException | None = None
        self.loading = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Answer for the modules that the plugin stands in for; None leaves others to the finders behind this one."""
        if fullname not in STAND_INS or self.failure is not None:
            return None
        # The import system holds its global lock here, so nothing else is imported before the loader's turn.
        from importlib.machinery import ModuleSpec

        return ModuleSpec(fullname, self, origin=STAND_INS[fullname])  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Leave it to the import system to make an empty module; give neml2's own if ours cannot be imported."""
        # What our modules import of neml2 may ask for the binding in turn: then it is on its way.
        if not self.loading and self.failure is None:
            self.loading = True
            try:
                load_stand_ins()
            except Exception as error:
                # neml2 must come up as if the plugin were not there, so both modules are given up together.
                self.failure = error
                warn(
                    f"neml2-aoti-plugin cannot be imported ({type(error).__name__}: {error}), so neml2 uses its own "
                    f"binding. Reinstall the plugin, or switch it off by {SWITCH}=0."
                )
            finally:
                self.loading = False
        if self.failure is None:
            return None
        from importlib.util import find_spec, module_from_spec

        native = spec.loader_state = find_spec(spec.name)
        if native is None:
            raise ModuleNotFoundError(f"No module named {spec.name!r}", name=spec.name)
        return module_from_spec(native)

    def exec_module(self, module: ModuleType) -> None:
        """Copy the names over; classes keep the plugin's `__module__`, so they pickle."""
        native: ModuleSpec | None = module.__spec__ and module.__spec__.loader_state
        if native is not None and native.loader is not None:
            module.__spec__ = native
            native.loader.exec_module(module)
            return
        names = vars(sys.modules[STAND_INS[module.__name__]])
        # Of the special names all but these belong to a module's identity.
        special = {"__all__", "__dir__", "__doc__", "__getattr__"}
        vars(module).update({name: value for name, value in names.items() if name in special or name[:2] != "__"})
        # The native binding's `log` can be imported as a module as well.
        if isinstance(names.get("log"), type(sys)):
            sys.modules[f"{module.__name__}.log"] = names["log"]


def load_stand_ins() -> None:
    """Import the plugin's modules that stand in, and register the HIT type; raises whatever their import raises."""
    _import(BINDING)
    hit = _import(HIT_MODULE)
    if hit is None or not hasattr(hit, "AOTIModel"):
        hit = _import_anew(HIT_MODULE)
    from neml2.factory import register_neml2_object

    register_neml2_object(HIT_TYPE)(hit.AOTIModel)


def _import(name: str) -> ModuleType | None:
    """Import a module; None if another thread is at it and waits for what this thread is importing."""
    from importlib import import_module

    try:
        return import_module(name)
    except RuntimeError as error:
        if type(error).__name__ != "_DeadlockError":
            raise
        return None


def _import_anew(name: str) -> ModuleType:
    """Import a module that is half made and waits for neml2, in this thread or another one.

    Whoever imports it gets what is in `sys.modules` when the half-made one comes to its end: the module from here.
    """
    from importlib.machinery import PathFinder
    from importlib.util import module_from_spec

    spec = PathFinder.find_spec(name, sys.modules[name.rpartition(".")[0]].__path__)
    if spec is None or spec.loader is None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    module = sys.modules[name] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def neml2_is_imported() -> bool:
    """Tell whether neml2 is there and has run to its end; the mark is the import system's own."""
    neml2 = sys.modules.get("neml2")
    return neml2 is not None and not getattr(getattr(neml2, "__spec__", None), "_initializing", False)


def warn(message: str) -> None:
    """Warn, also where warnings are errors: there it is printed, because nothing here may raise."""
    import warnings

    try:
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    except Warning:
        print(message, file=sys.stderr)


def current() -> Finder | None:
    """Give the finder that is in place, if one is."""
    finders: list[Any] = sys.meta_path
    return next((entry for entry in finders if getattr(entry, "neml2_aoti_plugin", False) is True), None)


def replace(finder: Finder) -> None:
    """Replace what neml2 has by ours, where it was imported first; or leave it as it is."""
    finder.route = "late"
    try:
        load_stand_ins()
        for name in STAND_INS:
            sys.modules.pop(name, None)
        aoti = sys.modules.get("neml2.aoti")
        if aoti is None:
            # The native binding did not import, so neml2 gave its subpackage up; with ours it comes up.
            vars(sys.modules["neml2"])["_aoti_module"] = _import("neml2.aoti")
        else:
            for name in STAND_INS:
                _import(name)
            vars(aoti).update(Model=sys.modules[BINDING].Model, AOTIModel=sys.modules[HIT_MODULE].AOTIModel)
        log: ModuleType | None = sys.modules.get("neml2.log")
        if log is not None:
            # It is to steer our store, with the levels that its old one had.
            ours, old = sys.modules[BINDING].log, log._store
            ours.apply_env()
            for channel in log.CHANNELS:
                level = old.effective_level(channel)
                if ours.effective_level(channel) != level:
                    ours.set_default_level(channel, level)
            ours.set_sink(log._forward)
            vars(log).update(_backend=ours, _store=ours)
    except Exception as error:
        finder.failure = error
        warn(
            f"neml2-aoti-plugin was imported after neml2 and cannot take the place of its binding "
            f"({type(error).__name__}: {error}); neml2 stays as it was."
        )


def arm(route: str) -> None:
    """Put the finder in place, once; where neml2 is imported already, put ours in place of what it has.

    `route` is what brought us here: "import" or "entry point".
    """
    global problem
    try:
        if os.environ.get(SWITCH, "").strip().lower() in {"0", "false", "no", "off"}:
            problem = f"it is switched off by {SWITCH}={os.environ[SWITCH]}"
            return
        found = current()
        if found is None:
            found = Finder(route, "torch" in sys.modules)
            sys.meta_path.insert(0, found)
            # In mid-import neml2 has yet to ask for its binding.
            if neml2_is_imported():
                replace(found)
        elif route == "entry point" and found.torch_was_imported and found.route == "import":
            # Loading the entry point imported the package, which armed a moment ago, with torch in mid-import.
            found.route = route
    except Exception as error:
        problem = f"it could not be armed: {type(error).__name__}: {error}"


def autoload() -> None:
    """Arm the plugin; `import torch` calls this through the entry point."""
    arm("entry point")
