"""Switches that must be set before anything imports torch's threads or Triton's kernels, whichever tests are collected first."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
