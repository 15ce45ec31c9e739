"""Labels of test cases."""

import re


def named(value):
    """A test's name without addresses of functions: workers must agree on it."""
    return re.sub(r"<function (\S+) at \w+>", r"\1", str(value))
