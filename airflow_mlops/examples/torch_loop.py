"""A PyTorch loop with distributed data parallelism: a logistic regression on synthetic data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def train_loop_per_worker(config: Mapping[str, Any]) -> None:
    """Train with DDP, one checkpoint per epoch; a resumed run goes on at the next epoch.

    :param config: optional ``epochs`` (3), ``rows`` (per worker, 512), ``lr`` (0.1), ``seed`` (7)
    """
    import os
    import tempfile

    import ray.train
    import ray.train.torch
    import torch

    context = ray.train.get_context()
    torch.manual_seed(int(config.get("seed", 7)))
    model = ray.train.torch.prepare_model(torch.nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=float(config.get("lr", 0.1)))
    first = 0
    checkpoint = ray.train.get_checkpoint()
    if checkpoint:
        with checkpoint.as_directory() as folder:
            state = torch.load(os.path.join(folder, "state.pt"), weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["epoch"] + 1

    generator = torch.Generator().manual_seed(100 + context.get_world_rank())
    x = torch.randn(int(config.get("rows", 512)), 4, generator=generator)
    y = (x.sum(dim=1, keepdim=True) > 0).float()
    for epoch in range(first, int(config.get("epochs", 3))):
        loss = torch.nn.functional.binary_cross_entropy_with_logits(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with tempfile.TemporaryDirectory() as folder:
            saved = None
            if context.get_world_rank() == 0:
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch}
                torch.save(state, os.path.join(folder, "state.pt"))
                saved = ray.train.Checkpoint.from_directory(folder)
            ray.train.report({"loss": loss.item(), "epoch": epoch}, checkpoint=saved)
