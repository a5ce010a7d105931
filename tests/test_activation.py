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

NOT_AUTOLOADED = {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}


def armed(how: str) -> str:
    return f"assert status.armed == {how!r}, status\n"


@pytest.mark.parametrize(
    ("first", "how"),
    [
        ("import torch", "entry point"),
        ("import neml2", "entry point"),
        ("import neml2_aoti_plugin", "import"),
        ("import neml2_aoti_plugin.model", "import"),
        ("import neml2_aoti_plugin._host.binding", "import"),
        ("import neml2_aoti_plugin._host.hit", "import"),
        ("from neml2_aoti_plugin import Model; import torch", "import"),
        ("import torch, neml2_aoti_plugin._host.hit", "entry point"),
    ],
)
def test_active_whatever_comes_first(environment: Environment, first: str, how: str) -> None:
    environment.run(f"{first}\n{ACTIVE}{armed(how)}")


@pytest.mark.parametrize("flags", [["-I"], ["-W", "error"], ["-O"]], ids=" ".join)
def test_active_under_flags(environment: Environment, flags: list[str]) -> None:
    # -O drops assertions, so this also prints what matters.
    printed = environment.run(f"{ACTIVE}\nprint(status)", flags=flags)
    assert ": active\n" in printed
    assert "neml2_aoti_plugin._host.hit.AOTIModel" in printed


def test_active_in_spawned_workers(environment: Environment) -> None:
    script = environment.folder / "spawn.py"
    script.write_text(
        "import multiprocessing\n"
        "def owner(model):\n"
        "    import neml2.factory, neml2_aoti_plugin\n"
        "    assert neml2.factory._registry['AOTIModel'] is model\n"
        "    return neml2_aoti_plugin.status()\n"
        "if __name__ == '__main__':\n"
        "    from neml2.aoti import AOTIModel\n"
        "    with multiprocessing.get_context('spawn').Pool(1) as pool:\n"
        "        print(pool.apply(owner, (AOTIModel,)))\n"
    )
    done = environment.start([str(script)])
    assert done.returncode == 0, done.stderr
    assert ": active\n" in done.stdout


@pytest.mark.parametrize("value", ["0", "false", "no", " OFF "])
def test_switched_off_by(environment: Environment, value: str) -> None:
    code = """
import sys, neml2_aoti_plugin
before = list(sys.meta_path)
neml2_aoti_plugin._autoload.autoload()
assert sys.meta_path == before and neml2_aoti_plugin._autoload.current() is None
status = neml2_aoti_plugin.status()
assert not status.active and status.armed is None
assert "switched off by NEML2_AOTI_PLUGIN=" in status.reason, status
"""
    environment.run(code, variables={"NEML2_AOTI_PLUGIN": value})


@pytest.mark.parametrize(
    ("before", "variables"),
    [
        ("", {"NEML2_AOTI_PLUGIN": "0"}),
        ("import neml2_aoti_plugin", {"NEML2_AOTI_PLUGIN": "0"}),
        ("", NOT_AUTOLOADED),
    ],
)
def test_switched_off_it_leaves_neml2_alone(environment: Environment, before: str, variables: dict[str, str]) -> None:
    # What neml2 itself says, where its own binding does not import, is of no interest.
    done = environment.start(["-c", f"{before}\n{UNTOUCHED}"], variables=variables)
    assert done.returncode == 0, done.stderr


def test_explicit_import_before_neml2_without_autoloading(environment: Environment) -> None:
    environment.run(f"import torch, neml2_aoti_plugin\n{ACTIVE}{armed('import')}", variables=NOT_AUTOLOADED)


def test_explicit_import_after_neml2(environment: Environment) -> None:
    code = f"""
import io, neml2
neml2.log.set_default_level("newton", "info")
{UNTOUCHED}
before = neml2.solvers.ConvergenceError
import neml2_aoti_plugin  # ahead of neml2.aoti, which is not there where the binding does not load
{ACTIVE}{armed("late")}
assert plugin.ConvergenceError is before
# Levels set before stay, and lines go where neml2.log sends them.
assert neml2.log.effective_level("newton") == "info"
stream = io.StringIO()
neml2.log.set_stream(stream)
log.emit("newton", "info", "from the plugin")
neml2.log.emit("newton", "info", "from neml2")
assert stream.getvalue().count("[neml2:newton ][info] from ") == 2, stream.getvalue()
"""
    done = environment.start(["-c", code], variables=NOT_AUTOLOADED)
    assert done.returncode == 0, done.stderr


def test_explicit_import_after_neml2_without_its_binding(environment: Environment) -> None:
    # What neml2 finds on a torch that its binding does not load on: an ImportError.
    code = f"""
import sys, warnings
sys.modules["neml2.aoti._aoti"] = None
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import neml2
assert "neml2.aoti" not in sys.modules
before = neml2.solvers.ConvergenceError
import neml2_aoti_plugin
{ACTIVE}{armed("late")}
assert plugin.ConvergenceError is before
"""
    environment.run(code, variables=NOT_AUTOLOADED)


