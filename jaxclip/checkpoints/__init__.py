"""Files of trees: saved whole or not at all, read with suspicion, rewritten leaf by leaf."""

from jaxclip.checkpoints.reading import CheckpointError as CheckpointError
from jaxclip.checkpoints.rewriting import clip_checkpoint as clip_checkpoint
from jaxclip.checkpoints.rewriting import compress_checkpoint as compress_checkpoint
from jaxclip.checkpoints.rewriting import decompress_checkpoint as decompress_checkpoint
from jaxclip.checkpoints.store import inspect as inspect
from jaxclip.checkpoints.store import load as load
from jaxclip.checkpoints.store import save as save
