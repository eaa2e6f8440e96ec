"""The arguments of the command line, and its words for those of the Python functions."""

import argparse
import json
import math
import re
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import jaxclip
from jaxclip._core.text import escaped
from jaxclip.cli import commands
from jaxclip.cli.completion import PrintCompletion, complete_files
from jaxclip.cli.help_texts import FILES, HELP
from jaxclip.cli.policy_files import RULES

_BITS = ("1", "ternary", "2", "3", "4", "5", "6", "8")
_SCALES = ("float32", "float16", "bfloat16", "log8")
_DTYPES = ("float16", "bfloat16", "float32")
_FORMATS = ("safetensors", "compressed-tensors", "sparse-24-bitmask", "gguf")
_FORMATS += ("Q4_0", "Q4_1", "Q8_0", "TQ1_0", "TQ2_0")
_LAYOUTS = ("in_out", "out_in")


class _Parser(argparse.ArgumentParser):
    """A parser whose texts keep their lines, and whose errors are safe to print."""

    def __init__(self, **settings: Any):
        super().__init__(**settings, formatter_class=argparse.RawDescriptionHelpFormatter)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:  # pyright: ignore
        # To argparse "-2,-1" is an option, where it follows --axis and a space.
        joined: list[str] = []
        for word in sys.argv[1:] if args is None else args:
            if joined[-1:] == ["--axis"] and re.match("-[0-9]", word):
                word = f"{joined.pop()}={word}"
            joined.append(word)
        return super().parse_known_args(joined, namespace)

    def error(self, message: str) -> NoReturn:
        super().error(escaped(message))


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line; what it parses has `run`, the command's function."""
    parser = _Parser(
        prog="jaxclip",
        description="Inspect, clip, compress and export files of weights.",
        epilog=FILES,
    )
    parser.add_argument("--version", action="version", version=f"jaxclip {jaxclip.__version__}")
    parser.add_argument(
        "--print-completion",
        action=PrintCompletion,
        help="print a script that completes commands and options in a shell, and exit",
    )
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=_Parser)
    for name, add_options, run in _COMMANDS:
        text, _, examples = HELP[name].partition("examples:")
        command = subparsers.add_parser(
            name,
            help=text.partition("\n")[0],
            description=text,
            epilog=f"examples:{examples}\n{FILES}",
        )
        add_options(command)
        command.add_argument("--json", action="store_true", help="print JSON instead of a table")
        command.add_argument(
            "--no-cache",
            action="store_true",
            help="keep no compiled programs in the user's cache folder",
        )
        command.set_defaults(run=run, parser=command)
    return parser


# --- Options of the commands ----------------------------------------------------------------


def _add_inspect_options(parser: argparse.ArgumentParser) -> None:
    _add_file(parser)
    read = parser.add_mutually_exclusive_group()
    read.add_argument("--headers-only", action="store_true", help="read no weights")
    read.add_argument("--statistics", action="store_true", help="read weights of any size")
    parser.add_argument(
        "--outlier",
        type=_number(above=0),
        default=3.0,
        metavar="K",
        help="outliers are beyond K rms (3)",
    )


def _add_clip_options(parser: argparse.ArgumentParser) -> None:
    _add_files(parser)
    parser.add_argument(
        "--threshold", type=_number(at_least=0), required=True, metavar="T", help="at least 0"
    )
    parser.add_argument(
        "--include",
        type=_regex,
        default="",
        metavar="REGEX",
        help="clip only tensors whose name it matches",
    )


