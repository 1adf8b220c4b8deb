"""Reading and updating a few rows of a large matrix: gather, SGD with momentum, coasting of rows that were left alone.

``products.py`` holds the 2x2 matrices by which a row coasts; ``reference.py`` is the NumPy oracle of the kernels,
``cpu.py`` (Numba) what runs on the CPU. Importing this package imports none of them.
"""
