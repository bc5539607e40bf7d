"""Two ranks, a process each: redline.optim on shards; GPT under DDP, FSDP2, and its checkpoints."""

import os

import pytest
import torch
from torch import distributed, nn

from cases import randn
from redline.layers import GPT
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
    leave()


def leave():
    """Ends a rank's process that is done. gloo's threads may outlive its group, and a process that
    unloads the library meanwhile aborts ("terminate called without an active exception", once in
    some twenty runs of all tests on two cores)."""
    os._exit(0)


@pytest.mark.skipif(not distributed.is_available(), reason="this torch has no distributed")
def test_clip_counts_every_ranks_gradients(tmp_path):
    torch.multiprocessing.spawn(steps_on_a_rank, (tmp_path / "store",), RANKS)


# --- whole models ---------------------------------------------------------------------------------

MODELS = {
    "GPT": {},
    "fused loss": {"fused_loss": "promise"},
    "recomputed": {"recompute": "full"},
}


def gpt(seed=1, **options):
    torch.manual_seed(seed)
    return GPT(31, 16, 24, layers=2, heads=4, kv_heads=2, **options)


def fully_sharded(net, mesh):
    """As FSDP2 is used: each layer by itself, and what is left."""
    from torch.distributed.fsdp import fully_shard

    for layer in net.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(net, mesh=mesh)


def batch(step):
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(31, (2 * RANKS, 9), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]


def train(net, optimizer, step, rank=None):
    """One step on the whole batch, or on a rank's part of it; the loss."""
    part = slice(None) if rank is None else slice(2 * rank, 2 * rank + 2)
    net.zero_grad()
    loss = net(*(tensor[part] for tensor in batch(step)))
    loss.backward()
    clip_grad_norm(net.parameters(), 0.5, optimizer)
    optimizer.step()
    return loss.detach()


def full(parameter):
    """Its numbers, wherever they are."""
    tensor = getattr(parameter, "data", parameter)
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def agrees_with_the_whole(net, whole, rank):
    """Three steps by ranks, each on a part of the batch, are three of one process on all of it."""
    optimizers = [AdamW(each.parameters(), lr=1e-2) for each in (whole, net)]
    for step in range(3):
        loss = train(net, optimizers[1], step, rank)
        distributed.all_reduce(loss, op=distributed.ReduceOp.SUM)
        torch.testing.assert_close(loss / RANKS, train(whole, optimizers[0], step))
    for ours, theirs in zip(net.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(full(ours), full(theirs), rtol=1e-4, atol=1e-5)
    return optimizers[1]


def goes_on_from_a_checkpoint(net, optimizer, rank, mesh, folder):
    """A model of other weights that loads what was saved takes the same next step, to the bit."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint import state_dict

    def states(net, optimizer):
        found = state_dict.get_state_dict(net, optimizer)
        return dict(zip(("model", "optimizer"), found, strict=True))

    checkpoint.save(states(net, optimizer), checkpoint_id=folder)
    other = fully_sharded(gpt(seed=2), mesh)
    other_optimizer = AdamW(other.parameters(), lr=1e-2)
    loaded = states(other, other_optimizer)
    checkpoint.load(loaded, checkpoint_id=folder)
    state_dict.set_state_dict(
        other,
        other_optimizer,
        model_state_dict=loaded["model"],
        optim_state_dict=loaded["optimizer"],
    )
    losses = [train(*each, 3, rank) for each in ((net, optimizer), (other, other_optimizer))]
    assert torch.equal(*losses)
    for ours, theirs in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(full(ours), full(theirs))


def models_on_a_rank(rank, folder):
    from torch.distributed.tensor import init_device_mesh
    from torch.nn.parallel import DistributedDataParallel

    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS)
    try:
        mesh = init_device_mesh("cpu", (RANKS,))
        for options in MODELS.values():
            agrees_with_the_whole(DistributedDataParallel(gpt(**options)), gpt(), rank)
            net = fully_sharded(gpt(**options), mesh)
            optimizer = agrees_with_the_whole(net, gpt(), rank)
        goes_on_from_a_checkpoint(net, optimizer, rank, mesh, f"{folder}/saved")
        distributed.barrier()
    finally:
        distributed.destroy_process_group()
    leave()


@pytest.mark.skipif(not distributed.is_available(), reason="this torch has no distributed")
def test_gpt_of_two_ranks_and_its_checkpoint(tmp_path, one_thread):
    from torch.distributed import checkpoint

    torch.multiprocessing.spawn(models_on_a_rank, (tmp_path,), RANKS)
    # One process without a group reads what two have written.
    whole, alone = gpt(), gpt(seed=2)
    optimizer = AdamW(whole.parameters(), lr=1e-2)
    for step in range(3):
        train(whole, optimizer, step)
    state = {"model": alone.state_dict()}
    checkpoint.load(state, checkpoint_id=tmp_path / "saved", no_dist=True)
    alone.load_state_dict(state["model"])
    for ours, theirs in zip(alone.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
