"""The kernels of alimm: NumPy and Numba only, usable without torch or MMEngine.

Each family is a package with ``reference.py`` (NumPy, readable, the oracle), ``cpu.py`` (Numba) and ``cuda.py``
(Numba CUDA). Importing this module imports none of them.
"""
