"""NumPy reference of critical gradients and critical momenta.

Written from the equations, in float64 throughout, and naive on purpose: the buffer is
a list of arrays, and every mean is computed afresh from that list.
"""

from collections.abc import Iterator
from typing import Any

import ml_dtypes  # noqa: F401  (teaches NumPy the names bfloat16 and float8_*)
import numpy as np


class Buffer:
    """The C entries with the largest decayed keys, in logical slot order.

    Offering an entry inserts it (appending while there is room, else replacing the
    smallest key, if that is strictly smaller) and then decays every key, including
    the new one. `fifo=True` always replaces the oldest entry of a full buffer. An
    offer with a non-finite key or value does not count.
    """

    def __init__(self, topc, decay, round_to=None):
        self.topc, self.decay, self.round_to = topc, decay, round_to
        self.keys, self.values, self.ages = [], [], []
        self.accepted = self.offered = 0

    def offer(self, key, value, fifo=False):
        value = {name: self._stored(x) for name, x in value.items()}
        finite = np.isfinite(key) and all(np.isfinite(x).all() for x in value.values())
        if not finite or self.topc == 0:
            return
        slot = self._slot_for(key, fifo)
        self.offered += 1
        self.ages = [age + 1 for age in self.ages]
        if slot is not None:
            # A slice assignment appends when `slot` is one past the end.
            self.keys[slot : slot + 1] = [key]
            self.values[slot : slot + 1] = [value]
            self.ages[slot : slot + 1] = [0]
            self.accepted += 1
        self.keys = [self.decay * k for k in self.keys]

    def _slot_for(self, key, fifo):
        if len(self.keys) < self.topc:
            return len(self.keys)
        if fifo:
            return self.ages.index(max(self.ages))
        smallest = min(self.keys)
        if key <= smallest:
            return None
        # Keys that have decayed to 0 leave by age, others by index.
        order = self.ages if smallest == 0 else [0] * self.topc
        return max(
            (i for i, k in enumerate(self.keys) if k == smallest),
            key=lambda i: (order[i], -i),
        )

    def _stored(self, x):
        return stored(x, self.round_to)


def stored(x, dtype):
    """`x` after storage. In int8 each row has its own scale."""
    x = np.array(x, np.float64)
    if dtype is None:
        return x
    if dtype != "int8":
        return x.astype(dtype).astype(float)
    if x.size == 0:
        return x
    largest = np.abs(x).max(axis=-1, keepdims=True) if x.ndim else np.abs(x)
    # Ties round as in the package only with the same factor, which has 17 bits.
    mantissa, exponent = np.frexp(np.float32(largest * ((1 - 2**-16) / 127)))
    scale = np.float32(np.ldexp(np.rint(mantissa * 2**17), exponent - 17))
    # Rows below 1.5e-36, whose scale has no inverse in float32, become 0.
    normal = scale > np.finfo(np.float32).tiny
    inverse = np.float32(1) / np.where(normal, scale, np.float32(1))
    return np.rint(x * np.float64(inverse)) * np.float64(scale)


# The mean arrives here already multiplied by kappa.
AGGREGATIONS = {
    "sum": lambda update, mean, fill: update + mean,
    "mid": lambda update, mean, fill: (update + mean) / 2,
    "mean": lambda update, mean, fill: (update + fill * mean) / (fill + 1),
}


def aggregate(x, entries, kappa=1.0, aggr: Any = "sum"):
    """`x` combined with the stored `entries`. Without entries or kappa, `x` itself."""
    if not entries or kappa == 0:
        return x
    combine = aggr if callable(aggr) else AGGREGATIONS[aggr]
    return combine(x, kappa * sum(entries) / len(entries), len(entries))


def sum_of_norms(tree):
    return sum(np.sqrt(np.sum(np.square(x))) for x in tree.values())


class Memory:
    """The buffers of one run: one for all leaves (synced), or one per leaf."""

    def __init__(
        self,
        topc=5,
        decay=0.7,
        kappa=1.0,
        aggr="sum",
        synced=True,
        priority_fn=sum_of_norms,
        buffer_dtype=None,
    ):
        self.topc, self.decay, self.kappa, self.aggr = topc, decay, kappa, aggr
        self.synced, self.priority_fn = synced, priority_fn
        self.buffer_dtype = buffer_dtype
        self.buffers = {}  # tuple of leaf names -> Buffer, made at the first step

    def keys(self, grads):
        groups = [tuple(grads)] if self.synced else [(name,) for name in grads]
        return {g: self.priority_fn({name: grads[name] for name in g}) for g in groups}

    def step(self, values, keys, fifo=False):
        """Aggregate `values` with the old entries, then offer them under `keys`."""
        aggregated = {}
        for group, key in keys.items():
            new = Buffer(self.topc, self.decay, self.buffer_dtype)
            buffer = self.buffers.setdefault(group, new)
            for name in group:
                entries = [entry[name] for entry in buffer.values]
                aggregated[name] = aggregate(
                    values[name], entries, self.kappa, self.aggr
                )
            buffer.offer(key, {name: values[name] for name in group}, fifo)
        return aggregated


