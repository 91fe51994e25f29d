"""Checkpoints to a Hub and back, over HTTP to one on the loopback, which also fails in every way that `hub_trials` lists."""

import errno
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from hub_server import OWNER, READER, STRANGER, Fault, Hub
from hub_trials import BEGIN, DOCUMENT, END, IDS, REPO, attempt, checkpoint, connected, contents, trials
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import zoo
from zoo.config import ZooConfig
from zoo.hub import HubError
from zoo.hub.cards import PIPELINES
from zoo.hub.push import compose
from zoo.registry import AUTO

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # how huggingface_hub calls httpx


@pytest.fixture
def hub(tmp_path):
    with Hub() as hub, connected(hub, tmp_path / "cache"):
        yield hub


@pytest.fixture
def folder(tmp_path):
    checkpoint(tmp_path / "model", 0)
    return tmp_path / "model"


def text(hub: Hub, name: str, repo_id: str = REPO, revision: str = "main") -> str:
    return hub.read(hub.tree(repo_id, revision)[name]).decode()


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


# -- the whole way -----------------------------------------------------------------------------------------------------

PUSH = """
import sys, torch, zoo
from transformers import AutoModelForCausalLM
ids = torch.arange(16)[None]
model = zoo.from_config("gla-tiny").eval()
commit = model.push_to_hub("me/tiny", commit_message="First")
assert commit.oid and commit.commit_url.endswith(commit.oid)
loaded = AutoModelForCausalLM.from_pretrained("me/tiny").eval()
assert torch.equal(loaded(ids).logits, model(ids).logits) and type(loaded) is type(model)
torch.save(model(ids).logits, sys.argv[1] + "/logits.pt")
"""
TRUST = """
import sys, torch
from pathlib import Path
from transformers import AutoModelForCausalLM
sys.modules["zoo"] = None  # as if it were not installed
try:
    AutoModelForCausalLM.from_pretrained("me/tiny", trust_remote_code=True)
except ImportError as error:
    print(error)
del sys.modules["zoo"]
model = AutoModelForCausalLM.from_pretrained("me/tiny", trust_remote_code=True).eval()
assert type(model).__module__ == "zoo.models.gla"
assert torch.equal(model(torch.arange(16)[None]).logits, torch.load(sys.argv[1] + "/logits.pt"))
model.save_pretrained(sys.argv[1] + "/saved")
assert not list(Path(sys.argv[1], "saved").glob("*.py"))  # the package's sources stay in the package
"""


def fresh(code: str, hub: Hub, folder: Path) -> str:
    """The output of an interpreter that knows the Hub by its environment alone."""
    own = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": OWNER, "HF_HOME": str(folder / "home"), "PYTHONPATH": str(ROOT)}
    inherited = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    command = [sys.executable, "-c", code, str(folder)]
    result = subprocess.run(command, env=inherited | own, capture_output=True, text=True, timeout=300, cwd=folder)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_a_pushed_model_loads_by_its_id_with_and_without_the_package(tmp_path):
    with Hub() as hub:
        fresh(PUSH, hub, tmp_path)
        assert hub.repos[REPO].branches["main"][-1][1] == "First"
        assert fresh(TRUST, hub, tmp_path).splitlines() == ["this model needs the package seqzoo: run `pip install seqzoo`"]


def test_a_folder_goes_there_and_back(hub, folder, tmp_path):
    (folder / "optimizer.pt").write_bytes(b"state")
    (folder / "checkpoint-1").mkdir()
    pushed = zoo.hub.push(folder, REPO)
    assert pushed.left_out == ["checkpoint-1", "optimizer.pt"] and not {"optimizer.pt", "checkpoint-1"} & hub.tree(REPO).keys()
    assert pushed.files == {name: blob.size for name, blob in hub.tree(REPO).items() if name != ".gitattributes"}
    assert zoo.hub.pull(REPO, tmp_path / "pulled") == tmp_path / "pulled"
    pulled, sent = contents(tmp_path / "pulled"), contents(folder)
    changed = {name for name in pulled if pulled[name] != sent.get(name)}
    assert changed == {"config.json", "README.md", "modeling_zoo.py"} and sent.keys() - pulled.keys() == {"optimizer.pt"}
    assert torch.equal(logits(zoo.from_pretrained(tmp_path / "pulled")), logits(zoo.from_pretrained(folder)))


