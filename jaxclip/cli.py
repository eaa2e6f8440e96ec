"""The command line: `jaxclip COMMAND ...`, or `python -m jaxclip COMMAND ...`.

Commands import what they need when they run, so that `--help` is there at once.
"""

import argparse
import dataclasses
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["main"]

_FILES = """\
Files of weights are .safetensors, .npz or .npy, or a folder with model.safetensors or with
model.safetensors.index.json and its shards. They are read tensor by tensor, and never written
to: what is made is a new file, which appears when it is complete.

Exit status: 0; 1 after an error, which is a line on standard error; 2 if the command line is
wrong; 130 after an interrupt.
"""

_HELP = {
    "inspect": """\
Look into a file: what it holds, and how its weights are spread.

For every floating tensor: a histogram from -max to max, the largest magnitude, the root mean
square (rms), the share of entries beyond some multiple of it, and the thresholds of least
squared error for one scale at 4, 3 and 2 bits and ternary.

examples:
  jaxclip inspect net.safetensors
  jaxclip inspect net.safetensors --headers-only --json
""",
    "clip": """\
Clip weights to [-T, T].

Entries beyond the threshold end exactly on it; tensors keep their dtype.

examples:
  jaxclip clip net.safetensors clipped.safetensors --threshold 0.1 --include "weight$"
""",
    "compress": """\
Round weights to a few bits, all in one file.

Tensors of two or more dimensions are rounded to a grid with one scale for each index along the
axis, or for each group of entries; the others stay as they are.

With --target-bpw or --target-bytes each tensor gets the width that makes the error of all small:
the file is read twice. With --rate the codes are entropy coded, and the step of each tensor is
chosen so that they take that many bits; fewer with --bit-price, at a larger error.

--policy REGEX=SPEC is for tensors whose name REGEX matches somewhere; the first that matches
counts. SPEC is none, to leave them as they are, or words with commas between them: the bits B
first, or not at all, and any of

  group=N  rule=NAME  axis=A  scale=FORMAT  zero=yes|no  price=P    as --group-size, --rule ...

SPEC begins after the first = that leaves only such words behind it; in REGEX, = can be written
\\x3d.

examples:
  jaxclip compress net.safetensors small.safetensors --bits 4 --group-size 64 --dry-run
  jaxclip compress net.safetensors small.safetensors --bits ternary --policy embed=8 --force
  jaxclip compress net.safetensors small.safetensors --force --policy "embed=8,rule=max_abs"
  jaxclip compress net.safetensors small.safetensors --target-bpw 3.5 --rule max_abs --force
  jaxclip compress net.safetensors small.safetensors --rate 2.5 --force
  jaxclip compress net.safetensors small.safetensors --rate 2.6 --bit-price .12 --force
""",
    "decompress": """\
Write plain floating weights, which any safetensors reader loads.

The names are those that `jaxclip inspect` shows; those of a file of another library are as they
were before it was compressed.

examples:
  jaxclip decompress small.safetensors plain.safetensors --dtype bfloat16
""",
    "export": """\
Write low-bit weights for other programs.

compressed-tensors: codes and scales as vLLM and transformers read them; what is printed belongs
into the model's config.json as quantization_config. Q4_0, Q4_1, Q8_0: GGUF, which needs the
extra gguf and names that its reader knows. safetensors: plain weights. Keys of nested trees are
joined by dots; the names of other libraries stay as they are.

With --max-shard-bytes DST is a new folder: shards of that size and their index. A folder of shards
becomes one of shards of 5 GB, unless DST ends in .safetensors. With --model-files DST is a folder
that loads as it is: config.json gets its quantization_config, tokenizer and the like go along.

examples:
  jaxclip export small.safetensors model.safetensors --to compressed-tensors
  jaxclip export small.safetensors shards --to compressed-tensors --max-shard-bytes 2000000000
  jaxclip export small.safetensors folder --to compressed-tensors --model-files model
  jaxclip export net.safetensors net.gguf --to Q4_0 --architecture llama
""",
    "verify": """\
Read everything and check all that can be checked.

Files of jaxclip have a checksum for every byte; of others, structure and sizes are checked.

examples:
  jaxclip verify small.safetensors
""",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
      arguments: Words of the command line without the program's name; None for the process's.

    Returns:
      The exit status: 0, or 1 after an error, which is a line on standard error.

    Example:
      >>> main(["verify", "net.safetensors"])
      1
    """
    parsed = _parser().parse_args(arguments)
    try:
        result = parsed.run(parsed)
        is_json = parsed.json or isinstance(result, dict)
        print(json.dumps(_as_json(result), indent=2) if is_json else result)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("jaxclip: interrupted; nothing was left half-written", file=sys.stderr)
        return 130
    except (OSError, ValueError, TypeError, ImportError) as error:
        print(f"jaxclip: error: {error}", file=sys.stderr)
        return 1
    return 0


def _as_json(value: Any) -> Any:
    """Reports as dicts; what has no JSON as text."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _as_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): _as_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_as_json(item) for item in value]
    return value


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
    """A file's report, and the statistics of its floating leaves by name."""

    report: Any
    statistics: dict[str, Any]

    def __str__(self) -> str:
        width = max([len(name) for name in self.statistics] + [4])
        titles = ("max", "rms", "outliers", "t, 4 bits", "t, 3 bits", "t, 2 bits", "t, ternary")
        lines = [f"{'leaf':<{width}} {'-max ... max':<16}" + _columns(titles)]
        for name, s in self.statistics.items():
            numbers = [f"{s.max_abs:.4g}", f"{s.rms:.4g}", f"{s.outlier_rate:.3%}"]
            numbers += [f"{t:.4g}" for t in s.thresholds.values()]
            note = f"  {s.num_nonfinite:,} not finite" if s.num_nonfinite else ""
            lines.append(f"{name:<{width}} {s.sparkline}{_columns(numbers)}{note}")
        return f"{self.report}\n\n" + "\n".join(lines)


def _columns(texts: Sequence[str]) -> str:
    return "".join(f"{text:>11}" for text in texts)


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
    for _, spec in args.policy:
        if isinstance(spec, dict) and "rule" in spec:
            spec["rule"] = getattr(jaxclip, spec["rule"])
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
        policy=args.policy,
        coding=coding,
        overwrite=args.force,
        dry_run=args.dry_run,
    )


