"""T-SPIN in a plain PyTorch loop: three lines change, and the logits of the batch never exist.

    python examples/pytorch_loop.py [--before] [--compile inductor]

The model is made on the spot and the tokens are random: put your own in their place.
"""

import argparse

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from tspin_kernels import linear_tspin_loss, tspin_loss

Batch = tuple[
    Tensor, Tensor, Tensor
]  # input_ids, attention_mask, response_mask [3B, T]: real, synthetic, proto of each prompt


def loss_before(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, response_mask: Tensor) -> Tensor:
    logits = model(input_ids, attention_mask=attention_mask).logits.float()
    logps = logits[:, :-1].log_softmax(-1).gather(-1, input_ids[:, 1:, None])[..., 0]
    real, synthetic, proto = (logps * response_mask[:, 1:]).sum(-1).view(-1, 3).T
    return tspin_loss(real, synthetic, proto).mean()


def loss_after(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, response_mask: Tensor) -> Tensor:
    sequence_ids = torch.arange(len(input_ids), device=input_ids.device)[:, None].expand_as(input_ids)
    hidden = model.base_model(input_ids, attention_mask=attention_mask).last_hidden_state
    targets = input_ids.masked_fill(response_mask == 0, -100)[:, 1:]
    return linear_tspin_loss(hidden[:, :-1], model.lm_head.weight, targets, sequence_ids[:, 1:])[0]


def random_batch(prompts: int = 2, length: int = 24) -> Batch:
    input_ids = torch.randint(3, 256, (3 * prompts, length))
    ends = torch.randint(length // 2, length + 1, (3 * prompts, 1))
    attention_mask = (torch.arange(length) < ends).long()
    return input_ids, attention_mask, attention_mask * (torch.arange(length) >= length // 3)


def train(before: bool = False, compile_with: str | None = None, steps: int = 5) -> tuple[list[float], PreTrainedModel]:
    """The loss of every step, and the model."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, initializer_range=0.1, **sizes))
    if compile_with:
        model.base_model.compile(backend=compile_with)  # in place, so that both functions run the compiled trunk
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    losses = []
    for _ in range(steps):
        loss = (loss_before if before else loss_after)(model, *random_batch())
        loss.backward()
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
