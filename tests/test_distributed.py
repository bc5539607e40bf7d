"""redline.optim over two ranks: shards of one model, each on its own process."""

import pytest
import torch
from torch import distributed, nn

from cases import randn
from redline.optim import AdamW, clip_grad_norm

RANKS = 2


def sharded(net, mesh):
    from torch.distributed.tensor import Shard, distribute_tensor

    for module in net:
        for name, parameter in list(module.named_parameters()):
            shard = distribute_tensor(parameter.detach(), mesh, [Shard(0)])
            setattr(module, name, nn.Parameter(shard))
    return net


def model():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(7, 33), nn.LayerNorm(33), nn.Linear(33, 5))


def steps_on_a_rank(rank, store):
    """The same steps by a whole model and by this rank's half of one."""
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS
    )
    try:
        mesh = init_device_mesh("cpu", (RANKS,))
        whole, half = model(), sharded(model(), mesh)
        optimizers = [AdamW(net.parameters(), lr=1e-2) for net in (whole, half)]
        for step in range(3):
            whole.zero_grad()
            whole(
                randn(16, 7, dtype=torch.float32, device="cpu", seed=step)
            ).square().mean().backward()
            for ours, theirs in zip(half.parameters(), whole.parameters(), strict=True):
                ours.grad = distribute_tensor(theirs.grad.clone(), mesh, [Shard(0)])
                assert ours.grad.to_local().shape[0] < theirs.grad.shape[0]
            norms = [
                clip_grad_norm(net.parameters(), 0.01, optimizer)
                for net, optimizer in zip((whole, half), optimizers, strict=True)
            ]
            torch.testing.assert_close(*norms)  # a rank's own half has a smaller one
            for optimizer in optimizers:
                optimizer.step()
        for ours, theirs in zip(half.parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(ours.full_tensor(), theirs.detach())
        distributed.barrier()  # a rank that leaves while the other still sends aborted it, once
    finally:
        distributed.destroy_process_group()


@pytest.mark.skipif(not distributed.is_available(), reason="this torch has no distributed")
def test_clip_counts_every_ranks_gradients(tmp_path):
    torch.multiprocessing.spawn(steps_on_a_rank, (tmp_path / "store",), RANKS)
