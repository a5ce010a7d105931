"""The log store: precedence, forms of NEML2_LOGS, lines, sinks, threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from attacks.children import run_fresh
from neml2_aoti_plugin import _log as log
from neml2_aoti_plugin.errors import InputError

SetEnvironment = Callable[[str], None]


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


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> SetEnvironment:
    def change(spec: str) -> None:
        monkeypatch.setenv("NEML2_LOGS", spec)
        log.apply_env()

    return change


def levels() -> list[str]:
    return [log.effective_level(channel) for channel in ("newton", "linear", "driver")]


def test_precedence(environment: SetEnvironment) -> None:
    for channel in log.CHANNELS:
        assert log.effective_level(channel) == "warning"
        assert [log.enabled(channel, level) for level in log.LEVELS] == [True, True, False, False]
    log.set_default_level("all", "info")
    assert levels() == ["info", "info", "info"]
    log.set_default_level("newton", "silent")
    assert levels() == ["silent", "info", "info"]
    environment("all=debug")
    assert levels() == ["debug", "debug", "debug"]
    environment("newton=warning,all=debug")
    assert levels() == ["warning", "debug", "debug"]
    environment("linear=info")
    assert levels() == ["silent", "info", "info"]
    log.reset_defaults()
    assert levels() == ["warning", "info", "warning"]


@pytest.mark.parametrize(
    ("word", "level"),
    [
        *((level, level) for level in log.LEVELS),
        *(("off", "silent"), ("none", "silent"), ("warn", "warning")),
        *(("0", "silent"), ("1", "warning"), ("2", "info"), ("3", "debug")),
        (" DeBug ", "debug"),
    ],
)
def test_words_for_levels(environment: SetEnvironment, word: str, level: str) -> None:
    environment(f" Newton = {word} , nonsense without a sign,")
    assert log.effective_level("newton") == level


@pytest.mark.parametrize("spec", ["newton=loud", "sound=info", "=info", "newton="])
def test_a_bad_entry_is_an_error_that_changes_nothing(environment: SetEnvironment, spec: str) -> None:
    environment("newton=debug")
    with pytest.raises(InputError, match=f"NEML2_LOGS.*{spec}") as caught:
        environment(f"linear=debug,{spec}")
    assert isinstance(caught.value, RuntimeError) and isinstance(caught.value, ValueError)
    assert levels() == ["debug", "warning", "warning"]


def test_a_bad_entry_in_the_environment_of_the_process_only_warns() -> None:
    script = """
import warnings, neml2_aoti_plugin._log as log
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    log.set_sink(print)
    assert (log.effective_level("newton"), log.effective_level("linear")) == ("warning", "debug")
(warning,) = caught
print(warning.message)
"""
    printed = run_fresh(script, NEML2_LOGS="newton=loud,linear=debug")
    assert "NEML2_LOGS" in printed and "'newton=loud'" in printed


def test_unknown_channels_and_levels_are_refused() -> None:
    calls: list[Callable[[str], object]] = [
        lambda name: log.enabled(name, "info"),
        log.effective_level,
        lambda name: log.emit(name, "info", "text"),
        lambda name: log.set_default_level(name, "info"),
    ]
    for name in ("NEWTON", "", "sound", "all"):
        # A default is set for all channels at once, too.
        for call in calls[:-1] if name == "all" else calls:
            with pytest.raises(InputError, match="channel"):
                call(name)
    for level in ("INFO", "warn", "2", ""):
        with pytest.raises(InputError, match="level"):
            log.enabled("newton", level)
        with pytest.raises(InputError, match="level"):
            log.set_default_level("newton", level)


def test_lines_go_to_standard_streams_or_to_a_sink(capfd: pytest.CaptureFixture[str]) -> None:
    log.set_default_level("all", "debug")
    log.emit("substep", "debug", "a")
    log.emit("newton", "info", "b")
    log.emit("model", "warning", "c")
    log.set_default_level("all", "silent")
    log.emit("newton", "warning", "not shown")
    printed = capfd.readouterr()
    assert printed.err == "[neml2:substep][dbg ] a\n[neml2:model  ][warn] c\n"
    assert printed.out == "[neml2:newton ][info] b\n"
    log.reset_defaults()
    lines: list[tuple[str, str]] = []
    for reset in (log.reset_sink, lambda: log.set_sink(None)):
        log.set_sink(lambda level, line: lines.append((level, line)))
        log.emit("linear", "warning", "one")
        reset()
        log.emit("linear", "warning", "two")
    assert lines == [("warning", "[neml2:linear ][warn] one")] * 2
    assert capfd.readouterr().err.count("two") == 2


def test_levels_may_be_changed_while_others_read_them() -> None:
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            assert log.effective_level("newton") in ("info", "debug", "warning")
            log.enabled("driver", "debug")

    with ThreadPoolExecutor(4) as pool:
        readers = [pool.submit(read) for _ in range(4)]
        for _ in range(2000):
            log.set_default_level("newton", "info")
            log.set_default_level("all", "debug")
            log.reset_defaults()
        stop.set()
    assert [reader.result() for reader in readers] == [None] * 4
