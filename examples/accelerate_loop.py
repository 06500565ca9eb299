"""SimPO under accelerate, with gradient accumulation: three lines change, inside a module that accelerate wraps.

    accelerate launch examples/accelerate_loop.py [--before] [--compile inductor]

The loss is the module's forward, so that the hooks of DDP and FSDP fire: a call of `model.base_model` from outside passes them by.
The model is made on the spot and the tokens are random: put your own in their place.
"""

import argparse

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from tspin_kernels import linear_sequence_loss


def simpo(chosen: Tensor, rejected: Tensor, beta: float = 2.0, gamma: float = 1.0) -> Tensor:
    """Mean log-probs of both responses [B] to losses [B]."""
    return -logsigmoid(beta * (chosen - rejected) - gamma)


class Before(nn.Module):
    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        logits = self.model(input_ids).logits.float()
        logps = logits[:, :-1].log_softmax(-1).gather(-1, labels[:, 1:, None].clamp(min=0))[..., 0]
        means = (logps * (labels[:, 1:] >= 0)).sum(-1) / (labels[:, 1:] >= 0).sum(-1)
        return simpo(*means.view(-1, 2).T).mean()


class After(Before):
    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        ids = torch.arange(len(labels), device=labels.device)[:, None].expand_as(labels)
        hidden = self.model.base_model(input_ids).last_hidden_state
        loss_fn = lambda s: simpo(*(s.logprobs / s.lengths).unbind(1))
        return linear_sequence_loss(
            hidden[:, :-1], self.model.lm_head.weight, labels[:, 1:], ids[:, 1:], loss_fn, group_size=2
        )[0]


def random_pairs(pairs: int, length: int = 24) -> list[tuple[Tensor, Tensor]]:
    """input_ids and labels [2, length] of each pair, chosen and rejected; labels are -100 in the prompt and behind the end."""
    rows = []
    for _ in range(pairs):
        input_ids, ends = torch.randint(3, 256, (2, length)), torch.randint(length // 2, length + 1, (2, 1))
        place = torch.arange(length)
        rows.append((input_ids, input_ids.masked_fill((place < length // 3) | (place >= ends), -100)))
    return rows


def train(before: bool = False, compile_with: str | None = None, steps: int = 4) -> tuple[list[float], PreTrainedModel]:
    """The loss of every micro-batch of this process, and the model."""
    accelerator = Accelerator(gradient_accumulation_steps=2, cpu=not torch.cuda.is_available())
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, initializer_range=0.1, **sizes))
    if compile_with:
        model.base_model.compile(backend=compile_with)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    stack = lambda rows: [torch.cat(column) for column in zip(*rows)]
    loader = DataLoader(random_pairs(2 * steps * accelerator.num_processes), batch_size=2, collate_fn=stack)  # type: ignore
    module, optimizer, loader = accelerator.prepare((Before if before else After)(model), optimizer, loader)
    losses = []
    for input_ids, labels in loader:
        with accelerator.accumulate(module):
            loss = module(input_ids, labels)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return losses, model


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", action="store_true", help="the same with logits")
    parser.add_argument("--compile", metavar="BACKEND", help="compile the model, e.g. with inductor")
    options = parser.parse_args()
    print(*(f"{loss:.6f}" for loss in train(options.before, options.compile)[0]))
