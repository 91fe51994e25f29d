"""Before anything imports Triton: without a GPU its kernels are interpreted. `auto` never takes interpreted ones."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
