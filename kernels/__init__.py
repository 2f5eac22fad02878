"""Triton kernels of pymerge, installed as ``pymerge.kernels``, one file for each family of ops.

``launch`` says where kernels run and how large their blocks are, ``elements`` and ``rounding`` read
and write formats, ``philox``, ``keeping`` and ``elementary`` are what several families compute
with. Importing this package loads nothing; importing a module of it loads Triton, and makes kernels
for Triton's interpreter where TRITON_INTERPRET=1. pymerge/ops/triton.py does that when it must.

Written to the language of Triton 3.6: no range over a value that only a launch knows, no bfloat16
arithmetic or casts, float32 division by tl.div_rn, sums of floats in an order of their own.
"""
