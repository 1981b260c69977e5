"""Epoch values under two real gloo processes equal those of one process over all batches."""

import subprocess
import sys

SCRIPT = """
import sys
import torch
import torch.distributed as dist
from nano_think.metrics.denoising import DenoisingError
from nano_think.metrics.domain_loss import DomainLoss
from nano_think.metrics.routing import RoutingStats

def metrics():
    return (DomainLoss(["a", "b"], torch.arange(20)), RoutingStats(["T", "S"], ["a", "b"], 16),
            DenoisingError(3, 10, 4))

def feed(chosen, seed):
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(-5, 20, (3, 8), generator=g)
    # rank 1 sees only domain b, so the ranks hold different domains
    domain = torch.full((3,), seed % 2)
    nll = torch.rand(3, 8, generator=g) * (labels >= 0)
    chosen[0].update(nll, labels, domain)
    weights = torch.randn(3, 8, 2, generator=g).softmax(-1)
    chosen[1].update(weights, domain, torch.arange(8).expand(3, 8), labels >= 0)
    x = torch.randn(2, 3, 8, 4, generator=g)
    chosen[2].update(x[0], x[1], torch.randint(1, 11, (3,), generator=g))

rank = int(sys.argv[1])
whole, mine = metrics(), metrics()
for seed in range(4):
    feed(whole, seed)
    if seed % 2 == rank:
        feed(mine, seed)
expected = [m.compute() for m in whole]
curve = whole[1].position_curve()
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
for one, two in zip(expected, (m.compute() for m in mine), strict=True):
    assert one.keys() == two.keys()
    for name in one:
        assert torch.allclose(one[name], two[name], rtol=1e-10, atol=1e-12), name
assert torch.allclose(curve, mine[1].position_curve(), equal_nan=True)
assert mine[0].tokens.sum() < whole[0].tokens.sum(), "the local state stays local after compute"
dist.destroy_process_group()
"""


def test_two_gloo_processes_equal_one(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(SCRIPT)
    workers = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(tmp_path / "rendezvous")],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for worker in workers:
            _, errors = worker.communicate(timeout=120)
            assert worker.returncode == 0, errors
    finally:
        for worker in workers:
            worker.kill()
