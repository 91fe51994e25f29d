"""Checkpoints that are whole or absent, and loading that accounts for every key."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from zoo.config import nearest


@contextmanager
def whole_or_nothing(target: str | os.PathLike) -> Iterator[Path]:
    """A folder beside `target` to write into; its files move to `target` only when the body ends without an error.

    Weight files of `target` that the new checkpoint does not have are removed, other files stay.
    """
    target = Path(target)
    if target.is_file():
        raise ValueError(f"{target} is a file; name a folder to save into")
    target.parent.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield stage
        target.mkdir(exist_ok=True)
        written = {p.name for p in stage.iterdir()}
        stale = [p for p in target.glob("model*.safetensors*") if p.name not in written]
        # configuration last: a folder is only ever read through it
        for path in sorted(stage.iterdir(), key=lambda p: (p.suffix == ".json", p.name == "config.json")):
            os.replace(path, target / path.name)
        for path in stale:
            path.unlink()
    finally:
        shutil.rmtree(stage, ignore_errors=True)


class CheckpointMixin:
    """`save_pretrained` that never leaves half a checkpoint, `from_pretrained` that leaves no key unaccounted for."""

    def save_pretrained(self, save_directory, *, push_to_hub: bool = False, layout: str | None = None, **kwargs):
        """As transformers', but the files appear in `save_directory` only once all are written.

        `layout`: write a foreign layout, one of `zoo.layouts()`; the other arguments are then those of `save_foreign`.
        """
        if layout is not None:
            from zoo.foreign import save_foreign  # the files of others are needed by few

            return save_foreign(self, save_directory, layout, **kwargs)
        with whole_or_nothing(save_directory) as stage:
            super().save_pretrained(stage, **kwargs)
        if push_to_hub:
            raise ValueError("save first, then call model.push_to_hub(repo_id)")

    def push_to_hub(self, repo_id: str, **kwargs):
        """One commit with the model and its card on the Hub, as `zoo.hub.push`, which names the arguments. Returns its CommitInfo."""
        import zoo  # what pushes stands above the core, and is there once the package is

        return zoo.hub.push(self, repo_id, **kwargs).commit

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, output_loading_info: bool = False, **kwargs):
        """As transformers', but a missing, surplus or misshapen key is an error, except for another task's head.

        Raises:
            ValueError: naming the keys and the nearest ones, or the file that cannot be read.
        """
        allow_shapes = bool(kwargs.pop("ignore_mismatched_sizes", False))
        try:
            model, info = super().from_pretrained(
                pretrained_model_name_or_path, *args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
            )
        except SafetensorError as error:
            raise ValueError(
                f"{pretrained_model_name_or_path}: a safetensors file is truncated or corrupt ({error}); download or save it again"
            ) from error
        check_keys(cls.__name__, model, info, allow_shapes)
        return (model, info) if output_loading_info else model


def check_keys(name: str, model, info: dict, allow_shapes: bool) -> None:
    """Raise ValueError for keys that do not fit; heads (keys outside `model.`) may come and go with the task."""
    own = set(model.state_dict())
    base = model.base_model_prefix + "."
    is_base = model.base_model is model

    def of_body(key: str) -> bool:
        return is_base or key.startswith(base)

    problems = []
    if missing := sorted(k for k in info["missing_keys"] if of_body(k)):
        problems.append(f"missing {len(missing)}: {', '.join(missing[:4])}")
    heads = ("lm_head", "logits_bias", "score", "head", "classifier", "answer")
    surplus = sorted(k for k in info["unexpected_keys"] if k.startswith(base) or (is_base and not k.startswith(heads)))
    if surplus:
        problems.append(f"not of this architecture {len(surplus)}: " + ", ".join(k + nearest(k, own) for k in surplus[:4]))
    if info["mismatched_keys"] and not allow_shapes:
        first = sorted(info["mismatched_keys"])[:4]
        shapes = [f"{k} is {list(found)} in the file, {list(wanted)} in the model" for k, found, wanted in first]
        problems.append("misshapen: " + "; ".join(shapes))
    if problems:
        raise ValueError(f"the checkpoint does not fit {name}: " + " | ".join(problems) + ". Check that its config.json belongs to it.")
