"""Small models as pairs of pure functions: init and apply."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Model(NamedTuple):
    init: Callable  # key -> params
    apply: Callable  # params, inputs -> outputs


@functools.cache
def mlp(*sizes: int) -> Model:
    """A perceptron with ReLUs, or a linear map if there are two sizes."""

    def init(key):
        keys = jax.random.split(key, len(sizes))
        return [
            {"w": jax.random.normal(k, (n, m)) * (2 / n) ** 0.5, "b": jnp.zeros(m)}
            for k, n, m in zip(keys, sizes, sizes[1:])
        ]

    def apply(params, x):
        for layer in params[:-1]:
            x = jax.nn.relu(x @ layer["w"] + layer["b"])
        return x @ params[-1]["w"] + params[-1]["b"]

    return Model(init, apply)


@functools.cache
def convolutional(channels: int, classes: int) -> Model:
    """Three convolutions of stride 2 over a row of 40 numbers, then a linear map.

    A convolution is written as a product with the windows of its input. Many runs at
    once are then batched products.
    """
    widths, kernels = (1, channels, channels, channels), (5, 3, 3)

    def windows(x, kernel):
        x = jnp.pad(x, ((0, 0), (1, 1), (0, 0)))
        count = (x.shape[1] - kernel) // 2 + 1
        parts = [x[:, k : k + 2 * count - 1 : 2] for k in range(kernel)]
        return jnp.concatenate(parts, axis=-1)

    def init(key):
        keys = jax.random.split(key, 4)
        layers = []
        for k, n, m, kernel in zip(keys, widths, widths[1:], kernels):
            n = n * kernel
            w = jax.random.normal(k, (n, m)) * (2 / n) ** 0.5
            layers.append({"w": w, "b": jnp.zeros(m)})
        inputs = 5 * channels  # 40 numbers are 19, 10 and 5 after the convolutions
        w = jax.random.normal(keys[3], (inputs, classes)) * (2 / inputs) ** 0.5
        return [*layers, {"w": w, "b": jnp.zeros(classes)}]

    def apply(params, x):
        x = x[..., None]
        for layer, kernel in zip(params[:-1], kernels):
            x = jax.nn.relu(windows(x, kernel) @ layer["w"] + layer["b"])
        return x.reshape(len(x), -1) @ params[-1]["w"] + params[-1]["b"]

    return Model(init, apply)


@functools.cache
def transformer(
    vocabulary: int, width: int, layers: int, heads: int, context: int
) -> Model:
    """Logits of each next character, (batch, length, V), from (batch, length)."""

    def init(key):
        keys = iter(jax.random.split(key, 3 + 4 * layers))

        def normal(*shape, scale=None):
            scale = shape[0] ** -0.5 if scale is None else scale
            return jax.random.normal(next(keys), shape) * scale

        return {
            "characters": normal(vocabulary, width, scale=0.02),
            "places": normal(context, width, scale=0.02),
            "readout": normal(width, vocabulary),
            "blocks": [
                {
                    "attend": normal(width, 3 * width),
                    "out": normal(width, width),
                    "up": normal(width, 4 * width),
                    "down": normal(4 * width, width),
                    "norms": jnp.ones((2, width)),
                }
                for _ in range(layers)
            ],
        }

    def attention(block, x):
        qkv = (x @ block["attend"]).reshape(*x.shape[:2], 3, heads, width // heads)
        q, k, v = jnp.moveaxis(qkv, 2, 0)
        mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        return mixed.reshape(x.shape) @ block["out"]

    def apply(params, text):
        x = params["characters"][text] + params["places"][: text.shape[1]]
        for block in params["blocks"]:
            x = x + attention(block, _normalize(x) * block["norms"][0])
            inner = jax.nn.gelu((_normalize(x) * block["norms"][1]) @ block["up"])
            x = x + inner @ block["down"]
        return _normalize(x) @ params["readout"]

    return Model(init, apply)


def _normalize(x):
    return x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)


def cross_entropy(logits, labels):
    """Mean nats per label."""
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], -1)
    return -jnp.mean(chosen)


def accuracy(logits, labels):
    """Percent."""
    return 100 * jnp.mean(logits.argmax(-1) == labels)
