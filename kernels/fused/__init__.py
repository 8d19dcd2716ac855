"""Triton kernels, installed as ``calm_fast.kernels`` although they live in ``kernels/fused`` (see setup.py).

Importing this package defines nothing and imports nothing: each ``<op>.py`` beside it imports Triton, and is
itself imported only when ``calm_fast.ops.<op>`` launches, so a machine without Triton never notices.
"""
