"""The command line: what its help promises runs, and errors are one line on standard error."""

import contextlib
import io
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

import jaxclip
from jaxclip import checkpoints, cli
from jaxclip.cli import arguments, help_texts
from oracles.made_up_files import header_of


@pytest.fixture(autouse=True)
def folder(tmp_path: pathlib.Path, monkeypatch) -> pathlib.Path:
    """A folder to work in, with a file of weights and a low-bit file."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    tensors = {
        "embed.weight": rng.standard_normal((40, 64)).astype(np.float32),
        "layer.weight": rng.standard_normal((32, 64)).astype(ml_dtypes.bfloat16),
        "layer.bias": rng.standard_normal(32).astype(np.float32),
    }
    safetensors.numpy.save_file(tensors, "net.safetensors")
    small = jaxclip.compress(tensors, jaxclip.Grid(4, axis=0))
    checkpoints.save("low.safetensors", small)
    write_policy({"embed": 8})
    pathlib.Path("model").mkdir()
    pathlib.Path("model", "config.json").write_text('{"model_type": "bert"}')
    return tmp_path


def write_policy(policy: Any, name: str = "policy.json") -> None:
    pathlib.Path(name).write_text(policy if isinstance(policy, str) else json.dumps(policy))


def run(*words: str) -> tuple[int, str, str]:
    """Exit status, standard output and standard error."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = cli.main(words)
        except SystemExit as end:
            status = int(end.code or 0)
    return status, out.getvalue(), err.getvalue()


def run_json(*words: str) -> Any:
    status, out, err = run(*words, "--json")
    assert status == 0, err
    return json.loads(out)


@pytest.mark.thorough
def test_every_example_of_the_help_runs():
    examples = [
        line.strip()
        for name in help_texts.HELP
        for line in run(name, "--help")[1].splitlines()
        if line.startswith("  jaxclip ")
    ]
    assert len(examples) >= 10
    checkpoints.save("small.safetensors", checkpoints.load("low.safetensors"))
    for example in examples:
        program, *words = shlex.split(example)
        target = words[2] if len(words) > 2 and not words[2].startswith("--") else None
        if target and words[1] != target and "small" in target:
            pathlib.Path(target).unlink(missing_ok=True)
        status, out, err = run(*words)
        assert status == 0, (example, err)
        assert program == "jaxclip"
        assert out.strip()
    assert "net.gguf" in os.listdir()
    config = json.loads(pathlib.Path("folder", "config.json").read_text())
    assert config["model_type"] == "bert"
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"


@pytest.mark.thorough
def test_inspect_shows_what_is_there_and_how_it_is_spread():
    status, out, _ = run("inspect", "net.safetensors")
    assert status == 0
    assert "embed.weight" in out
    assert "bfloat16" in out
    assert "█" in out
    found = run_json("inspect", "net.safetensors")
    w = checkpoints.load("net.safetensors")["embed.weight"]
    assert found["statistics"]["embed.weight"]["max_abs"] == pytest.approx(np.abs(w).max())
    assert found["statistics"]["embed.weight"]["thresholds"].keys() == {"4", "3", "2", "ternary"}
    headers = run_json("inspect", "low.safetensors", "--headers-only")
    assert {x["path"]: x["bits"] for x in headers["leaves"]}["embed.weight"] == 4
    assert headers["total_bytes"] == os.path.getsize("low.safetensors")
    low = run_json("inspect", "low.safetensors")["report"]["leaves"]
    density = {x["path"]: x["density"] for x in low}["embed.weight"]
    assert density == np.mean(checkpoints.load("low.safetensors")["embed.weight"].qvalue != 0)
    assert "density" in run("inspect", "low.safetensors")[1]


def write_hole(path: str, num_tensors: int, n: int) -> None:
    """A file of float32 tensors whose values are a hole."""
    entries = {
        f"w{i}": {
            "dtype": "F32",
            "shape": [n],
            "data_offsets": [4 * n * i, 4 * n * (i + 1)],
        }
        for i in range(num_tensors)
    }
    with open(path, "wb") as file:
        file.write(header_of(entries))
        file.truncate(file.tell() + 4 * n * num_tensors)


@pytest.mark.parametrize(("num_tensors", "size"), [(1001, 0), (1, 2**29)])
def test_inspect_of_many_or_large_tensors_reads_headers_alone(num_tensors, size):
    write_hole("large.safetensors", num_tensors, size)
    status, out, _ = run("inspect", "large.safetensors")
    assert status == 0
    assert out.endswith("--statistics measures the weights.\n")
    found = run_json("inspect", "large.safetensors")
    assert found["statistics"] is None
    assert found["report"]["raw_bytes"] == 4 * size * num_tensors


