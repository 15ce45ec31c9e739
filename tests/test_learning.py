"""benchmarks/learning: its statistics, its protocol, its data and its page."""

import urllib.error

import jax
import jax.numpy as jnp
import joblib
import numpy as np
import optax
import pandas
import pytest
import scipy.sparse
import sklearn.datasets

import memoptax
from benchmarks.learning import __main__ as command
from benchmarks.learning import (
    data,
    intervals,
    optimizers,
    page,
    protocol,
    summary,
    training,
)
from benchmarks.learning import task as tasks
from benchmarks.learning.experiments import CORE, NAMES, characters, e7, e9, e11, load
from benchmarks.learning.results import FOLDER, Results

from untyped import untyped

pytestmark = pytest.mark.slow


@pytest.mark.long
@pytest.mark.minutes
def test_all_experiments_run_in_their_quick_form(capsys):
    command.main(["--quick"])
    printed = capsys.readouterr().out
    assert printed.count("Bounds: ") == len(CORE)
    assert printed.count("| optimizer |") == len(CORE)
    assert printed.count("C=5 FIFO |") >= 5


def test_runs_on_the_text_of_another_python_are_not_kept_with_the_rest(
    monkeypatch, capsys
):
    monkeypatch.setattr(characters, "PYTHON", (3, 0))
    with pytest.raises(SystemExit):
        command.main(["e13"])
    assert "are on the help of Python 3.0, and this" in capsys.readouterr().err


# Statistics


def test_interval_of_known_numbers():
    # Student's 97.5 % quantile of 3 degrees of freedom is 3.18245.
    mean, half = intervals.of_mean([1.0, 2.0, 3.0, 4.0])
    assert mean == 2.5
    np.testing.assert_allclose(half, 3.18245 * np.std([1, 2, 3, 4], ddof=1) / 2, 1e-5)


def test_difference_is_paired_by_seed():
    ours = {1: 11.0, 2: 21.1, 3: 30.9, 9: 1e6}
    theirs = {3: 30.0, 2: 20.0, 1: 10.0, 8: -1e6}
    found = intervals.of_difference(ours, theirs)
    np.testing.assert_allclose(found.mean, 1.0)
    assert found.excludes_zero and found.half < 0.3
    assert not intervals.of_difference(
        theirs, {1: 12.0, 2: 20.0, 3: 28.0}
    ).excludes_zero


def test_intervals_cover_the_mean_as_often_as_they_say():
    draws = np.random.default_rng(0).normal(size=(2000, 10))
    covered = [not intervals.of_mean(row).excludes_zero for row in draws]
    assert 0.935 < np.mean(covered) < 0.965


def test_one_value_has_no_interval():
    with pytest.raises(ValueError, match="at least two, but are 1"):
        intervals.of_mean([1.0])


# Results and protocol


def _run(**values):
    first = {"task": "t", "optimizer": "o", "rate": 0.1, "seed": 0, "steps": 5}
    return first | {"test": 1.5} | values


def test_results_resume(tmp_path):
    path = tmp_path / "some" / "e0.csv"
    Results(path).append([_run(), _run(seed=1, test=float("nan"))])
    again = Results(path)
    assert ("t", "o", 0.1, 0, 5) in again and ("t", "o", 0.1, 2, 5) not in again
    again.append([_run(seed=2)])
    assert len(Results(path).runs) == 3
    (run,) = Results(path).select("t", "o", seed=1)
    assert np.isnan(run["test"]) and run["steps"] == 5


def _parabola(best, largest=False):
    """A task whose result is known at any rate, and a stand-in for train."""
    unused = untyped([None] * 5)
    task = tasks.Task(
        "t", None, *unused, steps=1, schedule=tasks.constant, largest=largest
    )
    made = []

    def train(task, make, runs, schedule, loss):
        made.extend(runs)
        sign = -1 if largest else 1
        for run in runs:
            score = sign * np.log2(run["rate"] / best) ** 2 + 1e-3 * run["seed"]
            yield [{"validation": score, "test": score}]

    return task, train, made


ROW = optimizers.Row("o", lambda rate, steps: optax.sgd(rate), 1.0)


