"""T-SPIN, SPIN and SFT as a transformers Trainer: one pass over real, synthetic and proto responses per batch.

The loss maths lives in tspin_kernels and the forward pass in tspin.model; this file turns a method's name into a loss
function, counts triplets over micro-batches and ranks so that accumulating gradients changes nothing, and logs. It
deliberately neither samples nor iterates: that is tspin.loop.

B triplets of a batch, G members of a triplet (chosen = real, rejected = synthetic, proto). Log-probs are in nats.
"""

import copy
import heapq
import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.trainer_utils import EvalLoopOutput

from tspin import diagnostics, tiling
from tspin.collator import TripletCollator
from tspin.data import tokenize_triplets
from tspin.fitting import MemoryCheck, gpu_memory
from tspin.loading import add_adapter, load_model, warn_of_rounded_steps
from tspin.memory import Context
from tspin.metrics import Batch, Meter, reduced, triplet_metrics
from tspin.model import (
    BatchTooLargeError,
    causal_lm,
    install_scoring,
    naming_out_of_memory,
    score_batch,
    vocabulary_size,
)
from tspin.optimizers import spare_copies
from tspin.prefix import share_prompts
from tspin.rows import check_columns
from tspin.scoring import scoring_options, verify_packed_row
from tspin.sequential import backward_one_by_one, group_by_group
from tspin.sharding import whole_weights
from tspin.training_args import TSPINConfig
from tspin_kernels import SequenceStats, sft_loss, spin_loss, tspin_loss, tspin_ref_loss

logger = logging.getLogger(__name__)


class NonFiniteLossError(ValueError):
    """Loss, gradient or weights became nan or inf; no checkpoint holds such weights, and only the last case has touched any."""


class StepTooLargeError(ValueError, torch.OutOfMemoryError):
    """A step did not fit the GPU; the message says which keys make it smaller. A run goes on from its last checkpoint."""


def method_loss_fn(args: TSPINConfig, beta: float) -> Callable[..., Tensor]:
    """The loss of `args.method` as `loss_fn(sequences, keep, ref_logps=None) -> [B]`, on the fused and the plain path.

    keep: [B] bool; loss and gradient of the others are 0, whatever their log-probs.
    ref_logps: [B, G] summed log-probs under the previous policy, for the methods that need them.
    """
    margins = {"alpha": args.alpha, "beta": beta, "loss_type": args.loss_type}

    def triple(values: Tensor | None) -> Any:
        assert values is not None, "the trainer checks that references are there"
        return (*values.unbind(1), None)[:3]

    def loss_fn(sequences: SequenceStats, keep: Tensor, ref_logps: Tensor | None = None) -> Tensor:
        # Masked before the loss as well: an infinite slope times a masked 0 would be nan.
        sequences = sequences._replace(logprobs=torch.where(keep[:, None], sequences.logprobs, 0.0))
        logps, refs = reduced(args, sequences, ref_logps)
        if args.method == "sft":
            loss = sft_loss(logps[:, 0])
        elif args.method == "spin":
            loss = spin_loss(*triple(logps)[:2], *triple(refs)[:2], lam=args.lam, loss_type=args.loss_type)
        elif args.method == "tspin_ref":
            loss = tspin_ref_loss(*triple(logps), *triple(refs), **margins)
        else:
            loss = tspin_loss(*triple(logps), **margins)
        lengths = sequences.lengths.clamp(min=1)
        if args.sft_coef:
            loss = loss + args.sft_coef * sft_loss(sequences.logprobs[:, 0] / lengths[:, 0])
        if args.entropy_coef:
            entropy: Any = sequences.entropy
            loss = loss - args.entropy_coef * (entropy / lengths).mean(1)
        return torch.where(keep, loss, 0.0)

    return loss_fn


def _untileable(model: nn.Module) -> str | None:
    if is_deepspeed_zero3_enabled():
        return "DeepSpeed ZeRO-3 divides the weights of an MLP while it is differentiated"
    return tiling.refusal(model)


