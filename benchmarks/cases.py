"""The optimizers that are compiled for accelerators and run on them, by name.

A new row is a line in ``OPTIMIZERS``. The most that its step may cost is a line in
``LIMITS``.
"""

from typing import NamedTuple

import optax

import memoptax as mo

RATE = 1e-3
INT8 = {"buffer_dtype": "int8"}
INT8_AND_M = {"buffer_dtype": "int8", "mu_dtype": "int8"}

OPTIMIZERS = {
    "optax.adam": lambda: optax.adam(RATE),
    "optax.sm3": lambda: optax.sm3(RATE),
    "sgd_c, C = 1": lambda: mo.sgd_c(RATE, topc=1),
    "sgd_c, C = 1, int8": lambda: mo.sgd_c(RATE, topc=1, **INT8),
    "sgd_c, C = 5": lambda: mo.sgd_c(RATE, topc=5),
    "sgd_c, C = 5, int8": lambda: mo.sgd_c(RATE, topc=5, **INT8),
    "sgd_c, C = 20": lambda: mo.sgd_c(RATE, topc=20),
    "sgd_c, C = 20, int8": lambda: mo.sgd_c(RATE, topc=20, **INT8),
    "sgd_c, momentum, C = 5": lambda: mo.sgd_c(RATE, 0.9, topc=5),
    "rmsprop_c, C = 5": lambda: mo.rmsprop_c(RATE, topc=5),
    "adam_c, C = 1": lambda: mo.adam_c(RATE, topc=1),
    "adam_c, C = 1, int8": lambda: mo.adam_c(RATE, topc=1, **INT8),
    "adam_c, C = 5": lambda: mo.adam_c(RATE, topc=5),
    "adam_c, C = 5, int8": lambda: mo.adam_c(RATE, topc=5, **INT8),
    "adam_c, C = 5, bfloat16": lambda: mo.adam_c(RATE, topc=5, buffer_dtype="bfloat16"),
    "adam_c, C = 20": lambda: mo.adam_c(RATE, topc=20),
    "adam_c, C = 20, int8": lambda: mo.adam_c(RATE, topc=20, **INT8),
    "adamw_c, C = 5": lambda: mo.adamw_c(RATE, topc=5),
    "sgd_cm, C = 1, int8": lambda: mo.sgd_cm(RATE, topc=1, **INT8_AND_M),
    "sgd_cm, C = 5": lambda: mo.sgd_cm(RATE, topc=5),
    "adam_cm, C = 1": lambda: mo.adam_cm(RATE, topc=1),
    "adam_cm, C = 1, int8 slots and m": lambda: mo.adam_cm(RATE, topc=1, **INT8_AND_M),
    "adam_cm, C = 5": lambda: mo.adam_cm(RATE, topc=5),
    "adam_cm, C = 5, int8 slots and m": lambda: mo.adam_cm(RATE, topc=5, **INT8_AND_M),
    "adam_cm, C = 20, int8 slots and m": lambda: mo.adam_cm(
        RATE, topc=20, **INT8_AND_M
    ),
    "adamw_cm, C = 5": lambda: mo.adamw_cm(RATE, topc=5),
    "sm3_cm, C = 0, int8 m": lambda: mo.sm3_cm(RATE, topc=0, mu_dtype="int8"),
    "sm3_cm, C = 1, int8 slots and m": lambda: mo.sm3_cm(RATE, topc=1, **INT8_AND_M),
    "sm3_cm, C = 5, int8 slots and m": lambda: mo.sm3_cm(RATE, topc=5, **INT8_AND_M),
    "sm3_cm, C = 5": lambda: mo.sm3_cm(RATE, topc=5),
    "sm3": lambda: mo.sm3(RATE),
    "sm3, momentum": lambda: mo.sm3(RATE, 0.9),
    "sm3, momentum in int8": lambda: mo.sm3(RATE, 0.9, momentum_dtype="int8"),
}


class Limit(NamedTuple):
    """The most that a compiled step may cost. None means no limit.

    It may copy no slot or leaf, must update stacks of slots in place, and must return
    the state in the memory of its arguments.
    """

    h100: float | None = None  # bytes moved per parameter
    v5e: float | None = None
    temporaries: float | None = 0.02  # in copies of the parameters, of a device's share
    sent: int | None = 0  # instructions, each of a few numbers

    def exceeded(self, row, device):
        """The figures of a row that are over their limits: name, value, limit."""
        if "error" in row:
            return [("error", row["error"], "none")]
        most = {
            "moved": getattr(self, device, None),
            "temporaries": self.temporaries,
            "copies": 0,
            "stacks": 0,
            "unaliased": 0,
            "sent": self.sent,
            "largest sent": None if self.sent is None else 16,
        }
        rounded = row | {
            "moved": round(row["moved"], 1),
            "temporaries": round(row["temporaries"], 3),
        }
        return [
            (what, rounded[what], limit)
            for what, limit in most.items()
            if limit is not None and rounded[what] > limit
        ]


SUM = 0.13  # temporaries of running sums
LIMITS = {
    "float32": {
        "sgd_c, C = 1": Limit(24, 24),
        "adam_c, C = 1": Limit(40, 40),
        "adam_c, C = 1, int8": Limit(35, 36),
        "sgd_c, C = 5": Limit(44, 44),
        "adam_c, C = 5": Limit(60, 60),
        "adam_c, C = 5, int8": Limit(42, 42),
        "sgd_c, C = 20": Limit(36, 36, SUM),
        "adam_c, C = 20": Limit(52, 52, SUM),
        "rmsprop_c, C = 5": Limit(52, 52),
        "adam_cm, C = 5": Limit(68, 64),
        "adam_cm, C = 5, int8 slots and m": Limit(38, 38),
        "sm3_cm, C = 1, int8 slots and m": Limit(25, 23),
        # The temporaries are maxima of parts of four leaves at once.
        "sm3_cm, C = 5, int8 slots and m": Limit(34, 36, 0.04),
        "sm3": Limit(16.5, 12),
        "sm3, momentum": Limit(28.5, 24),
    },
    "bfloat16": {"sgd_c, C = 1": Limit(14, 14), "sm3": Limit(8.5, 8.5)},
    # One instruction adds up all norms of a gradient.
    "a mesh of 8": {
        name: Limit(temporaries=None, sent=1)
        for name in (
            *("sgd_c, C = 1", "adam_c, C = 5", "adam_c, C = 20"),
            "adam_cm, C = 5, int8 slots and m",
        )
    },
    "7B": {
        name: Limit(temporaries=0.12, sent=None)
        for name in (
            *("sgd_c, C = 1", "sgd_c, C = 1, int8", "sgd_c, C = 5"),
            *("sgd_c, C = 5, int8", "sgd_c, C = 20, int8"),
            *("adam_c, C = 1", "adam_c, C = 1, int8", "adam_c, C = 5"),
            *("adam_c, C = 5, int8", "adam_c, C = 20, int8"),
            *("adam_cm, C = 1", "adam_cm, C = 1, int8 slots and m"),
            *("adam_cm, C = 5", "adam_cm, C = 5, int8 slots and m"),
            "adam_cm, C = 20, int8 slots and m",
        )
    },
}
