"""The training loop: resumable, and bounded by compute time rather than by steps."""

from __future__ import annotations

import random
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from tools.train_toy import corpus
from tools.train_toy.dialogues import Maker
from tools.train_toy.model import Toy, export, loss_sum
from tools.train_toy.optimizer import Optimizer
from tools.train_toy.packing import Batch, Codec, Packer, load_prose
from tools.train_toy.shape import Shape

# Short rows are the fastest, and hold all but the conversations with tools; two steps of three
# have rows that hold those, and a long one now and then keeps the whole context in use.
SHORT, LENGTH, LONG = 256, 512, 2048
LONG_ONE_IN = 50
WARM_UP = 60
HOLD = 0.35  # part of the run at the full rate; after it the rate falls to zero in a line


@dataclass
class Options:
    corpus: Path
    out: Path
    work: Path
    minutes: float  # of compute time (of this process, all threads)
    wall_minutes: float  # a cap for machines that are shared or paused
    tokens: int = 4096  # per step
    share: float = 0.6
    seed: int = 0
    export_every: float = 5.0  # minutes
    compile: bool = True


class Clock:
    """How far the run is, from 0 to 1, by whichever of the two budgets is further spent."""

    def __init__(self, options: Options, spent: float = 0.0) -> None:
        self.options, self.spent = options, spent
        self.wall, self.compute = time.monotonic(), self._now()

    def _now(self) -> float:
        return time.process_time() if not torch.cuda.is_available() else time.monotonic()

    def progress(self) -> float:
        used = self.spent + (self._now() - self.compute) / 60 / self.options.minutes
        wall = (time.monotonic() - self.wall) / 60 / self.options.wall_minutes
        return max(used, wall + self.spent)


def rate_at(step: int, progress: float) -> float:
    return min(1.0, (step + 1) / WARM_UP, max(0.0, (1 - progress) / (1 - HOLD)))


@torch.no_grad()
def prose_loss(model: Toy, prose: np.ndarray, device: str, windows: int = 16) -> float:
    """Mean loss on evenly spaced windows of held-out prose."""
    starts = np.linspace(0, len(prose) - LENGTH - 2, windows).astype(int)
    rows = np.stack([prose[s : s + LENGTH + 1] for s in starts]).astype(np.int64)
    total = 0.0
    for part in np.array_split(rows, max(1, windows // 8)):
        tokens = torch.from_numpy(part).to(device)
        same, ones = torch.zeros_like(tokens, dtype=torch.int32), torch.ones(tokens.shape)
        total += loss_sum(model, tokens, same, ones.to(device)).item()
    return total / (windows * LENGTH)


class Trainer:
    def __init__(self, options: Options, tokenizer: Tokenizer) -> None:
        self.options, self.shape = options, Shape()
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        options.work.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(options.seed)
        self.model = Toy(self.shape)
        self.model.layers.bfloat16()
        self.model.to(self.device)
        self.optimizer = Optimizer(self.model)
        self.loss = torch.compile(loss_sum, dynamic=False) if options.compile else loss_sum
        sentences = corpus.sentences_of(corpus.load_books(options.corpus, "train"))
        prose = load_prose(options.corpus, "train", tokenizer, options.work / "train.npy")
        self.valid = load_prose(options.corpus, "valid", tokenizer, options.work / "valid.npy")
        # A resumed run must not see again what it saw: the state is saved with the weights.
        self.rng = random.Random(options.seed + 1)
        self.packer = Packer(Maker(self.rng, sentences), Codec(tokenizer), prose, options.share)
        self.interrupted = False
        self.saved = options.work / "state.pt"

    def _save(self, progress: float) -> None:
        partial = self.saved.with_suffix(".partial")
        state = {
            "optimizer": self.optimizer.state(),
            "progress": progress,
            "rng": self.rng.getstate(),
        }
        torch.save(state, partial)
        partial.replace(self.saved)
        export(self.optimizer.averages, self.shape, self.options.out)

    def _resume(self) -> float:
        if not self.saved.exists():
            return 0.0
        state = torch.load(self.saved, map_location=self.device, weights_only=False)
        self.optimizer.restore(state["optimizer"])
        self.rng.setstate(state["rng"])
        return state["progress"]

    def _batch(self, step: int) -> Batch:
        length = LENGTH if step % 3 else SHORT
        if step % LONG_ONE_IN == LONG_ONE_IN - 1:
            length = LONG
        batch = self.packer.batch(max(1, self.options.tokens // length), length)
        return Batch(*(t.to(self.device) for t in (batch.tokens, batch.documents, batch.weights)))

    def run(self) -> bool:
        """Train until the budget is spent; False if a signal came first. Saved in either case."""
        clock = Clock(self.options, self._resume())
        logged = saved = time.monotonic()
        losses: list[torch.Tensor] = []
        for interrupt in (signal.SIGTERM, signal.SIGINT):
            signal.signal(interrupt, lambda *_: setattr(self, "interrupted", True))
        while (progress := clock.progress()) < 1 and not self.interrupted:
            batch = self._batch(self.optimizer.steps)
            loss = self.loss(self.model, batch.tokens, batch.documents, batch.weights)
            loss = loss / batch.weights.sum()
            loss.backward()
            self.optimizer.step(rate_at(self.optimizer.steps, progress))
            losses.append(loss.detach())
            now = time.monotonic()
            if self.optimizer.steps % 25 == 0:
                mean = torch.stack(losses).mean().item()
                speed = len(losses) * self.options.tokens / (now - logged)
                print(
                    f"step {self.optimizer.steps} progress {progress:.3f} loss {mean:.4f} "
                    f"tokens/s {speed:.0f}",
                    flush=True,
                )
                losses, logged = [], now
            if now - saved > 60 * self.options.export_every:
                self._save(progress)
                held = prose_loss(self.model, self.valid, self.device)
                print(f"exported; held-out prose loss {held:.4f}", flush=True)
                saved = logged = time.monotonic()
        self._save(progress)
        return not self.interrupted