class TSPINTrainer(Trainer):
    """Trainer of one iteration of self-play.

    Args:
        model: a causal LM, a peft-wrapped one, or the name or directory of one. Its dropout is switched off.
        args: TSPINConfig.
        train_dataset, eval_dataset: rows with the token id columns of `tspin.data.build_triplets`, or with TRL's
            columns prompt, chosen, rejected (and proto), as text or messages.
        processing_class: the tokenizer; needed for text rows.
        peft_config: wraps the model in this adapter first; prompt-learning methods are refused.
        data_collator: default TripletCollator for the members that the method scores. One that is given decides whether rows
            are packed, which needs prefix_sharing.
        iteration: of the loop, from 0; it chooses between beta and beta_first_iteration.
    Raises:
        ValueError: a model that cannot be scored exactly, missing columns, reference methods without references.
        NonFiniteLossError: from train(), naming the step; what is known of it lies in `diagnostics` (default
            output_dir/diagnostics), see `tspin.diagnostics.write_bundle`.
        StepTooLargeError: from train(), naming the step.
    """

    model: nn.Module
    args: TSPINConfig

    def __init__(
        self,
        model: nn.Module | str,
        args: TSPINConfig,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: Any = None,
        data_collator: Callable[[list[dict]], Batch] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple = (None, None),
        *,
        iteration: int = 0,
    ):
        if not isinstance(args, TSPINConfig):
            raise ValueError(f"args: want a TSPINConfig, got {type(args).__name__}; build TSPINConfig(output_dir=...)")
        if args.n_gpu > 1:
            logger.warning("using the first of %d GPUs; accelerate launch starts a process for each", args.n_gpu)
            args._n_gpu = 1
        self.beta = args.beta_at(iteration)
        self.members = args.members_at(iteration)
        self._meter = Meter()
        self._clock: float | None = None
        self._sharing: ExitStack | None = None
        self._watch, self._watched_step = diagnostics.Watch(), 0
        self.scored: list[tuple[Batch, SequenceStats]] = []
        self.diagnostics = f"{args.output_dir}/diagnostics"
        self.tiled, self.sequential = args.sequence_tiling == "on", args.sequential_backward == "on"
        model = load_model(model) if isinstance(model, str) else model
        if peft_config is not None:
            model = add_adapter(model, peft_config, seed=args.seed)
        if any(hasattr(p, "ds_id") for p in model.parameters()):
            raise ValueError(
                "model: want whole weights, got one that DeepSpeed has divided already; give its name or directory, or load it "
                "before the TSPINConfig"
            )
        install_scoring(model)
        if self.tiled:
            if reason := _untileable(model):
                raise ValueError(f"sequence_tiling: want 'off', got 'on': {reason}")
            tiling.tile_sequences(model)
        train_dataset, eval_dataset = (
            _with_ids(dataset, args, self.members, processing_class, vocabulary_size(causal_lm(model)))
            for dataset in (train_dataset, eval_dataset)
        )
        if train_dataset is not None:
            args.check_rows(len(train_dataset))
        super().__init__(
            *(model, args, data_collator, train_dataset, eval_dataset, processing_class),  # type: ignore
            callbacks=callbacks,
            optimizers=optimizers,
        )
        if optimizers[0] is None:
            warn_of_rounded_steps(self.model, args)
        # The loss is already divided by the count of get_batch_samples: Trainer must not divide it again.
        self.model_accepts_loss_kwargs = True
        self.loss_fn = method_loss_fn(args, self.beta)
        self.scoring = scoring_options(args, self.model)
        self.sharing: bool = self.scoring.pop("prefix_sharing")
        if data_collator is None:
            pad = getattr(processing_class, "pad_token_id", None) or 0
            self.data_collator = TripletCollator(pad, self.members, packed=self.sharing)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As Trainer.train; ValueError from the first batch where a row that shares its prompt differs from separate rows."""
        self._spare_memory()
        try:
            with self._sharing_prompts():
                result = super().train(*args, **kwargs)
        except BatchTooLargeError:
            raise  # an evaluation's, which names its key
        except torch.OutOfMemoryError as error:
            sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
            switches = {"sequence_tiling": self.tiled, "sequential_backward": self.sequential}
            check = self._memory_check(**{key: "on" if on else "off" for key, on in switches.items()})
            if check is None and not sharded:
                raise
            what = "what sharding saves is not predicted; lower per_device_train_batch_size, or set sequential_backward: on"
            what = f"predicted {check.need()}{check.advice()}" if check is not None else what
            raise StepTooLargeError(f"out of memory in step {self.state.global_step + 1}; {what}") from error
        self._refuse_broken_weights()
        return result

    def _memory_check(self, **settled: str) -> MemoryCheck | None:
        """The prediction for a micro-batch of the longest triplets, with the keys `settled` and what is taken of "auto".

        None where there is no GPU of one's own, or no prediction.
        """
        size = gpu_memory(self.args.device)
        if size is None or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return None
        args = copy.copy(self.args)
        vars(args).update(settled)
        names = [f"{name}_ids" for name in ("prompt", *self.members)]
        rows: Any = self.train_dataset
        lengths = ([len(row[name]) for name in names] for row in rows)
        size_of: Any = sum if self.sharing else lambda row: row[0] + max(row[1:])
        longest = heapq.nlargest(args.per_device_train_batch_size, lengths, key=size_of)
        try:
            contexts = [Context(prompt, tuple(responses)) for prompt, *responses in longest]
            return MemoryCheck.of_model(self.model, args, contexts, size, sharing=self.sharing).spared()
        except Exception as error:  # of a model's own code, on tensors without data
            logger.warning("the memory of a step cannot be predicted for %s: %s", type(self.model).__name__, error)
            return None

    def _spare_memory(self) -> None:
        """Of what "auto" leaves open, take tiles, then one response at a time, where the longest step would not fit the GPU."""
        args = self.args
        if "auto" not in (args.sequence_tiling, args.sequential_backward):
            return
        check = self._memory_check()
        tiles = check is not None and check.args.sequence_tiling == "on" != args.sequence_tiling
        if tiles and _untileable(self.model):
            check = self._memory_check(sequence_tiling="off")
        taken = args if check is None else check.args
        self.tiled, self.sequential = taken.sequence_tiling == "on", taken.sequential_backward == "on"
        # The same on all ranks, and after a restart: the GPU's size counts, not what happens to be free.
        wanted = torch.tensor([self.tiled, self.sequential], dtype=torch.int64, device=args.device)
        self.tiled, self.sequential = map(bool, self.accelerator.reduce(wanted).tolist())  # type: ignore
        if self.tiled and args.sequence_tiling == "auto":
            logger.warning("sequence_tiling: some thousand tokens at a time, as whole rows would not fit the GPU")
            tiling.tile_sequences(self.model)
        if self.sequential and args.sequential_backward == "auto":
            logger.warning("sequential_backward: one response at a time, as a whole batch would not fit the GPU")

    @contextmanager
    def _sharing_prompts(self) -> Iterator[None]:
        # An evaluation amid training shares the attention, and the check, of the training.
        if self._sharing is not None:
            yield
            return
        self._sharing, self._verified = ExitStack(), False
        try:
            with self._sharing:
                yield
        finally:
            self._sharing = None

    def _begin(self, batch: Batch) -> None:
        """Let a batch, the first of a run, show that prompts may be shared; until the end of the run, they are."""
        if self._sharing is None or self._verified or not self.sharing:
            return
        if "prefix_layout" in batch:
            wrapped: Any = self.model_wrapped
            reduce = partial(self.accelerator.reduce, reduction="sum")
            # One response at a time takes no row of several triplets, nor does this.
            batch = list(group_by_group(batch))[-1] if self.sequential else batch
            with self.accelerator.autocast():
                verify_packed_row(wrapped, batch, core=self.model, reduce=reduce, **self.scoring)
        self._verified = True
        self._sharing.enter_context(share_prompts(causal_lm(self.model)))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As Trainer's, but weights are whole and not rounded to 16 bits however the model is sharded."""
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            return super().save_model(output_dir, _internal_call)
        self._save(output_dir, state_dict=whole_weights(self.model, frozen=not hasattr(self.model, "peft_config")))

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """As Trainer's, but weights that would fill a GPU's memory a second time as temporaries are stepped one at a time."""
        given = self.optimizer is not None
        optimizer = super().create_optimizer(*args, **kwargs)
        if not given:
            spare_copies(optimizer)
        return optimizer

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: Any) -> tuple[list[Batch], Tensor]:
        """The micro-batches of one optimizer step, and how many triplets all ranks keep in it."""
        self._clock = self._clock or time.perf_counter()
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.scored = []
        for batch in batches:
            self._begin(batch)
            batch["counted"] = self._counted(batch, batch is batches[-1], self.train_dataset)
        kept = sum((self._kept(batch).sum() for batch in batches), torch.zeros((), device=device))
        total: Any = self.accelerator.reduce(kept, "sum")
        return batches, total.clamp(min=1)

    def _counted(self, batch: Batch, may_be_last: bool, dataset: Any) -> Tensor:
        """[B] bool, False for rows that accelerate repeats to fill the last round of an epoch on every rank."""
        B, ranks, state = len(batch["identical"]), self.accelerator.num_processes, self.accelerator.gradient_state
        ends = may_be_last and ranks > 1 and state.end_of_dataloader and not self.args.dataloader_drop_last
        position = self.accelerator.process_index * B + torch.arange(B, device=batch["identical"].device)
        return position < ((ends and len(dataset) % (ranks * B)) or ranks * B)

    def _kept(self, batch: Batch) -> Tensor:
        """[B] bool: triplets that the loss sees."""
        return batch["counted"] & ~batch["identical"] if self.args.drop_identical else batch["counted"]

    def _score(self, model: nn.Module, batch: Batch, normalizer: Any, meter: Meter) -> tuple[Tensor, SequenceStats]:
        score = partial(score_batch, model, **self.scoring)
        request: dict[str, Any] = {
            "group_inputs": (self._kept(batch), *([batch["ref_logps"]] if self.args.needs_references else [])),
            "normalizer": normalizer,
            "entropy": "grad" if self.args.entropy_coef else "value",
        }
        if self.sequential and torch.is_grad_enabled():
            # A sharded model adds up its shards at every backward; its ranks must run alike.
            sharded, backward = self.is_fsdp_enabled or self.is_deepspeed_enabled, self.accelerator.backward
            if self.is_deepspeed_enabled:
                # Accelerate's would take a step.
                engine: Any = self.accelerator.deepspeed_engine_wrapped
                backward = partial(engine.backward, sync_gradients=False, scale_wrt_gas=False)
            loss, sequences = backward_one_by_one(
                *(score, backward, batch, self.loss_fn),
                unsynced=nullcontext if sharded else partial(self.accelerator.no_sync, model),
                skip_zeros=not sharded,
                **request,
            )
        else:
            loss, sequences = score(batch, self.loss_fn, **request)
        meter.add(triplet_metrics(self.args, self.members, sequences, batch))
        if torch.is_grad_enabled():
            self.scored.append((batch, sequences))
        return loss, sequences

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """This rank's share of the step's loss: the sum over its kept triplets by the count kept on all ranks.

        Ranks average their gradients, so the share is multiplied by the number of ranks.
        """
        assert num_items_in_batch is not None, "get_batch_samples counts the kept triplets"
        normalizer = num_items_in_batch / self.accelerator.num_processes
        loss, sequences = self._score(model, inputs, normalizer, self._meter)
        if self.is_deepspeed_enabled:
            self._stop_if_not_finite(loss)  # its backward takes the step
        self._meter.add({"tokens_per_second": (inputs["attention_mask"], torch.zeros_like(loss))})
        return (loss, sequences) if return_outputs else loss

    def training_step(self, model: nn.Module, inputs: Batch, num_items_in_batch: Any = None) -> Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not self.is_deepspeed_enabled:
            self._stop_if_not_finite(loss)
        return loss

    def _stop_if_not_finite(self, loss: Tensor) -> None:
        # Summed over ranks, so that all of them stop before the weights are touched.
        total: Any = self.accelerator.reduce(loss, "sum")
        if not torch.isfinite(total):
            self._stop("the loss of", 1, loss=loss.item())

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        norm: Any = super()._get_grad_norm(*args, **kwargs)
        # A GradScaler leaves out such a step by itself and lowers its scale, until there is nothing left to lower.
        scaler: Any = self.accelerator.scaler
        # DeepSpeed may know no norm yet.
        if norm is not None and not math.isfinite(norm) and (scaler is None or scaler.get_scale() < 1):
            self._stop("the gradient norm of", 1, gradient_norm=float(norm))
        return norm

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self._refuse_broken_weights()
        super()._save_checkpoint(*args, **kwargs)

    def _refuse_broken_weights(self) -> None:
        """Stop on all ranks where a trainable weight of one is nan or inf."""
        trained = ((name, p.detach()) for name, p in self.model.named_parameters() if p.requires_grad)
        broken = diagnostics.non_finite(trained)
        total: Any = self.accelerator.reduce(torch.tensor(len(broken)).to(self.args.device), "sum")
        if total:
            self._stop("a weight after", 0, weights=sum(broken.values()))

    def _stop(self, what: str, ahead: int, **values: float) -> NoReturn:
        step = self.state.global_step + ahead
        where = diagnostics.write_bundle(self, step, f"{what} step {step}", values)
        raise NonFiniteLossError(
            f"{what} step {step} is not finite ({', '.join(map(str, values.values()))} here); {where}. Lower alpha or "
            "learning_rate, use loss_type='logistic' or logp_reduction='mean', or look for nan in the weights"
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the means over all triplets since the last logging step to the training logs."""
        if "loss" in logs and self._clock is not None:
            seconds = torch.tensor(time.perf_counter() - self._clock, device=self.args.device)
            self._clock = None
            self._meter.add({"tokens_per_second": (0 * seconds, seconds / self.accelerator.num_processes)})
            logs = {**logs, **self._meter.take(self.accelerator)}
            step, args = self.state.global_step, self.args
            triplets = (step - self._watched_step) * args.train_batch_size * args.gradient_accumulation_steps
            self._watched_step = step
            for text in self._watch.add(logs, triplets * self.accelerator.num_processes, step >= self.state.max_steps):
                logger.warning("%s", text)
            if torch.cuda.is_available():
                logs["memory/peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        super().log(logs, start_time)

    @torch.no_grad()
    def evaluation_loop(
        self,
        dataloader: torch.utils.data.DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Loss and the training metrics as means over the kept and the counted triplets of all ranks."""
        meter = Meter()
        self.callback_handler.eval_dataloader = dataloader  # type: ignore
        self.model.eval()
        rows, key = self.args.per_device_eval_batch_size, "per_device_eval_batch_size"
        with self._sharing_prompts(), naming_out_of_memory(rows, "the evaluation of", key):
            for batch in dataloader:
                batch = self._prepare_inputs(batch)
                self._begin(batch)
                batch["counted"] = self._counted(batch, True, dataloader.dataset)
                loss, _ = self._score(self.model, batch, 1.0, meter)
                meter.add({"loss": (loss, self._kept(batch))})
                self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in meter.take(self.accelerator).items()}
        return EvalLoopOutput(None, None, metrics, len(dataloader.dataset))  # type: ignore