def _decompress(args: argparse.Namespace) -> Any:
    from jaxclip import checkpoints

    dtype = _dtype(args.dtype)
    return checkpoints.decompress_checkpoint(args.src, args.dst, dtype, overwrite=args.force)


def _export(args: argparse.Namespace) -> Any:
    from jaxclip import interop

    config = interop.export_checkpoint(
        args.src,
        args.dst,
        args.to,
        architecture=args.architecture,
        max_shard_bytes=args.max_shard_bytes,
        model_files=args.model_files,
        overwrite=args.force,
    )
    files = (
        [entry.path for entry in os.scandir(args.dst)] if os.path.isdir(args.dst) else [args.dst]
    )
    return config or {"path": args.dst, "num_bytes": sum(map(os.path.getsize, files))}


def _verify(args: argparse.Namespace) -> Any:
    from jaxclip.checkpoints import inspection

    return inspection.verify_file(args.path)


def _dtype(name: str | None) -> Any:
    if name is None:
        return None
    import jax.numpy as jnp

    return jnp.dtype(name)


# --- The words of the command line ----------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jaxclip",
        description="Look into files of weights, clip them, compress them, export them.",
        epilog=_FILES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, run: Any) -> Any:
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

    _add_reader_options(command("inspect", _inspect), has_statistics=True)
    _add_reader_options(command("verify", _verify), has_statistics=False)

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
    decompress.add_argument("--dtype", choices=dtypes, help="that of the weights if not given")

    export = command("export", _export)
    _add_files(export)
    export.add_argument(
        "--to", choices=["safetensors", "compressed-tensors", "Q4_0", "Q4_1", "Q8_0"], required=True
    )
    export.add_argument(
        "--max-shard-bytes", type=int, metavar="N", help="most bytes of tensors of a shard"
    )
    export.add_argument(
        "--model-files",
        metavar="FOLDER",
        help="the model's, with config.json; DST is a folder then",
    )
    export.add_argument("--architecture", default="llama", help="what GGUF says it is (llama)")
    return parser


