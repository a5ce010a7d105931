"""The command: its documents, errors, streams and signals; in this process, and as the console script of a wheel."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
from click import Context

import environments
from commands import answer, copy_of, printed, refused, require_form
from environments import Environment
from legacy import build
from legacy.catalogue import INPUTS, SCENARIOS
from neml2_aoti_plugin import _cli
from neml2_aoti_plugin._cli.app import HELP, app
from neml2_aoti_plugin._cli.output import console
from neml2_aoti_plugin._cli.process import heeded
from stubs.catalogue import CATALOGUE
from tools import json_forms
from tools.json_forms import REPORTS

TORCH = {"NEML2_AOTI_PLUGIN_KERNELS": "torch"}
POSIX = pytest.mark.skipif(os.name == "nt", reason="signals and terminals are others there")


def filled(folder: Path) -> Path:
    """A folder as the page of the command has it: input files, and the models compiled."""
    for name in ("elasticity", "viscoplasticity", "promoted"):
        copy_of(name, folder / "aoti")
        shutil.copy(CATALOGUE[name].path, folder)
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return filled(tmp_path_factory.mktemp("place"))


@pytest.fixture
def there(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(place)
    return place


def start(
    environment: Environment, place: Path, *words: str, shell: str = "", **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run the console script, or a line of a shell in which it is `$@`."""
    if not shell:
        return environment.start(words, program=environment.command, cwd=place, variables=variables)
    arguments = ["-c", shell, "sh", str(environment.command), *words]
    return environment.start(arguments, program=Path("/bin/sh"), cwd=place, variables=variables)


# -- documents -----------------------------------------------------------------------------------------------------

# What each command is given; those behind come to what those before have written.
CALLS: dict[str, list[str]] = {
    "doctor": ["aoti/elasticity"],
    "example": ["first"],
    "inspect": ["aoti/promoted_aoti.i"],
    "verify": ["aoti/promoted_aoti.i", "--rows", "4"],
    "bench": ["aoti/elasticity", "--rows", "1,8", "--seconds", "0"],
    "run": ["aoti/elasticity_aoti.i", "driver", "--out", "result.npz"],
    "plot": ["result.npz", "--out", "curve.svg"],
    "params": ["aoti/promoted", "--set", "promoted.E=9", "--out", "new.safetensors"],
    "seal": ["aoti/elasticity"],
    "warm": [],
    "migrate": ["aoti/elasticity", "--out", "new"],
    "serve": ["aoti/elasticity", "--check"],
}


def test_each_command_gives_its_document_and_says_it_in_words(there: Path) -> None:
    assert set(CALLS) == set(REPORTS) == set(app.commands)
    for command, words in CALLS.items():
        require_form(answer(command, *words), command)
        # These write over nothing.
        for folder in ("first", "new") if command in ("example", "migrate") else ():
            shutil.rmtree(there / folder, ignore_errors=True)
        assert printed(command, *words)[0].strip()
    assert (there / "new/elasticity/metadata.json").is_file() and (there / "curve.svg").is_file()


@pytest.mark.parametrize("commands", [["run"], pytest.param([*CALLS], marks=pytest.mark.long, id="all")])
def test_the_console_script(commands: list[str], environment: Environment, tmp_path: Path) -> None:
    filled(tmp_path)
    for command in commands:
        done = start(environment, tmp_path, command, *CALLS[command], "--json", **TORCH)
        assert (done.returncode, done.stderr) == (0, ""), f"{command}:\n{done.stdout}\n{done.stderr}"
        require_form(json.loads(done.stdout)["result"], command)


