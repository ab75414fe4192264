"""Train the demo model on `text/` and write `sollol_nb/models/demo.gguf`. Runs on a CPU, from fixed seeds."""

from __future__ import annotations

import argparse
import functools
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax  # type: ignore[import-untyped]
from corpus import Sampler, exam, read_corpus
from export import write_gguf
from model import LAYER_MATRICES, ModelShape, Weights, initial_weights, logits, loss
from optax.contrib import MuonDimensionNumbers, muon  # type: ignore[import-untyped]
from tokenizer import Tokenizer, learn_merges

SEED = 20
MERGE_COUNT = 1024
PEAK_RATE = 4e-3
# (rows, length) of the batches, in turn; the longer rows hold the long answer and long conversations.
BATCHES = (*[(4, 256)] * 4, (2, 512), *[(4, 256)] * 4, (1, 1024))
DEFAULT_OUT = Path(__file__).parents[2] / "sollol_nb" / "models" / "demo.gguf"


def train(shape: ModelShape, sampler: Sampler, steps: int) -> Weights:
    """Train for `steps` batches and return the weights; prints the loss every 50 steps.

    Muon moves the layers' matrices and Adam the rest, which takes far fewer steps than Adam alone.
    """
    weights = initial_weights(shape, SEED)
    rate = optax.warmup_cosine_decay_schedule(0.0, PEAK_RATE, min(100, steps // 5), steps)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        muon(
            rate,
            adam_b2=0.98,
            weight_decay=0.01,
            consistent_rms=0.2,
            muon_weight_dimension_numbers=lambda weights: {
                name: MuonDimensionNumbers(1, 2) if name in LAYER_MATRICES else None for name in weights
            },
        ),
    )
    state = optimizer.init(weights)
    gradient = jax.value_and_grad(functools.partial(loss, shape))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(
        weights: Weights, state: optax.OptState, ids: jax.Array, conversations: jax.Array, counted: jax.Array
    ) -> tuple[Weights, optax.OptState, jax.Array]:
        value, slope = gradient(weights, ids, conversations, counted)
        updates, state = optimizer.update(slope, state, weights)
        return optax.apply_updates(weights, updates), state, value

    began, recent = time.monotonic(), []
    for number in range(1, steps + 1):
        rows, length = BATCHES[number % len(BATCHES)]
        ids, conversations, counted = map(jnp.asarray, sampler.batch(rows, length))
        weights, state, value = step(weights, state, ids, conversations, counted)
        recent.append(value)
        if number % 50 == 0 or number == steps:
            minutes = (time.monotonic() - began) / 60
            print(f"step {number}/{steps}  loss {np.mean(recent):.4f}  {minutes:.1f} min", flush=True)
            recent = []
    return weights


def grade(shape: ModelShape, weights: Weights, sheets: list[tuple[list[int], int]]) -> tuple[int, float]:
    """How many answers are exactly the greedy ones, and the lowest probability of any of their tokens."""
    score = jax.jit(functools.partial(logits, shape))
    right, lowest = 0, 1.0
    for ids, begin in sheets:
        length = 128 * (1 + (len(ids) - 1) // 128)
        row = np.zeros((1, length), np.int32)
        row[0, : len(ids)] = ids
        scores = score(weights, jnp.asarray(row), jnp.zeros((1, length), jnp.int32))[0]
        chances = np.asarray(jax.nn.softmax(scores))
        answer = chances[begin - 1 : len(ids) - 1]
        right += bool((answer.argmax(axis=1) == ids[begin:]).all())
        lowest = min(lowest, float(answer[np.arange(len(answer)), ids[begin:]].min()))
    return right, lowest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1700, help="batches to train on (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="the GGUF to write (default: the package's)")
    options = parser.parse_args()

    corpus = read_corpus()
    tokenizer = Tokenizer(learn_merges(corpus.texts(SEED), MERGE_COUNT))
    shape = ModelShape(vocab_size=len(tokenizer.tokens))
    weights = train(shape, Sampler(corpus, tokenizer, SEED), options.steps)
    # Grade the weights that are shipped: rounded to F16.
    shipped = {name: jnp.asarray(np.asarray(values, np.float16), jnp.float32) for name, values in weights.items()}
    for name, sheets in (
        ("trained", exam(corpus, tokenizer, lambda exchange: exchange.questions)),
        ("held out", exam(corpus, tokenizer, lambda exchange: exchange.held_out)),
    ):
        right, lowest = grade(shape, shipped, sheets)
        print(f"{name} questions: {right}/{len(sheets)} answered exactly, lowest token probability {lowest:.3f}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    draft = options.out.with_suffix(".part")
    write_gguf(draft, shape, weights, tokenizer)
    draft.replace(options.out)
    count = sum(values.size for values in weights.values())
    print(f"{options.out}: {count:,} parameters, {options.out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
