"""Train a character-level transformer on the English text that ships with CPython.

    python language_model.py --optimizer adam adam_cm:topc=1,learning_rate=5e-4
    python language_model.py --devices 8 --mesh 4x2 --checkpoint checkpoints

An optimizer is named as in memoptax or optax, with arguments after a colon. Parameters
and optimizer state are sharded over a mesh, and a batch over its first axis. The number
of the step determines its batch, so a run that was killed takes the same steps after it
resumes.
"""

import argparse
import ast
import functools
import re
import statistics
import time
import zlib
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from matplotlib.figure import Figure
from tqdm import tqdm

import memoptax

HELD_OUT = 0.1  # the last part of the text, for the validation loss
TEMPERATURE = 0.7


class Settings(NamedTuple):
    """What a run depends on, besides its text and its optimizer."""

    width: int = 128
    layers: int = 3
    heads: int = 4
    context: int = 96
    batch: int = 16
    steps: int = 2000
    seed: int = 0
    rate: float = 2e-3
    bf16: bool = False


QUICK = Settings(width=32, layers=1, heads=2, context=32, batch=8, steps=40, rate=1e-2)
HELP = {
    "width": "length of a character's vector",
    "layers": "layers of attention",
    "heads": "heads of each layer",
    "context": "characters that the model sees",
    "batch": "windows of text in a step",
    "steps": "steps of each run",
    "seed": "seed of the parameters and the batches",
    "rate": "peak learning rate, after a warm-up and before a cosine decay",
}


class Text(NamedTuple):
    """Text as one number per character."""

    characters: np.ndarray  # (V,), the character of each number
    training: np.ndarray  # (n,), uint8
    validation: np.ndarray  # (m,), uint8


def read_text():
    """The topics of Python's help, every paragraph once.

    Topics repeat one another, and held-out text must not occur in training.
    """
    from pydoc_data import topics

    paragraphs = re.split(r"\n\s*\n", "\n\n".join(topics.topics.values()))
    text = np.array(list("\n\n".join(dict.fromkeys(paragraphs))))
    characters, numbers = np.unique(text, return_inverse=True)
    parts = np.split(numbers.astype(np.uint8), [int((1 - HELD_OUT) * len(text))])
    return Text(characters, *parts)


class Block(nnx.Module):
    """Causal attention, then a perceptron, each with a residual connection."""

    def __init__(self, width, heads, **options):
        norm = functools.partial(nnx.RMSNorm, width, **options)
        linear = functools.partial(nnx.Linear, use_bias=False, **options)
        self.norms = nnx.List([norm(), norm()])
        self.attention = nnx.MultiHeadAttention(
            heads, width, use_bias=False, decode=False, **options
        )
        self.up, self.down = linear(width, 4 * width), linear(4 * width, width)

    def __call__(self, x):
        mask = nnx.make_causal_mask(jnp.ones(x.shape[:-1]))
        x = x + self.attention(self.norms[0](x), mask=mask)
        return x + self.down(nnx.gelu(self.up(self.norms[1](x))))


