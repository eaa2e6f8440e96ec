"""Files of trees: saved whole or not at all, checked when read, rewritten leaf by leaf.

.safetensors   any tree, `QuantizedArray` leaves included; a checksum for every byte
.npz           (nested) dicts of arrays; names joined by "/"
.npy           one array
"""

from jaxclip.checkpoints.compressing import compress as compress
from jaxclip.checkpoints.inspection import describe_file as describe_file
from jaxclip.checkpoints.inspection import verify_file as verify_file
from jaxclip.checkpoints.reading import CheckpointError as CheckpointError
from jaxclip.checkpoints.rewriting import clip_checkpoint as clip_checkpoint
from jaxclip.checkpoints.rewriting import compress_checkpoint as compress_checkpoint
from jaxclip.checkpoints.rewriting import decompress_checkpoint as decompress_checkpoint
from jaxclip.checkpoints.sizes import SizeReport as SizeReport
from jaxclip.checkpoints.sizes import size_report as size_report
from jaxclip.checkpoints.store import inspect as inspect
from jaxclip.checkpoints.store import load as load
from jaxclip.checkpoints.store import save as save
