"""What a CUDA graph does, on any device: operations recorded once and done again on the same tensors."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "unique_consecutive", "_unique2", "unique_dim", "equal", "is_nonzero"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}  # which count where their indices are booleans


class Tape(TorchDispatchMode):
    """Records the operations within it; `replay` does them again, writing every result where it was written before.

    Afterwards what was there before is as it was, like after the recording of a graph, which does nothing. What a graph could not
    record raises RuntimeError: values or shapes for which the host waits.
    """

    def __init__(self):
        super().__init__()
        self.entries, self.before = [], {}

    def __exit__(self, *raised):
        super().__exit__(*raised)
        for storage, kept in self.before.values():
            storage.copy_(kept)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        masked = name in INDEXING and any(t is not None and t.dtype is torch.bool for t in args[1])
        if name in WAITING or masked or (name == "repeat_interleave" and kwargs.get("output_size") is None):
            raise RuntimeError(f"{func} waits for the device")
        written = [given for one, given in zip(func._schema.arguments, args, strict=False) if one.alias_info and one.alias_info.is_write]
        for storage in (t.untyped_storage() for t in tree_leaves(written)):
            if storage.data_ptr() not in self.before:
                self.before[storage.data_ptr()] = storage, storage.clone()
        out = func(*args, **kwargs)
        if written or not any(one.alias_info for one in func._schema.returns):  # a view needs no second look
            self.entries.append((func, args, kwargs, tensors(out)))
        return out

    def replay(self) -> None:
        """Do it again."""
        for func, args, kwargs, written in self.entries:
            for old, new in zip(written, tensors(func(*args, **kwargs)), strict=True):
                if old is not new:
                    old.copy_(new)


def tensors(tree: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class Recorder:
    """In the place of `zoo.decode.record_graph`; counts how often it is asked, and keeps nothing."""

    def __init__(self, record: Callable | None = None):
        self.count, self.record = 0, record or tape

    def __call__(self, run: Callable[[], Tensor], device: torch.device) -> tuple[Callable[[], None], Tensor]:
        self.count += 1
        return self.record(run, device)


def tape(run: Callable[[], Tensor], device: torch.device) -> tuple[Callable[[], None], Tensor]:
    """A recording on tape."""
    with Tape() as made:
        result = run()
    return made.replay, result
