# SPDX-License-Identifier: Apache-2.0
"""`python -m oarlock.benchmarks.end_to_end_torch`: the same models in PyTorch, one process, two threads, as often as asked.

Embeddings with gradients that name their rows under Adagrad, dense parameters under fused Adam, matrix products at precision
"medium", which on AMD processors is the fast one. It has no row-wise Adagrad; Adagrad keeps a state per value. Lines are as in
``end_to_end_gemm``: {"model": name, "data": folder, "dim": n, "batch": n, "steps": k}. Invariant: ids, numbers and labels are in
memory before the clock starts. Main thread. Imports nothing of this project: it may run in an environment of its own.
"""

import importlib
import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

DEEP = (400, 400, 400)
FACTORS, TOWER = 8, (64, 32, 16, 8)
THREADS = 2


def chain(torch: Any, *widths: int, last: bool) -> Any:
    """Return Linear layers with ReLU between them, and after the last one if ``last``."""
    parts: list[Any] = []
    for i, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
        parts.append(torch.nn.Linear(inputs, outputs))
        if last or i < len(widths) - 2:
            parts.append(torch.nn.ReLU())
    return torch.nn.Sequential(*parts)


class Trained:
    """A model, its data in batches, and its optimizers. ``step()`` trains the next batch."""

    def __init__(self, torch: Any, asked: dict[str, Any]) -> None:
        self._torch = torch
        folder, size = Path(asked["data"]), asked["batch"]
        self._wide = asked["model"] == "wdl"
        ids = np.load(folder / "ids.npy")
        self._ids = torch.from_numpy(ids.astype(np.int64)).split(size)
        self._labels = torch.from_numpy(np.load(folder / "label.npy")).split(size)
        self._count = len(ids) // size
        rows = ids.max(axis=0).astype(np.int64) + 1
        if self._wide:
            numbers = np.load(folder / "numbers.npy")
            self._numbers = torch.from_numpy(numbers).split(size)
            width = numbers.shape[1]
            self._tables = [
                self._table(int(rows.max()), asked["dim"]),
                torch.nn.EmbeddingBag(int(rows.max()), 1, mode="sum", sparse=True),
            ]
            deep = chain(torch, width + ids.shape[1] * asked["dim"], *DEEP, 1, last=False)
            self._dense = [deep, torch.nn.Linear(width, 1)]
        else:
            self._tables = [self._table(int(n), FACTORS + TOWER[0] // 2) for n in rows]
            self._dense = [chain(torch, *TOWER, last=True), torch.nn.Linear(FACTORS + TOWER[-1], 1)]
        dense = [p for module in self._dense for p in module.parameters()]
        sparse = [p for module in self._tables for p in module.parameters()]
        self._optimizers = [torch.optim.Adam(dense, lr=1e-3, fused=True), torch.optim.Adagrad(sparse, lr=0.02)]
        self._loss = torch.nn.BCEWithLogitsLoss()
        self._at = 0
        self.loss = 0.0

    def _table(self, rows: int, dim: int) -> Any:
        weight = self._torch.empty(rows, dim).uniform_(-0.05, 0.05)
        return self._torch.nn.Embedding(rows, dim, sparse=True, _weight=weight)

    def _score(self, k: int) -> Any:
        torch, ids = self._torch, self._ids[k]
        if self._wide:
            numbers, rows = self._numbers[k], self._tables[0](ids)
            hidden = torch.cat([numbers, rows.reshape(len(ids), -1)], 1)
            return self._dense[0](hidden) + self._dense[1](numbers) + self._tables[1](ids)
        user, item = self._tables[0](ids[:, 0]), self._tables[1](ids[:, 1])
        tower = self._dense[0](torch.cat([user[:, FACTORS:], item[:, FACTORS:]], 1))
        return self._dense[1](torch.cat([user[:, :FACTORS] * item[:, :FACTORS], tower], 1))

    def step(self) -> None:
        k = self._at = (self._at + 1) % self._count
        loss = self._loss(self._score(k).squeeze(1), self._labels[k])
        loss.backward()
        for optimizer in self._optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.loss = float(loss.detach())


def main() -> int:
    """Answer until the input ends."""
    torch = importlib.import_module("torch")
    torch.set_num_threads(THREADS)
    torch.set_float32_matmul_precision("medium")
    torch.manual_seed(0)
    known: dict[str, Trained] = {}
    for line in sys.stdin:
        asked = json.loads(line)
        steps = asked.pop("steps")
        name = json.dumps(asked)
        if name not in known:
            known[name] = Trained(torch, asked)
        begun, worked = time.perf_counter(), time.process_time()
        for _ in range(steps):
            known[name].step()
        answer = {"seconds": time.perf_counter() - begun, "processor": time.process_time() - worked}
        print(json.dumps({**answer, "loss": known[name].loss, "version": torch.__version__}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