@pytest.mark.parametrize("largest", [False, True])
@pytest.mark.parametrize("best", [0.125, 1.0, 16.0])
def test_a_grid_grows_until_the_best_is_inside(tmp_path, monkeypatch, best, largest):
    task, train, made = _parabola(best, largest)
    monkeypatch.setattr(protocol, "train", train)
    results, size = Results(tmp_path / "e.csv"), protocol.Size(rates=3, seeds=4)
    protocol.measure(task, [ROW], size, results)
    choice = protocol.chosen(task, ROW, results)
    assert choice.rate == best and not choice.at_edge
    # The rate is chosen on three seeds. Four others run at it, and at ½, 2 and 4 times
    # it.
    assert {run["seed"] for run in made} == {0, 1, 2, 100, 101, 102, 103}
    fresh = {run["rate"] / best for run in made if run["seed"] >= protocol.FRESH}
    assert fresh == {0.5, 1, 2, 4}
    before = len(made)
    protocol.measure(task, [ROW], size, Results(tmp_path / "e.csv"))
    assert len(made) == before  # nothing is repeated


def test_an_edge_is_flagged(tmp_path, monkeypatch):
    task, train, _ = _parabola(1e4)
    monkeypatch.setattr(protocol, "train", train)
    results = Results(tmp_path / "e.csv")
    protocol.measure(task, [ROW], protocol.Size(rates=3, growth=2), results)
    choice = protocol.chosen(task, ROW, results)
    assert choice.at_edge and len(choice.rates) == 5


def test_a_rate_that_diverges_is_not_chosen(tmp_path):
    results = Results(tmp_path / "e.csv")
    for rate, score in ((0.1, 3.0), (0.2, 1.0), (0.4, float("nan"))):
        runs = [_run(rate=rate, seed=s, validation=score, test=0) for s in range(3)]
        results.append(runs)
    task = _parabola(1)[0]._replace(steps=5)
    assert protocol.chosen(task, ROW, results).rate == 0.2


# Optimizers


def _steps(tx, gradients):
    """Parameters and state after these gradients, from zeros."""

    def step(carry, gradient):
        params, state = carry
        updates, state = tx.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), None

    @jax.jit
    def run(gradients):
        params = jnp.zeros_like(gradients[0])
        return jax.lax.scan(step, (params, tx.init(params)), gradients)[0]

    return run(gradients)


@pytest.mark.parametrize("setting", [0.7, "FIFO", "random", "κ=1e-6"])
@pytest.mark.few(1)
def test_rows_make_the_optimizers_that_they_name(setting):
    """Traced numbers give the same optimizer as static ones."""
    gradients = jax.random.normal(jax.random.key(0), (40, 3))
    (row,) = optimizers.sgd_c([(2, setting)])
    params, state = _steps(row.make(0.1, 40, **row.numbers), gradients)
    stats = memoptax.buffer_stats(state)
    static = {
        0.7: {},
        "FIFO": {"fifo_probability": 1.0},
        "κ=1e-6": {"kappa": 0.0},
        "random": None,
    }[setting]
    if static is None:
        assert 0.01 < stats["acceptance"] < 0.9
        return
    tx = memoptax.sgd_c(0.1, momentum=0.9, topc=2, **static)
    expected, _ = _steps(tx, gradients)
    np.testing.assert_allclose(params, expected, rtol=1e-3, atol=1e-5)


def test_an_average_of_few_weights_is_their_mean():
    gradients = jnp.array([[1.0], [1.0], [4.0]])
    _, state = _steps(training.with_average(optax.sgd(1.0), 0.99), gradients)
    np.testing.assert_allclose(state.average, (-1 - 2 - 6) / 3, rtol=1e-6)


LINE = tasks.Task(
    name="line",
    data=jnp.arange(8.0),
    init=lambda key: jax.random.normal(key, (1,)),
    draw=lambda data, key, count: jax.random.randint(
        jax.random.fold_in(key, count), (2,), 0, 8
    ),
    batch=lambda data, rows: data[rows],
    loss=lambda w, x: jnp.mean((w[0] * x - x) ** 2),
    score=lambda data, w, losses, key: {"validation": w[0], "test": losses[-1]},
    steps=6,
    schedule=tasks.warmup,
    lanes=2,
)


def test_training_is_that_of_a_plain_loop():
    """Lanes, padding and the split into three programs change nothing."""
    task = LINE
    runs = [
        {"rate": rate, "seed": seed} for rate in (0.01, 0.02, 0.03) for seed in (3,)
    ]
    records = sum(training.train(task, ROW.make, runs), [])
    for run, record in zip(runs, records, strict=True):
        init_key, key = jax.random.split(jax.random.key(3))
        w = task.init(init_key)
        for count in range(6):
            batch = task.batch(task.data, task.draw(task.data, key, count))
            rate = run["rate"] * min((count + 1) / 0.3, 1)
            w = w - rate * jax.grad(task.loss)(w, batch)
        np.testing.assert_allclose(float(record["validation"]), w[0], rtol=1e-4)
        assert np.isnan(record["acceptance"])


