"""The examples run as a user runs them; each asserts its own claims."""

import gzip
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

FOLDER = pathlib.Path(__file__).parent.parent / "examples"
EXAMPLES = [path for path in sorted(FOLDER.glob("*.py")) if path.stem not in ("digits", "fashion")]


def run(example: pathlib.Path, *arguments: object, cwd: pathlib.Path, path: str = "") -> str:
    """What an example prints; `path` goes before the PATH of the shell."""
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"MPLBACKEND": "agg"}
    environment["PATH"] = os.pathsep.join(filter(None, [path, environment["PATH"]]))
    result = subprocess.run(
        [sys.executable, str(example), *map(str, arguments)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda p: p.stem)
def test_an_example_runs_and_its_claims_hold(example: pathlib.Path, tmp_path: pathlib.Path):
    assert "FAILS" not in run(example, cwd=tmp_path)
    if example.stem == "quickstart":
        assert (tmp_path / "tradeoff.png").stat().st_size > 10_000


def test_the_quickstart_is_short():
    assert len((FOLDER / "quickstart.py").read_text().splitlines()) <= 150


# --- Fashion-MNIST --------------------------------------------------------------------


@pytest.fixture
def fashion(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    import fashion

    return fashion


def write_idx(folder: pathlib.Path, *, is_gzipped: bool) -> dict[str, np.ndarray]:
    """Small files in the layout of Fashion-MNIST, and what is in them."""
    rng, written = np.random.default_rng(0), {}
    folder.mkdir(exist_ok=True)
    for part, size in {"train": 300, "t10k": 50}.items():
        for kind, shape in {"images-idx3": (size, 28, 28), "labels-idx1": (size,)}.items():
            values = rng.integers(256 if len(shape) == 3 else 10, size=shape).astype(np.uint8)
            header = bytes([0, 0, 8, len(shape)]) + np.array(shape, ">i4").tobytes()
            content = header + values.tobytes()
            name = f"{part}-{kind}-ubyte" + ".gz" * is_gzipped
            (folder / name).write_bytes(gzip.compress(content) if is_gzipped else content)
            written[f"{part}-{kind}"] = values
    return written


def write_dpkg(folder: pathlib.Path, script: str) -> str:
    """A `dpkg` of our own; where to find it."""
    folder.mkdir(exist_ok=True)
    (folder / "dpkg").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "dpkg").chmod(0o755)
    return str(folder)


@pytest.mark.parametrize("is_gzipped", [False, True])
def test_idx_files_are_read_as_they_were_written(fashion, tmp_path, is_gzipped):
    written = write_idx(tmp_path, is_gzipped=is_gzipped)
    source, train, held_out, test = fashion.load(tmp_path)
    assert source == f"Fashion-MNIST from {tmp_path}"
    pixels = written["train-images-idx3"].astype(np.float64)
    for name, images, labels in [
        ("train", *(np.concatenate(pair) for pair in zip(held_out, train, strict=True))),
        ("t10k", *test),
    ]:
        expected = (written[f"{name}-images-idx3"] - pixels.mean()) / pixels.std()
        np.testing.assert_allclose(images, expected.reshape(-1, 784), atol=1e-5)
        np.testing.assert_array_equal(labels, written[f"{name}-labels-idx1"])
        assert (images.dtype, labels.dtype) == (np.float32, np.int32)


def test_a_folder_without_the_files_and_a_cut_file_are_refused(fashion, tmp_path):
    write_idx(tmp_path, is_gzipped=False)
    file = tmp_path / "t10k-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match="t10k-images-idx3-ubyte is not a whole idx file"):
        fashion.load(tmp_path)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="has no t10k-images-idx3-ubyte"):
        fashion.load(tmp_path)


def test_the_files_of_the_package_are_found(fashion, tmp_path, monkeypatch):
    data = tmp_path / "data"
    write_idx(data, is_gzipped=True)
    path = write_dpkg(tmp_path / "bin", f"[ $1 = -L ] && echo {data} && ls -d {data}/*")
    monkeypatch.setenv("PATH", path, prepend=os.pathsep)
    assert fashion.load()[0] == f"Fashion-MNIST from {data}"


@pytest.mark.parametrize("has_dpkg", [False, True])
def test_without_the_package_the_digits_are_loaded(fashion, tmp_path, monkeypatch, has_dpkg):
    if has_dpkg:
        write_dpkg(tmp_path, "echo not installed >&2; exit 1")
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}" + "/bin" * has_dpkg)
    source, train, held_out, test = fashion.load()
    assert source.startswith("scikit-learn's digits")
    assert sum(len(labels) for _, labels in (train, held_out, test)) == 1797


def test_batches_after_a_restart_are_those_of_a_run_without_one(fashion):
    data = np.arange(50), np.arange(50) % 10
    whole = [x for (x, _), _ in zip(fashion.batches(data, 8), range(20), strict=False)]
    for start in (0, 4, 6, 13):
        rest = zip(fashion.batches(data, 8, start), whole[start:], strict=False)
        assert all((x == expected).all() for (x, _), expected in rest)
    assert len(np.unique(np.concatenate(whole[6:12]))) == 48


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nnx_fashion", "linen_fashion"])
def test_the_fashion_examples_take_idx_files_and_a_number_of_steps(name, tmp_path):
    write_idx(tmp_path, is_gzipped=True)
    printed = run(FOLDER / f"{name}.py", "--data", tmp_path, "--steps", 3, cwd=tmp_path)
    assert printed.startswith(f"Fashion-MNIST from {tmp_path}\n")
    assert "ternary" in printed


@pytest.mark.slow
def test_the_nnx_example_goes_on_from_its_checkpoint_on_digits(tmp_path):
    path = write_dpkg(tmp_path / "bin", "exit 1")
    example, arguments = FOLDER / "nnx_fashion.py", ("--checkpoint-dir", tmp_path / "run")
    printed = run(example, "--steps", 20, *arguments, cwd=tmp_path, path=path)
    assert printed.startswith("scikit-learn's digits")
    assert "checkpoint" not in printed
    printed = run(example, "--steps", 40, *arguments, cwd=tmp_path, path=path)
    assert "goes on from a checkpoint, after 20 steps" in printed
    assert "stopped after step 40" in printed