def test_a_file_that_stands_for_too_many_bytes_is_refused_until_the_limit_is_lifted():
    write_hole("hole.safetensors", 1, 2**27)
    for command in ("verify", "clip --threshold 1", "compress", "decompress", "export --to Q8_0"):
        name, *options = command.split()
        target = [] if name == "verify" else ["out.safetensors"]
        status, _, err = run(name, "hole.safetensors", *target, *options)
        assert status == 1
        assert "536,870,912 bytes, more than --max-ratio 64 times" in err
        assert "pass a larger --max-ratio" in err
    write_hole("hole.safetensors", 1, 2**10)
    assert run("verify", "hole.safetensors", "--max-ratio", "inf")[0] == 0
    assert run("verify", "hole.safetensors", "--max-ratio", "-1")[0] == 2


@pytest.mark.thorough
def test_clip_saves_the_projection():
    assert run("clip", "net.safetensors", "out.safetensors", "--threshold", "0.5")[0] == 0
    clipped = checkpoints.load("out.safetensors")
    for name, w in checkpoints.load("net.safetensors").items():
        np.testing.assert_array_equal(clipped[name], np.asarray(jaxclip.clip_weights(w, 0.5)))


@pytest.mark.thorough
def test_compress_and_decompress_do_what_python_does():
    words = ["compress", "net.safetensors", "out.safetensors", "--bits", "ternary"]
    words += ["--group-size", "16", "--policy", "policy.json"]
    write_policy({"embed": 8, r"layer\.weight$": None})
    planned = run_json(*words, "--dry-run")
    assert not os.path.exists("out.safetensors")
    assert run_json(*words)["total_bytes"] == planned["total_bytes"]
    assert planned["total_bytes"] == os.path.getsize("out.safetensors")
    small = checkpoints.load("out.safetensors")
    assert small["embed.weight"].bits == 8
    assert small["layer.weight"].dtype == ml_dtypes.bfloat16
    decompress = ["decompress", "out.safetensors", "plain.safetensors", "--dtype", "float16"]
    assert run(*decompress)[0] == 0
    plain = safetensors.numpy.load_file("plain.safetensors")
    wanted = jaxclip.dequantize(small["embed.weight"], np.float16)
    np.testing.assert_array_equal(plain["embed.weight"], wanted)


@pytest.mark.thorough
def test_a_policy_of_the_command_line_does_what_python_does():
    spec = {"bits": 6, "group_size": 32, "rule": "max_abs", "scale_dtype": "float16"}
    write_policy({"embed": spec, "layer.weight": {"zero_point": True, "axis": [0]}, "": None})
    words = ["compress", "net.safetensors", "out.safetensors", "--bits", "3"]
    assert run(*words, "--policy", "policy.json")[0] == 0
    spec["rule"] = jaxclip.max_abs
    policy = [("embed", spec), ("layer.weight", {"zero_point": True, "axis": (0,)}), ("", None)]
    wanted = jaxclip.compress(
        checkpoints.load("net.safetensors"), jaxclip.Grid(3, axis=0), policy=policy
    )
    checkpoints.save("wanted.safetensors", wanted)
    assert (
        pathlib.Path("out.safetensors").read_bytes()
        == pathlib.Path("wanted.safetensors").read_bytes()
    )


@pytest.mark.thorough
def test_the_first_expression_of_a_policy_counts():
    words = ["compress", "net.safetensors", "out.safetensors", "--policy", "policy.json", "--force"]
    for policy, bits in (({"embed": 8, r"\.weight": 2}, 8), ({r"\.weight": 2, "bias": 3}, 2)):
        write_policy(policy)
        assert run(*words)[0] == 0
        assert checkpoints.load("out.safetensors")["embed.weight"].bits == bits


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("{", "policy.json: not valid JSON"),
        ("[" * 100_000, "policy.json: not valid JSON"),
        (["embed", 8], "policy.json: a policy must be a JSON object"),
        ({"embed": {"size": 8}}, "policy.json: 'embed' has 'size', which is none of"),
        ('{"embed": {"bits": 8, "bits": 4}}', "'embed' has a field twice"),
        ({"embed": {"rule": "best"}}, "'embed' has the rule 'best', which is none of"),
        ({"embed": {"rule": ["max_abs"]}}, "'embed' has the rule ['max_abs']"),
        ({"embed": [4]}, "'embed' must have a width, null or an object, got [4]"),
        ({"embed": True}, "'embed' must have a width, null or an object, got True"),
        ({"embed": 7}, "bits must be one of"),
        ({"embed": {"group_size": "8"}}, "policy 'embed': group_size"),
        ({"(": 8}, "is not a regular expression"),
        ({"head": 8}, "match no leaf: ['head']"),
    ],
)
def test_a_wrong_policy_is_refused_by_file_and_expression(policy, message):
    write_policy(policy)
    words = ["compress", "net.safetensors", "x.safetensors", "--policy", "policy.json"]
    status, out, err = run(*words)
    assert (status, out) == (1, "")
    assert err.startswith("jaxclip: error: ")
    assert message in err
    assert err.count("\n") == 1
    assert not os.path.exists("x.safetensors")


