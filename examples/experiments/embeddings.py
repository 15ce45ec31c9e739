"""Word embeddings in a large table, of which every step touches a few rows.

This is skip-gram with negative samples on the English text that ships with CPython. As
in fastText, a word is the mean of the vectors of its character n-grams, which are
hashed into 200,000 rows. A batch touches about one row in seventy.
`row_value_and_grad`, SM3 with the row cover and `apply_updates` read and write only
these rows. Dense Adam reads and writes the whole table and two more of its size at
every step.
"""

import argparse
import collections
import functools
import re
import time
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from tqdm import tqdm

import memoptax

BUCKETS, WIDTH, LENGTH = 200_000, 64, 20
BATCH, NEGATIVES, WINDOW = 256, 5, 4
SHOWN = ["exceptions", "string", "float", "lists", "class", "attribute", "imported"]


def read_corpus():
    """The vocabulary of the language reference, and its text as one number per word."""
    from pydoc_data import topics

    text = " ".join(topics.topics.values()).lower()
    words = re.findall(r"[a-z]+", text)
    counts = collections.Counter(w for w in words if len(w) > 1)
    vocabulary = [w for w, n in counts.most_common() if n >= 5]
    number = {w: i for i, w in enumerate(vocabulary)}
    return vocabulary, np.array([number[w] for w in words if w in number])


def hashed_ngrams(word):
    """Rows of the word and its n-grams, padded with BUCKETS, which is not a row."""
    marked = f"<{word}>"
    grams = [marked] + [
        marked[i : i + n] for n in (3, 4, 5) for i in range(len(marked) - n + 1)
    ]
    ids = [zlib.crc32(g.encode()) % BUCKETS for g in dict.fromkeys(grams)][:LENGTH]
    return ids + [BUCKETS] * (LENGTH - len(ids))


def batches(text, size, seed=0):
    """Pairs of words at most WINDOW apart, frequent ones thinned out, and noise."""
    rng = np.random.default_rng(seed)
    frequency = np.bincount(text) / len(text)
    keep = np.minimum(1, np.sqrt(1e-3 / frequency))
    noise = np.cumsum(frequency**0.75)
    while True:
        thinned = text[rng.random(len(text)) < keep[text]]
        center = rng.permutation(np.arange(WINDOW, len(thinned) - WINDOW))
        offset = rng.integers(1, WINDOW + 1, len(center)) * rng.choice(
            [-1, 1], len(center)
        )
        for i in range(0, len(center) - size, size):
            here, there = center[i : i + size], offset[i : i + size]
            uniform = rng.random((size, NEGATIVES)) * noise[-1]
            negative = np.searchsorted(noise, uniform)
            target = thinned[here + there]
            yield thinned[here], np.concatenate([target[:, None], negative], 1)


def loss(rows):
    """Negative sampling: the first of the contexts is real, the others are noise."""
    filled = (jnp.abs(rows["ngrams"]).sum(-1) > 0).sum(1)  # padding gives zeros
    words = rows["ngrams"].sum(1) / filled[:, None]
    scores = jnp.einsum("bd,bkd->bk", words, rows["contexts"])
    signs = jnp.where(jnp.arange(1 + NEGATIVES) == 0, 1.0, -1.0)
    return -jax.nn.log_sigmoid(signs * scores).sum(1).mean()


def init_tables(words):
    ngrams = jax.random.normal(jax.random.key(0), (BUCKETS, WIDTH)) / WIDTH
    return {"ngrams": ngrams, "contexts": jnp.zeros((words, WIDTH))}


def sparse_step(tx):
    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(tables, state, ids):
        value, grads = memoptax.sparse.row_value_and_grad(loss, tables, ids)
        updates, state = tx.update(grads, state, tables)
        return memoptax.sparse.apply_updates(tables, updates), state, value

    return step


def dense_step(tx):
    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(tables, state, ids):
        def dense_loss(tables):
            return loss(
                {
                    k: t.at[ids[k]].get(mode="fill", fill_value=0)
                    for k, t in tables.items()
                }
            )

        value, grads = jax.value_and_grad(dense_loss)(tables)
        updates, state = tx.update(grads, state, tables)
        return optax.apply_updates(tables, updates), state, value

    return step


