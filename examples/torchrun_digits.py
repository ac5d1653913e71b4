"""Several processes: norms go in before DDP, and their statistics are merged at the end.

    torchrun --nproc_per_node 2 examples/torchrun_digits.py --out out/torchrun

Runs on CPUs (gloo) as well as on GPUs (nccl). Every rank does the same calls; ``save`` lets rank 0
write and the others wait for it. With ``--norm sync`` the norms take their statistics over all
processes where there are GPUs; gloo cannot, so there they are plain batch norms, and the notes say
so.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

import bnify
from digits import digits
from mlp import MyNetwork


def main() -> None:
    """Insert, wrap, train, calibrate, save."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--norm", default="batch", choices=["batch", "sync"])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("out/torchrun"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    gpus = torch.cuda.is_available()
    distributed.init_process_group("nccl" if gpus else "gloo")
    rank, world = distributed.get_rank(), distributed.get_world_size()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpus else torch.device("cpu")
    if gpus:
        torch.cuda.set_device(device)

    # Each rank has every world-th image: no sampler, so that none is repeated to pad the last.
    data = digits()
    images, labels = data.images[rank::world], data.labels[rank::world]
    loader = DataLoader(TensorDataset(images, labels), 32, shuffle=True, drop_last=True)

    # 1. Norms before DDP: the optimizer and DDP then see their parameters.
    torch.manual_seed(0)
    result = bnify.insert(MyNetwork().to(device), images[:32].to(device), norm=options.norm)
    model = result.model
    if rank == 0:
        print(f"norms behind {', '.join(edit.layer for edit in result.plan.edits)}")
        for note in result.plan.notes:
            print(f"note: {note}")

    # 2. The usual loop.
    parallel = DistributedDataParallel(model, device_ids=[device.index] if gpus else None)
    optimizer = torch.optim.AdamW(bnify.param_groups(model, weight_decay=0.01), lr=2e-3)
    torch.manual_seed(rank)
    parallel.train()
    for _ in range(options.epochs):
        for batch, target in loader:
            loss = F.cross_entropy(parallel(batch.to(device)), target.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    before = accuracy(model, data.test_images.to(device), data.test_labels.to(device))

    # 3. Plain batch norms follow the batches of their own rank: take the statistics of all ranks.
    bnify.calibrate(model, [images.to(device)])
    after = accuracy(model, data.test_images.to(device), data.test_labels.to(device))

    # 4. Rank 0 writes; the others go on when the folder is whole.
    model.cpu()
    place = result.save(options.out, onnx=False, force=True)
    distributed.barrier()  # gloo aborts where its peer has gone already
    distributed.destroy_process_group()
    loaded = bnify.load(place, model=MyNetwork())
    again = accuracy(loaded, data.test_images, data.test_labels)
    if rank == 0:
        print(f"{world} ranks: {before:.1%}, calibrated {after:.1%}, loaded again {again:.1%}")


@torch.no_grad()
def accuracy(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of images whose largest logit in eval mode is the label's; the mode is given back."""
    mode = model.training
    try:
        return (model.eval()(images).argmax(1) == labels).float().mean().item()
    finally:
        model.train(mode)


if __name__ == "__main__":
    main()
