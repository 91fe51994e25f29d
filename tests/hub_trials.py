"""Faults between a checkpoint and its Hub, one at a time, and what has become of either side afterwards.

python tests/hub_trials.py            # prints the table of docs/hub.md
python tests/hub_trials.py --write    # writes it there
"""

import argparse
import hashlib
import re
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import httpx
import torch
from hub_server import OWNER, Fault, Hub
from huggingface_hub import constants

import zoo
from zoo.hub import HubError

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "hub.md"
BEGIN, END = "<!-- begin generated: python tests/hub_trials.py --write -->", "<!-- end generated -->"
ALWAYS = 10**6
REPO = "me/tiny"
IDS = torch.arange(16)[None]


@dataclass(frozen=True)
class Trial:
    """`action` ("push", "pull" or "load") while requests of `method` on `path` fail as `kind` says, once or always."""

    action: str
    method: str
    path: str
    kind: int | str
    always: bool = False
    recovers: bool = True

    @property
    def name(self) -> str:
        return f"{self.action}: {self.method} {self.path} {self.kind}{', always' if self.always else ''}"


def trials() -> list[Trial]:
    """Every request of a push, a pull and a load, in every way it may fail; once, from which all but a few recover, and always."""
    steps = {
        "push": [
            ("GET", f"/api/models/{REPO}", (500, "drop")),
            ("POST", "/api/repos/create", (429, 500, "drop", "lost")),
            ("POST", "/api/validate-yaml", (500, "drop")),
            ("POST", "/preupload/", (429, 500, "drop")),
            ("POST", "/objects/batch", (503, "drop")),
            ("PUT", "/lfs/", (429, 500, "drop", "flip", "lost")),
            ("POST", "/objects/verify", (500, "drop")),
            ("POST", "/commit/", (429, 500, "drop", "lost")),
        ],
        "pull": [
            ("GET", f"/api/models/{REPO}", (429, 500, "drop")),
            ("GET", "/tree/", (500, "drop")),
            ("HEAD", "/config.json", (429, 500)),
            ("HEAD", "-of-00004.safetensors", (429, 500)),
            ("GET", "/config.json", (429, 500, "drop", "flip")),
            ("GET", "-of-00004.safetensors", (429, 500, "drop", "flip")),
        ],
        "load": [
            ("HEAD", "/config.json", (429, 500)),
            ("HEAD", "-of-00004.safetensors", (429, 500)),
            ("GET", "/config.json", (429, 500, "drop")),
            ("GET", "-of-00004.safetensors", (429, 500, "drop")),
        ],
    }
    # from_pretrained does not ask again for a file that was answered with 500; an object that was stored need not be verified
    final, needless = {("load", "GET", 500)}, "/objects/verify"
    every = [(action, *step) for action, listed in steps.items() for step in listed]
    return [
        Trial(action, method, path, kind, always, path == needless or not (always or (action, method, kind) in final))
        for action, method, path, kinds in every
        for kind in kinds
        for always in ((False,) if kind == "lost" else (False, True))
    ]


@contextmanager
def connected(hub: Hub, home: Path, token: str | None = OWNER) -> Iterator[None]:
    """This process talks to `hub`, keeps its cache in `home`, and does not wait between attempts."""
    values = {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_DISABLE_TELEMETRY": True,
        "HF_HUB_CACHE": str(home),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_STORED_TOKENS_PATH": str(home / "tokens"),
        "DOWNLOAD_CHUNK_SIZE": 4096,
    }
    with ExitStack() as stack:
        for name, value in values.items():
            stack.enter_context(patch.object(constants, name, value))
        stack.enter_context(patch("transformers.utils.hub._hf_api", None))
        stack.enter_context(patch("time.sleep", lambda seconds: None))
        stack.enter_context(patch.dict("os.environ", {"HF_TOKEN": token or ""}))
        yield


def checkpoint(folder: Path, seed: int) -> torch.nn.Module:
    """A tiny model in several shards."""
    torch.manual_seed(seed)
    model = zoo.from_config("gla-tiny").eval()
    model.save_pretrained(folder, max_shard_size="60KB")
    return model


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} if folder.exists() else {}


