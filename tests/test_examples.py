"""The examples and the benchmarks run, and give their known numbers."""

import argparse
import importlib.util
import inspect
import json
import pathlib
import re

import absent_devices
import cases
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import pytest
import sklearn.datasets
import sklearn.model_selection
import sklearn.preprocessing
from flax import nnx

import memoptax

ROOT = pathlib.Path(__file__).parents[1]


def load(path):
    spec = importlib.util.spec_from_file_location(pathlib.Path(path).stem, ROOT / path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def assert_picture(path):
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 10_000


@pytest.mark.long
def test_surfaces_give_the_recorded_losses(tmp_path):
    surfaces = load("examples/experiments/surfaces.py")
    losses = surfaces.main(["--output", str(tmp_path / "surfaces.png")])
    assert_picture(tmp_path / "surfaces.png")
    for key, recorded in surfaces.RECORDED.items():
        np.testing.assert_allclose(losses[key], recorded, rtol=1e-4, err_msg=str(key))
    assert losses["Six-hump camel", "SGDM_C"][-1] == pytest.approx(-1.0316, abs=1e-4)
    # The control: momentum at twice the rate reaches the same minima without a buffer.
    doubled = [losses[name, "SGDM, 2 × rate"][-1] for name in surfaces.PROBLEMS]
    np.testing.assert_allclose(doubled, [0, 3, -1.0316], atol=1e-4)


@pytest.mark.long
@pytest.mark.minutes
def test_digits_train_and_are_drawn(tmp_path, capsys):
    digits = load("examples/experiments/digits.py")
    output = tmp_path / "digits.png"
    arguments = ["--steps", "40", "--seeds", "2", "--output", str(output)]
    results = digits.main(arguments)
    assert_picture(output)
    assert set(results) == set(digits.OPTIMIZERS) | set(digits.DOUBLED)
    table = capsys.readouterr().out
    for name, record in results.items():
        assert name in table
        assert record["loss_curves"].shape == (2, 2)
        assert np.all(record["test_accuracy"] > 0.5), name
    # C + 3 copies in float32 and a few numbers: adam_c at C = 5.
    assert results["adam"]["state_bytes"] == pytest.approx(8, abs=0.01)
    assert results["adam_c"]["state_bytes"] == pytest.approx(32, abs=0.1)
    assert results["adam_c, int8 slots"]["state_bytes"] < 15
    assert results["sgd_c"]["state_bytes"] == pytest.approx(28, abs=0.1)


@pytest.mark.long
def test_digits_are_the_same_every_time():
    digits = load("examples/experiments/digits.py")
    data = jax.tree.map(jnp.asarray, digits.load_digits(0))
    starts = jax.vmap(digits.create_params)(jnp.arange(2))
    batches = np.stack([digits.draw_batches(s, 20, len(data[0][1])) for s in (0, 1)])

    class Bar:
        def update(self, steps):
            pass

    once, again = (
        digits.train(memoptax.sgd_c, (0.01, 0.1), starts, batches, data, Bar())[1]
        for _ in range(2)
    )
    np.testing.assert_array_equal(once, again)
    assert np.unique(once).size == once.size  # rates and seeds do differ


def logistic_regression(tx, epochs=10):
    """The best test accuracies of five seeds, as in the authors' label-noise study.

    The models have an output for each class, and take the examples one by one, in
    order.
    """
    x, y = sklearn.datasets.make_classification(
        n_samples=500,
        n_features=10,
        n_informative=7,
        n_redundant=0,
        n_repeated=0,
        n_clusters_per_class=1,
        flip_y=0,
        class_sep=0.5,
        shift=0.4,
        random_state=1403,
    )
    x, test_x, y, test_y = sklearn.model_selection.train_test_split(
        x, y, test_size=0.2, random_state=1234
    )
    scaler = sklearn.preprocessing.StandardScaler().fit(x)
    x, test_x = jnp.asarray(scaler.transform(x)), jnp.asarray(scaler.transform(test_x))
    y, test_y = jnp.asarray(y), jnp.asarray(test_y)

    def logits(params, x):
        return x @ params["weights"] + params["bias"]

    def loss(params, x, y):
        return optax.softmax_cross_entropy_with_integer_labels(logits(params, x), y)

    def step(carry, example):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params, *example), state, params)
        return (optax.apply_updates(params, updates), state), None

    def epoch(carry, _):
        carry, _ = jax.lax.scan(step, carry, (x, y))
        return carry, jnp.mean(logits(carry[0], test_x).argmax(-1) == test_y)

    @jax.jit
    @jax.vmap
    def run(seed):
        bound = 10**-0.5  # PyTorch's initialisation of a linear layer
        drawn = jax.random.uniform(jax.random.key(seed), (11, 2), float, -bound, bound)
        params = {"weights": drawn[:10], "bias": drawn[10]}
        return jnp.max(jax.lax.scan(epoch, (params, tx.init(params)), None, epochs)[1])

    return np.asarray(run(jnp.arange(5)))


