"""One optimizer step on one triplet or several, done as several implementations do it: what `memory` and `train_step` measure.

All share the model, its weights, gradient checkpointing and the optimizer; they differ in how rows and the output head are handled.
The gate runs them without the optimizer: losses and gradient norms must agree before anything is measured.

n triplets; P prompt tokens, L of each of the three responses.
"""

import gc
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen2Config, Qwen3MoeConfig

from benchmarks import measure
from tspin.model import head_of, install_scoring, score_batch
from tspin.prefix import NAME, PrefixLayout, layout_inputs
from tspin.sequential import backward_one_by_one
from tspin.tiling import tile_sequences
from tspin_kernels import SequenceStats, linear_tspin_loss, tspin_loss

MEMBERS, BETA = 3, 0.1
METHODS = ("full", "lora")
LORA_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def model_config(name: str) -> PreTrainedConfig:
    """The shape of a model by its name. Raises ValueError for an unknown one."""
    if name not in _SHAPES:
        raise ValueError(f"models: want names of {sorted(_SHAPES)}, got {name!r}")
    kind, shape = _SHAPES[name]
    return kind(**shape, max_position_embeddings=2**20)


def _shape(
    kind: type,
    vocab: int,
    hidden: int,
    inner: int,
    layers: int,
    heads: int,
    kv_heads: int,
    tied: bool = False,
    **more: int,
):
    return kind, {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "tie_word_embeddings": tied,
        **more,
    }


