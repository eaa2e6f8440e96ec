"""Reads jaxclip's `.safetensors` files with NumPy, zlib and json: docs/format.md as a program.

    python examples/read_low_bit_file.py net.safetensors

To be ported, not to be trusted: it believes what a file says, `jaxclip.checkpoints.load` does not.
"""

import json
import math
import pathlib
import struct
import sys
import zlib

import numpy as np

DTYPES = {"BOOL": "?", **{f"{k}{8 * n}": f"<{k.lower()}{n}" for k in "UIF" for n in (1, 2, 4, 8)}}
DTYPES |= {"BF16": "<u2", "F8_E4M3": "u1", "F8_E5M2": "u1"}  # which NumPy has not


def as_array(raw, dtype):
    """Raw bytes as an array; bfloat16 as float32, float8 as the bytes it is."""
    array = np.frombuffer(raw, DTYPES[dtype])
    return (array.astype("<u4") << 16).view("<f4") if dtype == "BF16" else array


def read_file(path):
    """A dict from the name of each leaf to its array, of a low-bit leaf to its weights."""
    data = pathlib.Path(path).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    ours = json.loads(header.pop("__metadata__")["jaxclip"])
    if ours["version"] not in (1, 2, 3, 4, 5, 6):
        raise ValueError(f"version {ours['version']} of the format is not known here")
    tensors = {}
    for name, entry in header.items():
        start, stop = entry["data_offsets"]
        raw = data[8 + length + start : 8 + length + stop]
        if f"{zlib.crc32(raw):08x}" != ours["crc"][name]:
            raise ValueError(f"tensor {name!r} is damaged")
        tensors[name] = as_array(raw, entry["dtype"]).reshape(entry["shape"])
    arrays = {name: tensor for name, tensor in tensors.items() if ":" not in name}
    leaves = {name: i | {"version": ours["version"]} for name, i in ours["leaves"].items()}
    return arrays | {name: leaf(name, i, tensors) for name, i in leaves.items()}


def leaf(name, info, tensors):
    """A low-bit leaf, or a float leaf whose zeros are left out."""
    return (weights if "bits" in info else with_zeros)(name, info, tensors)


