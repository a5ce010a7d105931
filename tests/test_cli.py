"""The command, through the console script of an environment with the plugin's wheel in it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

import environments
from environments import Environment
from json_check import mismatches
from legacy import build
from legacy.catalogue import INPUTS, SCENARIOS
from neml2_aoti_plugin import _cli as cli
from neml2_aoti_plugin._cli.app import COMMANDS
from neml2_aoti_plugin._cli.process import heeded
from stubs.build import compiled
from tools.json_forms import REPORTS

STUBS = ("elasticity", "promoted")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with compiled models, where commands are run."""
    folder = tmp_path_factory.mktemp("place")
    for name in STUBS:
        shutil.copytree(compiled(name), folder / "aoti", dirs_exist_ok=True)
    return folder


def start(
    environment: Environment, place: Path, arguments: Sequence[str], **variables: str
) -> subprocess.CompletedProcess[str]:
    return environment.start(arguments, program=environment.command, cwd=place, variables=variables)


# What each command is given; those behind come to what those before have written.
CALLS: dict[str, list[str]] = {
    "doctor": ["aoti/elasticity"],
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


def check(command: str, status: int, printed: str, told: str) -> None:
    """That a command has printed its document, and nothing else."""
    assert status == 0, f"{command}:\n{printed}\n{told}"
    assert told == "", f"{command}: {told}"
    document: dict[str, Any] = json.loads(printed)
    assert document.keys() == {"form", "command", "status", "result", "error"}
    assert (document["form"], document["command"], document["status"]) == (1, command, 0)
    assert document["error"] is None
    assert not mismatches(document["result"], REPORTS[command])


def test_each_command_gives_its_document(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert set(CALLS) == set(REPORTS) == set(COMMANDS)
    monkeypatch.chdir(place)
    for command, arguments in CALLS.items():
        status = cli.main([command, *arguments, "--json"])
        check(command, status, *capsys.readouterr())
    assert (place / "new/elasticity/metadata.json").is_file() and (place / "curve.svg").is_file()


def through_the_script(environment: Environment, place: Path, commands: Iterable[str]) -> None:
    for command in commands:
        arguments = [command, *CALLS[command], "--json"]
        done = start(environment, place, arguments, NEML2_AOTI_PLUGIN_KERNELS="torch")
        check(command, done.returncode, done.stdout, done.stderr)


def test_the_console_script(environment: Environment, place: Path) -> None:
    through_the_script(environment, place, ("doctor", "run", "plot"))


@pytest.mark.long
def test_the_console_script_with_all_commands(environment: Environment, tmp_path: Path) -> None:
    for name in STUBS:
        shutil.copytree(compiled(name), tmp_path / "aoti", dirs_exist_ok=True)
    through_the_script(environment, tmp_path, CALLS)


@pytest.mark.legacy
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("release", "schema"), [("3.0.0", 2), ("3.0.6", 7), ("3.1.0", 14)])
@pytest.mark.parametrize("scenario", ["forward", "implicit"])
def test_artifacts_of_old_releases(
    release: str, schema: int, scenario: str, environment: Environment, tmp_path: Path
) -> None:
    old = build.stub(release, scenario)
    source = str(INPUTS / SCENARIOS[scenario].input)
    calls = {
        "doctor": [str(old)],
        "inspect": [str(old)],
        "verify": [str(old), "--against", source, "--rows", "3"],
        "bench": [str(old), "--rows", "4", "--seconds", "0"],
        "params": [str(old)],
        "migrate": [str(old), "--out", "new"],
    }
    if schema > 2:
        # The driver in the stub of 3.0.0 has a word that neml2 3.1.0 does not know.
        driver = "pull" if scenario == "forward" else "history"
        calls |= {"run": [str(old), driver, "--out", "r.csv"], "plot": ["r.csv", "--x", "t", "--out", "r.png"]}
    for command, arguments in calls.items():
        variables = {"NEML2_AOTI_PLUGIN_KERNELS": "torch", "OMP_NUM_THREADS": "1"}
        done = start(environment, tmp_path, [command, *arguments, "--json"], **variables)
        document = json.loads(done.stdout)
        refused = command == "migrate" and scenario == "implicit" and schema < 12
        assert done.returncode == document["status"] == (1 if refused else 0), f"{command}: {done.stderr}"
        if refused:
            assert "Newton step is one graph" in document["error"]["message"]
        else:
            assert not mismatches(document["result"], REPORTS[command])
        if command == "inspect":
            assert document["result"]["schema"] == schema


def test_help_is_quick_and_imports_nothing_heavy(environment: Environment, place: Path) -> None:
    heavy = "{'torch', 'neml2', 'numpy', 'llvmlite', 'rich', 'matplotlib', 'safetensors'}"
    code = "import sys; from neml2_aoti_plugin import _cli as cli; status = cli.main(sys.argv[1:]); "
    code += f"assert not {heavy} & set(sys.modules); sys.exit(status)"
    for arguments in (["--help"], *([command, "--help"] for command in COMMANDS)):
        done = environment.start(["-c", code, *arguments])
        assert done.returncode == 0 and "Examples:" in done.stdout, done.stderr
    took = []
    for _ in range(5):
        begin = time.perf_counter()
        start(environment, place, ["--help"])
        took.append(time.perf_counter() - begin)
    assert min(took) < 0.3


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["inspect", "gone"], "there is no such folder"),
        (["inspect", "aoti"], "artifacts below it: elasticity, promoted"),
        (["inspect", "aoti/elasticity", "creep"], "holds the model 'elasticity', not 'creep'"),
        (["inspect", "aoti/elasticity_aoti.i", "creep"], "no compiled model 'creep'; there are: elasticity"),
        (["inspect", "aoti/elasticity", "--device", "cuda"], "compiled leaves: cpu/float64"),
        (["inspect"], "Missing argument 'ARTIFACT|STUB'"),
        (["inspekt"], "No such command 'inspekt'"),
        (["seal", "aoti/elasticity", "gone"], "there is no such folder"),
        (["bench", "aoti/elasticity", "--rows", "1,x"], "is not a list of whole numbers"),
        (["bench", "aoti/elasticity", "--rows", "1" + "0" * 30], "is not a list of whole numbers from 1 to"),
        (["bench", "aoti/elasticity", "--rows", "1" + "0" * 15], "takes more memory than there is"),
        (["bench", "aoti/elasticity", "--seconds", "1e999"], "'1e999' is not a finite number"),
        (["verify", "aoti/elasticity", "--rtol", "nan"], "'nan' is not a finite number"),
        (["verify", "aoti/elasticity", "--seed", "1" + "0" * 30], "is not in the range"),
        (["params", "aoti/promoted", "--set", "promoted.E=1e999"], "is not NAME=VALUE with a finite number"),
        (["doctor", "gone.i"], "gone.i"),
        (["doctor", "aoti/elasticity", "--device", "tpu"], "is not a torch device"),
        (["doctor", "aoti/elasticity", "--dtype", "float32"], "compiled leaves: cpu/float64"),
        (["verify", "aoti/elasticity", "--against", "gone.i"], "gone.i: no such file. Give the input file that was"),
        (["verify", "aoti/elasticity", "--source-model", "law"], "Give that file as well: --against INPUT.i"),
        (["verify", "aoti/elasticity", "--points", "a.npz", "--scale", "strain=1"], "and so does --driver or --scale"),
        (["verify", "aoti/elasticity", "--golden", "a", "--points", "a.npz"], "--golden says which points to take"),
        (["bench", "aoti/elasticity", "--points", "a.npz", "--driver", "driver"], "and so does --driver"),
    ],
)
def test_wrong_use_is_told(
    arguments: list[str],
    said: str,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(place)
    before = sorted(place.rglob("*"))
    assert cli.main(arguments) == 2
    printed, told = capsys.readouterr()
    assert said in told and printed == ""
    # An error of ours is one line; where the command line itself is wrong, click tells how it is used.
    assert len(told.strip().splitlines()) == 1 or told.startswith("Usage:")
    assert cli.main([*arguments, "--json"]) == 2
    document = json.loads(capsys.readouterr().out)
    assert document["result"] is None and said in document["error"]["message"]
    assert sorted(place.rglob("*")) == before


def test_a_missing_artifact_through_the_script(environment: Environment, place: Path) -> None:
    done = start(environment, place, ["inspect", "gone"])
    assert done.returncode == 2 and done.stdout == "" and len(done.stderr.strip().splitlines()) == 1


def test_warm_fills_the_folder_that_a_container_keeps(environment: Environment, place: Path) -> None:
    variables = {"NEML2_AOTI_PLUGIN_CACHE": str(place / "cache")}
    done = start(environment, place, ["warm", "--json"], **variables)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)["result"]
    assert [report["file"]] == [str(file) for file in (place / "cache").rglob("*.o")]
    doctor = json.loads(start(environment, place, ["doctor", "--json"], **variables).stdout)
    assert doctor["result"]["kernels"]["folder"] == str(place / "cache" / "machine-code")
    # Where no folder can be written to, that is told.
    sealed = {"NEML2_AOTI_PLUGIN_CACHE": "/proc/none"}
    assert start(environment, place, ["warm"], **sealed).returncode == 1


