"""A character model for the scripts beside this one: two layers of attention.

The text is that of Python's `help()`, half a million characters that every installation has. It
differs a little from version to version. Matrices are `(in, out)`, heads first in the outputs of
queries and keys. Norms have no parameters.
"""

import dataclasses
import functools
import pydoc_data.topics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxclip.weights import max_attention_logits

CONTEXT, BATCH, WIDTH, NUM_HEADS, NUM_LAYERS = 64, 16, 64, 4, 2
MATRICES = ("query", "key", "value", "out", "up", "down")


@dataclasses.dataclass(frozen=True)
class Text:
    """Characters as numbers: the first nine tenths to train on, the rest to test on."""

    train: np.ndarray
    test: np.ndarray
    num_characters: int


@functools.cache
def load_text() -> Text:
    topics = "".join(pydoc_data.topics.topics.values())
    alphabet, codes = np.unique(np.array(list(topics)), return_inverse=True)
    codes = codes.astype(np.int32)
    split = len(codes) * 9 // 10
    return Text(codes[:split], codes[split:], len(alphabet))


def init_params(key: jax.Array) -> Any:
    num_characters = load_text().num_characters
    keys = iter(jax.random.split(key, 3 + len(MATRICES) * NUM_LAYERS))

    def matrix(rows: int, columns: int, scale: float | None = None) -> jax.Array:
        scale = rows**-0.5 if scale is None else scale
        return scale * jax.random.normal(next(keys), (rows, columns))

    sizes = dict.fromkeys(MATRICES, (WIDTH, WIDTH))
    sizes |= {"up": (WIDTH, 4 * WIDTH), "down": (4 * WIDTH, WIDTH)}
    return {
        "embed": matrix(num_characters, WIDTH, 0.1),
        "position": matrix(CONTEXT, WIDTH, 0.1),
        "layers": [{name: matrix(*sizes[name]) for name in MATRICES} for _ in range(NUM_LAYERS)],
        "last": matrix(WIDTH, num_characters),
    }


def _normed(x: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)


def forward(
    params: Any, tokens: jax.Array, cap: Callable[[jax.Array], jax.Array] = lambda x: x
) -> tuple[jax.Array, list[jax.Array]]:
    """Logits of the next character, and each layer's largest attention logits before `cap`."""
    h, largest = params["embed"][tokens] + params["position"][: tokens.shape[-1]], []
    is_seen = jnp.tri(tokens.shape[-1], dtype=bool)
    for layer in params["layers"]:
        x = _normed(h)
        q, k, v = (
            (x @ layer[name]).reshape(*tokens.shape, NUM_HEADS, -1)
            for name in ("query", "key", "value")
        )
        largest.append(max_attention_logits(q, k, is_causal=True))
        logits = jnp.einsum("bthf,bshf->bhts", q, k) * q.shape[-1] ** -0.5
        odds = jax.nn.softmax(jnp.where(is_seen, cap(logits), -jnp.inf))
        h = h + jnp.einsum("bhts,bshf->bthf", odds, v).reshape(h.shape) @ layer["out"]
        h = h + jax.nn.gelu(_normed(h) @ layer["up"]) @ layer["down"]
    return _normed(h) @ params["last"], largest


def loss_of(params: Any, tokens: jax.Array, **settings: Any) -> tuple[jax.Array, list[jax.Array]]:
    """Mean loss in nats a character, and each layer's largest attention logits."""
    logits, largest = forward(params, tokens[:, :-1], **settings)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    return losses.mean(), largest


def draw_batch(key: jax.Array) -> jax.Array:
    train = load_text().train
    starts = jax.random.randint(key, (BATCH,), 0, len(train) - CONTEXT)
    return jnp.asarray(train)[starts[:, None] + jnp.arange(CONTEXT + 1)]


def test_loss(params: Any, **settings: Any) -> jax.Array:
    """Mean loss over 256 windows spread over the text that is not trained on."""
    test = load_text().test
    starts = np.linspace(0, len(test) - CONTEXT - 1, 256).astype(np.int32)
    return loss_of(params, jnp.asarray(test[starts[:, None] + np.arange(CONTEXT + 1)]), **settings)[
        0
    ]


def labels(matrices: str, others: str) -> Any:
    """A prefix tree that tells the matrices of the layers from embeddings and the last layer."""
    return {"embed": others, "position": others, "layers": matrices, "last": others}
