"""Exports that other libraries load without this one.

    to_safetensors          plain weights, for every reader of safetensors
    to_compressed_tensors   4- and 8-bit codes, for compressed-tensors, transformers and vLLM;
                            2:4 sparse weights; from_compressed_tensors back
    to_gguf                 blocks of 4 and 8 bits and ternary ones, for llama.cpp and the gguf
                            package; from_gguf back
    to_bitnet               ternary codes, for the BitNet layers of transformers; from_bitnet back
    export_checkpoint       the first three from a file, which need not fit into memory
    to_jax_sparse           arrays of jax.experimental.sparse in memory; from_jax_sparse back
    to_qwix                 arrays of Qwix in memory; from_qwix back

Names are the keys of the tree joined by a separator. Files, and folders of shards, appear whole
or not at all, and are written tensor by tensor.
"""

from jaxclip.interop.bitnet import from_bitnet as from_bitnet
from jaxclip.interop.bitnet import to_bitnet as to_bitnet
from jaxclip.interop.checkpoint import export_checkpoint as export_checkpoint
from jaxclip.interop.compressed_reading import from_compressed_tensors as from_compressed_tensors
from jaxclip.interop.compressed_tensors import to_compressed_tensors as to_compressed_tensors
from jaxclip.interop.gguf import to_gguf as to_gguf
from jaxclip.interop.gguf_reading import from_gguf as from_gguf
from jaxclip.interop.jax_sparse import from_jax_sparse as from_jax_sparse
from jaxclip.interop.jax_sparse import to_jax_sparse as to_jax_sparse
from jaxclip.interop.plain import to_safetensors as to_safetensors
from jaxclip.interop.qwix import from_qwix as from_qwix
from jaxclip.interop.qwix import to_qwix as to_qwix