@pytest.mark.skipif(os.name == "nt", reason="terminals are others there")
def test_colours_go_to_a_terminal_only(environment: Environment, place: Path) -> None:
    code = "from neml2_aoti_plugin._cli.output import console; console().print('careful', style='red')"
    printed = environment.run(code)
    assert printed == "careful\n"
    assert "\x1b[31mcareful" in _in_terminal(environment, code)
    assert "\x1b[31m" not in _in_terminal(environment, code, NO_COLOR="1")


def _in_terminal(environment: Environment, code: str, **variables: str) -> str:
    """What a piece of code prints to a terminal."""
    import pty

    inherited = {name: value for name, value in os.environ.items() if not name.startswith(environments.OUTSIDE)}
    mine, its = pty.openpty()
    program = [str(environment.python), "-c", code]
    with subprocess.Popen(
        program,
        cwd=environment.folder,
        env={**inherited, "TERM": "xterm-256color", **variables},
        stdout=its,
        stderr=its,
    ) as process:
        os.close(its)
        parts = []
        while True:
            try:
                part = os.read(mine, 65536)
            except OSError:
                break
            if not part:
                break
            parts.append(part)
        os.close(mine)
    assert process.returncode == 0
    return b"".join(parts).decode()


def test_completion(environment: Environment, place: Path) -> None:
    asked = {"_NEML2_AOTI_COMPLETE": "bash_complete", "COMP_WORDS": "neml2-aoti in", "COMP_CWORD": "1"}
    assert start(environment, place, [], **asked).stdout.strip() == "plain,inspect"