@pytest.mark.parametrize("online", [False, True])
def test_an_average_is_scored_online_before_each_step(online):
    task = LINE._replace(online=online, schedule=tasks.constant)

    def make(rate, steps):
        return training.with_average(optax.sgd(rate), 0.99)

    ((record,),) = untyped(training.train(task, make, [{"rate": 0.01, "seed": 3}]))
    init_key, key = jax.random.split(jax.random.key(3))
    draws = [task.draw(task.data, key, count) for count in range(6)]
    batches, weights = [task.batch(task.data, x) for x in draws], [task.init(init_key)]
    for batch in batches:
        weights.append(weights[-1] - 0.01 * jax.grad(task.loss)(weights[-1], batch))
    # The plain mean of the weights after the first five steps, or the last of them.
    scored = jnp.stack(weights[1:6]).mean(0) if online else weights[5]
    wanted = task.loss(scored, batches[5])
    np.testing.assert_allclose(record["test"], wanted, rtol=1e-4)
    mean = jnp.stack(weights[1:]).mean(0)[0]
    np.testing.assert_allclose(record["validation"], mean, rtol=1e-4)


def test_what_the_slots_hold_is_counted():
    """Under FIFO the tag's share is that of the last C batches."""
    (row,) = optimizers.adam_c([(2, "FIFO")])
    tx = row.make(0.1, 4, **row.numbers)
    params = {"net": jnp.ones(3), "tag": jnp.zeros(1)}
    state, update = tx.init(params), jax.jit(tx.update)
    for share in (1.0, 0.25, 0.75):
        grads = {"net": jnp.ones(3), "tag": jnp.array([e9.TINY * share])}
        _, state = update(grads, state, params)
    np.testing.assert_allclose(e9.remembered(state)["share"], 0.5, rtol=1e-4)
    assert np.isnan(e9.remembered(optax.adam(0.1).init(params))["share"])


def test_sharpness_of_a_quadratic():
    curvature = jnp.array([1.0, 3.0, 10.0])

    def loss(params):
        return jnp.sum(curvature * params["w"] ** 2) / 2

    found = e11.sharpness(loss, {"w": jnp.ones(3)}, jax.random.key(0))
    np.testing.assert_allclose(found["top"], 10, rtol=1e-4)
    np.testing.assert_allclose(found["trace"], 14, rtol=1e-5)


def test_the_optimum_is_one():
    x = np.random.default_rng(0).normal(size=(200, 9)).astype(np.float32)
    y = (x[:, 0] + 0.5 * x[:, 1] > 0.3).astype(np.int32)
    least = e7.optimum(x, y)
    w = optax.tree.zeros_like(e7.MODEL.init(jax.random.key(0)))
    slope = jax.jit(jax.grad(e7.loss))
    for _ in range(500):
        w = jax.tree.map(lambda p, g: p - g, w, slope(w, (x, y)))
    np.testing.assert_allclose(e7.loss(w, (x, y)), least, atol=1e-6)


# Data


def test_mnist1d_is_generated_and_does_not_change_the_global_generator():
    np.random.seed(7)
    before = np.random.get_state(legacy=False)
    parts = data.mnist1d(200)
    assert [part[0].shape for part in parts] == [(160, 40), (80, 40), (120, 40)]
    assert set(parts.train[1]) == set(range(10))
    np.testing.assert_equal(np.random.get_state(legacy=False), before)


def test_shuttle_and_segment():
    x, y = data.shuttle()
    assert x.shape == (49097, 9) and y.sum() == 3511
    np.testing.assert_allclose(x.mean(axis=0), 0, atol=1e-4)
    x, y = data.segment()
    assert x.shape == (2310, 18) and (np.bincount(y) == 330).all()


def test_flights_are_put_in_order():
    table = pandas.DataFrame(
        {
            "year": 2013,
            "month": [2, 1, 1, 1],
            "day": [1, 2, 2, 2],
            "sched_dep_time": [500, 900, 600, 700],
            "hour": [5, 9, 6, 7],
            "arr_delay": [16, 15, -3, np.nan],
            "carrier": ["UA", "AA", "UA", "UA"],
            "origin": "EWR",
            "dest": ["IAH", "MIA", "IAH", "IAH"],
            "distance": [1400, 1089, 1400, 1400],
        }
    )
    flights = data.read_flights(table)
    assert flights.late.tolist() == [0, 0, 1]
    assert flights.categories[:, 3].tolist() == [1, 2, 0]  # hours 6, 9, 5
    assert flights.categories[:, 4].tolist() == [0, 0, 1]  # a Wednesday, a Friday
    assert flights.sizes == (2, 1, 2, 3, 2)


