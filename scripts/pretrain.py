"""Train an architecture from random weights; flags are those of transformers' TrainingArguments and a few more.

python scripts/pretrain.py --config scripts/recipes/pretrain_bytes.yaml --output_dir gla-bytes
accelerate launch --config_file scripts/recipes/accelerate_fsdp2.yaml scripts/pretrain.py --architecture gla-340m \
    --tokenizer_name TOKENIZER --train_file tokens.bin --block_size 4096 --bf16 --output_dir out
"""

from zoo.train import DataArguments, PretrainArguments, RunArguments, parse, pretrain


def main() -> int:
    return int(pretrain(*parse((RunArguments, DataArguments, PretrainArguments)), say=print).interrupted)


if __name__ == "__main__":
    raise SystemExit(main())
