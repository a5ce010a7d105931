"""The log store: precedence, forms of NEML2_LOGS, lines, sinks, threads."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from neml2_aoti_plugin import _log as log
from neml2_aoti_plugin.errors import InputError


@pytest.fixture(autouse=True)
def fresh_store(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(log, "_sink", log._to_standard_streams)
    monkeypatch.delenv("NEML2_LOGS", raising=False)
    log.apply_env()
    log.reset_defaults()
    yield
    monkeypatch.undo()
    log.reset_defaults()
    log.apply_env()


def environment(monkeypatch: pytest.MonkeyPatch, spec: str) -> None:
    monkeypatch.setenv("NEML2_LOGS", spec)
    log.apply_env()


def test_warnings_are_shown_unless_something_else_is_asked() -> None:
    for channel in log.CHANNELS:
        assert log.effective_level(channel) == "warning"
        assert [log.enabled(channel, level) for level in log.LEVELS] == [True, True, False, False]


def test_precedence(monkeypatch: pytest.MonkeyPatch) -> None:
    log.set_default_level("all", "info")
    assert log.effective_level("newton") == log.effective_level("driver") == "info"
    log.set_default_level("newton", "silent")
    assert log.effective_level("newton") == "silent"
    environment(monkeypatch, "all=debug")
    assert log.effective_level("newton") == log.effective_level("driver") == "debug"
    environment(monkeypatch, "newton=warning,all=debug")
    assert log.effective_level("newton") == "warning"
    assert log.effective_level("linear") == "debug"
    environment(monkeypatch, "linear=info")
    assert [log.effective_level(c) for c in ("newton", "linear", "driver")] == ["silent", "info", "info"]
    log.reset_defaults()
    assert [log.effective_level(c) for c in ("newton", "linear", "driver")] == ["warning", "info", "warning"]


@pytest.mark.parametrize(
    ("word", "level"),
    [
        *((level, level) for level in log.LEVELS),
        *(("off", "silent"), ("none", "silent"), ("warn", "warning")),
        *(("0", "silent"), ("1", "warning"), ("2", "info"), ("3", "debug")),
        (" DeBug ", "debug"),
    ],
)
def test_words_for_levels(monkeypatch: pytest.MonkeyPatch, word: str, level: str) -> None:
    environment(monkeypatch, f" Newton = {word} , nonsense without a sign,")
    assert log.effective_level("newton") == level


@pytest.mark.parametrize("spec", ["newton=loud", "sound=info", "=info", "newton="])
def test_a_bad_entry_is_an_error_that_changes_nothing(monkeypatch: pytest.MonkeyPatch, spec: str) -> None:
    environment(monkeypatch, "newton=debug")
    with pytest.raises(InputError, match="NEML2_LOGS") as caught:
        environment(monkeypatch, f"linear=debug,{spec}")
    assert spec in str(caught.value)
    assert isinstance(caught.value, RuntimeError) and isinstance(caught.value, ValueError)
    assert log.effective_level("newton") == "debug"
    assert log.effective_level("linear") == "warning"


def test_a_bad_entry_in_the_environment_of_the_process_only_warns() -> None:
    script = (
        "import warnings, neml2_aoti_plugin._log as log\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    log.set_sink(print)\n"
        "    assert log.effective_level('newton') == 'warning'\n"
        "    assert log.effective_level('linear') == 'debug'\n"
        "(warning,) = caught\n"
        "print(warning.message)\n"
    )
    shell = {**os.environ, "NEML2_LOGS": "newton=loud,linear=debug"}
    printed = subprocess.run([sys.executable, "-c", script], env=shell, capture_output=True, text=True, check=True)
    assert "NEML2_LOGS" in printed.stdout and "'newton=loud'" in printed.stdout


@pytest.mark.parametrize("name", ["NEWTON", "all", "", "sound"])
def test_unknown_channels_are_refused(name: str) -> None:
    for call in (
        lambda: log.enabled(name, "info"),
        lambda: log.effective_level(name),
        lambda: log.emit(name, "info", "text"),
    ):
        with pytest.raises(InputError, match="channel"):
            call()
    if name != "all":
        with pytest.raises(InputError, match="channel"):
            log.set_default_level(name, "info")


@pytest.mark.parametrize("name", ["INFO", "warn", "2", ""])
def test_unknown_levels_are_refused(name: str) -> None:
    with pytest.raises(InputError, match="level"):
        log.enabled("newton", name)
    with pytest.raises(InputError, match="level"):
        log.set_default_level("newton", name)


def test_lines_and_standard_streams(capfd: pytest.CaptureFixture[str]) -> None:
    log.set_default_level("all", "debug")
    log.emit("substep", "debug", "a")
    log.emit("newton", "info", "b")
    log.emit("model", "warning", "c")
    log.set_default_level("all", "silent")
    log.emit("newton", "warning", "not shown")
    printed = capfd.readouterr()
    assert printed.err == "[neml2:substep][dbg ] a\n[neml2:model  ][warn] c\n"
    assert printed.out == "[neml2:newton ][info] b\n"


def test_sinks(capfd: pytest.CaptureFixture[str]) -> None:
    lines: list[tuple[str, str]] = []
    log.set_sink(lambda level, line: lines.append((level, line)))
    log.emit("linear", "warning", "one")
    assert lines == [("warning", "[neml2:linear ][warn] one")]
    for reset in (log.reset_sink, lambda: log.set_sink(None)):
        log.set_sink(lambda level, line: lines.append((level, line)))
        reset()
        log.emit("linear", "warning", "two")
    assert len(lines) == 1
    assert capfd.readouterr().err.count("two") == 2


def test_levels_may_be_changed_while_others_read_them() -> None:
    stop = threading.Event()
    failures: list[BaseException] = []

    def read() -> None:
        try:
            while not stop.is_set():
                assert log.effective_level("newton") in ("info", "debug", "warning")
                log.enabled("driver", "debug")
        except BaseException as error:
            failures.append(error)

    readers = [threading.Thread(target=read) for _ in range(4)]
    for reader in readers:
        reader.start()
    for _ in range(2000):
        log.set_default_level("newton", "info")
        log.set_default_level("all", "debug")
        log.reset_defaults()
    stop.set()
    for reader in readers:
        reader.join()
    assert not failures