class Transformer(nnx.Module):
    """Logits of each next character, (batch, length, V), from (batch, length)."""

    def __init__(self, vocabulary, settings):
        width, heads, layers = settings.width, settings.heads, settings.layers
        # The dtype of the computation. Parameters are float32.
        dtype = jnp.bfloat16 if settings.bf16 else None
        options = {"dtype": dtype, "rngs": nnx.Rngs(settings.seed)}
        small = nnx.initializers.normal(0.02)
        embed = functools.partial(nnx.Embed, embedding_init=small, **options)
        self.characters = embed(vocabulary, width)
        self.places = embed(settings.context, width)
        blocks = [Block(width, heads, **options) for _ in range(layers)]
        self.blocks = nnx.List(blocks)
        self.norm = nnx.RMSNorm(width, **options)
        self.readout = nnx.Linear(width, vocabulary, **options)

    def __call__(self, text):
        x = self.characters(text) + self.places(jnp.arange(text.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.readout(self.norm(x)).astype(jnp.float32)


def abstract_params(vocabulary, settings):
    """Shapes and dtypes of the parameters, without allocating any."""
    model = nnx.eval_shape(lambda: Transformer(vocabulary, settings))
    return nnx.as_pure(nnx.state(model, nnx.Param))


def create_mesh(shape):
    automatic = (jax.sharding.AxisType.Auto,) * 2
    return jax.make_mesh(shape, ("data", "model"), axis_types=automatic)


def create_model(vocabulary, settings, mesh):
    """The model, created in shards, so that no device holds all of a large one."""

    def create():
        return nnx.split(Transformer(vocabulary, settings))

    graph, shapes = nnx.eval_shape(create)
    shardings = jax.tree.map(lambda x: NamedSharding(mesh, spread(x, mesh)), shapes)
    return nnx.merge(graph, jax.jit(lambda: create()[1], out_shardings=shardings)())


def spread(leaf, mesh):
    """The spec of a parameter: each mesh axis takes the first dimension it divides.

    The first axis of the mesh is FSDP, the second is tensor-parallel.
    """
    free, spec = list(mesh.axis_names), []
    for length in leaf.shape if leaf.ndim > 1 else ():
        fits = free and length % mesh.shape[free[0]] == 0
        spec.append(free.pop(0) if fits else None)
    while spec and spec[-1] is None:
        spec.pop()
    return PartitionSpec(*spec)


def create_optimizer(tx, model, mesh):
    """State that is like the parameters has their shardings. The rest is replicated."""
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    everywhere = NamedSharding(mesh, PartitionSpec())

    def place(x):
        on_mesh = isinstance(x.sharding, NamedSharding)
        return x if on_mesh else jax.device_put(x, everywhere)

    nnx.update(optimizer, jax.tree.map(place, nnx.state(optimizer)))
    return optimizer


def find_optimizer(name, settings):
    """The optimizer of a ``name``, such as ``adam`` or ``adam_c:topc=10,decay=0.9``."""
    function, _, arguments = name.partition(":")
    keywords = {"learning_rate": settings.rate}
    for keyword in ast.parse(f"f({arguments})", mode="eval").body.keywords:
        word = isinstance(keyword.value, ast.Name) and keyword.value.id
        keywords[keyword.arg] = word or ast.literal_eval(keyword.value)
    peak = keywords["learning_rate"]
    keywords["learning_rate"] = optax.schedules.warmup_cosine_decay_schedule(
        0.0, peak, settings.steps // 20, settings.steps, peak / 10
    )
    for module in (memoptax, optax, optax.contrib):
        if hasattr(module, function):
            return getattr(module, function)(**keywords)
    raise SystemExit(f"{function} is not an optimizer of memoptax or optax.")


def loss_fn(model, windows):
    """Nats per character, each predicted from those before it in its window."""
    losses = optax.softmax_cross_entropy_with_integer_labels(
        model(windows[:, :-1]), windows[:, 1:].astype(jnp.int32)
    )
    return losses.mean()


def make_step(nodes, settings, mesh):
    """A function of ``nodes`` (model and optimizer) and the text that takes a step.

    Its windows of text are drawn from the seed and the number of the step. Everything
    keeps its sharding. Otherwise XLA would change some, and compile again for the next
    step.
    """
    layout = jax.tree.map(lambda x: x.sharding, nnx.state(nodes))
    over_batch = NamedSharding(mesh, PartitionSpec(mesh.axis_names[0]))

    # Donated: the new state takes the memory of the old one.
    @functools.partial(nnx.jit, donate_argnums=0)
    def step(nodes, text):
        model, optimizer = nodes["model"], nodes["optimizer"]
        key = jax.random.fold_in(jax.random.key(settings.seed), optimizer.step[...])
        last = len(text) - settings.context
        starts = jax.random.randint(key, (settings.batch, 1), 0, last)
        windows = text[starts + jnp.arange(settings.context + 1)]
        windows = jax.lax.with_sharding_constraint(windows, over_batch)
        loss, grads = nnx.value_and_grad(loss_fn)(model, windows)
        optimizer.update(model, grads)
        nnx.update(nodes, jax.lax.with_sharding_constraint(nnx.state(nodes), layout))
        return loss

    return step


@functools.partial(nnx.jit, static_argnames="settings")
def validation_loss(model, text, *, settings):
    """The loss on all of ``text``, cut into batches of windows."""
    shape = (-1, settings.batch, settings.context + 1)
    whole = len(text) // (shape[1] * shape[2]) * shape[1] * shape[2]
    batches = text[:whole].reshape(shape)
    return jax.lax.map(lambda windows: loss_fn(model, windows), batches).mean()


@functools.partial(nnx.jit, static_argnames="length")
def generate(model, prompts, key, *, length):
    """(samples, length) characters that follow ``prompts``, (samples, context)."""

    def step(window, key):
        logits = model(window)[:, -1] / TEMPERATURE
        new = jax.random.categorical(key, logits).astype(window.dtype)
        return jnp.concatenate([window[:, 1:], new[:, None]], axis=1), new

    return jax.lax.scan(step, prompts, jax.random.split(key, length))[1].T


class Checkpoints:
    """The last two states of a run in a folder, or nothing without a folder."""

    def __init__(self, folder, identity):
        self.identity, self.manager = identity, None
        if folder is not None:
            options = ocp.CheckpointManagerOptions(max_to_keep=2)
            self.manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def save(self, step, nodes, record):
        """Starts to write. Training goes on meanwhile, and the record grows."""
        if self.manager is None:
            return
        record = {name: list(values) for name, values in record.items()}
        parts = ocp.args.Composite(
            state=ocp.args.StandardSave(nnx.to_pure_dict(nnx.state(nodes))),
            record=ocp.args.JsonSave({"identity": self.identity, **record}),
        )
        self.manager.save(step, args=parts)

    def restore(self, nodes):
        """Puts the newest complete state into ``nodes``, and returns its record."""
        if self.manager is None or (step := self.manager.latest_step()) is None:
            return {"losses": [], "validation": []}
        parts = ocp.args.Composite(record=ocp.args.JsonRestore())
        record = self.manager.restore(step, args=parts).record
        if record.pop("identity") != self.identity:
            raise SystemExit(
                f"The checkpoint in {self.manager.directory} is of other settings or "
                "another text: name another folder."
            )
        state = nnx.state(nodes)
        like = jax.tree.map(ocp.utils.to_shape_dtype_struct, nnx.to_pure_dict(state))
        parts = ocp.args.Composite(state=ocp.args.StandardRestore(like))
        nnx.replace_by_pure_dict(state, self.manager.restore(step, args=parts).state)
        nnx.update(nodes, state)
        return record

    def close(self):
        if self.manager is not None:
            self.manager.close()  # waits for what is still being written


def train(name, settings, text, mesh, folder=None, every=50):
    """One run, with a validation loss and a checkpoint at every ``every`` steps.

    Returns:
      A dict with ``losses`` of the steps, ``validation`` as pairs of step and loss,
      ``speed`` in characters per second (None if nothing was left to do), ``stats``
      of the buffers, and the ``model``.
    """
    everywhere = NamedSharding(mesh, PartitionSpec())
    training, held_out = jax.device_put((text.training, text.validation), everywhere)
    model = create_model(len(text.characters), settings, mesh)
    optimizer = create_optimizer(find_optimizer(name, settings), model, mesh)
    nodes = {"model": model, "optimizer": optimizer}
    content = zlib.crc32(text.training.tobytes() + text.validation.tobytes())
    identity = {"optimizer": name, "text": content, **settings._asdict()}
    checkpoints = Checkpoints(folder and folder / file_name(name), identity)
    record, step = checkpoints.restore(nodes), make_step(nodes, settings, mesh)
    losses, validation, seconds = record["losses"], record["validation"], []
    # An accelerator is given its next step before the last one ends. Simulated devices
    # would block one another.
    ahead = mesh.devices.flat[0].platform != "cpu"
    bar = tqdm(
        desc=name, total=settings.steps, initial=len(losses), unit="step", disable=None
    )
    while (done := len(losses)) < settings.steps:
        until = min(settings.steps, (done // every + 1) * every)
        start, new = time.perf_counter(), []
        for _ in range(done, until):
            new.append(step(nodes, training))
            jax.block_until_ready(new[-1 - ahead :][0])
            bar.update()
        losses += np.asarray(jax.device_get(new)).tolist()
        seconds.append((time.perf_counter() - start) / (until - done))
        validation.append(
            (until, float(validation_loss(model, held_out, settings=settings)))
        )
        bar.set_postfix(loss=f"{losses[-1]:.3f}", validation=f"{validation[-1][1]:.3f}")
        checkpoints.save(until, nodes, record)
    bar.close()
    checkpoints.close()
    # Leave out the first interval, which compiles, if there are others.
    step_time = statistics.median(seconds[1:] or seconds) if seconds else None
    return {
        "losses": losses,
        "validation": validation,
        "speed": step_time and settings.batch * settings.context / step_time,
        "stats": buffer_stats(optimizer),
        "model": model,
    }


def file_name(name):
    return re.sub(r"[^\w.=-]+", "_", name)


def buffer_stats(optimizer):
    """The statistics of its buffers, if it has any."""
    try:
        return jax.device_get(jax.jit(memoptax.buffer_stats)(optimizer.opt_state))
    except ValueError:
        return {}


def print_reports(names, settings, text):
    """Print the bytes that every optimizer will hold, before any are allocated."""
    params = abstract_params(len(text.characters), settings)
    reports = {}
    for name in names:
        tx = find_optimizer(name, settings)
        reports[name] = memoptax.memory_report(tx, params)
        print(f"{name}, {reports[name].parameters:,} parameters\n{reports[name]}\n")
    return reports


def sample(model, text, settings, count, length):
    """Pairs of held-out text and what the model writes after it."""
    last = len(text.validation) - settings.context
    starts = np.linspace(0, last, count, dtype=int)
    prompts = text.validation[starts[:, None] + np.arange(settings.context)]
    new = generate(model, prompts, jax.random.key(settings.seed), length=length)
    spell = text.characters[np.concatenate([prompts, new], axis=1)]
    lines = ["".join(row) for row in spell]
    return [(x[: settings.context], x[settings.context :]) for x in lines]


def print_samples(results):
    for name, r in results.items():
        for prompt, new in r["samples"]:
            print(f"\n{f' {name} goes on after | ':-^88}\n{prompt}|{new}")


def print_table(results):
    print(
        f"\n{'optimizer':<32}{'training':>10}{'validation':>12}{'chars/s':>10}"
        f"{'state bytes/param':>19}{'buffer took':>13}"
    )
    for name, r in results.items():
        speed = f"{r['speed']:,.0f}" if r["speed"] else "-"
        took = r["stats"].get("acceptance")
        print(
            f"{name:<32}{np.mean(r['losses'][-50:]):>10.3f}"
            f"{r['validation'][-1][1]:>12.3f}{speed:>10}"
            f"{r['report'].per_parameter:>19.2f}"
            f"{'-' if took is None else f'{took:.0%}':>13}"
        )
    print("Losses in nats per character. In training: the mean of the last 50 steps.")


def draw(results, settings, output):
    """Plot the validation losses, and behind them smoothed training losses."""
    colours = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]
    figure = Figure(figsize=(9, 5.5))
    axis = figure.subplots()
    width = max(1, settings.steps // 50)
    for i, (name, r) in enumerate(results.items()):
        colour = colours[i % len(colours)]
        smooth = np.convolve(r["losses"], np.ones(width) / width, "valid")
        at = np.arange(len(smooth)) + (width + 1) / 2
        axis.plot(at, smooth, color=colour, alpha=0.4, lw=1.2)
        at, losses = np.transpose(r["validation"])
        label = f"{name} ({losses[-1]:.3f})"
        axis.plot(at, losses, "o-", color=colour, ms=3.5, label=label)
    axis.plot([], [], color="#777777", alpha=0.5, lw=1.2, label="in training, smoothed")
    axis.set(
        title=f"A transformer on the characters of Python's help\n{settings.layers} "
        f"layers of {settings.width}, {r['report'].parameters:,} parameters",
        xlabel=f"step of {settings.batch} × {settings.context} characters",
        ylabel="loss, nats per character",
        xlim=(0, settings.steps),
    )
    axis.legend(title="validation loss (the last)", frameon=False)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(output, dpi=120)


def parse(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--optimizer",
        nargs="+",
        default=["adam"],
        metavar="NAME",
        help="what to train with, as in adam_c:topc=10,decay=0.9 (adam)",
    )
    for name, text in HELP.items():
        default = getattr(Settings(), name)
        parser.add_argument(f"--{name}", type=type(default), help=f"{text} ({default})")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16")
    parser.add_argument("--mesh", default="1x1", help="devices, as in 4x2 (1x1)")
    parser.add_argument(
        "--devices", type=int, help="simulate this many on the CPU (none)"
    )
    parser.add_argument(
        "--checkpoint", type=Path, help="folder to save to and resume from (none)"
    )
    parser.add_argument(
        "--every",
        type=int,
        help="steps between checkpoints and validation losses (a twentieth of all)",
    )
    parser.add_argument(
        "--samples",
        type=int,
        default=2,
        help="texts to generate for each optimizer (2)",
    )
    parser.add_argument(
        "--length", type=int, default=400, help="characters of each text (400)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("language_model.png"),
        help="the figure (language_model.png)",
    )
    parser.add_argument(
        "--quick", action="store_true", help="a small model, trained for a few seconds"
    )
    args = parser.parse_args(argv)
    settings = QUICK if args.quick else Settings()
    given = {k: v for k in HELP if (v := getattr(args, k)) is not None}
    settings = settings._replace(bf16=args.bf16, **given)
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", args.mesh):
        parser.error(f"--mesh is two numbers as in 4x2, not {args.mesh}")
    args.mesh = tuple(map(int, args.mesh.split("x")))
    if settings.batch % args.mesh[0]:
        parser.error(f"--batch {settings.batch} is not divisible by {args.mesh[0]}")
    return args, settings


def main(argv=None):
    """Losses, speed, samples, statistics, report and model by optimizer."""
    args, settings = parse(argv)
    if args.devices:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", args.devices)
    text = read_text()
    print(
        f"{len(text.training):,} characters to train on, {len(text.validation):,} held "
        f"out, {len(text.characters)} different ones\n"
    )
    reports = print_reports(args.optimizer, settings, text)
    mesh = create_mesh(args.mesh)
    every = args.every or max(1, settings.steps // 20)
    results = {}
    for name, report in reports.items():
        r = train(name, settings, text, mesh, args.checkpoint, every)
        samples = sample(r["model"], text, settings, args.samples, args.length)
        results[name] = {**r, "report": report, "samples": samples}
    print_samples(results)
    print_table(results)
    draw(results, settings, args.output)
    print(f"Learning curves: {args.output}")
    return results


if __name__ == "__main__":
    main()
