"""Where the tests run: on eight simulated devices of a CPU, or on an accelerator.

    pytest -n 2
    MEMOPTAX_TEST_OPTIMIZED=1 pytest -n 2     # programs as fast as those of users
    MEMOPTAX_TEST_PLATFORM=cuda pytest        # or tpu, rocm: what JAX_PLATFORMS takes

Most of the time goes into compilation, for programs that run once. So LLVM does not
optimize them, and XLA's slower emitters of fusions are off: test_critical_gradients.py
takes 17 seconds instead of 29. Passes over whole programs, which decide what is fused,
copied and held, stay on. CI runs half of the fast suite with MEMOPTAX_TEST_OPTIMIZED.

On an accelerator, tests marked ``cpu_only`` are skipped with the reason that the marker
gives, and so are all that ask for the fixture ``mesh``. Matrix products have full
precision there. A TPU serves one process, so leave out ``-n``; on a GPU several share
its memory with ``XLA_PYTHON_CLIENT_PREALLOCATE=false``. All of this is set before JAX
starts.

``pytest`` runs the fast suite, ``-m long`` the rest, ``-m "long or not long"`` all.
A test marked ``few(n)`` has n of its cases in the fast suite, spread evenly, or as many
as ``MEMOPTAX_TEST_FEW`` says if those are fewer. CI leaves
out what is marked ``exhaustive``: the 5,000 streams per family of test_properties.py,
whose results docs/trust.md keeps. The fast suite has a short form of them.
"""

import importlib.metadata
import os

QUICKLY_COMPILED = [
    "--xla_backend_optimization_level=0",
    "--xla_cpu_parallel_codegen_split_count=1",
]
JAXLIB = tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2]))
if JAXLIB < (0, 11):  # later ones have no such choice
    QUICKLY_COMPILED.append("--xla_cpu_use_fusion_emitters=false")

PLATFORM = os.environ.get("MEMOPTAX_TEST_PLATFORM") or "cpu"
if PLATFORM == "cpu":
    flags = [os.environ.get("XLA_FLAGS", "")]
    if "xla_force_host_platform_device_count" not in flags[0]:
        flags.append("--xla_force_host_platform_device_count=8")
    if not os.environ.get("MEMOPTAX_TEST_OPTIMIZED"):
        flags += [f for f in QUICKLY_COMPILED if f.split("=")[0] not in flags[0]]
    os.environ["XLA_FLAGS"] = " ".join(flags)
    os.environ["JAX_PLATFORMS"] = "cpu"
else:
    # The CPU too, for tests that name it. JAX fails if the accelerator is missing.
    os.environ["JAX_PLATFORMS"] = f"{PLATFORM},cpu"
    os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

hypothesis.settings.register_profile(
    "the same on every run",
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)
hypothesis.settings.load_profile("the same on every run")


@pytest.hookimpl(tryfirst=True)  # before pytest deselects by -m
def pytest_collection_modifyitems(items):
    cases = {}
    for item in items:
        if item.get_closest_marker("few"):
            cases.setdefault((item.path, item.originalname), []).append(item)
    for group in cases.values():
        (count,) = group[0].get_closest_marker("few").args
        count = min(count, int(os.environ.get("MEMOPTAX_TEST_FEW") or count))
        fast = {k * len(group) // count for k in range(count)}
        for place, item in enumerate(group):
            if place not in fast:
                item.add_marker(pytest.mark.long)
    # Otherwise one worker may begin them when the other has nothing left to do.
    items.sort(key=lambda item: item.get_closest_marker("minutes") is None)
    if PLATFORM == "cpu":
        return
    for item in items:
        if "mesh" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.cpu_only("a mesh of eight devices"))
        marker = item.get_closest_marker("cpu_only")
        if marker:
            item.add_marker(pytest.mark.skip(reason=f"for a CPU: {marker.args[0]}"))


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_xdist_make_scheduler(config, log):
    """Neighbours go to one worker, where they share what is compiled."""
    if config.getoption("dist") != "load":
        return None
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log)


@pytest.fixture
def x64():
    """float64 for one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def mesh():
    """Eight devices, 4 × 2, in JAX's automatic mode."""
    automatic = (jax.sharding.AxisType.Auto,) * 2
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=automatic)