def test_the_tokenizer_goes_along(hub, tmp_path):
    words = {"type": "WordLevel", "vocab": {"<unk>": 0, "zebra": 1}, "unk_token": "<unk>"}
    (tmp_path / "words.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": words}))
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "words.json"), unk_token="<unk>")
    zoo.hub.push(zoo.from_config("gla-tiny"), REPO, tokenizer=tokenizer)
    assert AutoTokenizer.from_pretrained(REPO)("zebra")["input_ids"] == [1]
    assert zoo.from_pretrained(REPO).generation_config is not None


def test_a_foreign_checkpoint_loads_by_its_id(hub):
    llama = LlamaForCausalLM(
        LlamaConfig(vocab_size=97, hidden_size=32, intermediate_size=52, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    )
    llama.push_to_hub("me/llama")
    torch.testing.assert_close(logits(zoo.from_pretrained("me/llama")), logits(llama), rtol=1e-5, atol=1e-5)


def test_a_foreign_layout_is_pushed(hub, tmp_path):
    model = zoo.from_config("transformer-tiny")
    model.push_to_hub("me/llama", layout="llama")
    assert "model_type: llama" not in text(hub, "config.json", "me/llama") and "auto_map" not in text(hub, "config.json", "me/llama")
    assert "library_name: transformers" in text(hub, "README.md", "me/llama")
    for loaded in (AutoModelForCausalLM.from_pretrained("me/llama"), zoo.from_pretrained("me/llama")):
        torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path / "own")
    (tmp_path / "own" / "chat_template.jinja").write_text("hello")
    zoo.hub.push(tmp_path / "own", "me/other", layout="llama")
    ours, other = hub.tree("me/llama"), hub.tree("me/other")
    assert {name: ours[name].oid for name in ours if name != "README.md"} == {
        name: other[name].oid for name in other if name not in ("README.md", "chat_template.jinja")
    }
    with pytest.raises(HubError, match="mamba-original"):
        zoo.from_config("mamba-tiny").push_to_hub("me/mamba", layout="mamba-original")
    with pytest.raises(HubError, match="LlamaForCausalLM"):
        zoo.hub.push(LlamaForCausalLM.from_pretrained("me/llama"), "me/llama", layout="llama")
    zoo.hub.pull("me/llama", tmp_path / "llama")
    zoo.hub.push(tmp_path / "llama", "me/again")  # a foreign folder as it is
    assert hub.tree("me/again")["model.safetensors"] == ours["model.safetensors"]


# -- repositories ------------------------------------------------------------------------------------------------------


def test_a_dry_run_lists_and_changes_nothing(hub, folder):
    planned = zoo.hub.push(folder, REPO, dry_run=True)
    assert planned.commit is None and hub.repos == {} and {method for method, _ in hub.log} == {"GET"}
    assert planned.files == zoo.hub.push(folder, REPO).files


def test_branches_and_commits(hub, folder, tmp_path):
    first = zoo.hub.push(folder, REPO).commit.oid
    other = checkpoint(tmp_path / "other", 1)
    zoo.hub.push(tmp_path / "other", REPO, revision="dev")
    assert torch.equal(logits(zoo.from_pretrained(REPO, revision="dev")), logits(other))
    assert torch.equal(logits(zoo.from_pretrained(REPO)), logits(zoo.from_pretrained(folder)))
    zoo.hub.push(tmp_path / "other", REPO)
    zoo.hub.pull(REPO, tmp_path / "first", revision=first)
    assert torch.equal(logits(zoo.from_pretrained(tmp_path / "first")), logits(zoo.from_pretrained(folder)))
    with pytest.raises(HubError, match="no such revision"):
        zoo.hub.pull(REPO, tmp_path / "none", revision="prod")


def test_a_proposed_commit_leaves_main_alone(hub, folder, tmp_path):
    zoo.hub.push(folder, REPO)
    before = hub.tree(REPO)
    checkpoint(tmp_path / "other", 1)
    assert zoo.hub.push(tmp_path / "other", REPO, create_pr=True).commit.pr_url
    assert hub.tree(REPO) == before != hub.tree(REPO, "refs/pr/1")


def test_private_repositories_need_a_token(hub, folder, tmp_path):
    zoo.hub.push(folder, REPO, private=True)
    assert hub.repos[REPO].private
    for token, words in ((False, "token"), (STRANGER, "private"), ("hf_mistyped", "token")):
        with pytest.raises(HubError, match=words):
            zoo.hub.pull(REPO, tmp_path / "pulled", token=token)
    assert not (tmp_path / "pulled").exists()
    assert torch.equal(logits(zoo.from_pretrained(REPO, token=READER)), logits(zoo.from_pretrained(folder)))
    hub.repos[REPO].private, hub.repos[REPO].gated = False, True
    with pytest.raises(HubError, match="ask for it"):
        zoo.hub.pull(REPO, tmp_path / "pulled", token=STRANGER)