@pytest.mark.long
def test_label_noise_gives_the_accuracies_of_the_authors_study():
    """The seeds are not the authors', so the means may differ by their scatter."""
    sgd, doubled, sgd_c = (
        logistic_regression(tx).mean()
        for tx in (optax.sgd(1e-3), optax.sgd(2e-3), memoptax.sgd_c(1e-3))
    )
    # Recorded: .808, .820 and .834 (100 test points, five seeds).
    np.testing.assert_allclose([sgd, doubled, sgd_c], [0.808, 0.820, 0.834], atol=0.015)
    assert sgd_c > sgd
    assert abs(sgd_c - doubled) <= 0.02  # and the control is as good


@pytest.mark.parametrize("flat", [False, True], ids=["steps", "flat"])
@pytest.mark.long
def test_benchmark_runs(flat, tmp_path):
    steps = load("benchmarks/steps.py")
    output = tmp_path / "results.json"
    arguments = ["--quick", "--output", str(output)] + ["--flat"] * flat
    rows = steps.main(arguments)
    section = json.loads(output.read_text())["flat" if flat else "steps"]
    assert section["rows"] == rows
    assert section["machine"]["jax"] == jax.__version__
    if flat:
        assert all(r["accepted"] == 500 and r["rebuilds"] > 0 for r in rows)
    else:
        assert {r["optimizer"] for r in rows} == {*steps.PLAIN, *steps.BUFFERED}


@pytest.mark.parametrize("name", ["sm3", "training_step", "compile_time", "scaling"])
@pytest.mark.long
def test_other_benchmarks_run(name, tmp_path):
    output = tmp_path / "results.json"
    rows = load(f"benchmarks/{name}.py").main(["--quick", "--output", str(output)])
    (section,) = json.loads(output.read_text()).values()
    assert section["rows"] == rows
    ratios = [row["/ adam"] for row in rows if "/ adam" in row]
    assert ratios and all(ratio > 0 for ratio in ratios)


@pytest.mark.cpu_only("it reads what XLA makes for a CPU")
def test_the_kernels_of_a_step_are_counted(tmp_path):
    kernels = load("benchmarks/kernels.py")
    arguments = ["--quick", "--output", str(tmp_path / "results.json")]
    rows = kernels.main([*arguments, "optax.adam", "sgd_c"])
    touched = {r["optimizer"]: r["touches"] for r in rows if r["kernel"] == "the step"}
    # m and v from g, three each, and p from both: 4. A better compiler needs 7.
    assert 7 <= touched["optax.adam"] <= 10
    # g for the norm, a slot written, p changed by g and the slots, which count as one
    # operand: 1 + 2 + 4.
    assert 7 <= touched["sgd_c"] <= 8


@pytest.mark.long
def test_a_missing_peer_is_reported_as_missing(tmp_path, monkeypatch):
    peers = load("benchmarks/peers.py")
    monkeypatch.setattr(peers, "PEERS", {"nothing": ("no_such_module", "No", {})})
    output = ["--output", str(tmp_path / "results.json")]
    rows = {row["optimizer"]: row for row in peers.main(["--quick", *output])}
    assert rows["nothing"] == {"optimizer": "nothing", "version": "missing"}
    assert rows["sm3"]["ms"] > 0


def test_the_results_are_drawn(tmp_path):
    plots = load("benchmarks/plots.py")
    results = list((ROOT / "benchmarks/results").glob("*-cores-jax*.json"))
    assert results
    for kept in results:
        copy = tmp_path / kept.name
        copy.write_text(kept.read_text())
        assert_picture(plots.draw(copy))
        lines = plots.draw_times(plt.figure().subplots(), json.loads(copy.read_text()))
        for points in lines.values():
            capacities, _ = zip(*points)
            assert sorted(set(capacities)) == list(capacities)
        plt.close("all")


