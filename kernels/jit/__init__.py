"""Triton kernels and their launchers, one file for each op: the only folder that imports triton."""
