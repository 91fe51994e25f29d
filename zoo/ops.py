"""The operators, by their mathematics. Each takes tensors `[B, T, H, .]`, a state and a packing, and runs anywhere."""

import importlib
import pkgutil

import zoo.kernels as _kernels
from zoo.kernels.dispatch import BACKENDS, OPS, Backend, BackendError, Op, use_backend
from zoo.kernels.packing import Packing

for _module in pkgutil.iter_modules(_kernels.__path__):
    if _module.ispkg:
        importlib.import_module(f"zoo.kernels.{_module.name}")
for _name, _op in OPS.items():
    globals()[_name] = _op.call

__all__ = ["BACKENDS", "OPS", "Backend", "BackendError", "Op", "Packing", "use_backend", *OPS]