@pytest.mark.long
def test_embeddings_learn_from_touched_rows(tmp_path):
    embeddings = load("examples/experiments/embeddings.py")
    output = tmp_path / "embeddings.png"
    arguments = ["--steps", "300", "--dense-steps", "2", "--output", str(output)]
    found = embeddings.main(arguments)
    assert np.mean(found["losses"][-30:]) < 0.95 * np.mean(found["losses"][:30])
    assert found["bytes"] < 0.02 * found["adam_bytes"]
    assert_picture(output)
    for word, others in found["neighbours"].items():
        assert len(set(others)) == len(others) >= 3 and word not in others


@pytest.mark.cpu_only("a mesh of eight devices")
@pytest.mark.long
def test_the_language_model_learns_on_a_mesh_and_is_drawn(tmp_path, capsys):
    model = load("examples/experiments/language_model.py")
    output, folder = tmp_path / "language_model.png", tmp_path / "checkpoints"
    arguments = ["--quick", "--every", "20", "--samples", "1", "--length", "20"]
    arguments += ["--mesh", "4x2", "--output", str(output)]
    arguments += ["--optimizer", "adam_c:topc=2,decay=0.9", "--checkpoint", str(folder)]
    (found,) = model.main(arguments).values()
    printed = capsys.readouterr().out
    assert printed.index(str(found["report"])) < printed.index("state bytes/param")
    assert_picture(output)
    assert len(found["losses"]) == 40
    assert [step for step, _ in found["validation"]] == [20, 40]
    # Better than a uniform guess, and soon better than the frequencies of characters.
    assert found["validation"][-1][1] < 3.6 < np.log(100) < found["losses"][0]
    assert found["stats"]["fill"] == 2
    ((prompt, new),) = found["samples"]
    assert (len(prompt), len(new)) == (32, 20)

    kernel = found["model"].blocks[0].up.kernel[...]
    assert kernel.addressable_shards[0].data.size * 8 == kernel.size
    # All arrays kept their shardings. Otherwise the second step would compile again.
    assert found["model"].norm.scale[...].sharding.is_fully_replicated
    tx, mesh = memoptax.adam_c(0.1, topc=2), kernel.sharding.mesh
    optimizer = model.create_optimizer(tx, found["model"], mesh)
    params = nnx.state(found["model"], nnx.Param)
    wanted = jax.tree.leaves(memoptax.state_shardings(tx, params))
    for x, sharding in zip(jax.tree.leaves(optimizer.opt_state), wanted, strict=True):
        assert x.sharding.is_equivalent_to(sharding, x.ndim)
    assert optimizer.step[...].sharding.mesh == mesh
    # Resumed with nothing left to do, it returns the record and takes no step.
    (again,) = model.main(arguments).values()
    assert again["losses"] == found["losses"] and again["speed"] is None
    assert again["samples"] == found["samples"]
    # Under other settings it is refused.
    (folder,) = folder.iterdir()
    with pytest.raises(SystemExit, match="is of other settings"):
        model.Checkpoints(folder, {"seed": 1}).restore(None)


@pytest.mark.long
def test_the_language_model_computes_in_bfloat16():
    model = load("examples/experiments/language_model.py")
    args, settings = model.parse(["--quick", "--bf16", "--optimizer", "sm3"])
    text = model.read_text()
    made = model.create_model(len(text.characters), settings, model.create_mesh((1, 1)))
    assert {x.dtype.name for x in jax.tree.leaves(made)} == {"float32"}
    window = jnp.asarray(text.training[None, :32])
    assert "bf16" in str(
        jax.make_jaxpr(lambda x: made.blocks[0](made.places(x)))(window)
    )
    assert made(window).dtype == jnp.float32
    assert set(text.characters) > set("aeiou \n")
    for name in ("sm3", "adamw", "muon", 'adam_c:buffer_dtype="bfloat16",topc=1'):
        model.find_optimizer(name, settings).init({"w": jnp.ones((2, 2))})
    with pytest.raises(SystemExit, match="adamm is not an optimizer"):
        model.find_optimizer("adamm", settings)


SHORT = ["linen_train_state", "nnx_optimizer", "equinox_mlp"]


@pytest.mark.parametrize("name", SHORT)
@pytest.mark.few(1)
def test_small_examples_learn(name):
    accuracies = load(f"examples/{name}.py").main(["--steps", "200"])
    assert len(accuracies) == 2
    assert min(accuracies.values()) > 0.85


