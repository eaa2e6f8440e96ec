"""Signals end a command between two parts of its work: its status says which, nothing is left."""

import os
import pathlib
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pytest

from jaxclip import checkpoints, cli
from jaxclip._core import atomic, signals

COMMANDS = {
    "inspect": "inspect net.safetensors",
    "verify": "verify net.safetensors",
    "clip": "clip net.safetensors out/x.safetensors --threshold 1",
    "compress": "compress net.safetensors out/x.safetensors",
    "target": "compress net.safetensors out/x.safetensors --target-bpw 3",
    "decompress": "decompress low.safetensors out/x.safetensors",
    "export": "export low.safetensors out/x.safetensors --to compressed-tensors",
    "shards": "export low.safetensors out/x --to safetensors --max-shard-bytes 9",
    "gguf": "export net.safetensors out/x.gguf --to Q4_0",
}


@pytest.fixture(autouse=True)
def folder(tmp_path: pathlib.Path, monkeypatch) -> None:
    """A folder to work in, with files of weights, and a folder for results."""
    monkeypatch.chdir(tmp_path)
    weights = {f"{i}.weight": np.full((64, 64), i, np.float32) for i in range(6)}
    checkpoints.save("net.safetensors", weights)
    checkpoints.compress_checkpoint("net.safetensors", "low.safetensors", "ternary")
    pathlib.Path("out").mkdir()


@pytest.fixture(autouse=True)
def default_handlers():
    """Handlers as in the foreground: a job in the background starts with signals ignored."""
    defaults = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    old = {number: signal.signal(number, handler) for number, handler in defaults.items()}
    yield
    for number, handler in old.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_command_at_its_next_part(monkeypatch, capsys, name, number):
    num_parts = 0
    check_stop = signals.check_stop

    def be_signalled_and_check() -> None:
        nonlocal num_parts
        num_parts += 1
        if num_parts == 7:
            signal.raise_signal(number)
            num_parts += 1  # so the handler raises nothing
        check_stop()

    monkeypatch.setattr(signals, "check_stop", be_signalled_and_check)
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    assert cli.main(COMMANDS[name].split()) == 128 + number
    assert num_parts == 8
    assert os.listdir("out") == []
    out, err = capsys.readouterr()
    by = {"SIGINT": "interrupted"}.get(number.name, f"ended by {number.name}")
    assert (out, err) == ("", f"jaxclip: {by}; nothing was left half-written\n")
    assert handlers == [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]


def test_a_signal_after_the_last_part_is_not_lost(monkeypatch):
    monkeypatch.setattr(signals, "check_stop", lambda: None)
    with pytest.raises(signals.Stopped), signals.taken_as_flag(print):
        signal.raise_signal(signal.SIGTERM)
    with signals.taken_as_flag(print):
        pass


def test_what_was_ignored_stays_ignored():
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals.taken_as_flag(print):
            signal.raise_signal(signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, old)


def test_a_second_signal_is_seen_while_the_main_thread_is_elsewhere():
    seen = threading.Event()
    has_waited = []

    def work() -> None:
        with signals.taken_as_flag(lambda number: seen.set()):
            for seconds in (0.05, 60):
                signal.raise_signal(signal.SIGINT)
                has_waited.append(not seen.wait(seconds))

    with pytest.raises(signals.Stopped):
        work()
    assert has_waited == [True, False]


def test_nothing_is_imported_before_the_handler_is_set():
    script = """
        import os, sys
        before = set(sys.modules)
        from jaxclip.__main__ import run
        print(*(set(sys.modules) - before - {"_signal"}))
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert set(result.stdout.split()) == {"jaxclip", "jaxclip.__main__"}


def test_temporaries_are_removed_before_the_process_is_abandoned(tmp_path):
    with atomic.new_folder(tmp_path / "a") as a, atomic.replacing(tmp_path / "b"):
        (a / "shard").write_bytes(b"1")
        before = set(os.listdir(tmp_path))
        atomic.remove_unfinished()
        after = set(os.listdir(tmp_path))
        a.mkdir()  # for the contexts, which the process would not leave
        pathlib.Path(tmp_path, next(x for x in before - after if x.startswith(".b."))).touch()
    assert len(before - after) == 2


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["inspect", "compress", "decompress", "export"])
def test_a_signal_at_any_time_ends_with_its_status(name):
    command = [sys.executable, "-m", "jaxclip", *COMMANDS[name].split()]
    start = time.monotonic()
    subprocess.run(command, check=True, capture_output=True)
    total = time.monotonic() - start
    waits = random.Random(0)
    for number in (signal.SIGINT, signal.SIGTERM) * 3:
        for file in pathlib.Path("out").iterdir():
            file.unlink()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        time.sleep(waits.uniform(0.4, 0.6) * total)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 128 + number, err.decode()
        assert b"Traceback" not in err
        assert set(os.listdir("out")) <= {"x.safetensors"}
