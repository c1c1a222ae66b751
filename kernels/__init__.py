"""The Triton kernels: forward and backward launchers, tile choices, and the schedule of masks. Importing this needs
Triton."""