def _add_compress_options(parser: argparse.ArgumentParser) -> None:
    _add_files(parser)
    _add_goals(parser)
    add = parser.add_argument
    add("--axis", type=_axis, default="outputs", metavar="A", help="axis of output channels, or "
        "axes, such as 0,1; none, for one scale per tensor (those of --layout)")  # fmt: skip
    add("--layout", choices=_LAYOUTS, help="where the outputs are: in_out, as flax has them, or "
        "out_in, as PyTorch (taken from names and the kind of file)")  # fmt: skip
    add("--group-size", type=_count, metavar="N",
        help="entries that share a scale (a whole channel)")  # fmt: skip
    add("--rule", choices=RULES, default="mse_optimal",
        help="how the grid's range is chosen (mse_optimal)")  # fmt: skip
    add("--zero-point", action="store_true", help="allow ranges that are uneven around 0")
    add("--scale-dtype", choices=_SCALES, default="float32",
        help="format that scales are stored in (float32)")  # fmt: skip
    add("--bit-price", type=_number(at_least=0, below=math.inf), metavar="P",
        help="error that a coded bit is worth, in squared steps, such as .12 (0); with --rate or "
        "--coding")  # fmt: skip
    complete_files(
        add("--policy", metavar="FILE.json", help="other settings for some tensors, as above")
    )
    add("--coding", choices=["huffman", "ans", "lanes", "smallest"],
        help="entropy-code tensors that get smaller; ans needs the extra coding")  # fmt: skip
    complete_files(
        add("--calibration", metavar="FILE", help="what calibration.measure found, to round by")
    )
    add("--dry-run", action="store_true", help="write nothing, print the sizes")


def _add_goals(parser: argparse.ArgumentParser) -> None:
    goal = parser.add_mutually_exclusive_group()
    goal.add_argument("--bits", type=_bits, metavar="B", help=f"{', '.join(_BITS)} (4)")
    goal.add_argument("--target-bpw", type=_number(above=0, below=math.inf), metavar="B",
        help="choose widths for at most B bits per weight, scales included")  # fmt: skip
    goal.add_argument("--target-bytes", type=_count, metavar="N",
        help="choose widths for a file of at most N bytes")  # fmt: skip
    goal.add_argument("--rate", type=_number(above=0, below=math.inf), metavar="B",
        help="choose steps for B entropy-coded bits per weight")  # fmt: skip


def _add_decompress_options(parser: argparse.ArgumentParser) -> None:
    _add_files(parser)
    parser.add_argument("--dtype", choices=_DTYPES, help="of the result (that of the original)")


def _add_export_options(parser: argparse.ArgumentParser) -> None:
    _add_files(parser)
    add = parser.add_argument
    add("--to", choices=_FORMATS, required=True, help="the format")
    add("--dtype", choices=_DTYPES, help="of plain weights, and of scales in compressed-tensors "
        "(that of each tensor)")  # fmt: skip
    add("--max-shard-bytes", type=_count, metavar="N", help="largest size of a shard, in bytes")
    complete_files(
        add("--model-files", metavar="FOLDER",
            help="the original model, with config.json; DST becomes a folder")
    )  # fmt: skip
    add("--architecture", default="llama", help="architecture in GGUF (llama)")
    add("--metadata", action="append", type=_key_and_value, default=[], metavar="KEY=VALUE",
        help="a further key of GGUF, such as llama.block_count=12; the value is JSON, or else "
        "text; may be repeated")  # fmt: skip
    add("--rename", action="append", nargs=2, default=[], metavar=("REGEX", "TEXT"),
        help="replace what REGEX matches in names, as re.sub does; may be repeated, applied in "
        "order")  # fmt: skip


def _add_file(parser: argparse.ArgumentParser) -> None:
    complete_files(parser.add_argument("path", metavar="FILE", help="a file or folder of weights"))
    _add_max_ratio(parser)


def _add_files(parser: argparse.ArgumentParser) -> None:
    complete_files(parser.add_argument("src", metavar="SRC", help="the file or folder to read"))
    complete_files(parser.add_argument("dst", metavar="DST", help="the file to write"))
    parser.add_argument("--force", action="store_true", help="replace DST if it exists")
    _add_max_ratio(parser)


def _add_max_ratio(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max-ratio",
        type=_number(at_least=0),
        metavar="R",
        help="bytes of weights that a byte on disk may stand for (64); inf for a file you trust",
    )