def test_shards_are_written_by_their_size():
    words = ["export", "low.safetensors", "shards", "--to", "compressed-tensors"]
    config = run_json(*words, "--max-shard-bytes", "1")
    assert config["quant_method"] == "compressed-tensors"
    assert os.path.exists("shards/model.safetensors.index.json")
    run_json("export", "low.safetensors", "one.safetensors", "--to", "compressed-tensors")
    shards, one = checkpoints.load("shards"), checkpoints.load("one.safetensors")
    assert shards.keys() == one.keys()
    assert all(np.array_equal(shards[name], one[name]) for name in one)
    words = ["export", "shards", "again", "--to", "safetensors"]
    assert run_json(*words)["num_bytes"] == os.path.getsize("again/model.safetensors")


@pytest.mark.thorough
def test_targets_choose_widths_and_the_table_shows_what_was_lost():
    words = ["compress", "net.safetensors", "out.safetensors", "--rule", "max_abs", "--force"]
    report = run_json(*words, "--target-bytes", "4000")
    assert report["total_bytes"] == os.path.getsize("out.safetensors") <= 4000
    assert 0 < report["relative_error"] < 1
    assert {leaf["relative_error"] is None for leaf in report["leaves"]} == {False}
    status, out, _ = run(*words, "--target-bpw", "3.5")
    assert status == 0
    assert out.splitlines()[0].split()[-2:] == ["error", "clipped"]
    report = jaxclip.size_report(checkpoints.load("out.safetensors"))
    assert 3 < report.bits_per_weight <= 3.5


@pytest.mark.thorough
def test_a_rate_is_met_by_entropy_coding():
    words = ["compress", "net.safetensors", "out.safetensors", "--rate", "3"]
    leaves = {leaf["path"]: leaf for leaf in run_json(*words)["leaves"]}
    embed = leaves["embed.weight"]
    assert 8 * (embed["stored_bytes"] - 4 * 40) / (40 * 64) == pytest.approx(3, rel=0.06)


@pytest.mark.thorough
def test_a_price_of_bits_makes_a_smaller_file_of_a_larger_error():
    words = ["compress", "net.safetensors", "out.safetensors", "--rate", "2", "--dry-run"]
    nearest, cheaper = run_json(*words), run_json(*words, "--bit-price", ".12")
    assert cheaper["total_bytes"] < 0.98 * nearest["total_bytes"]
    assert nearest["relative_error"] < cheaper["relative_error"] < 1.25 * nearest["relative_error"]
    write_policy({"embed": {"bit_price": 0}, "layer": {"bit_price": 0}})
    assert run_json(*words, "--bit-price", ".12", "--policy", "policy.json") == nearest


@pytest.mark.thorough
def test_smallest_is_the_smallest_coding_of_each_tensor():
    stored = {}
    for coding in ("huffman", "ans", "lanes", "smallest"):
        words = ["compress", "net.safetensors", f"{coding}.safetensors", "--rate", "2"]
        report = run_json(*words, "--coding", coding)
        assert os.path.getsize(f"{coding}.safetensors") == report["total_bytes"]
        stored[coding] = {leaf["path"]: leaf["stored_bytes"] for leaf in report["leaves"]}
    smallest = stored.pop("smallest")
    assert smallest == {name: min(s[name] for s in stored.values()) for name in smallest}