@dataclass(frozen=True)
class Outcome:
    """Faults injected; whether the action succeeded all the same; whether either side had nothing or everything of it."""

    injected: int
    succeeded: bool
    whole: bool


def attempt(trial: Trial, folder: Path) -> Outcome:
    """A push, pull or load of the second of two versions of a model; with the fault, and then once more without, which must succeed."""
    checkpoint(folder / "old", 0)
    model = checkpoint(folder / "new", 1)
    with Hub() as hub, connected(hub, folder / "cache"):
        zoo.hub.push(folder / "old", REPO)
        if trial.action != "push":
            zoo.hub.pull(REPO, folder / "pulled")
            zoo.hub.push(folder / "new", REPO)
        before, pulled = list(hub.repos[REPO].branches["main"]), contents(folder / "pulled")
        fault = Fault(trial.method, trial.path, trial.kind, ALWAYS if trial.always else 1)
        hub.faults.append(fault)
        try:
            perform(trial.action, folder)
            succeeded = True
        except (HubError, OSError, httpx.HTTPError):  # the last of from_pretrained, which has no sentence of its own for it
            succeeded = False
        whole = cache_is_whole(folder / "cache") and hub_is_whole(hub)
        if trial.action == "push":
            after = hub.repos[REPO].branches["main"]
            whole &= after[: len(before)] == before and len(after) == len(before) + succeeded
        else:
            new = {name: hub.read(blob) for name, blob in hub.tree(REPO).items() if not name.startswith(".")}
            whole &= contents(folder / "pulled") == (new if succeeded and trial.action == "pull" else pulled)
        hub.faults.clear()
        perform(trial.action, folder)
        source = folder / "pulled" if trial.action == "pull" else REPO
        assert torch.equal(zoo.from_pretrained(source).eval()(IDS).logits, model(IDS).logits)
        assert not list(folder.glob(".pulled*"))
        return Outcome(fault.seen, succeeded, whole)


def perform(action: str, folder: Path) -> None:
    if action == "push":
        zoo.hub.push(folder / "new", REPO)
    elif action == "pull":
        zoo.hub.pull(REPO, folder / "pulled")
    else:
        zoo.from_pretrained(REPO)


def hub_is_whole(hub: Hub) -> bool:
    """Every file of the last commit is there with its size, every object has the content of its name."""
    blobs = hub.tree(REPO).values()
    return all(len(hub.read(blob)) == blob.size for blob in blobs) and all(
        hashlib.sha256(content).hexdigest() == name for name, content in hub.objects.items()
    )


def cache_is_whole(cache: Path) -> bool:
    """Every file that a snapshot shows is there with the content of its name; what is not whole has another name."""
    for blob in cache.glob("models--*/blobs/*"):
        content = blob.read_bytes()
        names = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest(), hashlib.sha256(content).hexdigest()
        if blob.suffix != ".incomplete" and blob.name not in names:
            return False
    return all(path.exists() for path in cache.glob("models--*/snapshots/*/*"))


def table(outcomes: dict[Trial, Outcome]) -> str:
    """How many of each action's faults were injected, recovered from, and refused; and after how many anything was half-written."""
    lines = ["| | trials | faults injected | recovered | refused | half-written |", "|---|--:|--:|--:|--:|--:|"]
    for action in dict.fromkeys(trial.action for trial in outcomes):
        of = [outcome for trial, outcome in outcomes.items() if trial.action == action]
        done, torn = sum(outcome.succeeded for outcome in of), sum(not outcome.whole for outcome in of)
        lines.append(f"| {action} | {len(of)} | {sum(o.injected for o in of)} | {done} | {len(of) - done} | {torn} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="write the table into docs/hub.md")
    options, outcomes = parser.parse_args(), {}
    for trial in trials():
        with tempfile.TemporaryDirectory() as folder:
            outcomes[trial] = outcome = attempt(trial, Path(folder))
        print(f"{trial.name}: {outcome.injected} injected, {'recovered' if outcome.succeeded else 'refused'}", flush=True)
    print(f"\n{table(outcomes)}")
    if options.write:
        text = DOCUMENT.read_text(encoding="utf-8")
        text = re.sub(f"{re.escape(BEGIN)}.*?{END}", f"{BEGIN}\n{table(outcomes)}\n{END}", text, flags=re.DOTALL)
        DOCUMENT.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
