"""What loading a foreign checkpoint costs in memory, on a Llama (or a Phi-3, whose tensors are split) of random weights."""

import json
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from zoo.auto import from_pretrained

SIZES = dict(
    hidden_size=1024, intermediate_size=2816, num_attention_heads=16, num_key_value_heads=16, vocab_size=32000, pad_token_id=0,
    bos_token_id=1, eos_token_id=2,
)  # fmt: skip
KINDS = (("llama", "auto"), ("phi3", "auto"), ("llama", "float32"))  # model types, and dtypes to load them in
SLACK = 300 * 2**20  # of what is neither the model nor a shard


@dataclass
class Loading:
    """Bytes: `model` of the weights; `shard` the largest file; `peak` resident memory over what was resident before, at its most."""

    model: int
    shard: int
    shards: int
    peak: int

    @property
    def bound(self) -> int:
        """What the peak must stay below: the weights, one shard and SLACK."""
        return self.model + self.shard + SLACK


def random_checkpoint(folder: Path, kind: str = "llama", size: int = 10**9, shard: int = 200 * 10**6) -> None:
    """Write a model of this type with random bfloat16 weights of about `size` bytes to `folder`, as transformers lays it out."""

    def build(layers: int):
        return AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**SIZES, num_hidden_layers=layers))

    with torch.device("meta"):
        one, two = (sum(parameter.numel() for parameter in build(layers).parameters()) for layers in (1, 2))
        model = build(max(1, (size // 2 - one) // (two - one) + 1))
    model.config.architectures, model.config.dtype = [type(model).__name__], torch.bfloat16
    model.config.save_pretrained(folder)
    files: list[dict[str, torch.Size]] = [{}]
    for name, tensor in model.state_dict().items():
        if files[-1] and 2 * (sum(shape.numel() for shape in files[-1].values()) + tensor.numel()) > shard:
            files.append({})
        files[-1][name] = tensor.shape
    index = {}
    for number, shapes in enumerate(files, 1):
        file = f"model-{number:05}-of-{len(files):05}.safetensors"
        tensors = {name: torch.randn(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(shapes, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def resident(field: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at its most. Linux only."""
    return 1024 * int(next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)).split()[1])


def load(folder: Path, dtype: str) -> tuple[int, int]:
    """Bytes of the weights, and how much more of this process is resident at its most than was before."""
    before = resident("VmRSS")
    model = from_pretrained(folder, dtype=dtype)
    for parameter in model.parameters():
        parameter.sum()  # a weight that was only mapped into memory is read now
    return sum(parameter.nbytes for parameter in model.parameters()), resident("VmHWM") - before


def measure(folder: Path, dtype: str = "auto") -> Loading:
    """Load the checkpoint in a process of its own, in this dtype ("auto": that of its weights)."""
    files = [path.stat().st_size for path in Path(folder).glob("*.safetensors")]
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        model, peak = pool.submit(load, folder, dtype).result()
    return Loading(model=model, shard=max(files), shards=len(files), peak=peak)


def weigh(size: int) -> Iterator[dict]:
    """Make and load a checkpoint of each of `KINDS`, of about so many bytes: rows with the fields of `Loading`, and its bound."""
    for kind, dtype in KINDS:
        with TemporaryDirectory() as folder:
            random_checkpoint(Path(folder), kind, size)
            found = measure(Path(folder), dtype)
        yield {"layout": kind, "dtype": dtype} | asdict(found) | {"bound": found.bound}