def train(step, tx, ngrams, stream, steps, words, bar=False):
    tables = init_tables(words)
    state = tx.init(tables)
    losses, seconds, touched = [], [], []
    ticks = tqdm(range(steps), unit="step", disable=not bar)
    for _ in ticks:
        center, context = next(stream)
        ids = {"ngrams": jnp.asarray(ngrams[center]), "contexts": jnp.asarray(context)}
        jax.block_until_ready(ids)
        start = time.perf_counter()
        tables, state, value = jax.block_until_ready(step(tables, state, ids))
        seconds.append(time.perf_counter() - start)
        losses.append(float(value))
        rows = np.unique(ngrams[center])
        touched.append((rows < BUCKETS).sum() + len(np.unique(context)))
        ticks.set_postfix(loss=f"{np.mean(losses[-200:]):.3f}", refresh=False)
    size = sum(x.nbytes for x in jax.tree.leaves(state))
    return tables, losses, 1e3 * np.median(seconds), np.mean(touched), size


def word_vectors(tables, ngrams):
    rows = tables["ngrams"].at[ngrams].get(mode="fill", fill_value=0)
    vectors = rows.sum(1) / (ngrams < BUCKETS).sum(1, keepdims=True)
    vectors = vectors - vectors.mean(0)
    return np.asarray(vectors / jnp.linalg.norm(vectors, axis=1, keepdims=True))


def neighbours(vectors, vocabulary, word, count=6):
    near = vectors @ vectors[vocabulary.index(word)]
    return [vocabulary[i] for i in np.argsort(-near)[1 : count + 1]]


def plot(path, losses, vectors, vocabulary):
    figure = Figure(figsize=(12, 5))
    left, right = figure.subplots(1, 2)
    width = max(1, len(losses) // 50)
    left.plot(np.convolve(losses, np.ones(width) / width, "valid"))
    left.set(xlabel="step", ylabel="loss", title=f"mean of {width} steps")
    shown = [w for w in SHOWN if w in vocabulary]
    groups = [[w, *neighbours(vectors, vocabulary, w, 5)] for w in shown]
    names = [w for group in groups for w in group]
    points = vectors[[vocabulary.index(w) for w in names]]
    axes = np.linalg.svd(points - points.mean(0), full_matrices=False)[2][:2]
    for k, group in enumerate(groups):
        x, y = axes @ vectors[[vocabulary.index(w) for w in group]].T
        right.scatter(x, y, s=12, color=f"C{k}")
        for w, a, b in zip(group, x, y):
            right.annotate(w, (a, b), fontsize=8, color=f"C{k}")
    right.set(title="words and their nearest neighbours, two main axes")
    right.set(xticks=[], yticks=[], xmargin=0.2)
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def main(argv=None):
    """Losses, times, bytes of state and the nearest words."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--steps", type=int, default=3000, help="steps of row-sparse SM3 (3000)"
    )
    parser.add_argument(
        "--dense-steps", type=int, default=30, help="steps of dense Adam, timed (30)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("embeddings.png"),
        help="the figure (embeddings.png)",
    )
    args = parser.parse_args(argv)
    steps = args.steps
    vocabulary, text = read_corpus()
    ngrams = np.array([hashed_ngrams(w) for w in vocabulary], np.int32)
    print(f"{len(text):,} words of text, {len(vocabulary):,} different ones")
    schedule = memoptax.sm3_schedule(0.3, steps // 20, steps, cooldown_fraction=0.5)
    sm3, adam = memoptax.sm3(schedule, cover=memoptax.covers.rows), optax.adam(1e-3)
    words = len(vocabulary)
    tables, losses, ms, touched, size = train(
        sparse_step(sm3), sm3, ngrams, batches(text, BATCH), steps, words, bar=True
    )
    _, _, adam_ms, _, adam_size = train(
        dense_step(adam), adam, ngrams, batches(text, BATCH), args.dense_steps, words
    )
    vectors = word_vectors(tables, ngrams)
    for word in SHOWN:
        if word in vocabulary:
            print(f"{word:>12}: {', '.join(neighbours(vectors, vocabulary, word))}")
    rows = BUCKETS + words
    print(f"\n{touched:,.0f} of {rows:,} rows touched per step ({touched / rows:.1%})")
    print(f"loss {np.mean(losses[:50]):.3f} -> {np.mean(losses[-200:]):.3f}\n")
    print("| optimizer | ms per step | bytes of state |")
    print("|---|---:|---:|")
    print(f"| row-sparse memoptax.sm3 | {ms:.2f} | {size:,} |")
    print(f"| dense optax.adam | {adam_ms:.2f} | {adam_size:,} |")
    plot(args.output, losses, vectors, vocabulary)
    print(f"\nThe figure is in {args.output}")
    return {
        "losses": losses,
        "ms": ms,
        "adam_ms": adam_ms,
        "bytes": size,
        "adam_bytes": adam_size,
        "neighbours": {w: neighbours(vectors, vocabulary, w) for w in SHOWN},
    }


if __name__ == "__main__":
    main()
