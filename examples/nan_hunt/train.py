"""Train a small model on graphs of sensors. The loss falls, then torch.linalg.eigh gives up: README.md finds out why.

Each sample is a window of 12 noisy sensors; the graph of their correlations is encoded by the first eigenvectors of its
Laplacian, as positional encodings are, and the label is the number of clusters among the sensors, 2 or 3.
"""

import torch
from torch import nn

SENSORS, LENGTH, VECTORS = 12, 64, 4


def batch(generator: torch.Generator, step: int, size: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows (size, SENSORS, LENGTH) and labels (size,); now and then a window in which nothing was connected."""
    labels = torch.randint(0, 2, (size,), generator=generator)
    sources = torch.randn(size, 3, LENGTH, generator=generator)
    cluster = torch.arange(SENSORS).expand(size, SENSORS) % (labels + 2).unsqueeze(-1)
    windows = sources.gather(1, cluster.unsqueeze(-1).expand(-1, -1, LENGTH))
    windows = windows + 0.8 * torch.randn(size, SENSORS, LENGTH, generator=generator)
    if step % 40 == 27:
        windows[0] = 0.0
    return windows, labels.float()


class GraphEncoding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.strength = nn.Parameter(torch.zeros(SENSORS, SENSORS))

    def forward(self, windows: torch.Tensor) -> torch.Tensor:
        x = windows / windows.norm(dim=-1, keepdim=True).clamp(min=1e-6)
        edges = (x @ x.mT).abs() * nn.functional.softplus(self.strength + self.strength.T)
        scale = edges.sum(-1).clamp(min=1e-6).rsqrt()
        laplacian = torch.eye(SENSORS) - scale.unsqueeze(-1) * edges * scale.unsqueeze(-2)
        return torch.linalg.eigh(laplacian).eigenvectors[..., :VECTORS]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoding = GraphEncoding()
        self.head = nn.Sequential(nn.Linear(SENSORS * VECTORS, 32), nn.ReLU(), nn.Linear(32, 1))

    def forward(self, windows: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoding(windows).abs().flatten(1)).squeeze(-1)


def main() -> None:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = Net()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(1, 101):
        windows, labels = batch(generator, step)
        loss = nn.functional.binary_cross_entropy_with_logits(model(windows), labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 20 == 0:
            print(f"step {step}: loss {loss.item():.3f}")


if __name__ == "__main__":
    main()
