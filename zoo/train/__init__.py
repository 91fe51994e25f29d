"""Train models on text: from random weights, further, or adapters of them.

    rows = text_rows(documents(Path("texts.jsonl"), tokenizer), tokenizer, block_size=1024)
    ZooTrainer(model, RunArguments("out", max_steps=100), rows, tokenizer=tokenizer, callbacks=[Display(print)]).train()

`pretrain` and `finetune` do the whole of it from flags, as `scripts/pretrain.py` and `scripts/finetune.py` hand them over. What training
promises is measured in docs/training.md.
"""

from zoo.train.adapt import Coverage, add_lora, choose_parameters, learn_states, lora_coverage
from zoo.train.arguments import DataArguments, FinetuneArguments, PretrainArguments, RunArguments, parse
from zoo.train.data import Rows, collate, documents, text_rows, token_rows
from zoo.train.display import Display
from zoo.train.meter import Meter, forward_flops
from zoo.train.run import byte_tokenizer, finetune, pretrain, train
from zoo.train.trainer import ZooTrainer

__all__ = [
    "Coverage", "DataArguments", "Display", "FinetuneArguments", "Meter", "PretrainArguments", "Rows", "RunArguments",
    "ZooTrainer", "add_lora",
    "byte_tokenizer", "choose_parameters", "collate", "documents", "finetune", "forward_flops", "learn_states", "lora_coverage", "parse",
    "pretrain", "text_rows", "token_rows", "train",
]  # fmt: skip
