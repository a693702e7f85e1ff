"""Code that does not come back is stopped, wherever it runs and whatever it catches."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import logging
import signal
import subprocess
import sys
import threading
import time

import pytest

from advkit.core import limits
from advkit.core.blame import MODEL, blamed, code_of
from advkit.core.limits import TimedOut, limited


def loops():
    while True:
        pass


def sleeps():
    time.sleep(60)


def waits():
    threading.Event().wait(60)


def swallows():
    while True:
        with contextlib.suppress(Exception):
            time.sleep(0.01)


def swallows_once():
    try:
        time.sleep(60)
    except BaseException:
        time.sleep(60)


@pytest.mark.parametrize("act", [loops, sleeps, waits, swallows])
def test_code_that_does_not_come_back_is_stopped(act):
    start = time.monotonic()
    with pytest.raises(TimedOut, match=r"^timed out after 0\.2 s$"), limited(0.2):
        act()
    assert 0.15 < time.monotonic() - start < 10


def test_what_swallows_the_interruption_is_interrupted_again():
    with pytest.raises(TimedOut), limited(0.1):
        swallows_once()


@pytest.mark.parametrize("act", [loops, swallows])
def test_so_it_is_in_another_thread(act):
    found = []

    def run():
        try:
            with limited(0.2):
                act()
        except TimedOut as error:
            found.append(str(error))
        with limited(5):  # nothing is left over for what comes after
            found.append(sum(range(100_000)))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(30)
    assert found == ["timed out after 0.2 s", sum(range(100_000))]


def test_what_is_back_in_time_is_let_go():
    for _ in range(50):
        with limited(0.05):
            pass
    time.sleep(0.2)  # no alarm comes late
    with limited(None):
        time.sleep(0.05)


def test_the_time_of_a_block_inside_is_not_counted():
    with limited(0.4):
        for _ in range(4):
            with limited(2):
                time.sleep(0.2)

    def both():
        with limited(5):
            time.sleep(0.5)
        loops()

    with pytest.raises(TimedOut, match=r"0\.3 s"), limited(0.3):
        both()
    inside = []
    with limited(5):
        with pytest.raises(TimedOut, match=r"0\.1 s"), limited(0.1):
            loops()
        inside.append("the outer one goes on")
    assert inside


@pytest.mark.parametrize("thread", [False, True])
def test_an_import_is_let_finish(thread, tmp_path, monkeypatch):
    """Half a module in sys.modules would break whatever needs it next."""
    name = f"slow_to_import_{int(thread)}"
    (tmp_path / f"{name}.py").write_text("import time\nfor _ in range(60):\n    time.sleep(0.01)\nWHOLE = True\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = []

    def run():
        try:
            with limited(0.1):
                importlib.import_module(name)
                loops()
        except TimedOut:
            found.append(sys.modules[name].WHOLE)

    if thread:
        other = threading.Thread(target=run)
        other.start()
        other.join(30)
    else:
        run()
    assert found == [True]


def test_the_callers_alarm_is_given_back():
    seen = []
    before = signal.signal(signal.SIGALRM, lambda *_: seen.append(1))
    try:
        with limited(5):
            pass
        assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        with limited(0.05), contextlib.suppress(TimedOut):
            pass
        with pytest.raises(TimedOut), limited(0.05):
            loops()
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 0
        time.sleep(0.6)
        assert seen == [1]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_it_says_whose_code_it_was():
    with pytest.raises(TimedOut) as told, limited(0.1), code_of(MODEL):
        loops()
    assert blamed(told.value) == MODEL


def test_code_that_never_returns_to_python_is_told_of(monkeypatch, caplog):
    """And stopped as soon as it does return."""
    monkeypatch.setattr(limits, "GRACE", 0.3)
    rounds, start = 200_000, time.monotonic()
    hashlib.pbkdf2_hmac("sha256", b"", b"", rounds)
    rounds = int(rounds * 2 / (time.monotonic() - start))  # about two seconds

    def hard():
        hashlib.pbkdf2_hmac("sha256", b"", b"", rounds)
        pytest.fail("it went on")

    with caplog.at_level(logging.WARNING, "advkit"), pytest.raises(TimedOut), limited(0.1):
        hard()
    assert sum("does not return to Python" in record.message for record in caplog.records) == 1


def test_a_limit_in_a_thread_leaves_a_traced_program_running() -> None:
    """A mark that an exception is due, left behind, makes Python 3.11 run in circles under a debugger or coverage."""
    code = (
        "import sys, threading\n"
        "from advkit.core.limits import limited\n"
        "def work():\n"
        "    with limited(60):\n"
        "        pass\n"
        "one = threading.Thread(target=work)\n"
        "one.start()\n"
        "one.join()\n"
        "def called():\n"
        "    return 1\n"
        "sys.settrace(lambda *_: None)\n"
        "called()\n"
        "sys.settrace(None)\n"
        "print('back')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "back\n", done.stderr
