"""Train on several processes while gradients are poisoned, and compare with a clean run.

Every process sees its share of each batch. At random steps one gradient entry of one random process becomes NaN, inf or
1e38 before the processes exchange their gradients. `GradGuard` finds what is not finite on whichever process holds it,
all take the same decision, and `ComplexAdamW`, its Langevin noise on, skips the step without waiting for the flag. The
noise depends on seed, step and element alone, so any number of processes, whole or sharded (FSDP2), draws the same.

    python examples/train_ddp.py [--steps 500] [--rate 0.08] [--shard] [--checkpoint FOLDER]
    torchrun --nproc-per-node 2 examples/train_ddp.py --shard

With `--checkpoint` the clean run is saved half-way by torch.distributed.checkpoint and goes on from what it loads. The
last line of output is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import tempfile

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from stablekern.optim import ComplexAdamW, GradGuard

SAMPLES, BATCH = 512, 64
POISONS = (math.nan, math.inf, 1e38)


def data() -> tuple[Tensor, Tensor]:
    """A noisy regression, the same on every process."""
    g = torch.Generator().manual_seed(3)
    inputs = torch.randn(SAMPLES, 4, generator=g)
    targets = torch.sin(inputs[:, :2].sum(-1, keepdim=True)) + 0.3 * torch.randn(SAMPLES, 1, generator=g)
    return inputs, targets


def build(shard: bool) -> tuple[nn.Module, nn.Module]:
    """The model, and what is called in its place on several processes."""
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(4, 33), nn.Tanh(), nn.Linear(33, 1))
    if shard:
        from torch.distributed.fsdp import fully_shard

        for part in (model[0], model[2], model):
            fully_shard(part, mesh=dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),)))
        return model, model
    return model, DistributedDataParallel(model) if dist.get_world_size() > 1 else model


def reload(model: nn.Module, optimizer: ComplexAdamW, folder: str) -> None:
    """Save everything, and take it back: by name, whatever the number of processes."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    weights, moments = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": moments}
    dcp.save(state, checkpoint_id=folder)
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


def train(steps: int, rate: float, shard: bool, checkpoint: str | None = None) -> tuple[float, int, int]:
    """(Final loss over all samples, steps that were poisoned, steps that were skipped)."""
    rank, size = dist.get_rank(), dist.get_world_size()
    model, replica = build(shard)
    optimizer = ComplexAdamW(model.parameters(), lr=3e-2, temperature=1e-9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    guard = GradGuard(model, 0.3)
    optimizer.found_inf = guard.found_inf
    inputs, targets = data()
    rng = random.Random(7)  # the same on every process
    poisoned = 0
    for step in range(steps):
        first = step * BATCH % SAMPLES + rank * (BATCH // size)
        here = slice(first, first + BATCH // size)
        prediction = replica(inputs[here])
        poison, unlucky = rng.choice(POISONS), rng.randrange(size)
        if rng.random() < rate:
            poisoned += 1
            if rank == unlucky:  # from here it goes backwards through the model, and to the other processes
                prediction.register_hook(
                    lambda grad, poison=poison: grad.clone().index_fill_(0, torch.tensor(0), poison)
                )
        optimizer.zero_grad()
        nn.functional.mse_loss(prediction, targets[here]).backward()
        guard()
        optimizer.step()
        schedule.step()
        if checkpoint and step == steps // 2:
            reload(model, optimizer, checkpoint)
    with torch.no_grad():
        loss = nn.functional.mse_loss(replica(inputs), targets)
    return float(loss), poisoned, int(guard.skipped)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--rate", type=float, default=0.08, help="share of the steps that are poisoned")
    parser.add_argument("--shard", action="store_true", help="FSDP2 instead of DDP")
    parser.add_argument("--checkpoint", help="folder in which the clean run is saved half-way")
    options = parser.parse_args()
    if "RANK" in os.environ:  # torchrun
        dist.init_process_group("gloo")
    else:
        store = tempfile.NamedTemporaryFile(delete=False)  # noqa: SIM115
        dist.init_process_group("gloo", init_method=f"file://{store.name}.store", rank=0, world_size=1)
    try:
        clean, _, _ = train(options.steps, 0.0, options.shard, options.checkpoint)
        loss, poisoned, skipped = train(options.steps, options.rate, options.shard)
        if dist.get_rank() == 0:
            print(f"{poisoned} of {options.steps} steps poisoned, {skipped} skipped")
            print(f"loss {loss:.5f}, of the clean run {clean:.5f}")
            result = {"processes": dist.get_world_size(), "steps": options.steps, "poisoned": poisoned}
            print(json.dumps({**result, "skipped": skipped, "loss": loss, "clean_loss": clean}))
        dist.barrier()
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
