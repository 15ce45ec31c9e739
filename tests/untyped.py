"""Values that pyright does not check."""

from typing import Any


def untyped(value) -> Any:
    """The same value. To pyright it is of every type.

    Optax's types of states, updates and parameters are those of any tree of arrays.
    They have no fields or keys, and BCOO arrays do not belong to them. Tests of
    refusals pass arguments of the wrong type.
    """
    return value
