"""Rounding beyond the nearest code: by the inputs of a layer, and by the bits that codes take."""
