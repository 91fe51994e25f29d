"""transformers' Trainer with rows of packed documents, a chunked loss, exact evaluation and checkpoints that know their run."""

import json
import math
import signal
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from zoo.train.arguments import RUN, RunArguments
from zoo.train.data import IGNORE, Rows, collate, text_bytes
from zoo.train.meter import Meter, add_up, peak_flops


class ZooTrainer(Trainer):
    """A Trainer of language models over `Rows`.

    Args:
        tokenizer: saved with the model, and needed to count bytes; None where there are only tokens.
        callbacks: see `zoo.train.display.Display`.

    Raises:
        ValueError: on `train(resume_from_checkpoint=...)`, if the checkpoint is of a run with other data or other sizes.
        FloatingPointError: a loss that is not finite.
    """

    def __init__(self, model: nn.Module, args: RunArguments, train: Rows, held_out: Rows | None = None, tokenizer=None, callbacks=()):
        self.interruption, self.interrupted = Interruption(), False
        super().__init__(
            model, args, data_collator=collate, train_dataset=train, eval_dataset=held_out, processing_class=tokenizer,
            callbacks=[self.interruption, *callbacks],
        )  # fmt: skip
        self.remove_callback(PrinterCallback)
        self.meter = Meter(model)
        self.peak = 1e12 * args.peak_tflops if args.peak_tflops else peak_flops()

    # -- a step ----------------------------------------------------------------------------------------------------------

    def training_step(self, model, inputs, num_items_in_batch=None) -> Tensor:
        self.meter.add(inputs["input_ids"], inputs.get("cu_seq_lens_q"))
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = inputs | {"skip_logits": True, "use_cache": False}
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def floating_point_ops(self, inputs) -> int:
        return 0  # the meter counts

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Weights of linear layers and embeddings; gates, decays, convolutions, norms and biases do not decay."""
        owners = {name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Embedding)}
        return [name for name, _ in model.named_parameters() if name.endswith(".weight") and name.removesuffix(".weight") in owners]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            if not math.isfinite(logs["loss"]):
                raise FloatingPointError(
                    f"the loss is {logs['loss']} at step {self.state.global_step}; lower --learning_rate or raise --warmup_steps, "
                    "and resume from a checkpoint before it"
                )
            logs |= self.meter.read(self.accelerator, self.peak)
            asked = any(add_up(self.accelerator, [float(self.interruption.raised)]))  # every process stops at the same step
            if asked and self.state.global_step < self.state.max_steps:
                self.interrupted = self.control.should_save = self.control.should_training_stop = True
        super().log(logs, start_time)

    # -- evaluation ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self, eval_dataset: Rows | None = None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Mean negative log likelihood over all tokens with labels (each once, on however many processes), its perplexity, and
        with a tokenizer bits per byte: the same sum, in bits, over the UTF-8 bytes of the text."""
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        if rows is None:
            raise ValueError("nothing to evaluate on; name --validation_file")
        model = self._wrap_model(self.model, training=False) if not self.is_in_train else self.model_wrapped
        was_training, sums = model.training, [0.0, 0.0, 0.0]
        model.eval()
        with self.meter.paused():
            for samples in self._shares(rows):
                batch = self._prepare_inputs(collate(samples))
                with self.compute_loss_context_manager():
                    loss = model(**batch, skip_logits=True, use_cache=False, num_items_in_batch=1).loss
                sums[0] += loss.item()
                sums[1] += sum(int((sample["labels"] != IGNORE).sum()) for sample in samples)
                sums[2] += text_bytes(samples, self.processing_class) if self.processing_class else 0
            nll, count, size = add_up(self.accelerator, sums)
        model.train(was_training)
        metrics = {"loss": nll / count, "perplexity": math.exp(min(nll / count, 700))}
        metrics |= {"bits_per_byte": nll / math.log(2) / size} if size else {}
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _shares(self, rows: Rows):
        """This process's batches: as many as every other's, with unlabelled rows where there are none left."""
        world, rank, size = self.args.world_size, self.args.process_index, self.args.per_device_eval_batch_size
        share = [rank + world * i for i in range(-(-len(rows) // world))]
        for at in range(0, len(share), size):
            samples = []
            for index in share[at : at + size]:
                sample = rows[index % len(rows)]
                samples.append(sample if index < len(rows) else sample | {"labels": torch.full_like(sample["labels"], IGNORE)})
            yield samples

    # -- checkpoints -----------------------------------------------------------------------------------------------------

    def run_facts(self) -> dict:
        """What must not change between a checkpoint and the run that resumes from it."""
        args = self.args
        same = ("per_device_train_batch_size", "gradient_accumulation_steps", "seed", "data_seed", "max_steps", "num_train_epochs")
        return {"data": self.train_dataset.fingerprint(), "world_size": args.world_size} | {name: getattr(args, name) for name in same}

    def _save_checkpoint(self, model, trial) -> None:
        with self.meter.paused():
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                folder = Path(self.args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
                (folder / RUN).write_text(json.dumps(self.run_facts(), indent=1) + "\n", encoding="utf-8")

    def train(self, resume_from_checkpoint: str | None = None, **kwargs):
        if resume_from_checkpoint is not None:
            before, now = json.loads(Path(resume_from_checkpoint, RUN).read_text(encoding="utf-8")), self.run_facts()
            if changed := [f"{name} was {before.get(name)!r} and is {now[name]!r}" for name in now if before.get(name) != now[name]]:
                raise ValueError(
                    f"{resume_from_checkpoint} is of another run, so that this one would not continue it: {'; '.join(changed)}. "
                    "Give it the same, or start anew from its weights (finetune with --model_name_or_path)"
                )
            state = json.loads(Path(resume_from_checkpoint, TRAINER_STATE_NAME).read_text(encoding="utf-8"))
            if state["global_step"] >= state["max_steps"]:
                raise ValueError(f"{resume_from_checkpoint} is the end of its run; to train further, finetune with --model_name_or_path")
            self.meter.tokens = max((entry.get("tokens", 0) for entry in state["log_history"]), default=0)
        self.meter.start()
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)


class Interruption(TrainerCallback):
    """Ctrl-C or SIGTERM: the step at hand is finished, a checkpoint saved, and training stops; a second one stops at once.

    Without a Trainer it is a context, whose loop asks for `raised`.
    """

    def __init__(self):
        self.raised, self.before = False, {}

    def __enter__(self) -> "Interruption":
        def note(number, frame):
            self.raised = True
            self.restore()

        try:
            self.before = {number: signal.signal(number, note) or signal.SIG_DFL for number in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not in the main thread, where no signals arrive
            self.before = {}
        return self

    def __exit__(self, *error) -> None:
        self.restore()

    def on_train_begin(self, args, state, control, **kwargs):
        self.__enter__()

    def on_step_end(self, args, state, control, **kwargs):
        if self.raised and args.world_size == 1:  # several processes agree when they log
            control.should_log = True

    def restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def on_train_end(self, args, state, control, **kwargs):
        self.restore()
