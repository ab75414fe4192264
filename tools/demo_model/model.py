"""The llama architecture in JAX, small: pre-norm blocks, interleaved rotary positions, SwiGLU, separate output.

The weights of the twelve blocks are stacked along a first axis, so that one compiled block serves all of them.
Rotary positions turn neighbouring pairs (2i, 2i+1), as llama.cpp's llama architecture does; so the query and key
weights go into the GGUF as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

Weights: TypeAlias = dict[str, jax.Array]


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The sizes of the model. The embedding is `head_count * head_size` wide."""

    vocab_size: int
    layer_count: int = 12
    head_count: int = 4
    head_size: int = 32
    feed_forward_size: int = 352
    context_length: int = 2048
    rope_base: float = 10000.0
    norm_epsilon: float = 1e-5

    @property
    def width(self) -> int:
        return self.head_count * self.head_size


def initial_weights(shape: ModelShape, seed: int) -> Weights:
    """Random weights, matrices as (layers, in, out); what writes into the residual stream starts smaller."""
    rng = np.random.default_rng(seed)
    width, hidden, layers = shape.width, shape.feed_forward_size, shape.layer_count

    def normal(*sizes: int, scale: float) -> jax.Array:
        return jnp.asarray(rng.normal(0.0, scale, sizes), dtype=jnp.float32)

    into, back = width**-0.5, (2 * layers) ** -0.5
    return {
        "embedding": normal(shape.vocab_size, width, scale=0.5),
        "attention_norm": jnp.ones((layers, width)),
        "query": normal(layers, width, width, scale=into),
        "key": normal(layers, width, width, scale=into),
        "value": normal(layers, width, width, scale=into),
        "attention_out": normal(layers, width, width, scale=into * back),
        "feed_forward_norm": jnp.ones((layers, width)),
        "gate": normal(layers, width, hidden, scale=into),
        "up": normal(layers, width, hidden, scale=into),
        "down": normal(layers, hidden, width, scale=hidden**-0.5 * back),
        "output_norm": jnp.ones((width,)),
        "output": normal(width, shape.vocab_size, scale=into * 0.5),
    }


LAYER_MATRICES = ("query", "key", "value", "attention_out", "gate", "up", "down")
_PER_LAYER = ("attention_norm", "feed_forward_norm", *LAYER_MATRICES)


def _rms_norm(x: jax.Array, weight: jax.Array, epsilon: float) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + epsilon) * weight


def _rotate(x: jax.Array, cosine: jax.Array, sine: jax.Array) -> jax.Array:
    """Turn pairs (2i, 2i+1) of (rows, length, heads, head_size) by their position's angle."""
    even, odd = x[..., 0::2], x[..., 1::2]
    turned = jnp.stack([even * cosine - odd * sine, even * sine + odd * cosine], axis=-1)
    return turned.reshape(x.shape)


def logits(shape: ModelShape, weights: Weights, ids: jax.Array, conversations: jax.Array) -> jax.Array:
    """Next-token logits, (rows, length, vocabulary).

    `ids` and `conversations` are (rows, length) integers; a token sees itself and the earlier tokens of its own
    conversation, so several conversations share a row without seeing each other.
    """
    rows, length = ids.shape
    position = np.arange(length)
    angle = position[:, None] * shape.rope_base ** (-np.arange(0, shape.head_size, 2) / shape.head_size)[None]
    cosine = jnp.asarray(np.cos(angle), jnp.float32)[None, :, None]
    sine = jnp.asarray(np.sin(angle), jnp.float32)[None, :, None]
    causal = position[:, None] >= position[None, :]
    visible = (conversations[:, :, None] == conversations[:, None, :]) & causal
    bias = jnp.where(visible, 0.0, -1e9)[:, None]

    def block(x: jax.Array, w: Weights) -> tuple[jax.Array, None]:
        heads = (rows, length, shape.head_count, shape.head_size)
        normed = _rms_norm(x, w["attention_norm"], shape.norm_epsilon)
        query = _rotate((normed @ w["query"]).reshape(heads), cosine, sine)
        key = _rotate((normed @ w["key"]).reshape(heads), cosine, sine)
        value = (normed @ w["value"]).reshape(heads)
        scores = jnp.einsum("rqhd,rkhd->rhqk", query, key) * shape.head_size**-0.5 + bias
        mixed = jnp.einsum("rhqk,rkhd->rqhd", jax.nn.softmax(scores, axis=-1), value)
        x = x + mixed.reshape(x.shape) @ w["attention_out"]
        normed = _rms_norm(x, w["feed_forward_norm"], shape.norm_epsilon)
        x = x + (jax.nn.silu(normed @ w["gate"]) * (normed @ w["up"])) @ w["down"]
        return x, None

    x, _ = jax.lax.scan(block, weights["embedding"][ids], {name: weights[name] for name in _PER_LAYER})
    return _rms_norm(x, weights["output_norm"], shape.norm_epsilon) @ weights["output"]


def loss(
    shape: ModelShape, weights: Weights, ids: jax.Array, conversations: jax.Array, counted: jax.Array
) -> jax.Array:
    """Mean cross-entropy, in nats, of the tokens, weighed by `counted` (rows, length): zero outside answers."""
    scores = logits(shape, weights, ids[:, :-1], conversations[:, :-1])
    targets, weight = ids[:, 1:], counted[:, 1:]
    chosen = jnp.take_along_axis(scores, targets[..., None], axis=-1)[..., 0]
    surprise = jax.nn.logsumexp(scores, axis=-1) - chosen
    return jnp.sum(surprise * weight) / jnp.maximum(jnp.sum(weight), 1.0)
