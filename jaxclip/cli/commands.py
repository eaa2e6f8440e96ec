"""The commands: each calls the function of the package that does the work.

Modules are imported when a command runs, so that `--help` is fast.
"""

import argparse
import dataclasses
import os
from typing import Any

from jaxclip.cli.policy_files import read_policy

# What `inspect` measures without being asked to: some seconds' worth.
_MAX_MEASURED_TENSORS = 1000
_MAX_MEASURED_BYTES = 2**30


def run_inspect(args: argparse.Namespace) -> Any:
    """Returns the sizes in a file, and statistics of its weights unless they are many."""
    from jaxclip import checkpoints
    from jaxclip.checkpoints import inspection

    report = checkpoints.inspect(args.path)
    if args.headers_only:
        return report
    is_large = len(report.leaves) > _MAX_MEASURED_TENSORS or report.raw_bytes > _MAX_MEASURED_BYTES
    if is_large and not args.statistics:
        return Inspection(report, None)
    statistics = inspection.describe_file(args.path, args.outlier, **_limits(args))
    densities = {name: s.density for name, s in statistics.items()}
    return Inspection(report.with_densities(densities), statistics)


def _limits(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the limits for reading that the command line gives."""
    return {} if args.max_ratio is None else {"max_ratio": args.max_ratio}


@dataclasses.dataclass(frozen=True)
class Inspection:
    """Sizes of a file's leaves, and statistics of the floating ones by name if they were read."""

    report: Any
    statistics: dict[str, Any] | None

    def __str__(self) -> str:
        from jaxclip._core.reports import format_table

        if self.statistics is None:
            return f"{self.report}\n\nStatistics take long here: --statistics measures the weights."
        rows = [["leaf", "-max ... max", "max", "rms", "outliers"]]
        rows[0] += ["t, 4 bits", "t, 3 bits", "t, 2 bits", "t, ternary", ""]
        for name, s in self.statistics.items():
            numbers = [f"{s.max_abs:.4g}", f"{s.rms:.4g}", f"{s.outlier_rate:.3%}"]
            numbers += [f"{t:.4g}" for t in s.thresholds.values()]
            note = f"{s.num_nonfinite:,} not finite" if s.num_nonfinite else ""
            rows.append([name, s.sparkline, *numbers, note])
        return f"{self.report}\n\n{format_table(rows, num_left=2)}"


def run_clip(args: argparse.Namespace) -> Any:
    """Clips the weights of a file."""
    from jaxclip import checkpoints

    return checkpoints.clip_checkpoint(
        args.src,
        args.dst,
        args.threshold,
        include=args.include,
        overwrite=args.force,
        **_limits(args),
    )


def run_compress(args: argparse.Namespace) -> Any:
    """Compresses a file, to a width, a target or a rate."""
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
        policy=read_policy(args.policy),
        layout=args.layout,
        coding=coding,
        calibration=_read_calibration(args.calibration),
        overwrite=args.force,
        dry_run=args.dry_run,
        **_limits(args),
    )


def _read_calibration(path: str | None) -> Any:
    """Returns the calibration in a file that `checkpoints.save` wrote; None without a file."""
    if path is None:
        return None
    from jaxclip import calibration, checkpoints

    try:
        return calibration.Calibration.from_tree(checkpoints.load(path))
    except checkpoints.CheckpointError:
        raise
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def run_decompress(args: argparse.Namespace) -> Any:
    """Writes the weights of a low-bit file as floats."""
    from jaxclip import checkpoints

    return checkpoints.decompress_checkpoint(
        args.src, args.dst, args.dtype, overwrite=args.force, **_limits(args)
    )


def run_export(args: argparse.Namespace) -> Any:
    """Writes weights for another program; returns its configuration, or the size of the result."""
    from jaxclip import interop

    result = interop.export_checkpoint(
        args.src,
        args.dst,
        args.to,
        dtype=args.dtype,
        architecture=args.architecture,
        metadata=dict(args.metadata),
        rename=[tuple(pair) for pair in args.rename],
        max_shard_bytes=args.max_shard_bytes,
        model_files=args.model_files,
        overwrite=args.force,
        **_limits(args),
    )
    files = [args.dst]
    if os.path.isdir(args.dst):
        files = [entry.path for entry in os.scandir(args.dst)]
    if args.to in ("compressed-tensors", "sparse-24-bitmask"):
        return result
    counts = {"tensors": result} if result else {}  # of each type in GGUF
    return {"path": args.dst, "num_bytes": sum(map(os.path.getsize, files)), **counts}


def run_verify(args: argparse.Namespace) -> Any:
    """Reads and checks a whole file."""
    from jaxclip.checkpoints import inspection

    report = inspection.verify_file(args.path, **_limits(args))
    return report if args.json else f"{report}\nOK: nothing is wrong with {args.path}"