@pytest.mark.parametrize("variables", [{}, NOT_AUTOLOADED], ids=["entry point", "load"])
def test_console_script(environment: Environment, variables: dict[str, str]) -> None:
    script = Path(sysconfig.get_path("scripts")) / "neml2-syntax"
    load = ["--load", "neml2_aoti_plugin"] if variables else []
    done = environment.start([str(script), *load, "--type", "AOTIModel", "--json", "-"], variables=variables)
    assert done.returncode == 0, done.stderr
    assert "neml2_aoti_plugin/_host/hit.py" in done.stdout


def test_log_speaks(environment: Environment) -> None:
    code = f"""{ACTIVE}
neml2.log.set_default_level("driver", "info")
neml2.log.emit("driver", "info", "hello")
neml2.log.emit("driver", "debug", "not this")
"""
    assert environment.run(code) == "[neml2:driver ][info] hello\n"


def test_reload_and_lookup(environment: Environment) -> None:
    environment.run(f"""{ACTIVE}
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
{ACTIVE}""")


@pytest.mark.parametrize(
    "names",
    [
        "neml2 torch neml2_aoti_plugin neml2_aoti_plugin.model neml2",
        "neml2_aoti_plugin._host.hit neml2 neml2_aoti_plugin._host.hit",
    ],
)
def test_threads_that_import_at_once(environment: Environment, names: str) -> None:
    environment.run(f"""
import importlib, threading
threads = [threading.Thread(target=importlib.import_module, args=(name,)) for name in {names.split()}]
for thread in threads: thread.start()
for thread in threads: thread.join()
{ACTIVE}""")


def test_importing_the_package_loads_nothing_heavy(environment: Environment) -> None:
    environment.run("""
import sys
before = set(sys.modules)
import neml2_aoti_plugin as plugin
new = {name.partition(".")[0] for name in set(sys.modules) - before}
assert new <= {"neml2_aoti_plugin", "__future__"}, new
status = plugin.status()
assert status.active and status.armed == "import" and status.owner is None, status
assert status.neml2 and status.torch and not {"torch", "neml2"} & set(sys.modules)
""")


def test_arming_is_quick(environment: Environment, capsys: pytest.CaptureFixture[str]) -> None:
    code = """
import sys, time
wall, cpu = time.perf_counter(), time.process_time()
from neml2_aoti_plugin._autoload import autoload
autoload()
wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
assert sys.meta_path[0].neml2_aoti_plugin
print(1e3 * wall, 1e3 * cpu)
"""
    runs = [[float(number) for number in environment.run(code).split()] for _ in range(11)]
    wall, cpu = (statistics.median(column) for column in zip(*runs, strict=True))
    with capsys.disabled():
        print(f"\narming: {wall:.2f} ms elapsed, {cpu:.2f} ms of processor time (median of {len(runs)} processes)")
    # Elapsed time counts the neighbours' work as well.
    assert cpu < 2


@pytest.mark.parametrize(
    "sabotage",
    [
        "sys.meta_path = None",
        "sys.meta_path = tuple(sys.meta_path)",
        "os.environ = None",
        "os.environ['NEML2_AOTI_PLUGIN'] = chr(0xdc80)",
        "sys.modules['neml2'] = None",
        "sys.modules['neml2'] = object()",
        "sys.modules['neml2'] = type(sys)('neml2')",
        "sys.modules['neml2_aoti_plugin._host'] = None; sys.modules['neml2'] = type(sys)('neml2')",
    ],
)
def test_arming_never_raises(environment: Environment, sabotage: str) -> None:
    environment.run(f"""
import os, sys
import neml2_aoti_plugin._autoload as autoload
sys.meta_path[:] = [entry for entry in sys.meta_path if entry is not autoload.current()]
{sabotage}
sys.stderr = sys.stdout  # A warning is welcome, an exception is not.
autoload.autoload()
autoload.autoload()
""")


def test_without_neml2(tmp_path: Path, wheel: Path) -> None:
    environments.create(tmp_path / "env", wheel, without=["neml2"]).run("""
import torch, neml2_aoti_plugin as plugin
from neml2_aoti_plugin import ConvergenceError, Model
status = plugin.status()
assert not status.active and status.neml2 is None and "neml2 is not installed" in status.reason, status
assert status.armed == "entry point" and status.native_on_disk is None
try:
    import neml2_aoti_plugin._host.hit
except ModuleNotFoundError as error:
    assert error.name == "neml2"
else:
    raise AssertionError("hit came up without neml2")
""")


def test_without_torch(tmp_path: Path, wheel: Path) -> None:
    environments.create(tmp_path / "env", wheel, without=["torch"]).run("""
import neml2_aoti_plugin as plugin
from neml2_aoti_plugin import ConvergenceError
status = plugin.status()
assert not status.active and status.torch is None and "torch is not installed" in status.reason, status
""")


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
