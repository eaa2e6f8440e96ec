"""The command line: `jaxclip COMMAND ...`, or `python -m jaxclip COMMAND ...`.

Commands import their modules when they run, so that `--help` is fast.
"""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

_FILES = """\
Weights are read from .safetensors, .npz or .npy files, or from a folder with model.safetensors,
or with model.safetensors.index.json and its shards. They are read tensor by tensor and never
written to. The result is a new file, which appears when it is complete.

Exit status: 0 on success; 1 after an error, with a message on standard error; 2 if the command
line is wrong; 130 after an interrupt.
"""

_HELP = {
    "inspect": """\
Show what is in a file: its tensors, their sizes, and statistics of the weights.

Every floating tensor gets a histogram from -max to max, the largest magnitude, the root mean
square (rms), the fraction of outliers (entries beyond K times the rms), and the thresholds of
least squared error for one scale at 4, 3 and 2 bits and ternary.

examples:
  jaxclip inspect net.safetensors
  jaxclip inspect net.safetensors --headers-only --json
""",
    "clip": """\
Clip weights to [-T, T].

Entries beyond the threshold become exactly the threshold; tensors keep their dtype.

examples:
  jaxclip clip net.safetensors clipped.safetensors --threshold 0.1 --include "weight$"
""",
    "compress": """\
Round weights to a few bits, into one file.

Tensors of two or more dimensions are rounded to a grid with one scale for each index along the
axis, or for each group of entries; the others stay as they are.

With --target-bpw or --target-bytes the width of each tensor is chosen so that the total error is
small; the file is then read twice. With --rate the codes are entropy-coded, and the step of each
tensor is chosen so that they take that many bits. With --bit-price they take fewer, at a larger
error.

--policy FILE.json gives other settings to some tensors. The file holds one JSON object that maps
regular expressions to specs, such as

  {"embed": 8, "head": {"bits": 6, "group_size": 32, "rule": "max_abs"}, "norm": null}

The first expression that matches somewhere in a tensor's name counts. A spec is a width, null to
leave the tensor as it is, or an object with any of bits, levels, axis, group_size, zero_point,
scale_dtype, rule and bit_price.

examples:
  jaxclip compress net.safetensors small.safetensors --bits 4 --group-size 64 --dry-run
  jaxclip compress net.safetensors small.safetensors --bits ternary --policy policy.json --force
  jaxclip compress net.safetensors small.safetensors --target-bpw 3.5 --rule max_abs --force
  jaxclip compress net.safetensors small.safetensors --rate 2.5 --force
  jaxclip compress net.safetensors small.safetensors --rate 2.6 --bit-price .12 --force
""",
    "decompress": """\
Write plain floating weights, which any safetensors reader loads.

The names are those that `jaxclip inspect` shows. Tensors that came from a file of another library
get their original names back.

examples:
  jaxclip decompress small.safetensors plain.safetensors --dtype bfloat16
""",
    "export": """\
Write low-bit weights for other programs.

compressed-tensors: codes and scales as vLLM and transformers read them. The printed output belongs
in the model's config.json as quantization_config. Q4_0, Q4_1, Q8_0: GGUF, which needs the extra
gguf, and tensor names that its reader knows. safetensors: plain weights. Keys of nested trees are
joined by dots; the names in files of other libraries stay as they are.

With --max-shard-bytes DST is a new folder of shards of at most that size, and their index. A folder
of shards is exported to a folder with shards of 5 GB, unless DST ends in .safetensors. With
--model-files DST is a folder that loads as it is: config.json gets its quantization_config, and the
tokenizer files are copied.

examples:
  jaxclip export small.safetensors model.safetensors --to compressed-tensors
  jaxclip export small.safetensors shards --to compressed-tensors --max-shard-bytes 2000000000
  jaxclip export small.safetensors folder --to compressed-tensors --model-files model
  jaxclip export net.safetensors net.gguf --to Q4_0 --architecture llama
""",
    "verify": """\
Read a whole file and check everything that can be checked.

Files of jaxclip have a checksum for every byte. In other files, structure and sizes are checked.

examples:
  jaxclip verify small.safetensors
""",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
      arguments: Arguments of the command line without the program's name; None for those of the
        process.

    Returns:
      The exit status: 0, 1 after an error (a message on standard error), 130 after an interrupt.

    Example:
      >>> main(["verify", "net.safetensors"])
      1
    """
    parsed = _parser().parse_args(arguments)
    try:
        result = parsed.run(parsed)
        is_json = parsed.json or isinstance(result, dict)
        print(_json_text(result) if is_json else result)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of the output has closed it, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("jaxclip: interrupted; nothing was left half-written", file=sys.stderr)
        return 130
    except (OSError, ValueError, TypeError, ImportError) as error:
        print(f"jaxclip: error: {error}", file=sys.stderr)
        return 1
    return 0


def _json_text(result: Any) -> str:
    from jaxclip._core.reports import to_json

    return json.dumps(to_json(result), indent=2)


# --- Commands -----------------------------------------------------------------------------


def _inspect(args: argparse.Namespace) -> Any:
    from jaxclip import checkpoints
    from jaxclip.checkpoints import inspection

    report = checkpoints.inspect(args.path)
    if args.headers_only:
        return report
    return _Inspection(report, inspection.describe_file(args.path, args.outlier))


@dataclasses.dataclass(frozen=True)
class _Inspection:
    """Sizes of a file's leaves, and statistics of the floating ones by name."""

    report: Any
    statistics: dict[str, Any]

    def __str__(self) -> str:
        from jaxclip._core.reports import format_table

        rows = [["leaf", "-max ... max", "max", "rms", "outliers"]]
        rows[0] += ["t, 4 bits", "t, 3 bits", "t, 2 bits", "t, ternary", ""]
        for name, s in self.statistics.items():
            numbers = [f"{s.max_abs:.4g}", f"{s.rms:.4g}", f"{s.outlier_rate:.3%}"]
            numbers += [f"{t:.4g}" for t in s.thresholds.values()]
            note = f"{s.num_nonfinite:,} not finite" if s.num_nonfinite else ""
            rows.append([name, s.sparkline, *numbers, note])
        return f"{self.report}\n\n{format_table(rows, num_left=2)}"


def _clip(args: argparse.Namespace) -> Any:
    from jaxclip import checkpoints

    return checkpoints.clip_checkpoint(
        args.src, args.dst, args.threshold, include=args.include, overwrite=args.force
    )


def _compress(args: argparse.Namespace) -> Any:
    import jaxclip
    from jaxclip import checkpoints

    bits, coding, rule = args.bits, args.coding, getattr(jaxclip, args.rule)
    if args.rate is not None:
        bits, rule = 8, jaxclip.thresholds.rate_optimal(args.rate)
        coding = coding or "huffman"
    return checkpoints.compress_checkpoint(
        args.src,
        args.dst,
        jaxclip.Grid(
            bits,
            axis=args.axis,
            group_size=args.group_size,
            zero_point=args.zero_point,
            scale_dtype=args.scale_dtype,
        ),
        target_bits_per_weight=args.target_bpw,
        target_bytes=args.target_bytes,
        rule=rule,
        bit_price=args.bit_price,
        policy=_read_policy(args.policy),
        coding=coding,
        overwrite=args.force,
        dry_run=args.dry_run,
    )


def _decompress(args: argparse.Namespace) -> Any:
    from jaxclip import checkpoints

    return checkpoints.decompress_checkpoint(args.src, args.dst, args.dtype, overwrite=args.force)


def _export(args: argparse.Namespace) -> Any:
    from jaxclip import interop

    result = interop.export_checkpoint(
        args.src,
        args.dst,
        args.to,
        architecture=args.architecture,
        max_shard_bytes=args.max_shard_bytes,
        model_files=args.model_files,
        overwrite=args.force,
    )
    files = [args.dst]
    if os.path.isdir(args.dst):
        files = [entry.path for entry in os.scandir(args.dst)]
    if args.to == "compressed-tensors":
        return result
    counts = {"tensors": result} if result else {}  # of each type in GGUF
    return {"path": args.dst, "num_bytes": sum(map(os.path.getsize, files)), **counts}


def _verify(args: argparse.Namespace) -> Any:
    from jaxclip.checkpoints import inspection

    return inspection.verify_file(args.path)


# --- Policies -------------------------------------------------------------------------------


def _read_policy(path: str | None) -> list[tuple[str, Any]]:
    """Reads the pairs of a policy, in order, from a file with one JSON object."""
    if path is None:
        return []
    try:
        with open(path, encoding="utf-8") as file:
            pairs = json.load(file, object_pairs_hook=tuple)  # not dict: it hides repeated keys
    except FileNotFoundError as error:
        raise FileNotFoundError(f"there is no file {path!r}.") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON: {error}.") from error
    if not isinstance(pairs, tuple):
        raise ValueError(f'{path}: a policy must be a JSON object, such as {{"embed": 8}}.')
    return [(regex, _spec_of(f"{path}: {regex!r}", spec)) for regex, spec in pairs]


def _spec_of(origin: str, spec: Any) -> Any:
    """Returns the spec of a JSON value, in which objects are tuples of pairs."""
    if not isinstance(spec, tuple):
        if spec is not None and type(spec) not in (int, str):
            raise ValueError(f"{origin} must have a width, null or an object, got {spec!r}.")
        return spec
    fields = dict(spec)
    unknown = fields.keys() - set(_SPEC_FIELDS)
    if unknown:
        raise ValueError(f"{origin} has {min(unknown)!r}, which is none of {_SPEC_FIELDS}.")
    if len(fields) != len(spec):
        raise ValueError(f"{origin} has a field twice.")
    if "rule" in fields:
        import jaxclip

        name = fields["rule"]
        if name not in _RULES:
            raise ValueError(f"{origin} has the rule {name!r}, which is none of {_RULES}.")
        fields["rule"] = getattr(jaxclip, name)
    if isinstance(fields.get("axis"), list):
        fields["axis"] = tuple(fields["axis"])
    return fields


# --- Arguments ------------------------------------------------------------------------------

_RULES = ("mse_optimal", "max_abs")
_SCALES = ("float32", "float16", "bfloat16", "log8")
_GRID_FIELDS = ("bits", "levels", "axis", "group_size", "zero_point", "scale_dtype")
_SPEC_FIELDS = (*_GRID_FIELDS, "rule", "bit_price")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jaxclip",
        description="Inspect, clip, compress and export files of weights.",
        epilog=_FILES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, run: Callable[[argparse.Namespace], Any]) -> argparse.ArgumentParser:
        text, _, examples = _HELP[name].partition("examples:")
        added = commands.add_parser(
            name,
            help=text.partition("\n")[0],
            description=text,
            epilog=f"examples:{examples}\n{_FILES}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        added.add_argument("--json", action="store_true", help="print JSON instead of a table")
        added.set_defaults(run=run)
        return added

    inspect = command("inspect", _inspect)
    inspect.add_argument("path", metavar="FILE", help="a file or folder of weights")
    inspect.add_argument("--headers-only", action="store_true", help="read no weights")
    inspect.add_argument(
        "--outlier", type=float, default=3.0, metavar="K", help="outliers are beyond K rms (3)"
    )

    verify = command("verify", _verify)
    verify.add_argument("path", metavar="FILE", help="a file or folder of weights")

    clip = command("clip", _clip)
    _add_files(clip)
    clip.add_argument("--threshold", type=float, required=True, metavar="T", help="at least 0")
    clip.add_argument(
        "--include", default="", metavar="REGEX", help="clip only tensors whose name it matches"
    )

    _add_compress_options(command("compress", _compress))

    decompress = command("decompress", _decompress)
    _add_files(decompress)
    dtypes = ["float16", "bfloat16", "float32"]
    decompress.add_argument("--dtype", choices=dtypes, help="of the result (that of the original)")

    export = command("export", _export)
    _add_files(export)
    export.add_argument(
        "--to", choices=["safetensors", "compressed-tensors", "Q4_0", "Q4_1", "Q8_0"], required=True
    )
    export.add_argument(
        "--max-shard-bytes", type=int, metavar="N", help="largest size of a shard, in bytes"
    )
    export.add_argument(
        "--model-files",
        metavar="FOLDER",
        help="the original model, with config.json; DST becomes a folder",
    )
    export.add_argument("--architecture", default="llama", help="architecture in GGUF (llama)")
    return parser


def _add_files(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("src", metavar="SRC", help="the file or folder to read")
    parser.add_argument("dst", metavar="DST", help="the file to write")
    parser.add_argument("--force", action="store_true", help="replace DST if it exists")


def _add_compress_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    _add_files(parser)
    goal = parser.add_mutually_exclusive_group()
    goal.add_argument("--bits", type=_bits, metavar="B", help="1, ternary, 2, 3, 4, 5, 6 or 8 (4)")
    goal.add_argument("--target-bpw", type=float, metavar="B", help="choose widths for at most B "
        "bits per weight, scales included")  # fmt: skip
    goal.add_argument("--target-bytes", type=int, metavar="N", help="choose widths for a file of "
        "at most N bytes")  # fmt: skip
    goal.add_argument("--rate", type=float, metavar="B", help="choose steps for B entropy-coded "
        "bits per weight")  # fmt: skip
    add("--axis", type=_axis, default=0, metavar="A", help="axis of output channels: 0, as PyTorch "
        "has it (default); -1, as flax has it; none, for one scale per tensor")  # fmt: skip
    add("--group-size", type=int, metavar="N", help="entries that share a scale (a whole channel)")
    add("--rule", choices=_RULES, default="mse_optimal",
        help="how the grid's range is chosen (mse_optimal)")  # fmt: skip
    add("--zero-point", action="store_true", help="allow ranges that are uneven around 0")
    add("--scale-dtype", choices=_SCALES, default="float32",
        help="format that scales are stored in (float32)")  # fmt: skip
    add("--bit-price", type=float, default=0.0, metavar="P",
        help="error that a coded bit is worth, in squared steps, such as .12 (0); with --rate or "
        "--coding")  # fmt: skip
    add("--policy", metavar="FILE.json", help="other settings for some tensors, as above")
    add("--coding", choices=["huffman", "ans", "smallest"],
        help="entropy-code tensors that get smaller; ans needs the extra coding")  # fmt: skip
    add("--dry-run", action="store_true", help="write nothing, print the sizes")


def _bits(text: str) -> int | str:
    return int(text) if text.isdecimal() else text


def _axis(text: str) -> int | None:
    return None if text == "none" else int(text)
