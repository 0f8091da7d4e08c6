"""Triton kernels and their launchers, one file for each op: the only place that imports triton."""
