"""Train a model further, whole, in part, or with low-rank adapters; flags are those of transformers' TrainingArguments and a few more.

python scripts/finetune.py --config scripts/recipes/finetune_chat.yaml --model_name_or_path demo/student --output_dir student-chat
python scripts/finetune.py --model_name_or_path MODEL --train_file chats.jsonl --lora_r 16 --bf16 --output_dir out
"""

from zoo.train import DataArguments, FinetuneArguments, RunArguments, finetune, parse


def main() -> int:
    return int(finetune(*parse((RunArguments, DataArguments, FinetuneArguments)), say=print).interrupted)


if __name__ == "__main__":
    raise SystemExit(main())