_EXPERTS = {"head_dim": 128, "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8}
_SHAPES: dict[str, tuple[Any, dict[str, Any]]] = {
    "tiny": _shape(LlamaConfig, 128, 32, 64, 2, 2, 2),
    "llama-4-layers": _shape(LlamaConfig, 8192, 256, 704, 4, 4, 4),
    "qwen2.5-1.5b": _shape(Qwen2Config, 151936, 1536, 8960, 28, 12, 2, tied=True),
    "llama-3.1-8b": _shape(LlamaConfig, 128256, 4096, 14336, 32, 32, 8),
    "qwen3-30b-a3b": _shape(Qwen3MoeConfig, 151936, 2048, 6144, 48, 32, 4, **_EXPERTS),
}


@dataclass
class Triplets:
    """Token ids of triplets of one shape, on the device: prompts [n, P] and responses [n, 3, L]."""

    prompts: Tensor
    responses: Tensor
    alpha: float = field(init=False)

    def __post_init__(self) -> None:
        # Margins of order one, so that no gradient vanishes.
        self.alpha = 1.0 / self.responses.shape[2]

    def rows(self) -> Tensor:
        """[3 n, P + L]: the prompt once for each response."""
        prompts = self.prompts[:, None].expand(-1, MEMBERS, -1)
        return torch.cat([prompts, self.responses], 2).flatten(0, 1)

    def packed(self) -> tuple[Tensor, PrefixLayout]:
        """[1, n (P + 3 L)]: every prompt once."""
        n, P = self.prompts.shape
        row = torch.cat([self.prompts, self.responses.flatten(1)], 1)
        return row.view(1, -1), PrefixLayout(((P, (self.responses.shape[2],) * MEMBERS),) * n)

    def packed_rows(self) -> Tensor:
        """[3 n L]: where in `packed` the hidden row is from which each response token is predicted."""
        n, P = self.prompts.shape
        L = self.responses.shape[2]
        starts = torch.arange(n, device=self.prompts.device) * (P + MEMBERS * L)
        rows = starts[:, None] + P - 1 + torch.arange(MEMBERS * L, device=starts.device)
        rows[:, ::L] = starts[:, None] + P - 1
        return rows.flatten()

    def sequence_ids(self) -> Tensor:
        """[3 n L]: the response of each scored token."""
        sequences = torch.arange(len(self.prompts) * MEMBERS, device=self.prompts.device)
        return sequences.repeat_interleave(self.responses.shape[2])


def make_triplets(prompt: int, response: int, vocab: int, device: torch.device, number: int = 1) -> Triplets:
    """Random tokens, the same for the same lengths and number."""
    generator = torch.Generator().manual_seed(prompt * 31 + response)
    ids = torch.randint(vocab, (number, prompt + MEMBERS * response), generator=generator).to(device)
    return Triplets(ids[:, :prompt], ids[:, prompt:].unflatten(1, (MEMBERS, response)))


def _loss_of_sums(logprobs: Tensor, triplets: Triplets) -> Tensor:
    return tspin_loss(*logprobs.view(-1, MEMBERS).unbind(1), alpha=triplets.alpha, beta=BETA).mean()


def _separate_hidden(model: Any, triplets: Triplets) -> Tensor:
    # [3 L, D]: what each response token is predicted from.
    hidden = _core(model).base_model(input_ids=triplets.rows(), use_cache=False).last_hidden_state
    return hidden[:, triplets.prompts.shape[1] - 1 : -1].flatten(0, 1)


def _naive(model: Any, triplets: Triplets) -> Tensor:
    logits = model(input_ids=triplets.rows(), use_cache=False).logits[:, :-1].float()
    targets = triplets.rows()[:, 1:]
    logprobs = logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    return _loss_of_sums(logprobs[:, triplets.prompts.shape[1] - 1 :].sum(1), triplets)


def _trl_style(model: Any, triplets: Triplets) -> Tensor:
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    head = head_of(model)
    # bias, targets, temperature, chunk_size, softcap, logit_scale, outputs
    arguments = (None, triplets.responses.flatten(), 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ())
    logprobs, *_ = ChunkedLogProbFunction.apply(_separate_hidden(model, triplets), head.weight, *arguments)
    return _loss_of_sums(logprobs.view(-1, triplets.responses.shape[2]).sum(1), triplets)


def _fused_loss(model: Any, hidden: Tensor, triplets: Triplets, rows: Tensor | None = None) -> Tensor:
    weight, targets, ids = head_of(model).weight, triplets.responses.flatten(), triplets.sequence_ids()
    return linear_tspin_loss(hidden, weight, targets, ids, rows=rows, alpha=triplets.alpha, beta=BETA)[0]


def _tspin_separate(model: Any, triplets: Triplets) -> Tensor:
    return _fused_loss(model, _separate_hidden(model, triplets), triplets)


def _tspin(model: Any, triplets: Triplets) -> Tensor:
    core, (input_ids, layout) = _core(model), triplets.packed()
    inputs = layout_inputs(layout, input_ids.device)
    hidden = core.base_model(input_ids=input_ids, use_cache=False, **inputs).last_hidden_state[0]
    return _fused_loss(model, hidden, triplets, triplets.packed_rows())


def _tspin_sequential(model: Any, triplets: Triplets) -> Tensor:
    input_ids, layout = triplets.packed()
    batch = {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "rows": triplets.packed_rows(),
        "targets": triplets.responses.flatten(),
        "sequence_ids": triplets.sequence_ids(),
        "lengths": torch.full(triplets.responses.shape[:2], triplets.responses.shape[2], device=input_ids.device),
        "prefix_layout": layout,
    }

    def loss_fn(sequences: SequenceStats) -> Tensor:
        return tspin_loss(*sequences.logprobs.unbind(1), alpha=triplets.alpha, beta=BETA)

    score, number = partial(score_batch, model), len(triplets.prompts)
    return backward_one_by_one(score, lambda loss: loss.backward(), batch, loss_fn, normalizer=number)[0]


IMPLEMENTATIONS: dict[str, Callable[[Any, Triplets], Tensor]] = {
    "naive": _naive,
    "trl_style": _trl_style,
    "tspin_separate": _tspin_separate,
    "tspin": _tspin,
    "tspin_tiled": _tspin,
    "tspin_sequential": _tspin_sequential,
    "tspin_tiled_sequential": _tspin_sequential,
}
_SHARING = (_tspin, _tspin_sequential)


def _core(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


class Arms:
    """One model with its optimizer, and the steps of all implementations on it.

    On CUDA in bfloat16, on the CPU in float32; RMSProp as in the paper.
    """

    def __init__(self, model_name: str, method: str, device: torch.device) -> None:
        self.device, self.vocab = device, model_config(model_name).vocab_size
        torch.manual_seed(0)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        with device:
            model: Any = AutoModelForCausalLM.from_config(
                model_config(model_name), dtype=dtype, attn_implementation="sdpa"
            )
        model.gradient_checkpointing_enable({"use_reentrant": False})
        if method == "lora":
            from peft import LoraConfig, get_peft_model

            model = get_peft_model(model, LoraConfig(r=16, target_modules=LORA_MODULES, task_type="CAUSAL_LM"))
        install_scoring(model)
        self.model: nn.Module = model.train()
        self.trainable = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.RMSprop(self.trainable, lr=1e-7)

    def backward(self, implementation: str, triplets: Triplets) -> Tensor:
        """The loss, its gradient left in the parameters."""
        step = IMPLEMENTATIONS[implementation]
        # Until the backward is done, which runs the layers again.
        _core(self.model).set_attn_implementation(NAME if step in _SHARING else "sdpa")
        untile = tile_sequences(self.model) if "tiled" in implementation else None
        try:
            loss = step(self.model, triplets)
            loss.backward()
        finally:
            if untile is not None:
                untile()
        return loss.detach()

    def step(self, implementation: str, triplets: Triplets) -> None:
        """Forward, backward and optimizer."""
        self.backward(implementation, triplets)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def resident(self) -> int:
        """Bytes of weights, buffers and optimizer states."""
        states = [t for state in self.optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
        return sum(t.nbytes for t in [*self.model.parameters(), *self.model.buffers(), *states])

    def gradients(self) -> int:
        """Bytes of all gradients."""
        return sum(p.nbytes for p in self.trainable)

    def gate(self, triplets: Triplets) -> dict[str, str]:
        """Why implementations are refused: not installed, or a loss or a gradient that is not that of `naive`."""
        found, refused = {}, {}
        for name in IMPLEMENTATIONS:
            try:
                loss = self.backward(name, triplets).item()
            except ImportError as error:
                refused[name] = measure.reason(error)
                continue
            square = sum(p.grad.double().square().sum() for p in self.trainable if p.grad is not None)
            found[name] = (loss, float(square) ** 0.5)
            self.optimizer.zero_grad()
        # Rounding of hidden states alone: bfloat16 has 8 bits, and three responses cancel in part.
        loss_error, grad_error = (2e-2, 1e-1) if self.device.type == "cuda" else (1e-5, 1e-4)
        true = found["naive"]
        for name, (loss, norm) in found.items():
            if not (abs(loss - true[0]) <= loss_error * abs(true[0]) and abs(norm - true[1]) <= grad_error * true[1]):
                refused[name] = f"loss {loss:.6g} and gradient norm {norm:.6g}, naive {true[0]:.6g} and {true[1]:.6g}"
        return refused

    def peak(self, implementation: str, triplets: Triplets) -> tuple[int, int] | str:
        """Peak bytes of a step and of its backward alone, weights and optimizer states included; or why there are none."""
        try:
            growth, _ = measure.peak_bytes(partial(self.backward, implementation, triplets), self.device)
            updating, _ = measure.peak_bytes(self.optimizer.step, self.device)
        except Exception as error:
            self.optimizer.zero_grad()
            self.clear()
            return measure.reason(error)
        self.optimizer.zero_grad()
        backward = growth + self.resident()
        return max(backward, updating + self.resident() + self.gradients()), backward

    def clear(self) -> None:
        """Give free blocks back to the device, so that one measurement does not crowd the next."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