class CriticalGradients:
    """Gradients are stored, keyed by their own norm."""

    def __init__(self, **options):
        self.memory = Memory(**options)

    def step(self, grads, offered=None, fifo=False):
        """`offered` replaces the stored and aggregated value, but not the key."""
        offered = grads if offered is None else offered
        return self.memory.step(offered, self.memory.keys(grads), fifo)


class CriticalMomenta:
    """Momenta are stored, keyed by the norm of the gradient.

    `skip_first=True` is the first step of the released Adam_CM: it stores the bare
    gradient, leaves the momentum at zero and emits zero. A step on which any gradient
    is not finite changes nothing, and emits that gradient where it is not finite.
    """

    def __init__(self, b1=0.9, skip_first=False, mu_dtype=None, **options):
        self.b1, self.skip_first, self.mu_dtype = b1, skip_first, mu_dtype
        if mu_dtype is not None and options.get("buffer_dtype") == mu_dtype:
            options["buffer_dtype"] = None  # slots take the momentum as it is stored
        self.memory = Memory(**options)
        self.m, self.taken = {}, 0

    def step(self, grads, fifo=False):
        if not self.m:
            self.m = {name: np.zeros_like(g) for name, g in grads.items()}
        keys = self.memory.keys(grads)
        if not all_finite(grads):
            refused = self.memory.step(self.m, dict.fromkeys(keys, np.nan))
            return {
                n: np.where(np.isfinite(g), refused[n], g) for n, g in grads.items()
            }
        self.taken += 1
        if self.taken == 1 and self.skip_first:
            self.memory.step(grads, keys, fifo)
            return dict(self.m)
        for name, g in grads.items():
            m = self.b1 * self.m[name] + (1 - self.b1) * g
            self.m[name] = stored(m, self.mu_dtype)
        return self.memory.step(self.m, keys, fifo)


def all_finite(tree):
    return all(np.isfinite(x).all() for x in tree.values())


def critical_gradients(grads, fifo=None, **options) -> Iterator[Any]:
    """Yield the update of every step of a stream of dicts or lists of arrays."""
    yield from _stream(CriticalGradients(**options), grads, fifo)


def critical_momenta(grads, fifo=None, **options) -> Iterator[Any]:
    """As `critical_gradients`, for momenta."""
    yield from _stream(CriticalMomenta(**options), grads, fifo)


def _stream(transform, grads, fifo):
    fifo = None if fifo is None else iter(fifo)
    for step in grads:
        evict_oldest = fifo is not None and next(fifo)
        named = step if isinstance(step, dict) else dict(enumerate(step))
        named = {name: np.asarray(g, np.float64) for name, g in named.items()}
        update = transform.step(named, fifo=evict_oldest)
        yield update if isinstance(step, dict) else list(update.values())


# The base optimizers follow PyTorch. Each maps the stream of one leaf's updates to
# descent directions, without the learning rate.


class Sgd:
    def __init__(self, momentum=None, nesterov=False, dampening=0.0):
        self.momentum, self.nesterov, self.dampening = momentum, nesterov, dampening
        self.trace = None

    def __call__(self, u):
        if self.momentum is None:
            return u
        if self.trace is None:
            self.trace = u  # the first step is undamped
        else:
            self.trace = self.momentum * self.trace + (1 - self.dampening) * u
        return u + self.momentum * self.trace if self.nesterov else self.trace


class Rmsprop:
    def __init__(self, alpha=0.99, eps=1e-8, momentum=None, centered=False):
        self.alpha, self.eps, self.momentum = alpha, eps, momentum
        self.centered = centered
        self.mean = self.square = self.trace = 0.0

    def __call__(self, u):
        self.square = self.alpha * self.square + (1 - self.alpha) * u**2
        variance = self.square
        if self.centered:
            self.mean = self.alpha * self.mean + (1 - self.alpha) * u
            # Rounding can push the difference of the two moments below zero.
            variance = np.maximum(self.square - self.mean**2, 0.0)
        direction = u / (np.sqrt(variance) + self.eps)
        if self.momentum is None:
            return direction
        self.trace = self.momentum * self.trace + direction
        return self.trace


