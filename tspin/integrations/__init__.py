"""This package's kernels inside other people's trainers."""