def _with_ids(
    dataset: Any,
    args: TSPINConfig,
    members: tuple[str, ...],
    tokenizer: PreTrainedTokenizerBase | None,
    vocabulary: int,
) -> Any:
    """The data set with the columns that its members need, tokenised here where it holds TRL's text columns."""
    if dataset is None:
        return dataset
    if not len(dataset):
        raise ValueError("dataset: want at least one triplet, got none; is max_length too small for all of them?")
    columns = set(dataset[0])
    if "prompt_ids" not in columns:
        if tokenizer is None:
            raise ValueError(
                f"processing_class: want the tokenizer, because the data set has no token ids but {sorted(columns)}"
            )
        dataset = tokenize_triplets(dataset, tokenizer, max_length=args.max_length)
    ids = ["prompt_ids", *(f"{member}_ids" for member in members)]
    references = [f"ref_{member}_logps" for member in members] if args.needs_references else []
    missing = [name for name in (*ids, *references) if name not in dataset[0]]
    if missing:
        remedy = "add the columns of tspin.scoring.score_references" if "logps" in missing[0] else "add them"
        raise ValueError(
            f"train_dataset: method {args.method!r} wants the columns {missing}, got {sorted(columns)}; {remedy}"
        )
    check_columns(dataset, ids, references, vocabulary)
    return dataset
