"""A whole training step of a small transformer, as a ratio to the same with optax.adam.

    python benchmarks/training_step.py [--quick] [--rounds 9] [--batch 8]

The model has about 11 M float32 parameters and reads texts of 128 characters. A jitted,
donated step runs forward, backward and update. The optimizers take turns in one
process.
"""

import argparse
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from measuring import Runner, add_arguments, describe_machine, nbytes, report
from tqdm import tqdm

import memoptax

OPTIMIZERS = {
    "optax.adam": optax.adam(1e-4),
    "optax.sm3": optax.sm3(1e-4),
    "sgd_c": memoptax.sgd_c(1e-4),
    "adam_c": memoptax.adam_c(1e-4),
    "adam_c, C = 20": memoptax.adam_c(1e-4, topc=20),
    "adam_cm": memoptax.adam_cm(1e-4),
    "adam_cm, C = 20": memoptax.adam_cm(1e-4, topc=20),
    "sm3": memoptax.sm3(1e-4),
}
QUICK = ("optax.adam", "adam_c", "sm3")
COLUMNS = ("optimizer", "ms", "/ adam", "state B/param", "parameters")


class Transformer(nn.Module):
    """A causal decoder without dropout."""

    layers: int
    width: int
    vocabulary: int = 96

    @nn.compact
    def __call__(self, tokens):
        length = tokens.shape[-1]
        place = self.param("place", nn.initializers.normal(0.02), (length, self.width))
        x = nn.Embed(self.vocabulary, self.width)(tokens) + place
        mask = nn.make_causal_mask(tokens)
        for _ in range(self.layers):
            h = nn.LayerNorm()(x)
            x += nn.MultiHeadDotProductAttention(self.width // 32)(h, mask=mask)
            h = nn.Dense(4 * self.width)(nn.LayerNorm()(x))
            x += nn.Dense(self.width)(nn.gelu(h))
        return nn.Dense(self.vocabulary)(nn.LayerNorm()(x))


def training_step(model, tx, carry, tokens):
    """Parameters and state after one batch of next-character prediction."""
    params, state = carry

    def loss(params):
        logits = model.apply(params, tokens[:, :-1])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        return jnp.mean(losses)

    updates, state = tx.update(jax.grad(loss)(params), state, params)
    return optax.apply_updates(params, updates), state


def main(argv=None):
    """The rows of the table that was printed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch", type=int, default=8)
    add_arguments(parser)
    args = parser.parse_args(argv)
    machine = describe_machine()
    model = Transformer(1, 64) if args.quick else Transformer(6, 384)
    shape = (2, 17) if args.quick else (args.batch, 129)
    tokens = jax.random.randint(jax.random.key(0), shape, 0, model.vocabulary)
    params = jax.jit(model.init)(jax.random.key(1), tokens[:, :-1])
    size = nbytes(params) // 4

    # All states together are small beside the activations of a real batch.
    runners = {}
    for name in tqdm(QUICK if args.quick else OPTIMIZERS, desc="compiling"):
        tx = OPTIMIZERS[name]
        carry = (jax.tree.map(jnp.copy, params), jax.jit(tx.init)(params))
        step = functools.partial(training_step, model, tx)
        runners[name] = Runner(step, carry, tokens)
    rounds = 2 if args.quick else args.rounds
    for turn in tqdm(range(rounds + 1), desc="rounds"):
        for runner in runners.values():
            runner.run(tokens)
            if turn == 0:  # the first turn touches new memory
                runner.seconds.clear()
    adam = runners["optax.adam"].milliseconds
    rows = [
        {
            "optimizer": name,
            "ms": runner.milliseconds,
            "/ adam": runner.milliseconds / adam,
            "state B/param": nbytes(runner.carry[1]) / size,
            "parameters": size,
            "tokens": tokens[:, 1:].size,
        }
        for name, runner in runners.items()
    ]
    report(args, "training step", machine, rows, COLUMNS)
    return rows


if __name__ == "__main__":
    main()