def with_zeros(name, info, tensors):
    """The values of a float leaf in the places that its mask says."""
    shape, stored, values = info["shape"], tensors[f"{name}:mask"], tensors[f"{name}:values"]
    count, axis, order = math.prod(shape), len(shape) - 1, list(range(len(shape)))
    if info["coding"] is not None:  # the first byte is the axis along which entries follow
        axis, data = int(stored[0]), stored[1:].tobytes()
        order.append(order.pop(axis))
        if info["coding"] == "lanes":
            paired = [*(shape[a] for a in order[:-1]), -(-shape[axis] // 2)]
            codes = from_rows(data, {"shape": paired, "axis": None})
            mask = np.stack([codes > 0, (codes < 0) | (codes > 1)], axis=-1)
            mask = mask.reshape(*paired[:-1], -1)[..., : shape[axis]]
            stored = np.packbits(mask, bitorder="little")
        else:
            codes = (huffman if info["coding"] == "huffman" else ans)(data, -(-count // 8))
            stored = codes.astype(np.uint8)
    mask = np.unpackbits(stored, bitorder="little")[:count].astype(bool)
    array = np.zeros(shape, values.dtype)
    array[mask.reshape([shape[a] for a in order]).transpose(np.argsort(order))] = values
    return array


def weights(name, info, tensors):
    """What a low-bit leaf stands for: scale * (code - zero), in float32, in its dtype."""
    shape, scale = info["shape"], tensors[f"{name}:scale"]
    if info.get("scale_dtype") == "log8":
        power = (2.0 ** -((scale & 127) / 8)).astype(np.float32) * tensors[f"{name}:unit"]
        scale = np.where(scale > 127, -power, power)
    codes = decode(tensors[f"{name}:codes"], info, math.prod(shape)).reshape(shape)
    zero = spread(tensors[f"{name}:zero"], info) if info.get("zero_point") else 0
    product = spread(scale.astype(np.float32), info) * (codes - zero).astype(np.float32)
    if info["dtype"] == "BF16":  # to the nearest, ties to even
        word = product.view(np.uint32)
        return (word + 0x7FFF + (word >> 16 & 1) & 0xFFFF0000).astype(np.uint32).view(np.float32)
    return product.astype(DTYPES[info["dtype"]])


def spread(scale, info):
    """Repeats one value per block to one per entry, along the axes that are cut into groups."""
    shape, ndim = info["shape"], len(info["shape"])
    channels = {a % ndim for a in np.atleast_1d([] if info["axis"] is None else info["axis"])}
    if info["axis"] is None and ndim > 1:
        channels = {0}
    if info["group_size"] is None or not shape:
        return scale
    axes = [a for a in range(ndim) if a not in channels]
    if info["version"] < 3:  # groups run along the last of these axes only
        axes = axes[-1:]
    apart = [a for a in range(ndim) if a not in axes]
    rows, length = (math.prod(shape[a] for a in some) for some in (apart, axes))
    flat = scale.transpose(*apart, *axes).reshape(rows, scale.shape[axes[-1]])
    flat = np.repeat(flat, min(info["group_size"], max(length, 1)), 1)[:, :length]
    entries = flat.reshape([shape[a] for a in (*apart, *axes)])
    return entries.transpose(np.argsort((*apart, *axes)))


def decode(stored, info, count):
    """Codes, whether packed or entropy coded."""
    bits = info["bits"]
    if info.get("coding") is not None:
        if info["coding"] == "lanes":
            return from_rows(stored.tobytes(), info)
        return (huffman if info["coding"] == "huffman" else ans)(stored.tobytes(), count)
    if bits == "ternary":  # five digits a byte
        return (stored[:, None] // 3 ** np.arange(5) % 3).reshape(-1)[:count] - 1
    stream = np.unpackbits(stored, bitorder="little")[: count * bits].reshape(-1, bits)
    unsigned = stream.astype(np.int64) @ (1 << np.arange(bits))
    if bits == 1 or info.get("levels") == "balanced":  # odd numbers
        return 2 * unsigned - 2**bits + 1
    is_full = info.get("full_signed", info.get("levels") == "full")
    return unsigned - 2 ** (bits - 1) + (not is_full)


def from_rows(data, info):
    """Codes that were coded in lanes, channel by channel in chains of at most 512."""
    shape, ndim = info["shape"], len(info["shape"])
    first = sorted({a % ndim for a in np.atleast_1d([] if info["axis"] is None else info["axis"])})
    first = first or list(range(ndim - 1))
    order = [*first, *(a for a in range(ndim) if a not in first)]
    num_rows, row = (math.prod(shape[a] for a in o) for o in (first, order[len(first) :]))
    chain = max(-(-row // max(-(-row // 512), 1)), 1)
    filled = row + -row % chain
    codes = lanes(data, num_rows * filled).reshape(num_rows, filled)[:, :row]
    return codes.reshape([shape[a] for a in order]).transpose(np.argsort(order))


def huffman(data, count):
    """Bytes of k digits each, deflated; the last digit stands for a code that follows them."""
    lowest, k, num_beyond = struct.unpack("<bBxxxxxxQ", data[:16])
    base, num_bytes = {1: 256, 2: 16, 3: 6, 4: 4, 5: 3, 8: 2}[k], -(-count // k)
    stream = np.frombuffer(zlib.decompress(data[16:], -15), np.uint8)
    digits = stream[:num_bytes, None].astype(np.int64) // base ** np.arange(k) % base
    codes = digits.reshape(-1)[:count] + lowest
    if num_beyond:
        codes[codes == lowest + base - 1] = stream[num_bytes:].view(np.int8)
    return codes


def ans(data, count):
    """Asymmetric numeral systems, with a table of how often each code occurs."""
    try:
        import constriction
    except ImportError as error:
        raise ImportError("coding 'ans' needs a package: pip install constriction") from error
    lowest, num_levels, size = struct.unpack("<bxHI", data[:8])
    counts = np.frombuffer(zlib.decompress(data[8 : 8 + size], -15), "<u8")
    shares = np.append(counts / max(count, 1), [0.0] * (num_levels == 1)) if count else [1.0, 0.0]
    model = constriction.stream.model.Categorical(np.array(shares), perfect=False)
    coder = constriction.stream.stack.AnsCoder(np.frombuffer(data[8 + size :], "<u4"))
    return coder.decode(model, count) + lowest


NEXT_STATES = {
    1: [(0, 0)],
    4: [(0, 1), (2, 3), (1, 0), (3, 2)],
    8: [(0, 2), (5, 7), (1, 3), (6, 4), (2, 0), (4, 6), (3, 1), (7, 5)],
}
MAGNITUDES = [0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128]


def lanes(data, count):
    """Asymmetric numeral systems in lanes; codes may be on a path of a trellis."""
    num_states, num_classes, num_lanes, chain, size, num_escaped = struct.unpack(
        "<BBHIII", data[:16]
    )
    at, tables = 16, []
    for _ in range(num_classes * min(num_states, 2)):
        tables.append(frequencies(data[at + 2 : at + 2 + data[at]], data[at + 1]))
        at += 2 + data[at] if data[at] else 1
    side, num_chains = zlib.decompress(data[at : at + size], -15), -(-count // chain)
    classes = np.zeros(num_chains + chain, np.int8)
    if num_classes > 1:
        classes = np.frombuffer(side, np.int8, num_chains + chain)
    escaped = iter(np.frombuffer(side[len(side) - 4 * num_escaped :], "<i4").tolist())
    numbers = np.frombuffer(data, "<u4", num_lanes, at + size).tolist()
    words = iter(np.frombuffer(data[at + size + 4 * num_lanes :], "<u2").tolist())
    indices, states = np.zeros((2, num_chains, chain), np.int64)
    is_escaped = np.zeros((num_chains, chain), bool)
    for first in range(0, num_chains, num_lanes):
        rows = range(first, min(first + num_lanes, num_chains))
        state = [0] * len(rows)
        for i, (lane, row) in ((i, pair) for i in range(chain) for pair in enumerate(rows)):
            kind = min(max(int(classes[row]) + int(classes[num_chains + i]), 0), num_classes - 1)
            table = tables[kind * min(num_states, 2) + state[lane] % 2]
            slot, x = numbers[lane] % 2**13, numbers[lane] // 2**13
            symbol = int(np.searchsorted(np.cumsum(table), slot, "right"))
            numbers[lane] = x * table[symbol] + slot - sum(table[:symbol])
            most = len(table) // 2 - 1
            is_escaped[row, i] = symbol > 2 * most
            indices[row, i] = symbol - (2 * most + 1 if is_escaped[row, i] else most)
            states[row, i] = state[lane]
            state[lane] = NEXT_STATES[num_states][state[lane]][indices[row, i] % 2]
            if lane + 1 == len(rows):  # the end of a step
                for j in (j for j in range(len(rows)) if numbers[j] < 2**16):
                    numbers[j] = numbers[j] * 2**16 + next(words)
    indices[is_escaped] = list(escaped)
    codes = indices if num_states == 1 else 2 * indices - np.sign(indices) * (states % 2)
    return codes.reshape(-1)[:count]


def frequencies(lengths, escape):
    """How often of 2**13 times each index occurs, and an even and an odd escaped one."""
    if not lengths:
        return []
    weights = []
    for magnitude in range(MAGNITUDES[len(lengths) - 1] + 1):
        right = next(i for i, m in enumerate(MAGNITUDES) if m >= magnitude)
        left = max(right - 1, 0)
        distance = max(MAGNITUDES[right] - MAGNITUDES[left], 1)
        fall = 32 * (lengths[right] - lengths[left]) * (MAGNITUDES[right] - magnitude) // distance
        weights.append(weight(32 * lengths[right] - fall))
    escapes = [0 if escape == 255 else weight(32 * escape)] * 2
    weights = weights[:0:-1] + weights + escapes
    num_used = len(weights) - 2 * (escape == 255)
    found = [1 + w * (2**13 - num_used) // max(sum(weights), 1) for w in weights[:num_used]]
    found += [0] * (len(weights) - num_used)
    found[weights.index(max(weights))] += 2**13 - sum(found)
    return found


def weight(length):
    """2**(30 - length / 256), rounded down in two steps."""
    return int(2 ** (30 - length % 256 / 256)) >> length // 256


if __name__ == "__main__":
    for name, array in sorted(read_file(sys.argv[1]).items()):
        mean = array.astype(np.float64).mean() if array.size else float("nan")
        print(f"{name:40} {array.shape!s:20} {array.dtype!s:8} mean {mean:.6g}")
