"""Exports that other libraries load without this one."""

from jaxclip.interop.checkpoint import export_checkpoint as export_checkpoint
from jaxclip.interop.compressed_tensors import to_compressed_tensors as to_compressed_tensors
from jaxclip.interop.gguf import to_gguf as to_gguf
from jaxclip.interop.plain import to_safetensors as to_safetensors