def test_verify_reads_everything():
    status, out, _ = run("verify", "low.safetensors")
    assert status == 0
    assert out.endswith("\nOK: nothing is wrong with low.safetensors\n")
    data = bytearray(pathlib.Path("low.safetensors").read_bytes())
    data[-1] ^= 1
    pathlib.Path("low.safetensors").write_bytes(data)
    status, out, err = run("verify", "low.safetensors")
    assert (status, out) == (1, "")
    assert err.startswith("jaxclip: error: low.safetensors: tensor ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("inspect no.safetensors", "there is no file 'no.safetensors'"),
        ("inspect folder.txt", "there is no file"),
        ("compress net.safetensors low.safetensors", "exists; pass --force to replace it"),
        ("compress net.safetensors net.safetensors --force", "is a file that is read"),
        ("compress net.safetensors x.safetensors --policy no.json", "there is no file 'no.json'"),
        ("compress net.safetensors no/x.safetensors", "no directory"),
        ("export low.safetensors no/x.gguf --to Q4_0", "no directory"),
    ],
)
def test_errors_are_one_line_on_standard_error(words, message):
    status, out, err = run(*shlex.split(words))
    assert (status, out) == (1, "")
    assert err.startswith("jaxclip: error: ")
    assert message in err
    assert "Traceback" not in err
    assert not os.path.exists("x.safetensors")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "the following arguments are required: COMMAND"),
        ("no-such-command", "invalid choice: 'no-such-command'"),
        ("clip NET x.safetensors", "the following arguments are required: --threshold"),
        ("compress NET x.safetensors --bits 4 --target-bpw 3", "not allowed with argument --bits"),
        ("compress NET x.safetensors --bits 7", "--bits: must be one of 1, ternary, 2, 3,"),
        ("compress NET x.safetensors --axis first", "--axis: must be integers such as 0 or 0,1"),
        ("compress NET x.safetensors --axis 2", "'embed.weight': --axis must be in [-2, 2)"),
        ("compress NET x.safetensors --group-size 0", "--group-size: must be an integer of at"),
        ("compress NET x.safetensors --group-size 9" + "0" * 20, "--group-size: must be an int"),
        ("compress NET x.safetensors --target-bpw nan", "--target-bpw: must be a number above 0"),
        (
            "compress NET x.safetensors --target-bpw 0.1 --rule max_abs",
            "--target-bpw=0.1 is out of reach",
        ),
        (
            "compress NET x.safetensors --target-bytes 9 --rule max_abs",
            "--target-bytes=9 is out of reach",
        ),
        ("compress NET x.safetensors --rate -1", "--rate: must be a number above 0"),
        ("compress NET x.safetensors --rate 99", "--rate must be in (0, "),
        ("compress NET x.safetensors --bit-price .1", "--bit-price needs a coding"),
        ("compress NET x.safetensors --bit-price inf", "--bit-price: must be a number at least 0"),
        ("compress NET x.safetensors --bits 1 --zero-point", "--zero-point needs a code for 0"),
        ("compress NET x.npz", "DST must end in .safetensors"),
        ("clip NET x.safetensors --threshold -1", "--threshold: must be a number at least 0"),
        ("clip NET x.safetensors --threshold 1 --include (", "'(' is not a regular expression"),
        ("inspect NET --outlier -1", "--outlier: must be a number above 0"),
        ("decompress NET x.safetensors --dtype int8", "--dtype: invalid choice: 'int8'"),
        (
            "export NET x.gguf --to Q4_0 --metadata name",
            "--metadata: must be KEY=VALUE, got 'name'",
        ),
        ("export NET x.gguf --to Q4_0 --dtype float16", "--dtype is for safetensors, Q4_0 has"),
        ("export NET x.gguf --to Q4_0 --max-shard-bytes 9", "--max-shard-bytes is for safetensors"),
        ("export NET x --to safetensors --max-shard-bytes 0", "--max-shard-bytes: must be an int"),
        ("export NET x.safetensors --to safetensors --metadata a=1", "--metadata is for GGUF"),
        ("export NET x --to safetensors --model-files no", "--model-files must be the folder of"),
    ],
)
def test_a_wrong_command_line_ends_with_2_and_names_the_flag(words, message):
    status, out, err = run(*words.replace("NET", "net.safetensors").split())
    assert (status, out) == (2, "")
    assert "usage: jaxclip" in err
    assert message in err.splitlines()[-1]
    assert not os.path.exists("x.safetensors")


def test_every_argument_that_errors_rename_is_an_option():
    helps = "".join(run(name, "--help")[1] for name in help_texts.HELP)
    for name, flag in arguments._FLAGS.items():
        assert re.search(rf"(^|[\s\[]){flag}\b", helps), name


