"""Kernels for Hopper (sm_90) alone, in Gluon: warp-specialized, with asynchronous products and bulk copies."""
