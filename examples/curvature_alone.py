"""Hessian-vector products, top eigenpairs and the trace of any PyTorch network; no pruning involved. Runs offline.

    python examples/curvature_alone.py

The network may be any `nn.Module` that returns logits [N, K]. It must be in eval mode, and the batches must not change
from one product to the next.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

from hf_camphive.curvature.eigensolvers import SolverOptions, lanczos
from hf_camphive.curvature.estimators import SamplingOptions, hutchinson
from hf_camphive.curvature.operators import network_curvature

digits = load_digits()
images = torch.tensor(digits.images[:512], dtype=torch.float32)[:, None] / 16  # [512, 1, 8, 8]
labels = torch.tensor(digits.target[:512])

torch.manual_seed(0)
net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(72, 10)).eval()
optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
for _ in range(100):
    optimizer.zero_grad()
    nn.functional.cross_entropy(net(images), labels).backward()
    optimizer.step()

# The Hessian of the mean cross-entropy over all weights, known by its products: hessian(v) is H v.
batches = list(zip(images.split(256), labels.split(256)))
hessian, space = network_curvature(net, batches, "hessian")
vector = torch.randn(hessian.size, generator=torch.Generator().manual_seed(0))
product = dict(zip(space.shapes, space.split(hessian(vector))))
print(
    f"H is {hessian.size} x {hessian.size}; H v by weight:", {name: list(part.shape) for name, part in product.items()}
)

generator = torch.Generator().manual_seed(0)
top = lanczos(hessian, hessian.size, 3, SolverOptions(steps=30, tolerance=1e-3, generator=generator))
print("Top eigenvalues:", [round(value, 4) for value in top.values.tolist()])
print(top.verdict)

trace = hutchinson(hessian, hessian.size, 32, SamplingOptions(generator)).trace
print(f"Trace: {trace.value:.3f}, standard error {trace.error:.3f}")
