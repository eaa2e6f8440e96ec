"""The examples run as a user runs them; each asserts its own claims."""

import gzip
import itertools
import json
import os
import pathlib
import runpy
import subprocess
import sys
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import optuna
import pytest
import safetensors

import jaxclip
from jaxclip import checkpoints
from jaxclip._core.grids import Grid, code_range
from jaxclip.checkpoints.format import layout
from jaxclip.lowbit.arrays import QuantizedArray
from jaxclip.lowbit.trees import decompress
from oracles import recorded_trees

FOLDER = pathlib.Path(__file__).parents[2] / "examples"
WITHOUT_CLAIMS = (
    "digits", "distil_minilm", "fashion", "minilm", "read_low_bit_file", "quickstart",
)  # fmt: skip
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"MPLBACKEND": "agg"}
EXAMPLES = [path for path in sorted(FOLDER.glob("*.py")) if path.stem not in WITHOUT_CLAIMS]
# Of which tests here and of two processes run the parts with less data.
LONG = ("nnx_fashion", "linen_fashion", "optuna_search", "two_hosts")


def run(example: pathlib.Path, *arguments: object, cwd: pathlib.Path, path: str = "") -> str:
    """What an example prints; `path` goes before the PATH of the shell."""
    before = [path] if path else []
    environment = ENVIRONMENT | {"PATH": os.pathsep.join([*before, ENVIRONMENT["PATH"]])}
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


@pytest.mark.parametrize(
    "example",
    [
        pytest.param(p, marks=pytest.mark.weekly if p.stem in LONG else pytest.mark.thorough)
        for p in EXAMPLES
    ],
    ids=lambda p: p.stem,
)
def test_an_example_runs_and_its_claims_hold(example: pathlib.Path, tmp_path: pathlib.Path):
    assert "FAILS" not in run(example, cwd=tmp_path)