class Adam:
    def __init__(self, b1=0.9, b2=0.999, eps=1e-8, amsgrad=False):
        self.b1, self.b2, self.eps, self.amsgrad = b1, b2, eps, amsgrad
        self.t = 0
        self.m = self.v = self.v_max = 0.0

    def __call__(self, u):
        self.m = self.b1 * self.m + (1 - self.b1) * u
        return self.scale(self.m, u)

    def scale(self, numerator, u):
        self.t += 1
        self.v = self.b2 * self.v + (1 - self.b2) * u**2
        self.v_max = np.maximum(self.v_max, self.v)  # of the uncorrected moments
        return self.direction(numerator)

    def direction(self, numerator):
        t = max(self.t, 1)
        v = self.v_max if self.amsgrad else self.v
        root = np.sqrt(v) / np.sqrt(1 - self.b2**t)
        return numerator / (1 - self.b1**t) / (root + self.eps)


class AdamCm(Adam):
    """The aggregated momentum is both the numerator and what v averages.

    A step on which any gradient is not `finite` changes neither v nor the count.
    """

    def __call__(self, aggregated, finite=True):
        if finite:
            return self.scale(aggregated, aggregated)
        return self.direction(aggregated)


BASES = {
    "sgd_c": Sgd,
    "rmsprop_c": Rmsprop,
    "adam_c": Adam,
    "adamw_c": Adam,
    "sgd_cm": Sgd,
    "adam_cm": AdamCm,
    "adamw_cm": AdamCm,
}
DEFAULT_AGGR = {"rmsprop_c": "mean", "adam_c": "mean", "adamw_c": "mean"}
BUFFER_OPTIONS = {
    "topc",
    "decay",
    "kappa",
    "aggr",
    "synced",
    "priority_fn",
    "buffer_dtype",
}


def run(
    name,
    params0,
    grads,
    *,
    learning_rate,
    weight_decay=None,
    l2_before_buffer=False,
    fifo=None,
    guarded=False,
    **hyper,
):
    """Replay one optimizer; arguments are those of the package's alias `name`.

    Args:
      params0: dict of arrays.
      grads: dict of arrays with a leading time axis.
      l2_before_buffer: store g + wd * p under the key of g, as the released SGD_C does.
      fifo: one boolean per step, whether a full buffer evicts its oldest entry.
      guarded: keep every number whose step is not finite.

    Returns:
      Dict of arrays with a leading time axis: the parameters after each step.
    """
    decoupled = name in ("adamw_c", "adamw_cm")
    if weight_decay is None:
        weight_decay = 0.01 if decoupled else 0.0
    options = {k: hyper.pop(k) for k in BUFFER_OPTIONS & hyper.keys()}
    options.setdefault("aggr", DEFAULT_AGGR.get(name, "sum"))
    if name.startswith("adam") and name.endswith("_cm") and _keeps_nothing(options):
        # Critical momenta without a buffer are Adam, whose v is of the gradients.
        hyper.pop("skip_first", None)
        name = name.removesuffix("m")
    if name.endswith("_cm"):
        b1 = hyper.pop("b1", 0.9) if name == "sgd_cm" else hyper.get("b1", 0.9)
        skip_first = hyper.pop("skip_first", False)
        mu_dtype = hyper.pop("mu_dtype", None)
        transform = CriticalMomenta(b1, skip_first, mu_dtype, **options)
    else:
        transform = CriticalGradients(**options)
    bases = {leaf: BASES[name](**hyper) for leaf in params0}

    params = {leaf: np.asarray(p, np.float64) for leaf, p in params0.items()}
    steps = len(next(iter(grads.values())))
    trajectory = []
    for t in range(steps):
        step_grads = {leaf: np.asarray(grads[leaf][t], np.float64) for leaf in params}
        extra = {"fifo": fifo is not None and fifo[t]}
        if l2_before_buffer:
            extra["offered"] = {
                n: g + weight_decay * params[n] for n, g in step_grads.items()
            }
        updates = transform.step(step_grads, **extra)
        for leaf, u in updates.items():
            if not decoupled and not l2_before_buffer:
                u = u + weight_decay * params[leaf]
            if isinstance(bases[leaf], AdamCm):
                direction = bases[leaf](u, all_finite(step_grads))
            else:
                direction = bases[leaf](u)
            if decoupled:
                direction = direction + weight_decay * params[leaf]
            if name.endswith("_cm") and not all_finite(step_grads):
                direction = np.full_like(direction, np.nan)
            if guarded:
                direction = np.where(np.isfinite(direction), direction, 0)
            params[leaf] = params[leaf] - learning_rate * direction
        trajectory.append(dict(params))
    return {leaf: np.stack([p[leaf] for p in trajectory]) for leaf in params}


def _keeps_nothing(options):
    return options.get("kappa") == 0 or options.get("topc") == 0
