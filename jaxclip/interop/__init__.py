"""Exports that other libraries load without this one.

to_safetensors          plain weights: every reader of safetensors
to_compressed_tensors   4- and 8-bit codes: compressed-tensors, so transformers and vLLM
to_gguf                 blocks of 32 at 4 and 8 bits: llama.cpp and the gguf package
export_checkpoint       any of them from a file, which need not fit into memory
"""

from jaxclip.interop.checkpoint import export_checkpoint as export_checkpoint
from jaxclip.interop.compressed_tensors import to_compressed_tensors as to_compressed_tensors
from jaxclip.interop.gguf import to_gguf as to_gguf
from jaxclip.interop.plain import to_safetensors as to_safetensors