def test_errors_of_the_package_are_said_in_flags():
    said = {
        "'a' exists; pass overwrite=True to replace it.": "'a' exists; pass --force to replace it.",
        "bits must be 4: bits count.": "--bits must be 4: bits count.",
        "use bits='ternary' or group_size=32.": "use --bits ternary or --group-size 32.",
        "leaf 'group_size=3' has axis=(0, 1).": "leaf 'group_size=3' has axis=(0, 1).",
        "policy 'head': group_size must be 1.": "policy 'head': group_size must be 1.",
    }
    assert {message: arguments.in_flags(message) for message in said} == said


def test_an_interrupt_ends_with_130_and_leaves_nothing(monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("jaxclip.checkpoints.rewriting.clip_weights", interrupted)
    before = sorted(os.listdir())
    status, out, err = run("clip", "net.safetensors", "x.safetensors", "--threshold", "1")
    assert (status, out) == (130, "")
    assert err == "jaxclip: interrupted; nothing was left half-written\n"
    assert sorted(os.listdir()) == before


@pytest.mark.thorough
def test_the_module_is_the_command():
    command = [sys.executable, "-m", "jaxclip", "inspect", "low.safetensors", "--headers-only"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "embed.weight" in result.stdout


def test_the_version_and_the_completion_are_printed():
    assert run("--version") == (0, f"jaxclip {jaxclip.__version__}\n", "")
    pytest.importorskip("shtab")
    for shell in ("bash", "zsh", "fish"):
        status, out, err = run("--print-completion", shell)
        assert (status, err) == (0, "")
        assert "--target-bpw" in out or "target-bpw" in out
    assert run("--print-completion", "dos")[0] == 2


def test_an_export_has_dtype_metadata_and_names():
    words = ["export", "net.safetensors", "x.safetensors", "--to", "safetensors"]
    assert run(*words, "--dtype", "float16", "--rename", r"^embed\.", "token.")[0] == 0
    loaded = checkpoints.load("x.safetensors")
    assert loaded["token.weight"].dtype == loaded["layer.bias"].dtype == np.float16
    gguf = pytest.importorskip("gguf")
    words = ["export", "net.safetensors", "x.gguf", "--to", "Q4_0", "--metadata", "llama.n=12"]
    assert run(*words, "--metadata", "general.name=my net")[0] == 0
    fields = gguf.GGUFReader("x.gguf").fields
    assert fields["llama.n"].contents() == 12
    assert fields["general.name"].contents() == "my net"


def test_two_axes_and_a_layout_do_what_python_does():
    for words, grid, layout in (
        (["--axis", "0,1"], jaxclip.Grid(4, axis=(0, 1)), None),
        (["--axis", "-2,-1"], jaxclip.Grid(4, axis=(-2, -1)), None),
        (["--layout", "in_out"], jaxclip.Grid(4), "in_out"),
        ([], jaxclip.Grid(4), None),
    ):
        checkpoints.compress_checkpoint(
            "net.safetensors", "wanted.safetensors", grid, layout=layout, overwrite=True
        )
        assert run("compress", "net.safetensors", "out.safetensors", "--force", *words)[0] == 0
        wanted = pathlib.Path("wanted.safetensors").read_bytes()
        assert pathlib.Path("out.safetensors").read_bytes() == wanted


@pytest.mark.thorough
@pytest.mark.parametrize("is_kept", [True, False])
def test_compiled_programs_are_kept_in_the_folder_of_the_user(tmp_path, is_kept):
    source, cache = tmp_path / "net.npz", tmp_path / "cache"
    checkpoints.save(source, {"kernel": np.ones((64, 300), np.float32)})
    words = ["compress", str(source), str(tmp_path / "small.safetensors")]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
    environment |= {"XDG_CACHE_HOME": str(cache), "JAX_PLATFORMS": "cpu"}
    # Here the command itself tells, since a program that compiles quickly is not written there.
    words += [] if is_kept else ["--no-cache"]
    program = (
        "import sys, jax; from jaxclip import cli; cli.main(sys.argv[1:]);"
        "print(jax.config.jax_compilation_cache_dir, file=sys.stderr)"
    )
    command = [sys.executable, "-c", program, *words]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    wanted = str(cache / "jaxclip") if is_kept else "None"
    assert done.stderr.splitlines()[-1] == wanted
    assert (cache / "jaxclip").exists() == is_kept
