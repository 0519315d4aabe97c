"""Muon: the same steps as torch's own, which handles matrices one by one."""

import torch

from model.training.optimizer import Muon, orthogonalised


def test_muon_steps_as_torchs_own_does():
    torch.manual_seed(1)
    shapes = [(24, 16), (16, 24), (24, 16), (16, 16)]
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    muon = Muon(ours, 0.01, 0.5)
    reference = torch.optim.Muon(theirs, lr=0.01, weight_decay=0.5, adjust_lr_fn="match_rms_adamw")
    for _ in range(5):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        muon.step()
        reference.step()
    for p, q in zip(ours, theirs, strict=True):
        assert torch.allclose(p, q, atol=1e-4)


def test_singular_values_end_near_one():
    for shape in ((3, 40, 12), (3, 12, 40)):
        values = torch.linalg.svdvals(orthogonalised(torch.randn(shape, generator=torch.manual_seed(2))).float())
        assert values.min() > 0.4 and values.max() < 1.4