EXAMPLES = sorted(p.relative_to(ROOT) for p in ROOT.glob("examples/**/*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_help_explains_every_option_of_an_example(path, monkeypatch, capsys):
    explained, add_argument = {}, argparse.ArgumentParser.add_argument

    def add_and_note(parser, *names, **options):
        explained[names[-1]] = options.get("help")
        return add_argument(parser, *names, **options)

    monkeypatch.setattr(argparse.ArgumentParser, "add_argument", add_and_note)
    with pytest.raises(SystemExit) as stop:
        load(path).main(["--help"])
    assert stop.value.code == 0
    assert len(explained) > 1  # --help is one
    assert all(text and len(text) > 5 for text in explained.values()), explained
    usage = capsys.readouterr().out
    assert all(name in usage for name in explained if name.startswith("--"))


def test_the_page_names_every_example_in_the_order_of_the_folders():
    page = (ROOT / "docs/examples.md").read_text()
    named = re.findall(r"^\| `(\S+\.py)` \|", page, re.M)
    assert sorted(named) == sorted(
        path.relative_to("examples").as_posix() for path in EXAMPLES
    )
    assert named[: len(SHORT)] == [f"{name}.py" for name in SHORT]
    assert named == sorted(named, key=lambda name: "/" in name)


@pytest.mark.long
def test_recipes_show_what_they_say():
    recipes = load("examples/recipes.py")
    before, after, losses, memory = recipes.lora(100)
    jax.tree.map(np.testing.assert_array_equal, before["frozen"], after["frozen"])
    assert losses[-10:].mean() < 0.5 * losses[0]
    adapters = memoptax.state_bytes(
        memoptax.adam_c(1e-2), {name: before[name] for name in ("down", "up")}
    )
    assert memory.total == pytest.approx(adapters, abs=8)
    swept = recipes.sweep(20, (1, 2))
    assert len(swept) == 2 * 8 == len(set(swept.values()))
    losses = recipes.change_of_task(100)
    assert losses["reset"].mean() < losses["kept"].mean()
    last, averaged = recipes.polyak_average()
    assert averaged < last


def test_steps_are_compiled_ahead_of_time(tmp_path, capsys):
    """The command, and its counts, for this machine's CPU."""
    ahead = load("benchmarks/ahead_of_time.py")
    output = tmp_path / "ahead-of-time-v5e.json"
    arguments = ["--device", "cpu", "--quick", "--output", str(output)]
    found = ahead.main([*arguments, "--only", "optax.adam", "--tables", "float32"])
    found |= ahead.main([*arguments, "--only", "optax.adam", "--tables", "contexts"])
    kept = json.loads(output.read_text())
    assert {table: section["rows"] for table, section in kept.items()} == found
    (row,) = found["float32"]
    # Seven arrays at least. A CPU reads some of them twice.
    assert 28 <= row["moved"] <= 41 and row["state"] == pytest.approx(8, abs=0.1)
    assert row["copies"] == row["stacks"] == row["unaliased"] == row["sent"] == 0
    by_context = {row["context"]: row for row in found["contexts"]}
    assert set(by_context) == set(ahead.CONTEXTS)
    # Parameters and both moments are new arrays.
    undonated = by_context["undonated"]
    assert undonated["unaliased"] >= 12 * undonated["parameters"]
    assert by_context["donated"]["unaliased"] == 0
    # A scan runs its steps in a loop.
    scan = by_context["scan"]
    assert scan["loops"] == 1 and scan["moved"] < 0.01 and scan["in loops"] >= 28
    assert "| `optax.adam`; vmap |" in ahead.markdown(tmp_path)
    assert f"{row['moved']:.1f}" in capsys.readouterr().out


def test_a_step_over_its_limit_is_named(capsys):
    ahead = load("benchmarks/ahead_of_time.py")
    limit = ahead.LIMITS["float32"]["sgd_c, C = 1"]
    row = {"moved": 24.04, "temporaries": 0.0204, "copies": 0, "stacks": 0}
    row |= {"unaliased": 0, "sent": 0, "largest sent": 0}
    assert limit.exceeded(row, "v5e") == []
    bad = row | {"moved": 48.0, "temporaries": 0.25, "copies": 2, "unaliased": 64}
    over = [("float32", "sgd_c, C = 1", *x) for x in limit.exceeded(bad, "h100")]
    ahead.print_exceeded(over)
    lines = capsys.readouterr().out.splitlines()[3:]
    assert [line.split()[-3:] for line in lines] == [
        ["moved", "48.0", "24"],
        ["temporaries", "0.25", "0.02"],
        ["copies", "2", "0"],
        ["unaliased", "64", "0"],
    ]
    assert limit.exceeded({"error": "too large"}, "v5e") == [
        ("error", "too large", "none")
    ]


def test_a_missing_compiler_is_asked_for(monkeypatch):
    ahead = load("benchmarks/ahead_of_time.py")
    monkeypatch.setitem(absent_devices.COMPILERS, "tpu", (("none",), "jax[tpu]"))
    with pytest.raises(SystemExit, match=r'pip install "jax\[tpu\]"'):
        ahead.main(["--device", "v5e", "--check"])
    with pytest.raises(SystemExit):
        ahead.main(["--device", "cpu", "--check"])


def test_every_optimizer_has_a_case_and_every_row_is_one():
    first = {
        name: next(iter(inspect.signature(function).parameters), "")
        for name, function in vars(memoptax).items()
        if inspect.isfunction(function)
    }
    public = {name for name, parameter in first.items() if parameter == "learning_rate"}
    covered = {name.split(",")[0] for name in cases.OPTIMIZERS}
    assert public and public <= covered
    ahead = load("benchmarks/ahead_of_time.py")
    rows = {name for table in ahead.TABLES.values() for name in table.names}
    rows |= {name for limits in ahead.LIMITS.values() for name in limits}
    assert {*rows, *ahead.CHECKED} <= set(cases.OPTIMIZERS)
    for name, make in cases.OPTIMIZERS.items():
        state = jax.eval_shape(make().init, {"w": jnp.ones((8, 8))})
        assert jax.tree.leaves(state), name


CELL = {"cell_type": "code", "source": "print(1 + VALUE)", "metadata": {}}
CELL |= {"outputs": [], "execution_count": None}
NOTEBOOK = {"cells": [CELL], "metadata": {}, "nbformat": 4, "nbformat_minor": 4}


@pytest.mark.long
def test_a_device_is_tried_out_by_one_command(tmp_path, capsys):
    on_device = load("benchmarks/on_device.py")
    good, bad = tmp_path / "good.ipynb", tmp_path / "bad.ipynb"
    good.write_text(json.dumps(NOTEBOOK).replace("VALUE", "1"))
    bad.write_text(json.dumps(NOTEBOOK).replace("VALUE", "no_such_name"))
    output = tmp_path / "results.json"
    arguments = ["--quick", "--steps", "4", "--output", str(output)]
    arguments += ["--only", "sm3, momentum in int8"]
    rows = on_device.main([*arguments, "--notebooks", str(good)])
    kept = json.loads(output.read_text())
    assert {part: kept[part]["rows"] for part in on_device.PARTS} == rows
    assert all(row["verdict"] == "agrees" for row in rows["numbers"])
    assert all(row["/ adam"] > 0 for row in rows["times"])
    (memory,) = rows["memory"]
    # Parameters, gradients, a momentum of one byte, accumulators and scales of rows.
    assert memory["held B/param"] == pytest.approx(9, abs=0.5)
    assert [row["verdict"] for row in rows["notebooks"]] == ["ran"]
    with pytest.raises(SystemExit, match="failed: notebooks of bad.ipynb"):
        on_device.main(["--parts", "notebooks", "--notebooks", str(bad), *arguments])
    assert "FAILED: CellExecutionError: NameError" in capsys.readouterr().out


def test_a_device_that_differs_is_found():
    on_device = load("benchmarks/on_device.py")
    start = {"a": np.zeros(2), "b": np.zeros(1)}
    one = {"a": np.array([3.0, 4.0]), "b": np.ones(1)}
    other = {"a": np.array([3.0, 4.5]), "b": np.ones(1) + 1e-3}
    # Half of five; a thousandth of one.
    assert on_device.difference(start, one, other) == pytest.approx(1e5)

    def broken():
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: of memory\nat 0x0")

    assert on_device.attempt("sm3", broken) == {
        "optimizer": "sm3",
        "verdict": "FAILED: RESOURCE_EXHAUSTED: of memory",
    }
    state = {"slots": np.ones(2, np.int8), "count": np.int32(4), "mean": np.ones(3)}
    assert on_device.counts(state) == [4]
