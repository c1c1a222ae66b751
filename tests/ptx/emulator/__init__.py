"""The PTX that Triton compiles, executed on a CPU."""