def _add_files(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("src", metavar="SRC", help="the file or folder to read")
    parser.add_argument("dst", metavar="DST", help="the file to write")
    parser.add_argument("--force", action="store_true", help="replace DST if it exists")


def _add_reader_options(parser: argparse.ArgumentParser, has_statistics: bool) -> None:
    parser.add_argument("path", metavar="FILE", help="a file or folder of weights")
    if has_statistics:
        parser.add_argument("--headers-only", action="store_true", help="read no weights")
        parser.add_argument(
            "--outlier", type=float, default=3.0, metavar="K", help="outliers are beyond K rms (3)"
        )


def _add_compress_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    _add_files(parser)
    goal = parser.add_mutually_exclusive_group()
    goal.add_argument("--bits", type=_bits, metavar="B", help="1, ternary, 2, 3, 4, 5, 6 or 8 (4)")
    goal.add_argument("--target-bpw", type=float, metavar="B", help="most bits a weight, scales "
        "included: widths are chosen")  # fmt: skip
    goal.add_argument("--target-bytes", type=int, metavar="N", help="most bytes of the file: "
        "widths are chosen")  # fmt: skip
    goal.add_argument("--rate", type=float, metavar="B", help="entropy coded bits a weight: steps "
        "are chosen")  # fmt: skip
    add("--axis", type=_axis, default=0, metavar="A", help="axis of output channels: 0, as PyTorch "
        "has it (default); -1, as flax; none, for one scale a tensor")  # fmt: skip
    add("--group-size", type=int, metavar="N", help="entries that share a scale (a whole channel)")
    add("--rule", choices=_RULES, default="mse_optimal",
        help="how the grid's range is chosen (mse_optimal)")  # fmt: skip
    add("--zero-point", action="store_true", help="a grid need not be around 0")
    add("--scale-dtype", choices=_SCALES, default="float32",
        help="what scales are stored as (float32)")  # fmt: skip
    add("--bit-price", type=float, default=0.0, metavar="P",
        help="error that a coded bit is worth, in squared steps, such as .12 (0); with --rate or "
        "--coding")  # fmt: skip
    add("--policy", type=_policy, action="append", default=[], metavar="REGEX=SPEC",
        help="for tensors whose name it matches: bits, none, or more, as above")  # fmt: skip
    add("--coding", choices=["huffman", "ans", "smallest"],
        help="entropy code what gets smaller by it; what ans needs, readers need")  # fmt: skip
    add("--dry-run", action="store_true", help="write nothing, print the sizes")


def _bits(text: str) -> int | str:
    return int(text) if text.isdecimal() else text


def _axis(text: str) -> int | None:
    return None if text == "none" else int(text)


def _policy(text: str) -> tuple[str, Any]:
    """A regex and what follows the first "=" with nothing but words of a spec behind it."""
    word = r"[\w.+-]+"
    match = re.fullmatch(rf"(.*?)=({word}(?:={word})?(?:,{word}={word})*)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not REGEX=SPEC")
    pattern, words = match[1], match[2].split(",")
    if words == ["none"]:
        return pattern, None
    fields: dict[str, Any] = {}
    if "=" not in words[0]:
        fields["bits"] = _bits(words.pop(0))
    for key, value in (each.split("=") for each in words):
        if key not in _SPEC_FIELDS or _SPEC_FIELDS[key][0] in fields:
            known = ", ".join(_SPEC_FIELDS)
            raise argparse.ArgumentTypeError(f"{text!r} has {key}=, not one of {known}, or twice")
        name, parse = _SPEC_FIELDS[key]
        try:
            fields[name] = parse(value)
        except (ValueError, KeyError):
            message = f"{text!r} has {key}={value}, which is not allowed"
            raise argparse.ArgumentTypeError(message) from None
    return pattern, fields


_RULES = ["mse_optimal", "max_abs"]
_SCALES = ["float32", "float16", "bfloat16", "log8"]
# The words of a policy's SPEC: the field of `compress` each stands for, and how it is read.
_SPEC_FIELDS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "group": ("group_size", int),
    "rule": ("rule", {name: name for name in _RULES}.__getitem__),
    "axis": ("axis", _axis),
    "scale": ("scale_dtype", {name: name for name in _SCALES}.__getitem__),
    "zero": ("zero_point", {"yes": True, "no": False}.__getitem__),
    "price": ("bit_price", float),
}
