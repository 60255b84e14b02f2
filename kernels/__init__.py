"""Triton kernels, one file an op; imported only as ``cpd_fast.kernels``, and only when one is about to run."""