def test_weights_of_another_version_do_not_stay(hub, folder, tmp_path):
    zoo.hub.push(folder, REPO)
    zoo.hub.pull(REPO, tmp_path / "pulled")
    zoo.from_pretrained(folder).save_pretrained(tmp_path / "one")
    pushed = zoo.hub.push(tmp_path / "one", REPO)
    assert len(pushed.removed) == 5 and [name for name in hub.tree(REPO) if name.startswith("model.")] == ["model.safetensors"]
    assert len(hub.repos[REPO].branches["main"]) == 3  # the empty one, and one for each push
    zoo.hub.pull(REPO, tmp_path / "pulled")
    assert [path.name for path in (tmp_path / "pulled").glob("model*.safetensors*")] == ["model.safetensors"]
    assert zoo.hub.push(tmp_path / "one", REPO).commit.oid == pushed.commit.oid  # nothing new, no commit


# -- cards -------------------------------------------------------------------------------------------------------------


def test_the_card_says_what_it_is_and_what_was_measured(hub, folder):
    rows = [{"model": "student", "perplexity": 12.34567, "state_bytes": {"1024": 2048}}, {"depth": 0.5, "found": True}]
    (folder / "report.json").write_text(json.dumps({"command": "python scripts/convert.py teacher -o student", "rows": rows}))
    (folder / "report.png").write_bytes(b"picture")
    (folder / "losses.json").write_text("[1.0]")
    zoo.hub.push(folder, REPO, license="apache-2.0", base_model="them/teacher", tags=["bytes"])
    card = text(hub, "README.md")
    for line in (
        "license: apache-2.0",
        "base_model: them/teacher",
        "library_name: seqzoo",
        "pipeline_tag: text-generation",
        "- gla",
        "- bytes",
    ):
        assert line in card.splitlines()
    parameters = sum(p.numel() for p in zoo.from_pretrained(folder).parameters())
    assert f"| parameters | {parameters:,} |" in card and "| layers | 2: 2 gla |" in card and "arXiv:2312.06635" in card
    assert "    python scripts/convert.py teacher -o student" in card and "![](report.png)" in card and "losses.json" not in card
    assert "| model | perplexity | state_bytes 1024 |\n|---|---|---|\n| student | 12.35 | 2,048 |\n" in card
    assert "| depth | found |\n|---|---|\n| 0.5 | True |\n" in card
    assert f'AutoModelForCausalLM.from_pretrained("{REPO}")' in card


def test_what_an_author_wrote_stays(hub, folder):
    zoo.hub.push(folder, REPO, license="mit")
    card = text(hub, "README.md")
    with open(folder / "README.md", "w") as file:
        file.write(card.replace("| parameters |", "| wrong |").replace("license: mit", "license: mit\nlanguage: en") + "\nMy words.\n")
    zoo.hub.push(folder, REPO)
    (folder / "README.md").unlink()
    zoo.hub.push(folder, REPO)  # from what the repository has
    again = text(hub, "README.md")
    assert again.replace("language: en\n", "").replace("\nMy words.\n", "") == card and "My words." in again and "language: en" in again


@pytest.mark.parametrize("name", zoo.list_models())
def test_every_architecture_can_be_described(name, tmp_path):
    config = zoo.build_config(f"{name}-tiny")
    single = ("ForCausalLM" if config.causal else "ForMaskedLM", "ForSequenceClassification")
    for suffix in ("ForConditionalGeneration",) if config.is_encoder_decoder else single:
        config.architectures = [zoo.registry.get(name).models[suffix].__name__]
        config.save_pretrained(tmp_path)
        (tmp_path / "model.safetensors").touch()
        files = compose("me/model", tmp_path, "", {"tags": ()})
        assert f"pipeline_tag: {PIPELINES[suffix]}".encode() in files["README.md"] and f"| `{name}`".encode() in files["README.md"]
        written = json.loads(files["config.json"])["auto_map"]
        assert written.keys() == {"AutoConfig", "AutoModel", AUTO[suffix].__name__}
        assert all(hasattr(zoo.models, name.removeprefix("modeling_zoo.")) for name in written.values())


def test_every_task_has_its_pipeline(hub):
    assert PIPELINES.keys() == AUTO.keys()
    zoo.from_config("gla-tiny", task="sequence_classification").push_to_hub("me/judge")
    assert "pipeline_tag: text-classification" in text(hub, "README.md", "me/judge")
    assert "AutoModelForSequenceClassification" in json.loads(text(hub, "config.json", "me/judge"))["auto_map"]


