"""From a model or a folder to the Hub."""

import json
import os
import shutil
import tempfile
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import ModelInfo
from huggingface_hub.utils import validate_repo_id
from transformers.modeling_utils import PreTrainedModel

from zoo.auto import TASKS, default_task, from_pretrained
from zoo.config import ZooConfig
from zoo.hub.cards import Subject, render
from zoo.hub.errors import HubError, explained, insist
from zoo.hub.files import CODE, WEIGHTS, carried, check_weights, read_json
from zoo.layout import find_layout
from zoo.registry import ARCHITECTURES, AUTO

STUB = '''"""This checkpoint is of the architecture `{name}` of seqzoo, whose code is not in this repository."""

try:
    from zoo.models import {classes}
except ImportError as error:
    raise ImportError("this model needs the package seqzoo: run `pip install seqzoo`") from error
'''


@dataclass(frozen=True)
class Pushed:
    """What went to the Hub, or after a dry run what would go.

    Args:
        repo_id: with its owner.
        files: name -> bytes, of all files of the checkpoint; those that the repository has already are not sent again.
        removed: weight files of the repository that this checkpoint does not have.
        left_out: files and folders of the folder that do not travel.
        commit: None after a dry run.
    """

    repo_id: str
    files: dict[str, int]
    removed: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    commit: CommitInfo | None = None


def push(
    source: PreTrainedModel | str | os.PathLike, repo_id: str, *, token: str | bool | None = None, private: bool | None = None,
    revision: str | None = None, commit_message: str | None = None, commit_description: str | None = None, create_pr: bool = False,
    exist_ok: bool = True, dry_run: bool = False, layout: str | None = None, tokenizer=None, max_shard_size: int | str = "5GB",
    license: str | None = None, base_model: str | list[str] | None = None, tags: Iterable[str] = (),
) -> Pushed:  # fmt: skip
    """One commit with a checkpoint and its card, on a repository that is made if need be; or nothing.

    Args:
        source: a model; or a folder with a checkpoint of ours or in a foreign layout, with whatever lies beside it of tokenizer,
            generation config, card and numbers.
        repo_id: `owner/name`; the owner of the token if it is left out.
        token: one that may write; by default HF_TOKEN or what `hf auth login` stored.
        private: of a new repository.
        revision: a branch, made if need be; by default main.
        create_pr: propose the commit instead of making it.
        exist_ok: False: the repository must be new.
        dry_run: change nothing on the Hub; it is asked what it has.
        layout: write a foreign layout, one of `zoo.layouts()`.
        tokenizer: goes along with a model.
        license, base_model, tags: of the card; left out, what a card in the folder or the repository says stays.

    Raises:
        HubError: no right to write, a name that is not allowed or taken, a folder without config or safetensors, the Hub cannot be
            reached, or the disk is full. The repository is then as it was or new and empty; what was uploaded is not sent again.
    """
    api = HfApi(token=token, library_name="seqzoo")
    with explained("push to", repo_id, api.endpoint), tempfile.TemporaryDirectory(prefix="zoo-push-") as stage:
        validate_repo_id(repo_id)
        if "/" not in repo_id:
            repo_id = f"{insist(api.whoami)['name']}/{repo_id}"
        folder, left_out = prepare(source, Path(stage), layout, tokenizer, max_shard_size)
        there = insist(lambda: present(api, repo_id, revision))
        if there and not exist_ok:
            raise HubError(f"{repo_id} exists already; choose another name, or push onto it with exist_ok=True")
        fields = {"license": license, "base_model": base_model, "tags": tags}
        contents = compose(repo_id, folder, insist(lambda: written_card(api, folder, there)), fields)
        removed = stale(there, contents)
        sizes = {name: len(content) if isinstance(content, bytes) else content.stat().st_size for name, content in contents.items()}
        if dry_run:
            return Pushed(repo_id, sizes, removed, left_out)

        insist(lambda: api.create_repo(repo_id, private=private, exist_ok=True))
        if revision is not None and not create_pr:
            insist(lambda: api.create_branch(repo_id, branch=revision, exist_ok=True))

        def send() -> CommitInfo:  # made anew for every attempt, as an answer that got lost may have been to a commit that was made
            gone = [CommitOperationDelete(name) for name in stale(present(api, repo_id, revision), contents)]
            return api.create_commit(
                repo_id, [*(CommitOperationAdd(*file) for file in contents.items()), *gone], revision=revision, create_pr=create_pr,
                commit_message=commit_message or "Upload a checkpoint", commit_description=commit_description,
            )  # fmt: skip

        return Pushed(repo_id, sizes, removed, left_out, insist(send))


