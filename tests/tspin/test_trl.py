"""TRL's own trainers against the same trainers scored by `linear_logprobs`: step by step, on tiny models."""

import random
import runpy
import sys
import warnings

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

pytest.importorskip("trl", "1.16", reason="the extra trl, whose fused head began with 1.16 on a CPU, is not installed")

from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    MixtralConfig,
    PhiConfig,
    PreTrainedTokenizerFast,
    TrainerCallback,
    set_seed,
)
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl.trainer import utils as trl_utils

from tspin.integrations import trl as integration
from tspin.integrations.trl import fused

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # said at every import of an experimental trainer
    from trl.experimental.cpo import CPOConfig, CPOTrainer

LETTERS = "abcdefghijklmnopqrstuvwxyz ?!"
V = 3 + len(LETTERS)
PLAIN = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none", "disable_tqdm": True}
PLAIN |= {"save_strategy": "no", "logging_steps": 1, "max_steps": 3, "per_device_train_batch_size": 2, "max_length": 64}
PLAIN |= {"optim": "sgd", "learning_rate": 0.3, "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "seed": 3}
# What TRL logs that is no result of the computation.
UNCOMPARED = ("runtime", "per_second", "flos")


def make_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<unk>", "<eos>", *LETTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")


def configs() -> dict:
    small = {
        "vocab_size": V,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "initializer_range": 0.4,
    }
    small |= {
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "pad_token_id": 0,
        "eos_token_id": 2,
        "bos_token_id": None,
    }
    experts = {
        "num_local_experts": 3,
        "num_experts_per_tok": 2,
        "output_router_logits": True,
        "router_aux_loss_coef": 0.5,
    }
    return {
        "llama": LlamaConfig(**small),
        "gemma2": Gemma2Config(**small, head_dim=8, final_logit_softcapping=2.0),
        "granite": GraniteConfig(**small, logits_scaling=0.5),
        "phi": PhiConfig(**small | {"num_key_value_heads": 2, "partial_rotary_factor": 0.5}),
        "mixtral": MixtralConfig(**small | experts),
    }


def save_models(root, names) -> None:
    for name in names:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(configs()[name])
        if name == "phi":
            torch.nn.init.normal_(model.lm_head.bias)
        model.save_pretrained(root / name)
        make_tokenizer().save_pretrained(root / name)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    save_models(root, configs())
    return root


def text(rng: random.Random, low: int, high: int) -> str:
    return "".join(rng.choice(LETTERS) for _ in range(rng.randrange(low, high)))


def rows(n: int = 8, seed: int = 0) -> list[dict]:
    """Pairs whose parts have all lengths, so that every batch is padded on both sides."""
    rng = random.Random(seed)
    return [{"prompt": text(rng, 1, 20), "chosen": text(rng, 1, 16), "rejected": text(rng, 1, 16)} for _ in range(n)]


def unpaired() -> Dataset:
    pairs = [(row["prompt"], row[side], side == "chosen") for row in rows() for side in ("chosen", "rejected")]
    return Dataset.from_list([{"prompt": p, "completion": c, "label": label} for p, c, label in pairs])


class Record(TrainerCallback):
    """Gradients before and parameters after every optimizer step."""

    def __init__(self):
        self.gradients, self.points = [], []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        taken = [p.grad.flatten().clone() for p in model.parameters() if p.grad is not None]
        self.gradients.append(torch.cat(taken))

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.points.append(torch.cat([p.detach().flatten().clone() for p in model.parameters()]))


TRAINERS = {"dpo": (DPOTrainer, DPOConfig), "kto": (KTOTrainer, KTOConfig), "cpo": (CPOTrainer, CPOConfig)}


def make(kind: str, model, output_dir, **options):
    """A trainer of TRL's, and what it records."""
    trainer_class, config_class = TRAINERS[kind]
    model = AutoModelForCausalLM.from_pretrained(model) if not isinstance(model, torch.nn.Module) else model
    record, peft_config = Record(), options.pop("peft_config", None)
    data = unpaired() if kind == "kto" else Dataset.from_list(rows())
    args = config_class(str(output_dir), **PLAIN | options)
    given = {"train_dataset": data, "eval_dataset": data.select(range(4)), "processing_class": make_tokenizer()}
    set_seed(1)
    return trainer_class(model, args=args, callbacks=[record], peft_config=peft_config, **given), record


def trajectory(trainer, record):
    trainer.train()
    evaluation = trainer.evaluate()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    return {"gradients": record.gradients, "points": record.points, "logs": logs, "evaluation": evaluation}


