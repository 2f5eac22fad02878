"""Triton kernels of pymerge, installed as ``pymerge.kernels``.

The room is open but empty: this version computes on the CPU only (``csrc/cpu``).
"""
