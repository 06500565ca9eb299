"""TRL's own trainers against the same trainers scored by `linear_logprobs`: step by step, on tiny models; and data both ways."""

import random
import runpy
import sys
import warnings

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

pytest.importorskip("trl", "1.16", reason="the extra trl, whose fused head began with 1.16 on a CPU, is not installed")

import yaml
from datasets import Dataset, load_dataset
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

from tspin import TSPINConfig, TSPINTrainer, storage
from tspin.data import Encoder, Example, build_triplets, stop_token_ids
from tspin.generate import Generation
from tspin.integrations import trl as integration
from tspin.integrations.trl import fused
from tspin.rows import exchange

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


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for name, config in configs().items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        if name == "phi":
            torch.nn.init.normal_(model.lm_head.bias)
        model.save_pretrained(root / name)
        make_tokenizer().save_pretrained(root / name)
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
RARE = (
    "dpo",
    "dpo-truncated-at-the-start",
    "dpo-checkpointed",
    "dpo-long-answers-discounted",
    "kto-apo",
    "kto-lora",
    "cpo",
)
RARE += ("cpo-ipo", "cpo-alphapo")
MODELS = [
    ("dpo", "gemma2"),
    ("dpo", "phi"),
    ("dpo", "mixtral"),
    ("cpo", "gemma2"),
    ("cpo", "granite"),
    ("cpo", "mixtral"),
]


PARAMETERS = [
    pytest.param(name.split("-")[0], "llama", options, id=name, marks=[pytest.mark.soak] * (name in RARE))
    for name, options in CASES.items()
]
PARAMETERS += [pytest.param(kind, model, {"learning_rate": 0.03}, id=f"{kind}-{model}") for kind, model in MODELS]


@pytest.mark.parametrize("kind, model, options", PARAMETERS)
def test_losses_gradients_metrics_and_trajectories_are_trls(home, tmp_path, kind, model, options):
    theirs = trajectory(*make(kind, home / model, tmp_path, **options))
    trainer, record = make(kind, home / model, tmp_path, **options)
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
    budget = 1500
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


# Data, both ways


@pytest.fixture
def triplets(tmp_path):
    """triplets.parquet as the loop writes it, under a template, and the rows in it."""
    tokenizer = make_tokenizer()
    encode = Encoder(tokenizer, "ask {prompt} say ", stop_token_ids(tokenizer))
    examples, samples = [], ({}, {})
    for i, row in enumerate(rows(6)):
        prompt, prompt_ids, ids = encode(*exchange({"prompt": row["prompt"] + "x", "response": row["chosen"] + "y"}))
        examples.append(Example(i, prompt, row["chosen"] + "y", prompt_ids, ids))
        for made, said in zip(samples, (row["rejected"] + "z", row["chosen"] + "!")):
            made[i] = Generation([*tokenizer(said).input_ids, 2], "stop", said)
    path = tmp_path / "triplets.parquet"
    storage.write_parquet(path, build_triplets(examples, *samples, max_length=64))
    return path


def test_the_triplets_run_through_trl_dpo_unchanged(home, tmp_path, triplets):
    from trl.scripts.dpo import main, make_parser

    config = {"model_name_or_path": str(home / "llama"), "output_dir": str(tmp_path / "out"), **PLAIN, "max_steps": 1}
    config |= {
        "datasets": [{"path": "parquet", "data_files": str(triplets)}],
        "dtype": "float32",
        "save_strategy": "no",
    }
    (tmp_path / "dpo.yaml").write_text(yaml.safe_dump(config))
    main(*make_parser().parse_args_and_config(["--config", str(tmp_path / "dpo.yaml")]))
    trained, given = (AutoModelForCausalLM.from_pretrained(path) for path in (tmp_path / "out", home / "llama"))
    assert not torch.equal(trained.lm_head.weight, given.lm_head.weight)


def test_trl_trains_on_the_very_tokens_of_the_triplets(home, tmp_path, triplets):
    data = load_dataset("parquet", data_files=str(triplets), split="train", cache_dir=tmp_path)
    model = AutoModelForCausalLM.from_pretrained(home / "llama")
    trainer = DPOTrainer(
        model, args=DPOConfig(str(tmp_path), **PLAIN), train_dataset=data, processing_class=make_tokenizer()
    )
    ids = ["prompt_ids", "chosen_ids", "rejected_ids"]
    assert trainer.train_dataset.select_columns(ids).to_list() == data.select_columns(ids).to_list()
    assert data[0]["prompt"].startswith("ask ") and data[0]["prompt"].endswith(" say ")


def chat(role: str, text: str) -> list[dict]:
    return [{"role": role, "content": text}]


LAYOUTS = {
    "standard": lambda p, c, r: {"prompt": p, "chosen": c, "rejected": r},
    "conversational": lambda p, c, r: {
        "prompt": chat("user", p), "chosen": chat("assistant", c), "rejected": chat("assistant", r)
    },
    "implicit prompt": lambda p, c, r: {
        "chosen": chat("user", p) + chat("assistant", c), "rejected": chat("user", p) + chat("assistant", r)
    },
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_trls_preference_data_sets_feed_our_trainer_with_the_tokens_that_trl_takes(home, tmp_path, layout):
    data = Dataset.from_list(
        [LAYOUTS[layout](r["prompt"] + "x", r["chosen"] + "y", r["rejected"] + "z") for r in rows(6)]
    )
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'][0] }}? {{ m['content'] }}{% if m['role'] == 'assistant' %}<eos>{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}a? {% endif %}"
    )
    model = AutoModelForCausalLM.from_pretrained(home / "llama")
    theirs = DPOTrainer(model, args=DPOConfig(str(tmp_path), **PLAIN), train_dataset=data, processing_class=tokenizer)
    options = {"max_steps": 1, "use_cpu": True, "save_strategy": "no", "disable_tqdm": True}
    ours = TSPINTrainer(model, TSPINConfig(str(tmp_path), **options), data, processing_class=tokenizer)
    ours.train()
    ids = ["prompt_ids", "chosen_ids", "rejected_ids"]
    assert ours.train_dataset.select_columns(ids).to_list() == theirs.train_dataset.select_columns(ids).to_list()
    assert ours.state.global_step == 1 and len(ours.train_dataset) == 6