def test_a_missing_package_is_one_line(shared_folder: Path, wheel: Path, place: Path) -> None:
    environment = environments.create(shared_folder / "bare", wheel, without=("click", "rich", "matplotlib"))
    done = start(environment, place, ["inspect", "aoti/elasticity"])
    assert done.returncode == 2 and done.stderr.strip().endswith("pip install click")
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.long
def test_the_doctor_without_neml2(shared_folder: Path, wheel: Path, place: Path) -> None:
    environment = environments.create(shared_folder / "without-neml2", wheel, without=("neml2", "nmhit"))
    done = start(environment, place, ["doctor", "aoti/elasticity", "--json"])
    assert done.returncode == 1, done.stderr
    findings = {finding["subject"]: finding for finding in json.loads(done.stdout)["result"]["findings"]}
    assert (findings["neml2"]["level"], findings["neml2"]["cure"]) == ("problem", "pip install neml2")
    done = start(environment, place, ["inspect", "aoti/elasticity_aoti.i"])
    assert done.returncode == 2 and done.stderr.strip().endswith("pip install neml2")


# What a shell makes of the streams; $1 is the command, and what is behind it its arguments.
STREAMS = {
    "full": ('exec "$@" >/dev/full', 2, "the output cannot be written (No space left on device)"),
    "nobody reads": ('{ "$@"; echo $? >status; } | true; exit $(cat status)', 141, ""),
    "closed": ('exec "$@" >&- 2>&- <&-', 0, ""),
}


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no device that is full")
@pytest.mark.parametrize(
    ("arguments", "unbuffered", "streams"),
    [
        (["--help"], "1", "full"),
        (["--help"], "", "nobody reads"),
        (["--help"], "1", "closed"),
        (["inspect", "aoti/elasticity"], "1", "nobody reads"),
        (["inspect", "aoti/elasticity", "--json"], "", "full"),
        pytest.param(["inspect", "aoti/elasticity"], "", "full", marks=pytest.mark.wide),
        pytest.param(["inspect", "aoti/elasticity", "--json"], "1", "nobody reads", marks=pytest.mark.wide),
        pytest.param(["inspect", "aoti/elasticity"], "", "closed", marks=pytest.mark.wide),
    ],
)
def test_output_that_cannot_be_written_is_no_traceback(
    arguments: list[str], unbuffered: str, streams: str, environment: Environment, place: Path, tmp_path: Path
) -> None:
    line, status, said = STREAMS[streams]
    words = [str(place / word) if word.startswith("aoti/") else word for word in arguments]
    done = environment.start(
        ["-c", line, "sh", str(environment.command), *words],
        program=Path("/bin/sh"),
        cwd=tmp_path,
        variables={"PYTHONUNBUFFERED": unbuffered},
    )
    assert (done.returncode, done.stdout) == (status, "")
    assert said in done.stderr and len(done.stderr.splitlines()) == (1 if said else 0)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no device that is full")
