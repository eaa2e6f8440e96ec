"""Texts of `jaxclip COMMAND --help`; the tests run their examples."""

FILES = """\
Weights are read from .safetensors, .npz or .npy files, or from a folder with model.safetensors,
or with model.safetensors.index.json and its shards. They are read tensor by tensor and never
written to. The result is a new file, which appears when it is complete.

Exit status: 0 on success; 1 after an error, with a message on standard error; 2 if the command
line is wrong; 130 after an interrupt, 143 after SIGTERM, 129 after SIGHUP. A signal ends a command
between two parts of its work, and a second one at once; neither leaves a part of a file.
"""

HELP = {
    "inspect": """\
Show what is in a file: its tensors, their sizes, and statistics of the weights.

Every floating tensor gets a histogram from -max to max, the largest magnitude, the root mean
square (rms), the fraction of outliers (entries beyond K times the rms), and the thresholds of
least squared error for one scale at 4, 3 and 2 bits and ternary. Of more than 1,000 tensors or
1 GiB only headers are read, unless --statistics asks for more.

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

Tensors of two or more dimensions are rounded to a grid with one scale for each output, or for each
group of entries; the others stay as they are. The report shows the layout.

With --target-bpw or --target-bytes the width of each tensor is chosen so that the total error is
small; the file is then read twice. With --rate the codes are entropy-coded, and the step of each
tensor is chosen so that they take that many bits. With --bit-price they take fewer, at a larger
error.

Tensors under names of an optimizer's state, such as optimizer or exp_avg, and parts of layers that
are quantized already, such as qweight or weight_scale_inv, stay as they are unless a policy names
them.

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
in the model's config.json as quantization_config. sparse-24-bitmask: 2:4 sparse weights, as
compressed-tensors 0.9.4 to 0.14 reads them. gguf: GGUF with the codes that SRC has. Q4_0, Q4_1,
Q8_0, TQ1_0, TQ2_0: GGUF with blocks of that kind, if SRC has no codes. All need the extra gguf, and
tensor names that its reader knows. safetensors: plain weights. Keys of nested trees are joined by
dots; names in files of other libraries stay as they are, unless --rename changes them.

With --max-shard-bytes DST is a new folder of shards of at most that size, and their index. A folder
of shards is exported to a folder with shards of 5 GB, unless DST ends in .safetensors. With
--model-files DST is a folder that loads as it is: config.json gets its quantization_config, and the
tokenizer files are copied.

examples:
  jaxclip export small.safetensors model.safetensors --to compressed-tensors
  jaxclip export small.safetensors shards --to compressed-tensors --max-shard-bytes 2000000000
  jaxclip export small.safetensors folder --to compressed-tensors --model-files model
  jaxclip export net.safetensors net.gguf --to Q4_0 --metadata general.name=net
  jaxclip export small.safetensors small.gguf --to gguf --rename "layer\\." "blk.0."
  jaxclip export small.safetensors half.safetensors --to safetensors --dtype float16
""",
    "verify": """\
Read a whole file and check everything that can be checked.

Files of jaxclip have a checksum for every byte. In other files, structure and sizes are checked.

examples:
  jaxclip verify small.safetensors
""",
}