# -- what goes wrong ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trial", [
    pytest.param(trial, id=trial.name, marks=() if trial.kind in ("drop", "flip", "lost") else pytest.mark.slow) for trial in trials()
])  # fmt: skip
def test_a_fault_is_recovered_from_or_changes_nothing(trial, tmp_path):
    outcome = attempt(trial, tmp_path)
    assert outcome.injected > 0 and outcome.whole and outcome.succeeded == trial.recovers


def test_a_download_goes_on_where_it_was_cut(hub, folder, tmp_path):
    zoo.hub.push(folder, REPO)
    shard = "model-00001-of-00004.safetensors"
    hub.faults += [Fault("GET", shard, "drop"), Fault("GET", shard, 403)]  # cut, and then refused when asked for the rest
    with pytest.raises(HubError, match="may not"):
        zoo.hub.pull(REPO, tmp_path / "pulled")
    assert not (tmp_path / "pulled").exists() and len(list(tmp_path.glob(".pulled.part/*.safetensors"))) == 3
    hub.faults.append(Fault("GET", shard, "drop"))
    hub.log.clear()
    zoo.hub.pull(REPO, tmp_path / "pulled")
    fetched = [(method, path.rpartition("/")[2]) for method, path in hub.log if path.endswith(".safetensors") and method != "HEAD"]
    assert fetched == [("GET", shard), ("GET", shard), ("RANGE", shard)] and not list(tmp_path.glob(".pulled*"))


def test_what_was_uploaded_is_not_sent_again(hub, folder):
    hub.faults.append(Fault("POST", "/commit/", 500, 4))
    with pytest.raises(HubError, match="run the same again"):
        zoo.hub.push(folder, REPO)
    assert len(hub.repos[REPO].branches["main"]) == 1 and sum(method == "PUT" for method, _ in hub.log) == 4
    zoo.hub.push(folder, REPO)
    assert len(hub.repos[REPO].branches["main"]) == 2 and sum(method == "PUT" for method, _ in hub.log) == 4


def test_the_document_counts_these_trials():
    listed = DOCUMENT.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in listed.strip().splitlines()[2:]]
    assert rows, f"{DOCUMENT.name} has no table: python tests/hub_trials.py --write"
    for action, count, _, recovered, refused, torn in rows:
        of = [trial for trial in trials() if trial.action == action]
        assert [int(count), int(recovered), int(refused), int(torn)] == [
            len(of), sum(trial.recovers for trial in of), sum(not trial.recovers for trial in of), 0
        ], "python tests/hub_trials.py --write"  # fmt: skip
    assert {row[0] for row in rows} == {trial.action for trial in trials()}


@pytest.mark.parametrize("repo_id, arguments, words", [
    ("me/a model", {}, ["me/a model", "letters"]),
    ("me/a/b", {}, ["me/a/b", "owner/name"]),
    (REPO, {"token": "hf_mistyped"}, [REPO, "token", "settings/tokens"]),
    (REPO, {"token": False}, [REPO, "token", "HF_TOKEN"]),
    (REPO, {"token": READER}, [REPO, "rights"]),
    ("they/tiny", {}, ["they/tiny", "rights", "owner"]),
    ("me/there", {"exist_ok": False}, ["me/there", "exists", "exist_ok=True"]),
    (REPO, {"tokenizer": object()}, ["tokenizer", "save_pretrained"]),
    (REPO, {"layout": "llama"}, ["llama", "gla"]),
])  # fmt: skip
def test_a_push_that_is_refused_says_why_and_makes_nothing(hub, folder, repo_id, arguments, words):
    zoo.hub.push(folder, "me/there")
    with pytest.raises((HubError, ValueError)) as caught:
        zoo.hub.push(folder, repo_id, **arguments)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert list(hub.repos) == ["me/there"] and len(hub.repos["me/there"].branches["main"]) == 2


