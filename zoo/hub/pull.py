"""From the Hub into a folder."""

import hashlib
import os
import shutil
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.hf_api import RepoSibling

from zoo.hub.errors import ATTEMPTS, HubError, explained, insist
from zoo.hub.files import carried, check_weights
from zoo.saving import whole_or_nothing


def pull(repo_id: str, folder: str | os.PathLike, *, revision: str | None = None, token: str | bool | None = None) -> Path:
    """Download a checkpoint: safetensors, configuration, tokenizer, card and numbers; no pickles.

    The files appear in `folder` only once all have arrived and have the hashes that the Hub names. Until then they lie beside it in
    `.<name>.part`: the same call after an interruption fetches those that were not whole yet.

    Args:
        repo_id: `owner/name`.
        revision: a branch, tag or commit; by default the head of main.
        token: for a private repository; by default HF_TOKEN or what `hf auth login` stored.

    Returns: the folder.

    Raises:
        HubError: no such repository or revision, no right to read it, no safetensors in it, a file that arrives broken again and
            again, the Hub cannot be reached, or the disk is full or read-only.
    """
    api, target = HfApi(token=token, library_name="seqzoo"), Path(folder).absolute()
    part = target.parent / f".{target.name}.part"
    if target.is_file():
        raise HubError(f"{folder} is a file; name a folder to pull into")
    with explained("pull from", repo_id, api.endpoint):
        info = insist(lambda: api.model_info(repo_id, revision=revision, files_metadata=True))
        wanted = {file.rfilename: file for file in info.siblings if carried(file.rfilename)}
        if not any(name.endswith(".safetensors") for name in wanted):
            raise HubError(f"{repo_id} has no safetensors; zoo.from_pretrained({repo_id!r}) reads pickles of tensors, save the model again")
        part.mkdir(parents=True, exist_ok=True)
        for _ in range(ATTEMPTS):
            # the commit and not its branch, which may move on, and for which a Hub out of reach would not be an error
            insist(lambda: api.snapshot_download(repo_id, revision=info.sha, local_dir=part, allow_patterns=list(wanted)))
            if not (broken := [name for name, file in wanted.items() if not arrived(part / name, file)]):
                break
            for name in broken:
                (part / name).unlink()
        else:
            raise HubError(f"cannot pull from {repo_id}: {', '.join(broken)} arrived {ATTEMPTS} times with another hash than the Hub names")
        check_weights(part, wanted)
        with whole_or_nothing(target) as stage:
            for name in wanted:
                os.replace(part / name, stage / name)
        shutil.rmtree(part)
    return Path(folder)


def arrived(path: Path, file: RepoSibling) -> bool:
    """Whether the file has the hash that the Hub names: of its content for a large file, of a git blob for a small one."""
    digest = hashlib.sha256() if file.lfs else hashlib.sha1(b"blob %d\0" % path.stat().st_size)
    with path.open("rb") as content:
        while block := content.read(2**20):
            digest.update(block)
    return digest.hexdigest() == (file.lfs.sha256 if file.lfs else file.blob_id)