_COMMANDS = (
    ("inspect", _add_inspect_options, commands.run_inspect),
    ("verify", _add_file, commands.run_verify),
    ("clip", _add_clip_options, commands.run_clip),
    ("compress", _add_compress_options, commands.run_compress),
    ("decompress", _add_decompress_options, commands.run_decompress),
    ("export", _add_export_options, commands.run_export),
)


# --- Values ---------------------------------------------------------------------------------


def _number(
    at_least: float = -math.inf, above: float = -math.inf, below: float | None = None
) -> Callable[[str], float]:
    """Returns the type of a number within bounds; without `below` infinity is allowed."""
    lowest = f"above {above:g}" if above > at_least else f"at least {at_least:g}"
    rule = lowest if below is None else f"{lowest} and finite"

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (value >= at_least and value > above and (below is None or value < below)):
            raise argparse.ArgumentTypeError(f"must be a number {rule}, got {text!r}")
        return value

    return parse


def _count(text: str) -> int:
    if not re.fullmatch("[0-9]{1,18}", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text!r}")
    return int(text)


def _bits(text: str) -> int | str:
    if text not in _BITS:
        raise argparse.ArgumentTypeError(f"must be one of {', '.join(_BITS)}, got {text!r}")
    return int(text) if text.isdecimal() else text


def _axis(text: str) -> int | tuple[int, ...] | str | None:
    if text in ("none", "outputs"):
        return None if text == "none" else text
    if not re.fullmatch("-?[0-9]{1,3}(,-?[0-9]{1,3})*", text):
        raise argparse.ArgumentTypeError(
            f"must be integers such as 0 or 0,1, none or outputs, got {text!r}"
        )
    first, *others = map(int, text.split(","))
    return (first, *others) if others else first


def _regex(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a regular expression: {error}"
        ) from error
    return text


def _key_and_value(text: str) -> tuple[str, Any]:
    key, sign, value = text.partition("=")
    if not key or not sign:
        raise argparse.ArgumentTypeError(f"must be KEY=VALUE, got {text!r}")
    try:
        return key, json.loads(value)
    except (ValueError, RecursionError):
        return key, value


# --- Words ----------------------------------------------------------------------------------

# Arguments of the package's functions, and what the command line calls them.
_FLAGS = {"overwrite": "--force", "target_bits_per_weight": "--target-bpw"}
_FLAGS |= {"bits_per_weight": "--rate", "src": "SRC", "dst": "DST", "path": "FILE"}
_SAME_NAMES = """
    architecture axis bit_price bits calibration coding dry_run dtype group_size include layout
    max_ratio max_shard_bytes metadata model_files outlier rename rule scale_dtype target_bytes
    threshold to zero_point
"""
_FLAGS |= {name: f"--{name.replace('_', '-')}" for name in _SAME_NAMES.split()}
_NAMES = "|".join(sorted(_FLAGS, key=len, reverse=True))
_START = re.compile(rf"(params at '[^']*': )?({_NAMES})(?= must | needs | is |=)")
# What is in quotes comes from files. A word such as "bits" is an argument only with its value.
_WORDS = re.compile(rf"'[^']*'|\"[^\"]*\"|\b({_NAMES})=(True\b|'[\w.-]+'|[\w.-]*\w)|\b(\w+_\w+)\b")


def is_about_an_argument(error: BaseException) -> bool:
    """Returns True if an error of the package is about the value of an argument."""
    return type(error) in (ValueError, TypeError) and bool(_START.match(str(error)))


def in_flags(message: str) -> str:
    """Returns a message of the package, with flags in place of the arguments that it names."""
    if message.startswith("policy "):  # fields of a policy are those of Python
        return message

    def flag(match: re.Match[str]) -> str:
        name, value, word = match[1], match[2], match[3]
        if name is None:
            return _FLAGS.get(word, match[0])
        return _FLAGS[name] if value == "True" else f"{_FLAGS[name]} {value.strip(chr(39))}"

    start = _START.match(message)
    if start:
        message = f"{start[1] or ''}{_FLAGS[start[2]]}{message[start.end() :]}"
    return _WORDS.sub(flag, message)