@pytest.mark.thorough
def test_the_quickstart_holds_its_claims_and_shows_at_once_what_it_does(tmp_path: pathlib.Path):
    start, shown = time.monotonic(), []
    with subprocess.Popen(
        [sys.executable, str(FOLDER / "quickstart.py")],
        cwd=tmp_path,
        env=ENVIRONMENT | {"PYTHONUNBUFFERED": ""},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        for line in process.stdout:
            shown.append((time.monotonic() - start, line))
    total = time.monotonic() - start
    assert process.returncode == 0, shown
    assert not any("FAILS" in line for _, line in shown)
    assert (tmp_path / "tradeoff.png").stat().st_size > 10_000
    # Into a pipe Python writes only what is flushed, or everything at the end.
    times = [0, *(when for when, line in shown if " s] " in line), total]
    assert max(np.diff(times)) < total / 2


def test_the_quickstart_is_short():
    assert len((FOLDER / "quickstart.py").read_text().splitlines()) <= 180


@pytest.mark.thorough
@pytest.mark.parametrize("interrupted", ["ask", "compress", "tell"])
def test_a_search_that_is_interrupted_leaves_no_trial_running(interrupted, monkeypatch):
    calls, studies = itertools.count(), []

    def interrupt_at_third(function):
        def call(*arguments, **settings):
            if next(calls) == 2:
                raise KeyboardInterrupt
            return function(*arguments, **settings)

        return call

    def create_study(create=optuna.create_study, **settings):
        studies.append(create(**settings))
        if interrupted != "compress":
            method = interrupt_at_third(getattr(studies[0], interrupted))
            monkeypatch.setattr(studies[0], interrupted, method)
        return studies[0]

    monkeypatch.setattr(optuna, "create_study", create_study)
    if interrupted == "compress":
        monkeypatch.setattr(jaxclip, "compress", interrupt_at_third(jaxclip.compress))
    monkeypatch.syspath_prepend(str(FOLDER))
    # optax's cosine schedule needs the promotion of the default.
    with jax.numpy_dtype_promotion("standard"), pytest.raises(KeyboardInterrupt):
        runpy.run_path(str(FOLDER / "optuna_search.py"))
    states = [trial.state.name for trial in studies[0].trials]
    finished = ["COMPLETE"] * 2 if interrupted != "ask" else []
    assert states == finished + ["FAIL"] * ((2 if interrupted == "ask" else 8) - len(finished))


# --- A BERT encoder -------------------------------------------------------------------


class WordsAsTokens:
    """What `examples/minilm.py` uses of the package tokenizers: a token for each word."""

    @staticmethod
    def from_file(path: str) -> "WordsAsTokens":
        assert pathlib.Path(path).name == "tokenizer.json"
        return WordsAsTokens()

    def enable_truncation(self, length: int) -> None:
        self.length = length

    def enable_padding(self, length: int) -> None:
        assert length == self.length

    def encode_batch(self, texts: list[str]) -> list[types.SimpleNamespace]:
        rows = [[1, *(2 + len(word) for word in text.split())][: self.length] for text in texts]
        return [
            types.SimpleNamespace(
                ids=row + [0] * (self.length - len(row)),
                attention_mask=[1] * len(row) + [0] * (self.length - len(row)),
            )
            for row in rows
        ]


def bert_weights(hidden: int = 16) -> dict[str, np.ndarray]:
    """A drawn encoder of one layer, by the names of the Hugging Face hub."""
    rng = np.random.default_rng(0)
    shapes = {
        "embeddings.word_embeddings": (260, hidden),
        "embeddings.position_embeddings": (64, hidden),
        "embeddings.token_type_embeddings": (2, hidden),
    }
    block = "encoder.layer.0"
    square = [f"{block}.attention.self.{part}" for part in ("query", "key", "value")]
    shapes |= dict.fromkeys([*square, f"{block}.attention.output.dense"], (hidden, hidden))
    shapes |= {f"{block}.intermediate.dense": (4 * hidden, hidden)}
    shapes |= {f"{block}.output.dense": (hidden, 4 * hidden)}
    tensors = {f"{name}.weight": rng.standard_normal(shape) for name, shape in shapes.items()}
    tensors |= {f"{n}.bias": np.zeros(s[0]) for n, s in shapes.items() if block in n}
    for name in ("embeddings", f"{block}.attention.output", f"{block}.output"):
        tensors |= {f"{name}.LayerNorm.weight": np.ones(hidden)}
        tensors |= {f"{name}.LayerNorm.bias": np.zeros(hidden)}
    return {name: tensor.astype(np.float32) for name, tensor in tensors.items()}


@pytest.fixture
def encoder_folder(tmp_path, monkeypatch):
    """The files of a drawn encoder, and words with scores; the examples can be imported."""
    monkeypatch.setitem(sys.modules, "tokenizers", types.SimpleNamespace(Tokenizer=WordsAsTokens))
    monkeypatch.syspath_prepend(FOLDER)
    checkpoints.save(tmp_path / "model.safetensors", bert_weights())
    config = {"num_hidden_layers": 1, "num_attention_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "words.tsv").write_text("# words\nlove\tsex\t6.77\ntiger\tcat\t7.3\nX\ta\t1\n")
    return tmp_path


@pytest.mark.thorough
def test_embeddings_of_an_encoder_are_compared_with_those_of_its_low_bit_files(
    encoder_folder, monkeypatch, capsys
):
    import minilm

    monkeypatch.setattr(minilm, "SETTINGS", {"8 bits": "--bits 8", "2 bits": "--bits 2"})
    words = ["minilm.py", str(encoder_folder), "--words", str(encoder_folder / "words.tsv")]
    monkeypatch.setattr(sys, "argv", words)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        minilm.main()
    rows = {line[:24].strip(): line[24:].split() for line in capsys.readouterr().out.splitlines()}
    assert rows["float32"][3] == "1.0000"
    assert 0.999 < float(rows["8 bits"][3]) <= 1.0
    assert float(rows["2 bits"][3]) < float(rows["8 bits"][3])
    assert 0 < float(rows["8 bits"][2]) < 1e-3 < float(rows["2 bits"][2])


@pytest.mark.thorough
def test_tuning_brings_embeddings_nearer_and_keeps_codes_and_bytes(
    encoder_folder, monkeypatch, capsys
):
    import distil_minilm

    before, after = {}, {}

    def tuned(*arguments, tune=distil_minilm.tuned):
        before.update(arguments[2])
        after.update(tune(*arguments))
        return after

    monkeypatch.setattr(distil_minilm, "tuned", tuned)
    monkeypatch.setattr(distil_minilm, "NUM_SENTENCES", 64)
    files = {"words": "words.tsv", "calibration": "moments.safetensors", "save": "out.safetensors"}
    options = [f"--{name}={encoder_folder / file}" for name, file in files.items()]
    options += ["--bytes=12000", "--steps=40", "--step-size=1e-2"]
    monkeypatch.setattr(sys, "argv", ["distil_minilm.py", str(encoder_folder), *options])
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        distil_minilm.main()
    rows = {line[:24].strip(): line[24:].split() for line in capsys.readouterr().out.splitlines()}
    assert float(rows["and tuned"][1]) < 0.8 * float(rows["rounded by its inputs"][1])
    for row in ("and tuned", "rounded by its inputs"):
        assert int(rows[row][0].replace(",", "")) <= 12_000
    low_bit = [name for name, leaf in before.items() if isinstance(leaf, QuantizedArray)]
    assert len(low_bit) == 9
    for name in low_bit:
        np.testing.assert_array_equal(after[name].qvalue, before[name].qvalue)


def test_texts_to_train_on_are_not_those_held_out(encoder_folder):
    import minilm

    held_out = minilm.sentences(300)
    manual = minilm.sentences(50, held_out)
    library = minilm.library_sentences([*held_out, *manual])
    assert len(set(held_out)) == 300
    assert len(set(manual)) == 50
    assert len(library) > 1000
    assert not set(held_out) & set(manual)
    assert not {*held_out, *manual} & set(library)


def test_batches_of_tokens_have_no_padding(encoder_folder):
    import minilm

    texts = [" ".join(["word"] * n) for n in (10, 11, 13, 13, 20, 90)]  # and a token before
    batches = list(minilm.token_batches(minilm.Encoder(encoder_folder), texts))
    assert [batch.shape for batch in batches] == [(3, 12), (1, 20), (1, 48)]
    assert all((batch > 0).all() for batch in batches)


def test_ranks_of_ties_are_shared(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    import minilm

    assert minilm.spearman([1.0, 2.0, 3.0], [10.0, 20.0, 30.0]) == pytest.approx(1)
    # Ranks 1, 2.5, 2.5, 4 and 1, 2, 3, 4.
    assert minilm.spearman([1, 5, 5, 9], [1, 2, 3, 4]) == pytest.approx(0.9486832980505138)


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


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["nnx_fashion", "linen_fashion"])
def test_the_fashion_examples_take_idx_files_and_a_number_of_steps(name, tmp_path):
    write_idx(tmp_path, is_gzipped=True)
    printed = run(FOLDER / f"{name}.py", "--data", tmp_path, "--steps", 3, cwd=tmp_path)
    assert printed.startswith(f"Fashion-MNIST from {tmp_path}\n")
    assert "ternary" in printed


@pytest.mark.thorough
def test_the_nnx_example_goes_on_from_its_checkpoint_on_digits(tmp_path):
    path = write_dpkg(tmp_path / "bin", "exit 1")
    example, arguments = FOLDER / "nnx_fashion.py", ("--checkpoint-dir", tmp_path / "run")
    printed = run(example, "--steps", 20, *arguments, cwd=tmp_path, path=path)
    assert printed.startswith("scikit-learn's digits")
    assert "checkpoint" not in printed
    printed = run(example, "--steps", 40, *arguments, cwd=tmp_path, path=path)
    assert "goes on from a checkpoint, after 20 steps" in printed
    assert "stopped after step 40" in printed


# --- A reader of the file format ------------------------------------------------------


@pytest.fixture
def reader(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    import read_low_bit_file

    return read_low_bit_file


def assert_read_alike(reader, path: pathlib.Path) -> None:
    """The same arrays as ours; bfloat16 as float32 and float8 as bytes, as NumPy has neither."""
    expected = layout.plan_file(decompress(checkpoints.load(path))).leaves
    found = reader.read_file(path)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        array = np.asarray(array)
        wanted = array.view(np.uint8) if "float8" in array.dtype.name else array
        wanted = wanted.astype(np.float32) if wanted.dtype == jnp.bfloat16 else wanted
        assert found[name].dtype == wanted.dtype, name
        np.testing.assert_array_equal(found[name], wanted, err_msg=name)


@pytest.mark.parametrize("version", [1, "1_convolutions", 2, 3, 4, 6])
def test_the_reader_reads_recorded_files(reader, version):
    assert_read_alike(reader, recorded_trees.RECORDED / f"version_{version}.safetensors")


def every_kind_of_leaf() -> dict:
    """Sparse codes, so that coding makes them smaller, with every option of a low-bit array."""
    rng, leaves = np.random.default_rng(0), {}
    kinds = itertools.product(
        (1, "ternary", 2, 4, 8),
        ((None, None), (-1, None), (0, 7), (None, 50)),
        (False, True),
        ("float32", "float16", "bfloat16", "log8"),
    )
    for bits, (axis, group_size), has_zero, scale_dtype in kinds:
        low, high = code_range(bits)
        has_zero &= bits != 1
        grid = Grid(
            bits, axis=axis, group_size=group_size, zero_point=has_zero, scale_dtype=scale_dtype
        )
        shape = (5, 60)
        scale_shape = grid.scale_shape(shape)
        codes = rng.normal(0, 0.4, shape).round().clip(low, high)
        scale = rng.choice([0.5, 0.25, 2.0], scale_shape)
        scale.flat[0] = 2.0  # the unit of log8
        zero = rng.integers(low, high + 1, scale_shape).astype(np.int8) if has_zero else None
        leaves[f"{bits} {axis} {group_size} {has_zero} {scale_dtype}"] = QuantizedArray(
            (np.where(codes < 0, -1, 1) if bits == 1 else codes).astype(np.int8),
            scale.astype(jnp.dtype(scale_dtype.replace("log8", "float32"))),
            grid, jnp.dtype(jnp.bfloat16 if bits == 4 else np.float32), zero,
        )  # fmt: skip
    return leaves


@pytest.mark.thorough
@pytest.mark.parametrize("coding", [None, "huffman", "ans", "lanes"])
def test_the_reader_reads_every_kind_of_leaf(reader, coding, tmp_path):
    bytes_of_float8 = np.arange(256, dtype=np.uint8)
    plain = [bytes_of_float8.view(jnp.float8_e4m3fn), bytes_of_float8.view(jnp.float8_e5m2)]
    tree = {"low": every_kind_of_leaf(), "plain": [*plain, np.array([True, False])]}
    checkpoints.save(tmp_path / "net.safetensors", tree, coding=coding)
    inner = safetensors.safe_open(tmp_path / "net.safetensors", "np").metadata()["jaxclip"]
    codings = {info["coding"] for info in json.loads(inner)["leaves"].values()}
    assert codings == ({None, coding} if coding else {None})
    assert_read_alike(reader, tmp_path / "net.safetensors")


def test_the_reader_says_what_ans_needs_and_sees_damage(reader, tmp_path, monkeypatch):
    path = tmp_path / "net.safetensors"
    checkpoints.save(path, {"w": every_kind_of_leaf()["8 None None False float32"]}, coding="ans")
    monkeypatch.setitem(sys.modules, "constriction", None)
    with pytest.raises(ImportError, match="pip install constriction"):
        reader.read_file(path)
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match="tensor 'w:codes' is damaged"):
        reader.read_file(path)


@pytest.mark.thorough
def test_the_reader_prints_names_shapes_and_means(tmp_path):
    checkpoints.save(tmp_path / "net.safetensors", {"layer": {"bias": np.float32([1, 2, 6])}})
    printed = run(FOLDER / "read_low_bit_file.py", "net.safetensors", cwd=tmp_path)
    assert printed.split() == ["layer/bias", "(3,)", "float32", "mean", "3"]
