"""Heads of a probe: linear and MLP on one layer, linear on a learned sum of all of them.

What is chosen, is chosen by validation tracks: `choose` is given no other rows than those of
training and validation. MLP, optimiser and learning rates are those of MARBLE
(github.com/a43992899/MARBLE-Benchmark, benchmark/tasks/GTZAN/GTZAN_base_config.yaml).
"""

import copy
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import log_softmax
from torch import Tensor, nn

from mgc_dist.bias_model.heads import Head, fit_head
from mgc_dist.config import HeadName, ProbeConfig
from mgc_dist.scoring.metrics import track_labels, track_means

HIDDEN, DROPOUT, BATCH, PATIENCE = 512, 0.2, 64, 20
"""Of the MLP and its training, as MARBLE has them."""


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Rows of one split.

    Attributes:
        states: float32 [N, L, D] of all rows of the data set; only those named are read.
        rows: int64 [M].
        label, track: int64 [M].
    """

    states: NDArray[np.float32]
    rows: NDArray[np.int64]
    label: NDArray[np.int64]
    track: NDArray[np.int64]

    def of(self, layer: int | None) -> NDArray[np.float32]:
        """The states of a layer, [M, D]; of all, [M, L, D], for None."""
        return np.asarray(
            self.states[self.rows] if layer is None else self.states[self.rows, layer]
        )


class Mix(nn.Module):
    """A linear layer on the sum of all layers, weighted by a softmax."""

    def __init__(self, layers: int, width: int, genres: int) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.zeros(layers))
        self.linear = nn.Linear(width, genres)

    def forward(self, states: Tensor) -> Tensor:
        """[B, L, D] -> [B, K]."""
        mixed = torch.einsum("l,bld->bd", self.mix.softmax(0), states)  # [B, D]
        logits: Tensor = self.linear(mixed)
        return logits


@dataclass(frozen=True, kw_only=True)
class Net:
    """A fitted network, on the CPU.

    Attributes:
        net: [B, D] or [B, L, D] -> [B, K].
        mean, scale: of its inputs over the training rows.
    """

    net: nn.Module
    mean: NDArray[np.float32]
    scale: NDArray[np.float32]

    def logits(self, states: NDArray[np.float32]) -> NDArray[np.float64]:
        """[M, ...] -> [M, K]."""
        with torch.no_grad():
            found = self.net(torch.from_numpy((states - self.mean) / self.scale))
        return np.asarray(found.double().numpy())


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A kind of head on a layer, with the setting that validation tracks chose.

    Attributes:
        head: its kind.
        layer: from 0; None for all.
        setting: C of `linear`, else the learning rate.
        nll: over validation tracks, the mean over the fits.
        fits: of each seed; one of `linear`, which draws nothing.
    """

    head: HeadName
    layer: int | None
    setting: float
    nll: float
    fits: tuple[Head | Net, ...]

    def logits(self, rows: Rows) -> list[NDArray[np.float32]]:
        """Of each fit, float32 [M, K]."""
        states = rows.of(self.layer)
        return [fit.logits(states).astype(np.float32) for fit in self.fits]


def choose(
    head: HeadName,
    layer: int | None,
    training: Rows,
    validation: Rows,
    genres: int,
    config: ProbeConfig,
    device: torch.device,
) -> Choice:
    """Fit a head with every setting, and keep the one that validation tracks like best.

    Args:
        head: its kind.
        layer: from 0; None for all, of `mix`.
        training: what it is fitted on.
        validation: what chooses the setting, and ends the training of a network.
        genres: K.
        config: the settings to choose from.
        device: of the networks.

    Returns:
        Its first seed chooses the learning rate, which the other seeds share.
    """
    if head == "linear":
        return _linear(layer, training, validation, genres, config)
    seeds = range(config.seed, config.seed + config.seeds)
    trainer = _Trainer(head, layer, training, validation, genres, config.epochs, device)
    tried = {lr: trainer.fit(lr, seeds[0]) for lr in config.lr}
    best = min(tried, key=lambda lr: tried[lr][0])
    fits = [tried[best], *(trainer.fit(best, seed) for seed in seeds[1:])]
    nll = float(np.mean([loss for loss, _ in fits]))
    return Choice(head=head, layer=layer, setting=best, nll=nll, fits=tuple(net for _, net in fits))


def _linear(
    layer: int | None, training: Rows, validation: Rows, genres: int, config: ProbeConfig
) -> Choice:
    states, unseen = training.of(layer), validation.of(layer)
    heads = {c: fit_head(states, training.label, genres, c) for c in config.c}
    losses = {c: track_nll(one.logits(unseen), validation) for c, one in heads.items()}
    best = min(losses, key=lambda c: losses[c])
    return Choice(head="linear", layer=layer, setting=best, nll=losses[best], fits=(heads[best],))


def track_nll(logits: NDArray[np.float64], rows: Rows) -> float:
    """Mean over tracks of -log of the truth, by the mean of their segments' log-probabilities."""
    _, means = track_means(log_softmax(logits, axis=1), rows.track)
    labels = track_labels(rows.label, rows.track)
    return float(-log_softmax(means, axis=1)[np.arange(len(labels)), labels].mean())


class _Trainer:
    """Trains networks of one kind on one layer; the states go to the device once."""

    def __init__(
        self,
        head: HeadName,
        layer: int | None,
        training: Rows,
        validation: Rows,
        genres: int,
        epochs: int,
        device: torch.device,
    ) -> None:
        states = training.of(layer)
        self._mean = states.mean(axis=0, dtype=np.float64).astype(np.float32)
        deviation = states.std(axis=0, dtype=np.float64).astype(np.float32)
        self._scale = np.where(deviation > 1e-8, deviation, np.float32(1.0))
        self._x, self._unseen = (
            torch.from_numpy((each - self._mean) / self._scale).to(device)
            for each in (states, validation.of(layer))
        )
        self._y = torch.from_numpy(training.label).to(device)
        self._validation, self._epochs, self._device = validation, epochs, device
        self._head, self._genres = head, genres

    def fit(self, lr: float, seed: int) -> tuple[float, Net]:
        """Adam, to the epoch that validation tracks like best: their NLL, and the network."""
        on = [self._device] if self._device.type == "cuda" else []
        with torch.random.fork_rng(devices=on):
            torch.manual_seed(seed)
            net = self._new().to(self._device)
            optimizer = torch.optim.Adam(net.parameters(), lr=lr)
            best, kept, waited = float("inf"), copy.deepcopy(net), 0
            for _ in range(self._epochs):
                self._epoch(net, optimizer)
                loss = self._judge(net)
                waited += 1
                if loss < best:
                    best, kept, waited = loss, copy.deepcopy(net), 0
                if waited == PATIENCE:
                    break
        return best, Net(net=kept.cpu().eval(), mean=self._mean, scale=self._scale)

    def _new(self) -> nn.Module:
        width, genres = self._x.shape[-1], self._genres
        if self._head == "mix":
            return Mix(self._x.shape[1], width, genres)
        return nn.Sequential(
            nn.Linear(width, HIDDEN), nn.ReLU(), nn.Dropout(DROPOUT), nn.Linear(HIDDEN, genres)
        )

    def _epoch(self, net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        net.train()
        order = torch.randperm(len(self._y)).to(self._device)
        for rows in torch.split(order, BATCH):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(net(self._x[rows]), self._y[rows])
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()

    def _judge(self, net: nn.Module) -> float:
        net.eval()
        with torch.no_grad():
            logits = net(self._unseen).double().cpu().numpy()
        return track_nll(logits, self._validation)
