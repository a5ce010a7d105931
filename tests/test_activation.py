"""The plugin takes the binding's place, in real processes with the wheel installed, however the process begins."""

from __future__ import annotations

import statistics
import sysconfig
from pathlib import Path

import pytest

import environments
from environments import Environment

pytestmark = pytest.mark.processes

# The plugin must be the wheel's, and be active, in a process that has imported neml2.
ACTIVE = """
import sys, neml2, neml2.aoti, neml2.factory, neml2.solvers, neml2_aoti_plugin as plugin
assert plugin.__file__.startswith(sys.prefix), plugin.__file__
assert neml2.aoti.Model is plugin.Model
assert neml2.aoti.AOTIModel is plugin.AOTIModel is neml2.factory._registry["AOTIModel"]
assert neml2.aoti.ConvergenceError is plugin.ConvergenceError is neml2.solvers.ConvergenceError
from neml2.aoti._aoti import ConvergenceError, Model, log
from neml2.aoti._shim import AOTIModel
assert (ConvergenceError, Model, AOTIModel) == (plugin.ConvergenceError, plugin.Model, plugin.AOTIModel)
assert log is neml2.log._store
status = plugin.status()
assert status.active, status
assert status.owner == "neml2_aoti_plugin._host.hit.AOTIModel", status
"""

# neml2 must be as it is without the plugin; nothing here imports the plugin.
UNTOUCHED = """
import sys, neml2, neml2.factory
aoti = sys.modules.get("neml2.aoti")
assert aoti is None or aoti.Model.__module__ == "neml2.aoti._aoti", aoti.Model
owner = neml2.factory._registry.get("AOTIModel")
assert owner is None or owner.__module__ == "neml2.aoti._shim", owner
assert "neml2_aoti_plugin._host.hit" not in sys.modules
"""