@pytest.mark.parametrize("spoil, words", [
    (lambda folder: (folder / "config.json").unlink(), ["config.json", "save_pretrained"]),
    (lambda folder: [path.rename(path.with_suffix(".bin")) for path in folder.glob("*.safetensors")], ["safetensors", "save_pretrained"]),
    (lambda folder: (folder / "model-00002-of-00004.safetensors").unlink(), ["model-00002-of-00004.safetensors", "index"]),
    (lambda folder: (folder / "config.json").write_text('{"model_type": "zoo_unicorn"}'), ["zoo_unicorn", "registers"]),
    (lambda folder: (folder / "config.json").write_text('{"model_type": "unicorn"}'), ["unicorn"]),
    (lambda folder: (folder / "report.json").write_text("{"), ["report.json", "not JSON"]),
])  # fmt: skip
def test_half_a_checkpoint_is_not_pushed(hub, folder, spoil, words):
    spoil(folder)
    with pytest.raises((HubError, ValueError)) as caught:
        zoo.hub.push(folder, REPO)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert hub.repos == {}
    with pytest.raises(HubError, match="not a folder"):
        zoo.hub.push(folder / "nowhere", REPO)
    with pytest.raises(HubError, match="is a file"):
        zoo.hub.pull(REPO, folder / "generation_config.json")


def test_a_name_without_an_owner_is_of_the_token(hub, folder, tmp_path):
    assert zoo.hub.push(folder, "tiny").repo_id == REPO
    with connected(hub, tmp_path / "cache", token=None), pytest.raises(HubError, match="hf auth login"):
        zoo.hub.push(folder, "tiny")


def test_pickles_are_not_pulled(hub, folder, tmp_path):
    zoo.hub.push(folder, REPO)
    tree = hub.tree(REPO)
    for name in [name for name in tree if name.endswith(".safetensors")]:
        tree[name.replace(".safetensors", ".bin")] = tree.pop(name)
    with pytest.raises(HubError, match="no safetensors"):
        zoo.hub.pull(REPO, tmp_path / "pulled")
    with pytest.raises(HubError, match="no such repository"):
        zoo.hub.pull("me/nothing", tmp_path / "pulled")


@pytest.mark.parametrize("number, words", [(errno.ENOSPC, "full"), (errno.EROFS, "read-only"), (errno.EACCES, "permissions")])
def test_the_disk_says_no(hub, folder, tmp_path, number, words):
    zoo.hub.push(folder, REPO)
    refusal = OSError(number, os.strerror(number), "somewhere")
    for place in ("pathlib.Path.mkdir", "huggingface_hub.file_download.http_get", "zoo.saving.tempfile.mkdtemp"):
        with patch(place, side_effect=refusal), pytest.raises(HubError, match=words):
            zoo.hub.pull(REPO, tmp_path / "pulled")
        assert not (tmp_path / "pulled").exists()
    with patch("zoo.saving.tempfile.mkdtemp", side_effect=refusal), pytest.raises(HubError, match=words):
        zoo.hub.push(zoo.from_pretrained(folder), REPO)
    if number == errno.ENOSPC:
        written = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        with patch("transformers.modeling_utils.safe_save_file", side_effect=written), pytest.raises(HubError, match=words):
            zoo.hub.push(zoo.from_pretrained(folder), REPO)
    assert len(hub.repos[REPO].branches["main"]) == 2


def test_a_hub_out_of_reach(folder, tmp_path):
    with Hub() as hub:
        url = hub
    with connected(url, tmp_path / "cache"):
        with pytest.raises(HubError, match="cannot be reached"):
            zoo.hub.push(folder, REPO)
        with patch("huggingface_hub.constants.HF_HUB_OFFLINE", True), pytest.raises(HubError, match="HF_HUB_OFFLINE"):
            zoo.hub.pull(REPO, tmp_path / "pulled")


# -- around it ---------------------------------------------------------------------------------------------------------


def script(name: str, *arguments: str) -> None:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with patch("sys.argv", [name, *map(str, arguments)]):
        module.main()


def test_scripts(hub, folder, tmp_path, capsys):
    script("push_to_hub", folder, REPO, "--dry-run", "--license", "mit")
    out = capsys.readouterr().out
    assert f"would go to {REPO}" in out and "model-00001-of-00004.safetensors" in out and hub.repos == {}
    script("push_to_hub", folder, REPO, "--license", "mit", "--private")
    assert hub.repos[REPO].private and "license: mit" in text(hub, "README.md") and f"/{REPO}/commit/" in capsys.readouterr().out
    script("pull_from_hub", REPO, tmp_path / "pulled")
    assert f"in {tmp_path / 'pulled'}" in capsys.readouterr().out and (tmp_path / "pulled" / "config.json").exists()
    with pytest.raises(HubError, match="no such repository"):
        script("pull_from_hub", "me/nothing", tmp_path / "other")


def test_a_config_ships_no_code():
    ZooConfig.register_for_auto_class()
    assert not ZooConfig.is_remote_code()
