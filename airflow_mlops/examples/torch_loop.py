"""A PyTorch loop with distributed data parallelism, on CPUs or GPUs, that saves itself before its machine goes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def train_loop_per_worker(config: Mapping[str, Any]) -> None:
    """Train a binary classifier with DDP; a resumed run goes on at the next step, with another number of workers at the
    epoch it was in.

    On a preempted (spot) node Ray Train says so in time for one more checkpoint, and nothing is lost but the time of
    the restart. Asking for it is a collective operation: every worker asks after the same steps.

    :param config: optional ``data`` (Parquet file or folder; default: synthetic), ``features``, ``label``, ``hidden``
        (units of a hidden layer; default: none), ``batch`` (rows per worker; default: all), ``epochs`` (3), ``rows``
        (synthetic ones per worker, 512), ``lr`` (0.1), ``seed`` (7), ``checkpoint_every`` (epochs, 1), ``ask_every``
        (steps, 10)
    """
    import math
    import os
    import tempfile

    import ray.train
    import ray.train.torch
    import torch

    context, seed = ray.train.get_context(), int(config.get("seed", 7))
    rank, world = context.get_world_rank(), context.get_world_size()
    torch.manual_seed(seed)
    x, y = (tensor.to(ray.train.torch.get_device()) for tensor in _share(config))
    batch = int(config.get("batch") or len(x))
    epochs, parts = int(config.get("epochs", 3)), math.ceil(len(x) / batch)
    every, ask_every = int(config.get("checkpoint_every", 1)), int(config.get("ask_every", 10))
    # An older Ray Train does not have it; there a preempted run goes on from its last periodic checkpoint.
    preemption = getattr(ray.train, "get_preemption_info", lambda: None)

    model = ray.train.torch.prepare_model(_network(x.shape[1], int(config.get("hidden", 0))))
    optimizer = torch.optim.SGD(model.parameters(), lr=float(config.get("lr", 0.1)))
    first = 0
    checkpoint = ray.train.get_checkpoint()
    if checkpoint:
        with checkpoint.as_directory() as folder:
            state = torch.load(os.path.join(folder, "state.pt"), weights_only=True, map_location=x.device)
        # The bare network's: there may be more or fewer workers than before, down to one without DDP.
        _bare(model).load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["epoch"] * parts + state["part"] + 1
        if state["world"] != world:  # the shares are others
            first = (state["epoch"] + state["last_part"]) * parts

    warned = False
    for step in range(first, epochs * parts):
        epoch, part = divmod(step, parts)
        if part == 0 or step == first:
            order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed + epoch))
        rows = order[part * batch : (part + 1) * batch]
        loss = torch.nn.functional.binary_cross_entropy_with_logits(model(x[rows]), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

        last_part, just_in_time = part + 1 == parts, False
        if last_part or (step + 1) % ask_every == 0:
            taken = preemption() is not None
            just_in_time, warned = taken and not warned, taken
        if not (just_in_time or (last_part and ((epoch + 1) % every == 0 or epoch + 1 == epochs))):
            continue
        with tempfile.TemporaryDirectory() as folder:
            saved = None
            if rank == 0:
                position = {"epoch": epoch, "part": part, "last_part": last_part, "world": world}
                state = {"model": _bare(model).state_dict(), "optimizer": optimizer.state_dict(), **position}
                torch.save(state, os.path.join(folder, "state.pt"))
                saved = ray.train.Checkpoint.from_directory(folder)
            metrics = {"loss": loss.item(), "epoch": epoch, "step": step, "just_in_time": just_in_time}
            ray.train.report(metrics, checkpoint=saved)


def _share(config: Mapping[str, Any]) -> tuple[Any, Any]:
    """This worker's rows; all workers have equally many, or DDP would wait for the one with more."""
    import ray.train
    import torch

    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    if not config.get("data"):
        generator = torch.Generator().manual_seed(100 + rank)
        x = torch.randn(int(config.get("rows", 512)), 4, generator=generator)
        return x, (x.sum(dim=1, keepdim=True) > 0).float()
    import pyarrow.dataset

    features, label = list(config["features"]), config["label"]
    table = pyarrow.dataset.dataset(config["data"]).to_table(columns=[*features, label])
    size = table.num_rows // world
    frame = table.slice(rank * size, size).to_pandas()
    x = torch.tensor(frame[features].to_numpy(dtype="float32"))
    return x, torch.tensor(frame[[label]].to_numpy(dtype="float32"))


def _network(inputs: int, hidden: int) -> Any:
    import torch

    if not hidden:
        return torch.nn.Linear(inputs, 1)
    return torch.nn.Sequential(torch.nn.Linear(inputs, hidden), torch.nn.ReLU(), torch.nn.Linear(hidden, 1))


def _bare(model: Any) -> Any:
    return getattr(model, "module", model)