@pytest.mark.legacy
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("release", "schema"), [("3.0.0", 2), ("3.0.6", 7), ("3.1.0", 14)])
@pytest.mark.parametrize("scenario", ["forward", "implicit"])
def test_artifacts_of_old_releases(
    release: str, schema: int, scenario: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    old = build.stub(release, scenario)
    calls: dict[str, list[object]] = {
        "doctor": [old],
        "inspect": [old],
        "verify": [old, "--against", INPUTS / SCENARIOS[scenario].input, "--rows", 3],
        "bench": [old, "--rows", 4, "--seconds", 0],
        "params": [old],
    }
    # Without the stub, by its metadata file and by its folder, it is the same.
    file = build.metadata(release, scenario)
    for command in ("doctor", "inspect"):
        by_file, by_folder = (json.loads(printed(command, p, "--json")[0])["result"] for p in (file, file.parent))
        require_form(by_file, command)
        assert command != "doctor" or (by_file["artifact"]["runs"] and by_folder["artifact"]["runs"])
        assert command != "inspect" or by_file["inputs"] == by_folder["inputs"] == answer(command, old)["inputs"]
    if schema == 7 and scenario == "implicit":
        # Only the stub has the settings of that release.
        ours, without = (answer("inspect", p)["segments"][0]["newton"]["miters"] for p in (old, file))
        assert ours == 40 != without
    if schema > 2:
        # The driver in the stub of 3.0.0 has a word that neml2 3.1.0 does not know.
        driver = "pull" if scenario == "forward" else "history"
        calls |= {"run": [old, driver, "--out", "r.csv"], "plot": ["r.csv", "--x", "@time", "--out", "r.png"]}
    for command, words in calls.items():
        report = answer(command, *words)
        require_form(report, command)
        assert command != "inspect" or report["schema"] == schema
        assert command != "doctor" or report["artifact"]["runs"]
    if scenario == "implicit" and schema < 12:
        assert "Newton step is one graph" in refused("migrate", old, "--out", "new", status=1)
    else:
        require_form(answer("migrate", old, "--out", "new"), "migrate")


def test_the_example_is_the_stub_of_that_name_and_its_command_compiles_it(tmp_path: Path) -> None:
    folder = tmp_path / "a folder"
    report, stub = answer("example", folder), CATALOGUE["viscoplasticity"]
    assert Path(report["written"]).read_bytes() == stub.path.read_bytes()
    options = ["--driver", "driver", *stub.flags, "--output-dir", str(folder / "aoti")]
    assert shlex.split(report["compile"]) == ["neml2-compile", report["written"], *options]
    assert "is there already" in refused("example", folder)
    assert "cannot be made" in refused("example", Path(report["written"]) / "more")


# -- the page and the help, whose examples `test_documents.py` runs too -------------------------------------------

PAGE = json_forms.PAGE.read_text(encoding="utf-8")
# In an order in which each finds what it needs; the rest does not run here.
RUN = ("doctor", "example", "inspect", "verify", "run", "plot", "params", "seal", "serve", "")
# What takes a process of its own runs once, with the page; a service would not end.
NOT_RUN = re.compile(r"--try-binding|neml2-aoti serve (?!.*--check)")


def run(line: str) -> None:
    """Run a line of a shell; the command itself in this process, which saves the import of torch."""
    words = shlex.split(line)
    if words[0] == "neml2-aoti":
        printed(*words[1:])
    else:
        assert words[0] == "python" or line.startswith("cd aoti && sha256sum -c "), line
        done = subprocess.run(line.replace("python", sys.executable, 1), shell=True, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def examples(command: str) -> list[str]:
    """The examples in the help of a command."""
    found = app.get_command(Context(app), command)
    text = (found and found.epilog) or HELP
    return [line.strip() for line in text.partition("Examples:")[2].splitlines() if line.strip()]


def test_each_command_has_a_section_with_an_example_and_tables_of_its_form() -> None:
    lines = [line for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]
    assert {shlex.split(line)[1] for line in lines if line.startswith("neml2-aoti ")} == {*app.commands}
    for name in app.commands:
        assert re.search(rf"^## (.* and )?{name}\b", PAGE, re.MULTILINE), name
    assert json_forms.page(PAGE) == PAGE, "python -m tools.json_forms writes them"
    for report in REPORTS.values():
        said = json_forms.explanations(report)
        assert said.keys() == json_forms.fields_of(report).keys() and all(text.strip(".") for text in said.values())


@pytest.mark.processes
def test_examples_of_help_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(filled(tmp_path))
    monkeypatch.setenv("NEML2_AOTI_PLUGIN_KERNELS", "torch")
    for name in ("stiff", "soft"):
        run(f"neml2-aoti run aoti/viscoplasticity_aoti.i driver --out {name}.npz")
    for line in (line for name in RUN for line in examples(name) if not NOT_RUN.search(line)):
        run(line)
    for line in (line for name in app.commands if name not in RUN for line in examples(name)):
        assert line.startswith(("neml2-aoti ", "NEML2_AOTI_PLUGIN_CACHE=/opt/cache neml2-aoti "))


@pytest.mark.legacy
@pytest.mark.timeout(3600)
def test_the_example_of_migrate_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(build.artifact("3.0.6", "forward"), tmp_path / "old")
    (line,) = re.findall(r"```sh\n(neml2-aoti migrate .*)\n```", PAGE)
    for example in (line, *examples("migrate")):
        shutil.rmtree(tmp_path / "new", ignore_errors=True)
        run(example)
        assert answer("verify", "new/elasticity_aoti.i" if example == line else "new/elasticity")


# -- help, errors, and what is not installed -----------------------------------------------------------------------


def test_help_is_quick_and_imports_nothing_heavy(environment: Environment, place: Path) -> None:
    heavy = "{'torch', 'neml2', 'numpy', 'llvmlite', 'rich', 'matplotlib', 'safetensors'}"
    code = f"""
    import sys
    from neml2_aoti_plugin import _cli
    for words in ([], *([name] for name in {[*app.commands]})):
        assert _cli.main([*words, "--help"]) == 0
        assert not {heavy} & set(sys.modules), words
    """
    assert environment.run(code).count("Examples:") == 1 + len(app.commands)
    took = []
    for _ in range(5):
        before = os.times()
        start(environment, place, "--help")
        # Of a processor, since the machine may be busy; it takes 0.06 s.
        after = os.times()
        took.append(after.children_user + after.children_system - before.children_user - before.children_system)
    assert min(took) < 0.15


@pytest.mark.processes
def test_warm_fills_the_folder_that_a_container_keeps(environment: Environment, place: Path) -> None:
    variables = {"NEML2_AOTI_PLUGIN_CACHE": str(place / "cache")}
    warm, doctor = (json.loads(start(environment, place, c, "--json", **variables).stdout) for c in ("warm", "doctor"))
    assert [warm["result"]["file"]] == [str(file) for file in (place / "cache").rglob("*.o")]
    assert doctor["result"]["code_folder"] == str(place / "cache" / "machine-code")
    # Where no folder can be written to, that is an error.
    assert start(environment, place, "warm", NEML2_AOTI_PLUGIN_CACHE="/proc/none").returncode == 1


class Terminal(StringIO):
    def isatty(self) -> bool:
        return True


def test_colours_go_to_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    for stream, no_colour, wanted in ((StringIO, "", False), (Terminal, "", True), (Terminal, "1", False)):
        monkeypatch.setenv("NO_COLOR", no_colour)
        monkeypatch.setattr(sys, "stdout", shown := stream())
        console().print("careful", style="red")
        assert ("\x1b[31mcareful" in shown.getvalue()) is wanted and "careful" in shown.getvalue()


def test_a_terminal_sees_what_is_waited_for(there: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    for stream, words in ((Terminal, ["importing torch and neml2", "10/10"]), (StringIO, [])):
        with redirect_stdout(StringIO()), redirect_stderr(stream()) as err:
            assert _cli.main(["run", "aoti/elasticity_aoti.i", "driver"]) == 0
        assert all(word in err.getvalue() for word in words) and bool(err.getvalue()) is bool(words)


def test_completion(environment: Environment, place: Path) -> None:
    asked = {"_NEML2_AOTI_COMPLETE": "bash_complete", "COMP_WORDS": "neml2-aoti in", "COMP_CWORD": "1"}
    assert start(environment, place, **asked).stdout.strip() == "plain,inspect"


def test_a_missing_package_is_one_line(shared_folder: Path, wheel: Path, place: Path) -> None:
    environment = environments.create(shared_folder / "bare", wheel, without=("click", "rich", "matplotlib"))
    done = start(environment, place, "inspect", "aoti/elasticity")
    assert done.returncode == 2 and done.stderr.strip().endswith("pip install click")
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.long
def test_the_doctor_without_neml2(shared_folder: Path, wheel: Path, place: Path) -> None:
    environment = environments.create(shared_folder / "without-neml2", wheel, without=("neml2", "nmhit"))
    done = start(environment, place, "doctor", "aoti/elasticity", "--json")
    assert done.returncode == 1, done.stderr
    findings = {finding["subject"]: finding for finding in json.loads(done.stdout)["result"]["findings"]}
    assert (findings["neml2"]["level"], findings["neml2"]["cure"]) == ("problem", "pip install neml2")
    done = start(environment, place, "inspect", "aoti/elasticity_aoti.i")
    assert done.returncode == 2 and done.stderr.strip().endswith("pip install neml2")


# -- streams -------------------------------------------------------------------------------------------------------

# What a shell makes of the streams; $1 is the command, and what is behind it its arguments.
STREAMS = {
    "full": ('exec "$@" >/dev/full', 2, "the output cannot be written (No space left on device)"),
    "nobody reads": ('{ "$@"; echo $? >status; } | true; exit $(cat status)', 141, ""),
    "closed": ('exec "$@" >&- 2>&- <&-', 0, ""),
    # An error that cannot be printed keeps its status.
    "errors full": ('exec "$@" 2>/dev/full', 2, ""),
    "errors closed": ('exec "$@" 2>&-', 2, ""),
}


@pytest.mark.processes
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no device that is full")
@pytest.mark.parametrize(
    ("words", "unbuffered", "streams"),
    [
        ("--help", "1", "full"),
        ("--help", "", "nobody reads"),
        ("--help", "1", "closed"),
        ("inspect aoti/elasticity", "1", "nobody reads"),
        ("inspect aoti/elasticity --json", "", "full"),
        pytest.param("inspect aoti/elasticity", "", "full", marks=pytest.mark.wide),
        pytest.param("inspect aoti/elasticity --json", "1", "nobody reads", marks=pytest.mark.wide),
        pytest.param("inspect aoti/elasticity", "", "closed", marks=pytest.mark.wide),
        ("inspekt", "", "errors full"),
        ("inspect", "", "errors closed"),
        ("bench gone --rows 0", "", "errors full"),
    ],
)
def test_streams_that_cannot_be_written_to_are_no_traceback(
    words: str, unbuffered: str, streams: str, environment: Environment, place: Path
) -> None:
    line, status, said = STREAMS[streams]
    done = start(environment, place, *words.split(), shell=line, PYTHONUNBUFFERED=unbuffered)
    assert (done.returncode, done.stdout) == (status, "")
    assert said in done.stderr and len(done.stderr.splitlines()) == (1 if said else 0)


# -- signals -------------------------------------------------------------------------------------------------------


@POSIX
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_was_dropped_is_heeded_later(number: signal.Signals) -> None:
    before, dropped = signal.getsignal(number), []
    with pytest.raises((KeyboardInterrupt, SystemExit)) as ended, heeded() as heed:
        heed()
        try:
            signal.raise_signal(number)
        except (KeyboardInterrupt, SystemExit) as error:
            # As a bare `except` in a package that is being imported does.
            dropped.append(type(error))
        assert signal.getsignal(number) is not before
        heed()
    assert dropped == [type(ended.value)] == [KeyboardInterrupt if number == signal.SIGINT else SystemExit]
    assert ended.value.args == (() if number == signal.SIGINT else (128 + number,))
    assert signal.getsignal(number) is before


@POSIX
def test_who_handles_interrupts_keeps_handling_them() -> None:
    came: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    try:
        with heeded() as heed:
            signal.raise_signal(signal.SIGINT)
            heed()
        assert came == [signal.SIGINT]
    finally:
        signal.signal(signal.SIGINT, before)


@POSIX
@pytest.mark.long
@pytest.mark.parametrize(("number", "status", "said"), [("SIGINT", 130, "Interrupted."), ("SIGTERM", 143, "")])
def test_an_interrupted_run_leaves_nothing_behind(
    number: str, status: int, said: str, environment: Environment, place: Path, tmp_path: Path
) -> None:
    # Far more steps than it gets to take.
    steps = "Tensors/times/expr:='Scalar(torch.linspace(0.0, 1.0, 1000001, dtype=torch.float64))'"
    strains = "Tensors/strains/expr:='SR2(torch.zeros(1000001, 1, 6, dtype=torch.float64))'"
    out = tmp_path / "result.npz"
    program = [str(environment.command), "run", str(place / "aoti/elasticity_aoti.i"), "driver", steps, strains]
    with subprocess.Popen([*program, "--out", str(out)], stderr=subprocess.PIPE, text=True, cwd=tmp_path) as process:
        while not list(tmp_path.iterdir()) and process.poll() is None:
            time.sleep(0.05)
        # The draft is there; the driver runs now, or is about to.
        time.sleep(1.0)
        process.send_signal(getattr(signal, number))
        _, err = process.communicate(timeout=200)
    assert process.returncode == status and err.strip().endswith(said)
    assert not list(tmp_path.iterdir())
