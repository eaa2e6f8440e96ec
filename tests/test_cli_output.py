"""What the command line shows: any name from a file, in any encoding, to any reader."""

import json
import os
import pathlib
import subprocess
import sys
import warnings

import numpy as np
import pytest
import safetensors.numpy

import jaxclip
from jaxclip import checkpoints, cli
from jaxclip._core.reports import format_table

HOSTILE = "a\x1b]0;title\x07\x1b[2J\nfile header  forged\u202e"
SAFE = "a\\x1b]0;title\\x07\\x1b[2J\\nfile header  forged\\u202e"
NAMES = ["größe", "層.weight", HOSTILE]


@pytest.fixture(autouse=True)
def folder(tmp_path: pathlib.Path, monkeypatch) -> None:
    """A folder to work in, with a file of weights that have difficult names."""
    monkeypatch.chdir(tmp_path)
    tensors = {name: np.ones((32, 32), np.float32) for name in NAMES}
    tensors["層.weight"][0, 0] = np.nan
    safetensors.numpy.save_file(tensors, "net.safetensors")
    pathlib.Path("some.json").write_text('{"ö|weight": null}')


COMMANDS = {
    "--help": 0,
    "compress --help": 0,
    "inspect net.safetensors": 0,
    "inspect net.safetensors --json": 0,
    "verify net.safetensors": 0,
    "clip net.safetensors out.safetensors --threshold 1 --force": 0,
    "compress net.safetensors out.safetensors": 1,  # a weight is NaN
    "compress net.safetensors out.safetensors --policy some.json --dry-run": 0,
    "export net.safetensors out.gguf --to Q4_0": 1,
    "export net.safetensors größe.safetensors --to safetensors --force": 0,
    "inspect 層.safetensors": 1,
    "clip net.safetensors out.safetensors --threshold 層": 2,
}


@pytest.mark.parametrize(
    "encoding",
    ["ascii", "cp1252", pytest.param("latin-1", marks=pytest.mark.thorough), "utf-8"],
)
def test_every_command_shows_every_name_in_every_encoding(encoding: str):
    # One process for all commands: starting one takes a second.
    script = (
        "import json, sys, jaxclip.cli\n"
        "for words, status in json.loads(sys.argv[1]).items():\n"
        "    try: got = jaxclip.cli.main(words.split())\n"
        "    except SystemExit as end: got = end.code\n"
        "    assert got == status, (words, got)\n"
    )
    env = os.environ | {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0", "COLUMNS": "20"}
    env |= {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"} if encoding == "ascii" else {}
    commands = COMMANDS
    if encoding == "ascii":  # such a system has no such names of files, either
        commands = {words: status for words, status in commands.items() if words.isascii()}
    words = json.dumps(commands)
    result = subprocess.run([sys.executable, "-c", script, words], env=env, capture_output=True)
    err = result.stderr.decode(encoding)
    assert result.returncode == 0, err
    out = result.stdout.decode(encoding)
    assert SAFE in out
    assert "Traceback" not in err
    for text in (out, err):
        assert all(line.isprintable() for line in text.split(os.linesep))
    expected = {"ascii": "gr\\xf6\\xdfe", "cp1252": "größe", "latin-1": "größe"}
    assert expected.get(encoding, "層.weight") in out
    assert ("█" if encoding == "utf-8" else "#") in out


@pytest.mark.parametrize("words", ["--help", "inspect net.safetensors --headers-only"])
def test_a_reader_that_closes_the_pipe_gets_no_complaint(words: str):
    command = [sys.executable, "-m", "jaxclip", *words.split()]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == (0 if words == "--help" else 1)
    process.stderr.close()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no full device")
def test_a_full_disk_behind_standard_output_is_said_once():
    command = [sys.executable, "-m", "jaxclip", "inspect", "net.safetensors", "--headers-only"]
    with open("/dev/full", "w") as full:
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    message = "jaxclip: error: [Errno 28] No space left on device\n"
    assert (result.returncode, result.stderr) == (1, message)


@pytest.mark.filterwarnings("default")
def test_a_warning_is_a_line_with_escaped_names(monkeypatch, capsys):
    def inspect_and_warn(path):
        warnings.warn(f"in {path}: {HOSTILE}", UserWarning, stacklevel=1)
        return "sizes"

    monkeypatch.setattr(checkpoints, "inspect", inspect_and_warn)
    assert cli.main(["inspect", "net.safetensors", "--headers-only"]) == 0
    assert capsys.readouterr() == ("sizes\n", f"jaxclip: UserWarning: in net.safetensors: {SAFE}\n")


def test_errors_and_plots_show_escaped_names():
    text = np.array("text")
    for write in (checkpoints.save, jaxclip.interop.to_safetensors):
        with pytest.raises(TypeError) as info:
            write("x.safetensors", {HOSTILE: text})
        assert str(info.value).isprintable()
    with pytest.raises(ValueError, match="finite") as info:
        jaxclip.compress({HOSTILE: np.full((8, 8), np.nan)}, 4)
    assert str(info.value).isprintable()
    with pytest.raises(checkpoints.CheckpointError) as info:
        checkpoints.load("net.safetensors", like={"x": np.ones(2, np.float32)})
    assert str(info.value).isprintable()
    figure = jaxclip.plots.weight_histograms({HOSTILE + "$\\frac$": np.ones(3)})
    assert figure.axes[0].get_title() == SAFE + "$\\frac$"
    figure.canvas.draw()


def test_a_name_as_long_as_a_file_does_not_widen_the_other_rows():
    rows = [["name", "1"], ["n" * 10_000, "2"], *([["a", "3"]] * 9)]
    assert len(format_table(rows)) < 10_000 + 11 * 200