def assert_same(theirs, ours, skipped):
    # A small multiple of float32 rounding over a step; the trajectories below move by far more.
    close = lambda a, b: torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)
    for name in ("gradients", "points"):
        assert len(theirs[name]) == 3
        close(ours[name], theirs[name])
    assert (theirs["points"][0] - theirs["points"][-1]).abs().max() > 1e-3, (
        "nothing was learnt: the comparison is empty"
    )
    for a, b in zip([*ours["logs"], ours["evaluation"]], [*theirs["logs"], theirs["evaluation"]], strict=True):
        assert a.keys() == b.keys()
        for key in a:
            if not any(part in key for part in (*UNCOMPARED, *skipped)):
                close(torch.tensor(a[key]), torch.tensor(b[key]))


CASES = {
    "dpo": {},
    "dpo-accumulated": {"gradient_accumulation_steps": 2, "max_grad_norm": 0.1},
    "dpo-truncated": {"max_length": 20},
    "dpo-truncated-at-the-start": {"max_length": 20, "truncation_mode": "keep_end"},
    "dpo-checkpointed": {"gradient_checkpointing": True},
    "dpo-weighted": {"use_weighting": True, "loss_type": ["sigmoid", "apo_zero"], "loss_weights": [1.0, 0.5]},
    "dpo-long-answers-discounted": {"ld_alpha": 0.5},
    "dpo-precomputed": {"precompute_ref_log_probs": True},
    "dpo-lora": {"peft_config": LoraConfig(r=2, target_modules=["q_proj", "down_proj"])},
    "kto": {},
    "kto-apo": {"loss_type": "apo_zero_unpaired", "gradient_accumulation_steps": 2},
    "kto-lora": {"peft_config": LoraConfig(r=2, target_modules=["q_proj", "down_proj"])},
    "cpo": {"cpo_alpha": 0.7},
    "cpo-simpo": {"loss_type": "simpo", "cpo_alpha": 0.0, "gradient_accumulation_steps": 2},
    "cpo-ipo": {"loss_type": "ipo", "cpo_alpha": 0.0, "max_length": 20, "learning_rate": 0.003},
    "cpo-alphapo": {"loss_type": "simpo", "alpha": 0.1},
    "cpo-lora": {"peft_config": LoraConfig(r=2, target_modules=["q_proj", "down_proj"])},
}
for name in ("dpo-gemma2", "dpo-phi", "dpo-mixtral", "cpo-gemma2", "cpo-granite", "cpo-mixtral"):
    CASES[name] = {"model": name.split("-")[1], "learning_rate": 0.03}
# Of each kind of case one is run every time, and the rest in the soak.
OFTEN = (
    "dpo-accumulated dpo-truncated dpo-weighted dpo-precomputed dpo-lora kto cpo-simpo cpo-lora dpo-gemma2 cpo-mixtral"
)


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[pytest.mark.soak] * (name not in OFTEN.split())) for name in CASES
])  # fmt: skip
def test_losses_gradients_metrics_and_trajectories_are_trls(home, tmp_path, name):
    kind, options = name.split("-")[0], dict(CASES[name])
    model = home / options.pop("model", "llama")
    theirs = trajectory(*make(kind, model, tmp_path, **options))
    trainer, record = make(kind, model, tmp_path, **options)
    ours = trajectory(fused(trainer), record)
    # What fused() says is not TRL's; precomputed references make a first margin of 0 one of rounding, either side of 0.
    skipped = ["logits/"] * (kind == "cpo") + ["accuracies"] * ("precompute_ref_log_probs" in options)
    assert_same(theirs, ours, skipped)
    assert "entropy" in ours["logs"][0] or kind == "cpo"


def test_an_existing_adapter_has_its_own_copy_for_a_reference(home, tmp_path):
    results = []
    for use in (lambda trainer: trainer, fused):
        torch.manual_seed(2)
        config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(home / "llama"), config)
        adapted.save_pretrained(tmp_path / "adapter")
        base = AutoModelForCausalLM.from_pretrained(home / "llama")
        model = PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True)
        trainer, record = make("dpo", model, tmp_path)
        assert "ref" in model.peft_config
        results.append(trajectory(use(trainer), record))
    assert_same(*results, [])


@pytest.mark.parametrize("kind", TRAINERS)
def test_no_tensor_has_a_logit_for_every_token(home, tmp_path, kind):
    def largest(use):
        trainer, _ = make(kind, home / "llama", tmp_path, max_steps=1)
        trainer = use(trainer)
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded:
            trainer.train()
        shapes = [shape for event in recorded.events() for shape in event.input_shapes or [] if shape]
        return max(torch.Size(shape).numel() for shape in shapes if V in shape and 16 not in shape)

    # Of the shapes with a vocabulary in them: TRL's logits or its tile, and a block of ours.
    budget = 2048
    assert (
        largest(lambda trainer: fused(trainer, memory_budget=budget)) <= budget / 4 < largest(lambda trainer: trainer)
    )


