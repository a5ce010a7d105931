"""The sources of the machine code, which numba compiles when the package is built; they are not imported afterwards."""
