"""DPO by TRL's own trainer: one call around it, and its log-probs and entropies come from `linear_logprobs`.

    python examples/trl_dpo.py [--before] [--compile inductor]        # needs the extra `trl`

KTOTrainer and CPOTrainer (SimPO) likewise. The model, its tokenizer and the rows are made on the spot: put your own in their place.
"""

import argparse
import copy
import random
import tempfile

import torch
from datasets import Dataset
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

from tspin.integrations.trl import fused

LETTERS = "abcdefghijklmnopqrstuvwxyz "


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<unk>", "<eos>", *LETTERS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>")


def random_rows(n: int) -> Dataset:
    rng = random.Random(0)
    text = lambda: "".join(rng.choice(LETTERS) for _ in range(rng.randrange(1, 12)))
    return Dataset.from_list([{"prompt": text(), "chosen": text(), "rejected": text()} for _ in range(n)])


def train(before: bool = False, compile_with: str | None = None, steps: int = 4) -> tuple[list[float], PreTrainedModel]:
    """The loss of every step, and the model."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, initializer_range=0.1, pad_token_id=0, eos_token_id=2, **sizes))
    reference = copy.deepcopy(model)
    if compile_with:
        model.base_model.compile(backend=compile_with)
    with tempfile.TemporaryDirectory() as directory:
        args = DPOConfig(
            directory,
            max_steps=steps,
            learning_rate=0.1,
            optim="sgd",
            per_device_train_batch_size=2,
            logging_steps=1,
            save_strategy="no",
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=not torch.cuda.is_available(),
            disable_tqdm=True,
            report_to="none",
        )
        trainer = DPOTrainer(model, reference, args, train_dataset=random_rows(8), processing_class=tiny_tokenizer())
        if not before:
            trainer = fused(trainer)
        trainer.train()
    return [log["loss"] for log in trainer.state.log_history if "loss" in log], model


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", action="store_true", help="without that call")
    parser.add_argument("--compile", metavar="BACKEND", help="compile the model, e.g. with inductor")
    options = parser.parse_args()
    print(*(f"{loss:.6f}" for loss in train(options.before, options.compile)[0]))