OFF = {"NEML2_AOTI_PLUGIN": "0"}
NOT_AUTOLOADED = {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
ENTRY_POINT, IMPORT, LATE = (f"assert status.armed == {how!r}, status" for how in ("entry point", "import", "late"))

SWITCHED_OFF = """
import sys, neml2_aoti_plugin
before = list(sys.meta_path)
neml2_aoti_plugin._autoload.autoload()
assert sys.meta_path == before and neml2_aoti_plugin._autoload.current() is None
status = neml2_aoti_plugin.status()
assert not status.active and status.armed is None
assert "switched off by NEML2_AOTI_PLUGIN=" in status.reason, status
"""

AT_ONCE = """
import importlib, threading
threads = [threading.Thread(target=importlib.import_module, args=(name,)) for name in {}]
for thread in threads: thread.start()
for thread in threads: thread.join()
"""

# What arming never raises for; a warning is welcome, an exception is not.
SABOTAGE = """
import os, sys
import neml2_aoti_plugin._autoload as autoload
sys.meta_path[:] = [entry for entry in sys.meta_path if entry is not autoload.current()]
{}
sys.stderr = sys.stdout
autoload.autoload()
autoload.autoload()
"""

# What is run in a process of its own, by its name, and variables of the environment.
PROGRAMS: dict[str, tuple[str, dict[str, str]]] = {
    "torch is imported first": (f"import torch{ACTIVE}{ENTRY_POINT}", {}),
    "neml2 is imported first": (f"import neml2{ACTIVE}{ENTRY_POINT}", {}),
    "torch and the host are imported first": (f"import torch, neml2_aoti_plugin._host.hit{ACTIVE}{ENTRY_POINT}", {}),
    "the package is imported first": (f"import neml2_aoti_plugin{ACTIVE}{IMPORT}", {}),
    "a folder is imported first": (f"import neml2_aoti_plugin.model{ACTIVE}{IMPORT}", {}),
    "the stand-in is imported first": (f"import neml2_aoti_plugin._host.binding{ACTIVE}{IMPORT}", {}),
    "the HIT type is imported first": (f"import neml2_aoti_plugin._host.hit{ACTIVE}{IMPORT}", {}),
    "a name is imported first": (f"from neml2_aoti_plugin import Model; import torch{ACTIVE}{IMPORT}", {}),
    "an import before neml2 without autoloading": (f"import torch, neml2_aoti_plugin{ACTIVE}{IMPORT}", NOT_AUTOLOADED),
    # What neml2 finds on a torch that its binding does not load on: an ImportError.
    "an import after neml2 without its binding": (
        f"""
import sys, warnings
sys.modules["neml2.aoti._aoti"] = None
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import neml2
assert "neml2.aoti" not in sys.modules
before = neml2.solvers.ConvergenceError
import neml2_aoti_plugin
{ACTIVE}{LATE}
assert plugin.ConvergenceError is before
""",
        NOT_AUTOLOADED,
    ),
    "threads import at once": (AT_ONCE.format("'neml2 torch neml2_aoti_plugin neml2'.split()") + ACTIVE, {}),
    "threads import the host at once": (AT_ONCE.format("('neml2_aoti_plugin._host.hit', 'neml2') * 2") + ACTIVE, {}),
    "modules are loaded again and looked up": (
        f"""{ACTIVE}
import importlib, importlib.util, pickle
for name in ("neml2.aoti._aoti", "neml2.aoti._shim"):
    assert importlib.util.find_spec(name).name == name
    importlib.reload(sys.modules[name])
importlib.reload(neml2.aoti)
finders = len(sys.meta_path)
importlib.reload(plugin._autoload)
importlib.reload(plugin)
assert len(sys.meta_path) == finders
assert pickle.loads(pickle.dumps(neml2.aoti.AOTIModel)) is plugin.AOTIModel
{ACTIVE}""",
        {},
    ),
    "the package loads nothing heavy": (
        """
import sys
before = set(sys.modules)
import neml2_aoti_plugin as plugin
new = {name.partition(".")[0] for name in set(sys.modules) - before}
assert new <= {"neml2_aoti_plugin", "__future__"}, new
status = plugin.status()
assert status.active and status.armed == "import" and status.owner is None, status
assert status.neml2 and status.torch and not {"torch", "neml2"} & set(sys.modules)
""",
        {},
    ),
    **{f"off by {value!r}": (SWITCHED_OFF, {"NEML2_AOTI_PLUGIN": value}) for value in ("0", "false", "no", " OFF ")},
    **{
        spoil: (SABOTAGE.format(spoil), {})
        for spoil in (
            "sys.meta_path = None",
            "sys.meta_path = tuple(sys.meta_path)",
            "os.environ = None",
            "os.environ['NEML2_AOTI_PLUGIN'] = chr(0xdc80)",
            "sys.modules['neml2'] = None",
            "sys.modules['neml2'] = object()",
            "sys.modules['neml2'] = type(sys)('neml2')",
            "sys.modules['neml2_aoti_plugin._host'] = None; sys.modules['neml2'] = type(sys)('neml2')",
        )
    },
}


@pytest.mark.parametrize("what", PROGRAMS)
def test_in_a_fresh_process(environment: Environment, what: str) -> None:
    code, variables = PROGRAMS[what]
    environment.run(code, variables=variables)


@pytest.mark.parametrize("flags", [["-I"], ["-W", "error"], ["-O"]], ids=" ".join)
def test_active_under_flags(environment: Environment, flags: list[str]) -> None:
    # -O drops assertions, so this also prints what matters.
    printed = environment.run(f"{ACTIVE}\nprint(status)", flags=flags)
    assert ": active\n" in printed and "neml2_aoti_plugin._host.hit.AOTIModel" in printed


def test_active_in_spawned_workers(environment: Environment) -> None:
    script = environment.folder / "spawn.py"
    script.write_text("""
import multiprocessing
def owner(model):
    import neml2.factory, neml2_aoti_plugin
    assert neml2.factory._registry["AOTIModel"] is model
    return neml2_aoti_plugin.status()
if __name__ == "__main__":
    from neml2.aoti import AOTIModel
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print(pool.apply(owner, (AOTIModel,)))
""")
    done = environment.start([str(script)])
    assert done.returncode == 0, done.stderr
    assert ": active\n" in done.stdout


# What neml2 itself says on stderr, where its own binding does not import, is of no interest.
BESIDE_THE_BINDING = {
    "off": (UNTOUCHED, OFF),
    "imported, but off": (f"import neml2_aoti_plugin{UNTOUCHED}", OFF),
    "not autoloaded": (UNTOUCHED, NOT_AUTOLOADED),
    # Ahead of neml2.aoti, which is not there where the binding does not load. Levels set before stay, and lines go
    # where neml2.log sends them.
    "imported after neml2": (
        f"""
import io, neml2
neml2.log.set_default_level("newton", "info")
{UNTOUCHED}
before = neml2.solvers.ConvergenceError
import neml2_aoti_plugin
{ACTIVE}{LATE}
assert plugin.ConvergenceError is before
assert neml2.log.effective_level("newton") == "info"
stream = io.StringIO()
neml2.log.set_stream(stream)
log.emit("newton", "info", "from the plugin")
neml2.log.emit("newton", "info", "from neml2")
assert stream.getvalue().count("[neml2:newton ][info] from ") == 2, stream.getvalue()
""",
        NOT_AUTOLOADED,
    ),
}


@pytest.mark.parametrize("how", BESIDE_THE_BINDING)
def test_neml2_is_left_alone_until_it_is_asked_for(environment: Environment, how: str) -> None:
    code, variables = BESIDE_THE_BINDING[how]
    done = environment.start(["-c", code], variables=variables)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("variables", [{}, NOT_AUTOLOADED], ids=["entry point", "load"])
def test_console_script(environment: Environment, variables: dict[str, str]) -> None:
    script = Path(sysconfig.get_path("scripts")) / "neml2-syntax"
    load = ["--load", "neml2_aoti_plugin"] if variables else []
    done = environment.start([str(script), *load, "--type", "AOTIModel", "--json", "-"], variables=variables)
    assert done.returncode == 0, done.stderr
    assert "neml2_aoti_plugin/_host/hit.py" in done.stdout


def test_arming_is_quick(environment: Environment) -> None:
    code = """
import sys, time
start = time.process_time()
from neml2_aoti_plugin._autoload import autoload
autoload()
print(1e3 * (time.process_time() - start))
assert sys.meta_path[0].neml2_aoti_plugin
"""
    # In milliseconds of processor time: elapsed time counts the neighbours' work as well.
    assert statistics.median(float(environment.run(code)) for _ in range(11)) < 2


@pytest.mark.parametrize(
    ("lacks", "says"),
    [
        (
            "neml2",
            """
import torch
assert status.neml2 is None and status.armed == "entry point" and status.native_on_disk is None, status
from neml2_aoti_plugin import ConvergenceError, Model
try:
    import neml2_aoti_plugin._host.hit
except ModuleNotFoundError as error:
    assert error.name == "neml2"
else:
    raise AssertionError("hit came up without neml2")
""",
        ),
        ("torch", "assert status.torch is None, status\nfrom neml2_aoti_plugin import ConvergenceError"),
    ],
)
def test_without_what_it_needs(tmp_path: Path, wheel: Path, lacks: str, says: str) -> None:
    first = "import torch\n" if lacks == "neml2" else ""
    reason = f"assert not status.active and '{lacks} is not installed' in status.reason, status"
    environments.create(tmp_path / "env", wheel, without=[lacks]).run(
        f"{first}import neml2_aoti_plugin\nstatus = neml2_aoti_plugin.status()\n{reason}\n{says}"
    )


@pytest.mark.parametrize("module", ["_host/binding", "model/_model", "_host/hit"])
def test_steps_aside_when_it_cannot_be_imported(tmp_path: Path, wheel: Path, module: str) -> None:
    broken = environments.create(tmp_path / "env", wheel)
    (broken.site / "neml2_aoti_plugin" / f"{module}.py").write_text("raise OSError('broken on purpose')\n")
    code = f"{UNTOUCHED}\nimport neml2_aoti_plugin\nstatus = neml2_aoti_plugin.status()\nassert not status.active\n"
    # The entry point, the late way, and warnings that are errors; what differs by module is the first of them. Of
    # warnings only ours: where neml2's binding does not load, neml2 has one of its own, a UserWarning.
    ways = [({}, []), (NOT_AUTOLOADED, []), ({}, ["-W", "error::RuntimeWarning"])]
    for variables, flags in ways if module == "_host/binding" else ways[:1]:
        done = broken.start(["-c", f"{code}print(status)"], variables=variables, flags=flags)
        assert done.returncode == 0, done.stderr
        assert "neml2-aoti-plugin" in done.stderr and "OSError: broken on purpose" in done.stderr
        assert "OSError: broken on purpose" in done.stdout
