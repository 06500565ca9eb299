import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer

from tspin import TSPINConfig, TSPINTrainer, optimizers
from tspin.optimizers import optimizer_bytes, spare_copies
from tspin.tracing import WORK, LiveBytes

SIZES = (3000, 5000, 1000)
OPTIMIZERS = ["rmsprop", "adamw_torch", "sgd", "adagrad"]


def args_of(path, **values) -> TSPINConfig:
    return TSPINConfig(output_dir=str(path), use_cpu=True, bf16=False, **values)


@pytest.mark.parametrize("given", [None, True, False])
@pytest.mark.parametrize("elements", [2**26 - 1, 2**26])
def test_large_weights_are_stepped_one_at_a_time_unless_the_user_chose(given, elements):
    optimizer = torch.optim.RMSprop([nn.Parameter(torch.empty(elements, device="meta"))], foreach=given)
    spare_copies(optimizer)
    wanted = False if given is None and elements == 2**26 else given
    assert [group["foreach"] for group in optimizer.param_groups] == [wanted]


def test_a_fused_optimizer_stays_fused():
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(4))], fused=True)
    optimizer.param_groups[0]["params"] = [nn.Parameter(torch.empty(2**26, device="meta"))]
    spare_copies(optimizer)
    assert optimizer.param_groups[0]["foreach"] is None


@pytest.mark.parametrize("large", [True, False])
@pytest.mark.parametrize("given", [True, False])
def test_the_trainer_changes_its_own_optimizer_only(tmp_path, monkeypatch, large, given):
    monkeypatch.setattr(optimizers, "_LARGE", 1 if large else 2**40)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**shape, vocab_size=32))
    own = torch.optim.RMSprop(model.parameters()) if given else None
    trainer = TSPINTrainer(model, args_of(tmp_path), optimizers=(own, None))
    optimizer = trainer.create_optimizer()
    assert {group["foreach"] for group in optimizer.param_groups} == {False if large and not given else None}


@pytest.mark.parametrize("large", [True, False])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_states_and_temporaries_are_those_of_a_step(tmp_path, monkeypatch, name, large):
    monkeypatch.setattr(optimizers, "_LARGE", 1 if large else 2**40)
    args = args_of(tmp_path, optim=name)
    kind, options = Trainer.get_optimizer_cls_and_kwargs(args)
    weights = [nn.Parameter(torch.zeros(size)) for size in SIZES]
    optimizer, live = kind(weights, **options, foreach=not large), LiveBytes()
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    held = [t for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
    live.hold([*weights, *(w.grad for w in weights), *held], "held")
    with live:
        optimizer.step()
    states = sum(t.nbytes for t in held if t.numel() > 1)
    temporaries = max(terms.get(WORK, 0) for terms in live.peaks().values())
    found = optimizer_bytes(args, torch.float32, gpu=True)
    assert found.states(weights) == pytest.approx(states, abs=64)
    assert found.temporaries(weights) == pytest.approx(temporaries, abs=256)


@pytest.mark.parametrize("name", ["rmsprop_bnb_8bit", "adamw_bnb_8bit", "rmsprop_bnb_32bit"])
def test_states_of_8_bits_are_trained_with_and_priced(tmp_path, name):
    pytest.importorskip("bitsandbytes", reason="the extra quantization is not installed")
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**shape, vocab_size=256))
    row = {"prompt_ids": [3], "chosen_ids": [4, 5], "rejected_ids": [6]}
    args = args_of(tmp_path, optim=name, max_steps=1, save_strategy="no", disable_tqdm=True, learning_rate=1e-3)
    trainer = TSPINTrainer(model, args, [row])
    before = model.lm_head.weight.detach().clone()
    trainer.train()
    assert not torch.equal(model.lm_head.weight, before)
    state = trainer.optimizer.state[model.lm_head.weight]
    assert (state["state1"].dtype == torch.uint8) == name.endswith("8bit")
    # bitsandbytes keeps tables of 256 values, and states of small weights in 32 bits.
    held = sum(t.nbytes for key, t in state.items() if torch.is_tensor(t) and not key.startswith("qmap"))
    found = optimizer_bytes(args, torch.float32, gpu=True).states([model.lm_head.weight])
    assert found == pytest.approx(held, rel=0.02)


@pytest.mark.parametrize("name", OPTIMIZERS[:3])
def test_one_at_a_time_takes_the_same_step(name, tmp_path):
    kind, options = Trainer.get_optimizer_cls_and_kwargs(args_of(tmp_path, optim=name, learning_rate=0.1))
    torch.manual_seed(0)
    start, grads = [torch.randn(s) for s in SIZES], [torch.randn(s) for s in SIZES]
    results = []
    for foreach in (True, False):
        weights = [nn.Parameter(t.clone()) for t in start]
        optimizer = kind(weights, **options, foreach=foreach)
        for _ in range(2):
            for weight, grad in zip(weights, grads):
                weight.grad = grad.clone()
            optimizer.step()
        results.append(weights)
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
