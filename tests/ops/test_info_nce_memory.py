"""The logits never exist: what a step takes beyond its inputs and gradients is under a tenth of them."""

import subprocess
import sys

SCRIPT = """
import resource, torch
from embedfuse.ops import Rows, info_nce

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # MiB, on Linux

def step(q, pool, bank):
    ids = torch.arange(len(pool))
    loss = info_nce(q, Rows(pool, ids), bank=bank, temperature=torch.tensor(0.02)).loss.mean()
    return torch.autograd.grad(loss, (q, pool))

q, pool, bank = (torch.randn(n, 16) for n in (1024, 65536, 65536))
q.requires_grad_(), pool.requires_grad_()
step(q, pool[:2048], bank[:2048])  # libraries, threads
before = peak()
grads = step(q, pool, bank)
print(peak() - before - sum(g.nbytes for g in grads) / 2**20)
"""


def test_a_step_takes_a_fraction_of_the_logits(cpu_module):
    run = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    extra, logits = float(run.stdout), 1024 * 65536 * 4 / 2**20
    assert extra < logits / 10
