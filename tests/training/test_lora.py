"""LoRA: merged equals applied, rank 0 equals the base, only the additions learn."""

import copy

import pytest
import torch

from model.config import LORA_TARGETS
from model.training.lora import LoraLinear, add_lora, lora_tensors, merge_lora

TOKENS_BT = torch.arange(40).view(2, 20) % 300


def with_lora(decoder, rank=4, targets=LORA_TARGETS):
    adapted = copy.deepcopy(decoder)
    add_lora(adapted, rank, 8.0, targets)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_b" in name:  # as if something had been learned
            parameter.data.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return adapted


@torch.no_grad()
def test_merged_equals_applied(tiny_decoder):
    adapted = with_lora(tiny_decoder)
    applied = adapted(TOKENS_BT)
    merge_lora(adapted)
    assert adapted.state_dict().keys() == tiny_decoder.state_dict().keys()
    assert not any(isinstance(module, LoraLinear) for module in adapted.modules())
    torch.testing.assert_close(adapted(TOKENS_BT), applied, rtol=1e-4, atol=1e-4)
    assert (applied - tiny_decoder(TOKENS_BT)).abs().max() > 0.01


@torch.no_grad()
@pytest.mark.parametrize("merged", [False, True])
def test_rank_0_and_an_untrained_addition_are_the_base(tiny_decoder, merged):
    for rank in (0, 4):
        adapted = copy.deepcopy(tiny_decoder)
        add_lora(adapted, rank, 8.0, LORA_TARGETS)
        if merged:
            merge_lora(adapted)
        assert torch.equal(adapted(TOKENS_BT), tiny_decoder(TOKENS_BT))


def test_only_the_additions_to_the_targets_learn(tiny_decoder):
    adapted = with_lora(tiny_decoder, targets=("q_proj", "down_proj"))
    learning = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    n_layers = len(tiny_decoder.model.layers)
    assert len(learning) == 2 * 2 * n_layers and all("lora_" in name for name in learning)
    assert {name.split(".")[-2] for name in learning} == {"q_proj", "down_proj"}
    adapted(TOKENS_BT).sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in adapted.parameters())


def test_tensors_have_the_names_of_peft(tiny_decoder):
    tensors = lora_tensors(with_lora(tiny_decoder, rank=3, targets=("k_proj",)))
    name = "base_model.model.model.layers.1.self_attn.k_proj.lora_{}.weight"
    assert tensors[name.format("A")].shape == (3, tiny_decoder.config.hidden_size)
    assert tensors[name.format("B")].shape[1] == 3 and len(tensors) == 4
    assert lora_tensors(tiny_decoder) == {}
