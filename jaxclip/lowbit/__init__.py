"""Low-bit weights: codes on a grid and the scales that give them back.

w ~ scale * code, with one scale per tensor, channel or group.
"""

from jaxclip._core.grids import Grid as Grid
from jaxclip.lowbit.arrays import QuantizedArray as QuantizedArray
from jaxclip.lowbit.arrays import dequantize as dequantize
from jaxclip.lowbit.momentum import low_bit_momentum as low_bit_momentum
from jaxclip.lowbit.on_grid import compress_trained as compress_trained
from jaxclip.lowbit.on_grid import keep_on_grid as keep_on_grid
from jaxclip.lowbit.packing import pack_codes as pack_codes
from jaxclip.lowbit.packing import unpack_codes as unpack_codes
from jaxclip.lowbit.products import matmul as matmul
from jaxclip.lowbit.quantizer import quantize as quantize
from jaxclip.lowbit.rounding.by_rate import cheaper_codes as cheaper_codes
from jaxclip.lowbit.rounding.by_rate import dependent_codes as dependent_codes
from jaxclip.lowbit.scale_training import trainable_parts as trainable_parts
from jaxclip.lowbit.straight_through import fake_quantize as fake_quantize
from jaxclip.lowbit.trees import decompress as decompress
