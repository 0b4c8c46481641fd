# SPDX-License-Identifier: Apache-2.0
"""NCF in PyTorch as one would write it: one process, two embedding tables, Adam; negatives drawn by numpy in the loop or before.

Two forms of the row updates, each on one and two threads, are tried and the fastest counts: gradients that name their rows
(sparse=True, SparseAdam, which like ours touches only the rows of the batch), and dense gradients under fused Adam, which
changes all rows at each step and pays off while tables are small. Main thread.
"""

import importlib
import itertools
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]
FACTORS, HALF, WIDTHS = 8, 32, (64, 32, 16, 8)
NEGATIVES = 4
FORMS = ("sparse", "dense")
THREADS = (1, 2)


def load_torch() -> Any:
    """Return the torch module; ImportError says why there is none."""
    return importlib.import_module("torch")


class TorchNcf:
    """NeuMF-8. ``run(batches)`` draws negatives; ``run_given(batches)`` takes batches that were prepared before."""

    def __init__(self, torch: Any, users: Ids, items: Ids, sizes: tuple[int, int], batch_rows: int, form: str) -> None:
        self._torch = torch
        self._users, self._items = users, items
        self._sizes = sizes
        self._rows = batch_rows
        self._form = form
        self._at = 0

    def start(self) -> None:
        """Make the parameters, and prepare a few batches."""
        torch, nn = self._torch, self._torch.nn
        torch.manual_seed(0)
        sparse = self._form == "sparse"
        self._tables = [nn.Embedding(n, FACTORS + HALF, sparse=sparse) for n in self._sizes]
        for table in self._tables:
            nn.init.normal_(table.weight, std=0.01)
        layers: list[Any] = []
        for wide, narrow in itertools.pairwise(WIDTHS):
            layers += [nn.Linear(wide, narrow), nn.ReLU()]
        self._tower = nn.Sequential(*layers)
        self._score = nn.Linear(FACTORS + WIDTHS[-1], 1)
        weights = [t.weight for t in self._tables]
        dense = [*self._tower.parameters(), *self._score.parameters()]
        if sparse:
            self._optimizers = [
                torch.optim.SparseAdam(weights, lr=0.003),
                torch.optim.Adam(dense, lr=0.001, fused=True),
            ]
        else:
            groups = [{"params": weights, "lr": 0.003}, {"params": dense}]
            self._optimizers = [torch.optim.Adam(groups, lr=0.001, fused=True)]
        self._loss = nn.BCEWithLogitsLoss()
        # Bit (user, item) tells of a pair that happened: the quickest test that numpy has.
        self._taken = np.zeros(self._sizes, np.bool_)
        self._taken[self._users, self._items] = True
        self._rng = np.random.default_rng(0)
        self._labels = np.zeros((self._rows, 1 + NEGATIVES), np.float32)
        self._labels[:, 0] = 1.0
        self._given = [self._tensors(*self._draw()) for _ in range(16)]

    def _draw(self) -> tuple[Ids, Ids]:
        first = self._at
        self._at = (first + self._rows) % (len(self._users) - self._rows)
        users = self._users[first : first + self._rows]
        drawn = np.empty((self._rows, 1 + NEGATIVES), np.int64)
        drawn[:, 0] = self._items[first : first + self._rows]
        negatives = self._rng.integers(0, self._sizes[1], (self._rows, NEGATIVES))
        wrong = self._taken[users[:, None], negatives]
        while wrong.any():
            where = np.nonzero(wrong)
            negatives[where] = self._rng.integers(0, self._sizes[1], len(where[0]))
            wrong[where] = self._taken[users[where[0]], negatives[where]]
        drawn[:, 1:] = negatives
        return np.repeat(users, 1 + NEGATIVES), drawn.reshape(-1)

    def _tensors(self, users: Ids, items: Ids) -> tuple[Any, Any, Any]:
        tensor = self._torch.from_numpy
        return tensor(users), tensor(items), tensor(self._labels.reshape(-1))

    def _step(self, users: Any, items: Any, labels: Any) -> None:
        torch = self._torch
        u, i = self._tables[0](users), self._tables[1](items)
        tower = self._tower(torch.cat([u[:, FACTORS:], i[:, FACTORS:]], 1))
        score = self._score(torch.cat([u[:, :FACTORS] * i[:, :FACTORS], tower], 1)).squeeze(1)
        for optimizer in self._optimizers:
            optimizer.zero_grad()
        self._loss(score, labels).backward()
        for optimizer in self._optimizers:
            optimizer.step()

    def run(self, batches: int) -> int:
        """Train ``batches`` batches, drawing their negatives; return their samples."""
        for _ in range(batches):
            self._step(*self._tensors(*self._draw()))
        return batches * self._rows * (1 + NEGATIVES)

    def run_given(self, batches: int) -> int:
        """Train ``batches`` prepared batches; return their samples."""
        for n in range(batches):
            self._step(*self._given[n % len(self._given)])
        return batches * self._rows * (1 + NEGATIVES)


def fastest(torch: Any, forms: dict[str, TorchNcf], seconds: float) -> tuple[str, int, dict[str, float]]:
    """Return (form, threads) that train the batches in the least time, of two tries each, and microseconds per batch of all.

    Each try takes ``seconds``: two threads that others keep waiting may be a hundred times slower than one. Torch is left
    with the threads that were fastest.
    """
    best: dict[tuple[str, int], float] = {}
    for _ in range(2):
        for threads in THREADS:
            torch.set_num_threads(threads)
            for name, one in forms.items():
                one.run_given(1)
                begun, batches, spent = time.perf_counter(), 0, 0.0
                while not batches or spent < seconds:
                    one.run_given(1)
                    batches += 1
                    spent = time.perf_counter() - begun
                spent /= batches
                best[name, threads] = min(best.get((name, threads), spent), spent)
    form, threads = min(best, key=lambda choice: best[choice])
    torch.set_num_threads(threads)
    return form, threads, {f"{name}, threads {n}": round(spent * 1e6) for (name, n), spent in best.items()}
