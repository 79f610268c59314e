"""Use the four views in your own PyTorch loop, without this project's trainer.

    python examples/own_loop.py data/cifar10

The loader is iterated once per epoch, like a `DataLoader`. Its batches are already on the device.
Under torchrun, pass the rank and the number of ranks to `Order`. Each rank then gets its part.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from rsa_fast.pipelines import VIEWS, Loading, Order, open_source, open_views
from rsa_fast.pipelines.views import ViewSpec

# The augmentation as plain numbers. All other fields have RSA's values.
SPEC = ViewSpec(size_px=32, mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.2010))
BETA = 0.3  # the weight of pairs of two aggressive views; RSA lets it decay to 0


def main(data: Path, epochs: int = 10, batch_size: int = 64, seed: int = 0) -> list[float]:
    """Train a ResNet-18 with SimSiam's loss on RSA's views. Returns the mean loss of each epoch."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(seed)
    network = torchvision.models.resnet18(num_classes=128).to(device)
    predictor = nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 128)).to(device)
    parameters = [*network.parameters(), *predictor.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9)

    # `source` reads the images of any supported format. `order` chooses the images of each batch.
    # The choice depends only on the seed and the epoch, so a loop can begin at any epoch.
    source = open_source(data, "pretrain")
    order = Order(len(source.manifest), batch_size, seed)
    loading = Loading(backend="auto", threads=2)
    losses = []
    with open_views(
        source, SPEC, frozenset(VIEWS), order, device=device, loading=loading
    ) as loader:
        for epoch in range(epochs):
            total = torch.zeros((), device=device)
            for batch in loader.batches(epoch):
                q_1 = predictor(network(batch.aggressive_1))  # (B, 128)
                q_2 = predictor(network(batch.aggressive_2))  # (B, 128)
                with torch.no_grad():
                    z_1, z_2 = network(batch.weak_1), network(batch.weak_2)  # (B, 128)
                weak = similarity(q_1, z_2) + similarity(q_2, z_1)
                aggressive = similarity(q_1, q_2.detach()) + similarity(q_2, q_1.detach())
                loss = -((1 - BETA) * weak + BETA * aggressive) / 2
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                total += loss.detach()
            losses.append(total.item() / len(order))
            print(f"epoch {epoch}: loss {losses[-1]:.3f}")
    return losses


def similarity(q: Tensor, z: Tensor) -> Tensor:
    """The mean cosine of the rows of two tensors `(B, D)`."""
    return F.cosine_similarity(q, z).mean()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