def test_both_ops_agree_on_every_output(home):
    """Also where a target's probability is close to 1/2 or the target shares the largest logit, and in no rows at all."""
    draw = torch.Generator().manual_seed(0)
    for softcap, scale in ((None, 1.0), (2.0, 0.7)):
        for size in (0, 1, 200):
            hidden, weight = torch.randn(size, 4, generator=draw), torch.randn(9, 4, generator=draw)
            bias, targets = torch.randn(9, generator=draw), torch.randint(9, (size,), generator=draw)
            problem = (hidden, weight, bias, targets, 0.7, 4, softcap, scale)
            theirs = trl_utils._ChunkedLogProbFunction.apply(*problem)
            ours = integration._Scoring(memory_budget=2000).apply(*problem)
            for a, b in zip(ours, theirs, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
            if size == 200:
                assert 10 < ours[4].sum() < 190


def test_what_is_logged_of_logits_keeps_to_the_budget_too(monkeypatch):
    seen, blocks = [], integration._logits
    monkeypatch.setattr(integration, "_logits", lambda *a, **k: (seen.append(z.numel()) or z for z in blocks(*a, **k)))
    problem = (torch.randn(200, 4), torch.randn(9, 4), None, torch.zeros(200, dtype=torch.int64), 1.0, 4, 2.0)
    integration._Scoring(memory_budget=2000).apply(*problem)
    assert sum(seen) >= 200 * 9 and 12 * max(seen) <= 2000


def test_other_trainers_keep_trls_function(home, tmp_path):
    theirs = trl_utils._ChunkedLogProbFunction
    trainer, _ = make("dpo", home / "llama", tmp_path, max_steps=1)
    assert fused(fused(trainer), memory_budget=5000) is trainer, (
        "once is enough, and a second call only sets the budget"
    )
    trainer.train()
    assert trl_utils._ChunkedLogProbFunction is theirs
    with pytest.raises(AttributeError):
        trainer.compute_loss(trainer.model, None)
    assert trl_utils._ChunkedLogProbFunction is theirs


@pytest.fixture
def unchecked():
    integration._check_seam.cache_clear()
    yield
    integration._check_seam.cache_clear()


class _Renamed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, temperature, chunk_size, cap=None, logit_scale=1.0, outputs=()):
        raise AssertionError


class _Warmer(trl_utils._ChunkedLogProbFunction):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping=None, logit_scale=1.0,
                outputs=("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")):  # fmt: skip
        rest = (chunk_size, final_logit_softcapping, logit_scale, outputs)
        return trl_utils.ChunkedLogProbFunctionForTest.forward(ctx, hidden, weight, bias, targets, 1.0, *rest)


@pytest.mark.parametrize("other, found", [
    (None, "it has no such function"),
    (_Renamed, r"that function takes \['hidden'.*'cap'.*\], not \["),
    (_Warmer, "that function returns other numbers"),
])  # fmt: skip
def test_another_trl_is_refused_by_its_version(home, tmp_path, monkeypatch, unchecked, other, found):
    trainer, _ = make("dpo", home / "llama", tmp_path)
    monkeypatch.setattr(trl_utils, "ChunkedLogProbFunctionForTest", trl_utils._ChunkedLogProbFunction, raising=False)
    monkeypatch.setattr(trl_utils, "_ChunkedLogProbFunction", other)
    if other is None:
        monkeypatch.delattr(trl_utils, "_ChunkedLogProbFunction")
    with pytest.raises(ValueError, match=rf"trl \d+\.\d+.*{found}.*pip install 'tspin\[trl\]'"):
        fused(trainer)


def test_a_trainer_that_goes_another_way_is_not_fused_in_silence(home, tmp_path, monkeypatch):
    trainer, _ = make("dpo", home / "llama", tmp_path)
    monkeypatch.setattr(trainer, "compute_loss", lambda model, inputs, **_: torch.zeros(()), raising=False)
    with pytest.raises(ValueError, match="computed log-probs without ChunkedLogProbFunction"):
        fused(trainer).compute_loss(None, None)


def test_what_cannot_be_fused_is_refused(home, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="want a DPOTrainer, KTOTrainer or CPOTrainer of TRL, got Pretender"):
        fused(type("Pretender", (), {})())
    head = LoraConfig(r=2, target_modules=["q_proj", "lm_head"])
    trainer, _ = make("cpo", home / "llama", tmp_path, peft_config=head)
    with pytest.raises(ValueError, match="no adapter on the output head"):
        fused(trainer)
    trainer, _ = make("cpo", home / "llama", tmp_path)
    trainer.is_encoder_decoder = True
    with pytest.raises(ValueError, match="decoder-only"):
        fused(trainer)
    monkeypatch.setattr(integration, "is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(ValueError, match="ZeRO-3"):
        fused(trainer)


def test_without_trl_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl.trainer", None)
    with pytest.raises(ImportError, match=r"needs trl; pip install 'tspin\[trl\]'"):
        runpy.run_path(integration.__file__)
