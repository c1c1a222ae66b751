"""The Triton kernels: forward and backward launchers, tile choices, and the schedule of masks. All but `configs` need
Triton to be imported."""