def test_an_error_that_cannot_be_told_keeps_its_status(environment: Environment, tmp_path: Path) -> None:
    for arguments, redirected in (
        (["inspekt"], "2>/dev/full"),
        (["inspect"], "2>&-"),
        (["bench", "gone", "--rows", "0"], "2>/dev/full"),
    ):
        line = f'exec "$@" {redirected}'
        done = environment.start(
            ["-c", line, "sh", str(environment.command), *arguments], program=Path("/bin/sh"), cwd=tmp_path
        )
        assert (done.returncode, done.stdout, done.stderr) == (2, "", "")


@pytest.mark.skipif(os.name == "nt", reason="signals are others there")
def test_an_interrupt_that_was_dropped_is_heeded_later() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match=r"^$"), heeded() as heed:
        heed()
        # As a bare `except` in a package that is being imported does.
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is not before
        heed()
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.skipif(os.name == "nt", reason="signals are others there")
def test_sigterm_ends_a_block_as_an_exit_does() -> None:
    before = signal.getsignal(signal.SIGTERM)
    cleaned: list[bool] = []
    with pytest.raises(SystemExit) as ended, heeded() as heed:
        try:
            signal.raise_signal(signal.SIGTERM)
            heed()
        finally:
            cleaned.append(True)
    assert ended.value.code == 128 + signal.SIGTERM and cleaned
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.skipif(os.name == "nt", reason="signals are others there")
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


@pytest.mark.long
@pytest.mark.skipif(os.name == "nt", reason="signals are others there")
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
        _, told = process.communicate(timeout=200)
    assert process.returncode == status and told.strip().endswith(said)
    assert not list(tmp_path.iterdir())
