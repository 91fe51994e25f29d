"""Trained weights through our operators: a bidirectional selective state space that a package ships with its NumPy reference.

`make test` installs the package without what it depends on: pip install --no-deps typeseg==0.2.7 (Apache-2.0).
"""

import importlib
import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

import zoo
from zoo import ops
from zoo.convert.teacher import packaged_gguf
from zoo.evaluate.parity import close
from zoo.ops import use_backend

TEXTS = {
    "one byte": "x",
    "mixed": "<p>Total</p>\nSELECT name, sum(price) FROM sales GROUP BY name;\ndef total(x):\n    return [y for y in x if y]\n",
    "long": "for (let i = 0; i < n; i++) { console.log(`${i}`); }\n" * 6 + ".btn { color: red; }\n" * 4,
}
LABELS = {"mixed": {"html": "Total", "sql": "SELECT name", "python": "return ["}}  # label -> what it is right about


class Network:
    """The package's network of bytes, in our operators. Its names are Flax's; every scan runs in both directions and the sum counts."""

    def __init__(self, folder: Path):
        stored = np.load(folder / "data" / "mamba_al.npz")
        self.arrays = {name.replace("__", "/"): stored[name] for name in stored.files}
        self.weights = {name: torch.from_numpy(array) for name, array in self.arrays.items()}
        self.labels = json.loads((folder / "data" / "manifest.json").read_text())["labels"]
        self.blocks = len({name.split("/")[0] for name in self.weights if name.startswith("CheckpointMamba")})

    def dense(self, x: Tensor, name: str) -> Tensor:
        return x @ self.weights[name + "/kernel"] + self.weights[name + "/bias"]

    def norm(self, x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weights[name + "/scale"], self.weights[name + "/bias"], eps=1e-6)

    def block(self, x: Tensor, name: str) -> Tensor:
        u, gate = self.dense(self.norm(x, name + "LayerNorm_0"), name + "Dense_0").chunk(2, -1)
        kernel, ahead = self.weights[name + "Conv_0/kernel"].squeeze(1).t(), 2  # taps from one back to two ahead
        late, _ = ops.short_conv(F.pad(u, (0, 0, 0, ahead)), kernel, self.weights[name + "Conv_0/bias"], activation="silu")
        u = late[:, ahead:]
        rank, states = self.weights[name + "Dense_2/kernel"].shape[0], self.weights[name + "A_log"].shape[1]
        low, B, C = self.dense(u, name + "Dense_1").split([rank, states, states], -1)
        dt = F.softplus(self.dense(low, name + "Dense_2")) + 1e-4
        A, D = -self.weights[name + "A_log"].exp(), self.weights[name + "D"]
        forth, _ = ops.selective_scan(u, dt, A, B, C, D=D)
        back, _ = ops.selective_scan(*(t.flip(1) for t in (u, dt)), A, *(t.flip(1) for t in (B, C)), D=D)
        return x + self.dense((forth + back.flip(1)) * F.silu(gate), name + "Dense_3")

    @torch.no_grad()
    def __call__(self, compact: Tensor) -> Tensor:
        """Class logits `[1, T, classes]` of bytes by their row in the embedding, `[T]`."""
        x = self.weights["Embed_0/embedding"][compact].unsqueeze(0)
        for index in range(self.blocks):
            x = self.block(x, f"CheckpointMambaBlock1D_{index}/")
        return self.dense(self.norm(x, "LayerNorm_0"), "Dense_0")


@pytest.fixture(scope="module")
def package():
    spec = find_spec("typeseg")
    assert spec is not None, "these tests need trained weights; run: pip install --no-deps typeseg==0.2.7"
    return Network(Path(spec.origin).parent)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("text", TEXTS)
def test_a_trained_network_is_the_same_in_our_operators(package, text, backend):
    kernel = importlib.import_module("typeseg._mamba_kernel")
    tokens = importlib.import_module("typeseg._tokenize").text_to_bytes(TEXTS[text])
    expected = torch.from_numpy(kernel.mamba_forward(np, package.arrays, tokens, n_layers=package.blocks))
    with use_backend(backend):
        (result,) = package(torch.from_numpy(kernel._COMPACT_TABLE[tokens]))
    close(result, expected, f"{text}, {backend}")
    for label, part in LABELS.get(text, {}).items():
        place = slice(TEXTS[text].index(part), TEXTS[text].index(part) + len(part))
        assert {package.labels[index] for index in result.argmax(-1)[place]} == {label}


@pytest.mark.slow
@torch.no_grad()
def test_a_language_model_is_the_same_from_its_gguf():
    """SmolLM2, in the package that `make demo` installs."""
    path = packaged_gguf("smollm2-135m-instruct")
    ours, theirs = zoo.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    ids = torch.randint(ours.config.vocab_size, (2, 33), generator=torch.Generator().manual_seed(1))
    close(ours(ids).logits, theirs(ids).logits, "logits")
