"""Symmetric INT8 quantisation of activations, weights and gradients: statistics, rounding, layout, clips.

``reference.py`` is the NumPy oracle; ``cpu.py`` (Numba) and ``cuda.py`` (Numba CUDA) give the same bits.
``clipping.py`` decides where a channel of a gradient is clipped. Importing this package imports none of them.
"""
