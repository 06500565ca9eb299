"""Next-token training in Lightning, with perplexity and entropy logged: three lines of the training step change.

    python examples/lightning_module.py [--before] [--compile inductor]        # needs the package lightning

The model is made on the spot and the tokens are random: put your own in their place.
"""

import argparse
import logging
import warnings

import lightning
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from tspin_kernels import linear_logprobs


class Before(lightning.LightningModule):
    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model, self.losses = model, []

    def training_step(self, input_ids: Tensor, index: int) -> Tensor:
        logits = self.model(input_ids).logits.float()[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), input_ids[:, 1:].flatten())
        entropy = torch.distributions.Categorical(logits=logits.detach()).entropy().mean()
        return self.logged(loss, entropy)

    def logged(self, loss: Tensor, entropy: Tensor) -> Tensor:
        self.losses.append(loss.item())
        self.log_dict({"perplexity": loss.detach().exp(), "entropy": entropy})
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class After(Before):
    def training_step(self, input_ids: Tensor, index: int) -> Tensor:
        hidden = self.model.base_model(input_ids).last_hidden_state[:, :-1]
        scored = linear_logprobs(hidden, self.model.lm_head.weight, input_ids[:, 1:], entropy="value")
        loss, entropy = -scored.logprobs.mean(), scored.entropy.mean()
        return self.logged(loss, entropy)


def train(before: bool = False, compile_with: str | None = None, steps: int = 5) -> tuple[list[float], PreTrainedModel]:
    """The loss of every step, and the model."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, initializer_range=0.1, **sizes))
    if compile_with:
        model.base_model.compile(backend=compile_with)
    loader = DataLoader(torch.randint(3, 256, (2 * steps, 24)), batch_size=2)  # type: ignore
    module = (Before if before else After)(model)
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*does not have many workers")
        logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
        lightning.Trainer(max_epochs=1, accelerator="auto", devices=1, **quiet).fit(module, loader)
    return module.losses, model


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", action="store_true", help="the same with logits")
    parser.add_argument("--compile", metavar="BACKEND", help="compile the model, e.g. with inductor")
    options = parser.parse_args()
    print(*(f"{loss:.6f}" for loss in train(options.before, options.compile)[0]))