def test_text_has_three_parts_of_one_alphabet():
    text = data.text()
    assert all(part.max() < text.vocabulary for part in text[1:])
    assert len(text.train) > 7 * len(text.test) > 100_000


def test_covtype_from_a_small_file_of_its_format(tmp_path):
    folder = tmp_path / "covertype"
    folder.mkdir()
    x = np.arange(12.0).reshape(4, 3)
    joblib.dump(x, folder / "samples_py3")
    joblib.dump(np.array([1, 2, 7, 2], np.int32), folder / "targets_py3")
    made, labels = data.covtype(tmp_path)
    assert labels.tolist() == [0, 1, 0, 1]
    np.testing.assert_allclose(made.std(axis=0), 1, rtol=1e-5)


def test_rcv1_from_a_small_file_of_its_format(tmp_path):
    folder = tmp_path / "RCV1"
    folder.mkdir()
    x = scipy.sparse.csr_matrix(np.eye(3))
    topics = scipy.sparse.csr_matrix(np.array([[1, 0], [0, 1], [0, 1]], np.uint8))
    joblib.dump(x, folder / "samples_py3.pkl")
    joblib.dump(np.arange(3), folder / "sample_id_py3.pkl")
    joblib.dump(topics, folder / "sample_topics_py3.pkl")
    joblib.dump(np.array(["C11", "CCAT"]), folder / "topics_names_py3.pkl")
    made, labels = data.rcv1(tmp_path)
    assert made.shape == (3, 3) and labels.tolist() == [0, 1, 1]


@pytest.mark.parametrize("name", ["covtype", "rcv1"])
def test_a_download_without_a_network_is_an_error_that_says_so(name, monkeypatch):
    def fetch(**_):
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(sklearn.datasets, f"fetch_{name}", fetch)
    with pytest.raises(ConnectionError, match=f"{name} is not on this machine"):
        getattr(data, name)()


def test_a_package_that_is_absent_is_named(monkeypatch):
    def absent(name):
        raise ImportError(name)

    monkeypatch.setattr(data.importlib, "import_module", absent)
    with pytest.raises(ImportError, match=r"mnist1d is not installed: pip .*evidence"):
        data.mnist1d()


# Tables and the page


def test_numbers_are_written_as_far_as_they_are_known():
    assert page.interval(intervals.Interval(66.6667, 1.2345)) == "66.7 ± 1.2"
    assert page.difference(intervals.Interval(-0.5, 0.0312)) == "**−0.500 ± 0.031**"
    assert page.difference(intervals.Interval(0.01, 0.5)) == "+0.01 ± 0.50"


@pytest.mark.long
def test_the_pages_are_those_of_the_results():
    texts = [path.read_text() for path in page.PAGES]
    known = load()
    run = [known[name] for name in NAMES if (FOLDER / f"{name}.csv").exists()]
    made = {each.name: page.tables(each, FOLDER) for each in run}
    assert [page.fill(text, made) for text in texts] == texts
    for each in run:
        assert sum(text.count(f"<!-- evidence: {each.name} -->") for text in texts) == 1
        assert (page.DOCS / "evidence" / f"{each.name}.png").exists()


def test_lines_pair_with_the_base_and_with_fifo(tmp_path):
    """For the first task of E8, from results written by hand."""
    experiment = load()["e8"]
    task, _ = experiment.plan()[0]
    results = Results(tmp_path / "e8.csv")
    scores = {"adam": 60, "adam_c C=5 .7": 62, "adam_c C=5 FIFO": 63}
    for optimizer, score in scores.items():
        for rate in (0.1, 0.2, 0.4):
            for seed in (0, 1, 100, 101, 102):
                value = score - abs(rate - 0.2) + seed % 100
                results.append(
                    [
                        _run(
                            task=task.name,
                            optimizer=optimizer,
                            rate=rate,
                            seed=seed,
                            steps=task.steps,
                            validation=value,
                            test=value,
                        )
                    ]
                )
    ((_, lines),) = summary.lines(experiment, tmp_path)
    line = {line.name: line for line in lines}["adam_c C=5 .7"]
    assert line.rate == 0.2 and line.seeds == 3 and not line.at_edge
    np.testing.assert_allclose(line.over_base.mean, 2)
    np.testing.assert_allclose(line.over_fifo.mean, -1)
    double = {line.name: line for line in lines}["adam, 2 × rate"]
    np.testing.assert_allclose(double.over_base.mean, -0.2)