def prepare(source, stage: Path, layout: str | None, tokenizer, max_shard_size: int | str) -> tuple[Path, list[str]]:
    """The folder whose files travel, and what of the source does not."""
    names, left_out, written = [], [], {} if layout is None else {"layout": layout}
    if not isinstance(source, PreTrainedModel):
        folder = Path(source)
        if not folder.is_dir():
            raise HubError(f"{folder} is not a folder; name one that save_pretrained wrote, or pass a model")
        if tokenizer is not None:
            raise HubError(f"the tokenizer of a folder lies in it: call tokenizer.save_pretrained({str(folder)!r}), leave tokenizer= out")
        names = sorted(path.name for path in folder.iterdir())
        left_out = [name for name in names if not carried(name) or (folder / name).is_dir()]
        if layout is None:
            return folder, left_out
        source = from_pretrained(folder)
    elif layout is not None and not isinstance(source.config, ZooConfig):
        raise HubError(f"a {type(source).__name__} is not of the zoo: save it, and push what zoo.from_pretrained makes of it")
    source.save_pretrained(stage, max_shard_size=max_shard_size, **written)
    if tokenizer is not None:
        tokenizer.save_pretrained(stage)
    if not any(stage.glob("*.safetensors")):
        raise HubError(f"the layout {layout!r} writes pickles, which are not pushed; choose another, or push without layout=")
    for name in names:  # tokenizer, numbers and card of the folder
        if name not in left_out and not any(fnmatch(name, pattern) for pattern in WEIGHTS) and not (stage / name).exists():
            shutil.copy(folder / name, stage / name)
    return stage, left_out


def compose(repo_id: str, folder: Path, previous: str, fields: dict) -> dict[str, Path | bytes]:
    """Every file of the repository: name -> the file, or its content where it is not as in the folder."""
    contents: dict[str, Path | bytes] = {
        path.name: path for path in sorted(folder.iterdir()) if path.is_file() and carried(path.name) and path.name != CODE
    }
    check_weights(folder, contents)
    raw = read_json(folder / "config.json")
    subject = describe(raw, folder)
    contents["README.md"] = render(repo_id, subject, previous, folder, fields).encode()
    if subject.layout is None and type(subject.config).__module__.startswith("zoo.models."):  # and not of somebody's notebook
        names = {"AutoConfig": type(subject.config).__name__}
        models = ARCHITECTURES[subject.config.name].models
        names |= {AUTO[suffix].__name__: models[suffix].__name__ for suffix in dict.fromkeys(("Model", subject.suffix))}
        raw["auto_map"] = {auto: f"{CODE.removesuffix('.py')}.{name}" for auto, name in names.items()}
        contents["config.json"] = (json.dumps(raw, indent=2) + "\n").encode()
        contents[CODE] = STUB.format(name=subject.config.name, classes=", ".join(names.values())).encode()
    return contents


def describe(raw: dict, folder: Path) -> Subject:
    """What a config.json says. ValueError for a model that the zoo does not know."""
    kind = raw.get("model_type") or ""
    if kind.startswith("zoo_"):
        found = [entry for entry in ARCHITECTURES.values() if entry.config.model_type == kind]
        if not found:
            raise HubError(f"{folder} is of model type {kind!r}, which this version does not know; import the file that registers it")
        config = found[0].config.from_dict({name: value for name, value in raw.items() if name != "auto_map"})
        written = (raw.get("architectures") or [""])[0]
        suffix = next((suffix for suffix, cls in found[0].models.items() if cls.__name__ == written), None)
        return Subject(config, suffix or default_suffix(config))
    from zoo.foreign import config_class, saved_task, with_defaults  # the files of others are needed by few

    entry, layout = find_layout(raw)
    native = layout.complete is None and config_class(kind) is not None
    raw = with_defaults(raw, layout)
    config = entry.config(**layout.config_map(raw))
    return Subject(config, TASKS.get(saved_task(raw)) or default_suffix(config), layout.name, native)


def default_suffix(config: ZooConfig) -> str:
    """Of the language model that the config allows."""
    return TASKS[default_task(config)]


def present(api: HfApi, repo_id: str, revision: str | None) -> ModelInfo | None:
    """The repository at this branch, or at main from where a new branch begins; None before there is one."""
    for branch in dict.fromkeys((revision, None)):
        try:
            return api.model_info(repo_id, revision=branch)
        except RevisionNotFoundError:
            continue
        except RepositoryNotFoundError:
            break
    return None


def stale(there: ModelInfo | None, contents: Collection[str]) -> list[str]:
    """Weight files of the repository that are not among the new ones."""
    names = [file.rfilename for file in there.siblings] if there else []
    return [name for name in names if name not in contents and any(fnmatch(name, pattern) for pattern in WEIGHTS)]


def written_card(api: HfApi, folder: Path, there: ModelInfo | None) -> str:
    """The card in the folder, or the one in the repository, or ""."""
    path = folder / "README.md"
    if not path.exists():
        if not there or all(file.rfilename != path.name for file in there.siblings):
            return ""
        path = Path(api.hf_hub_download(there.id, path.name, revision=there.sha))
    return path.read_text(encoding="utf-8")
