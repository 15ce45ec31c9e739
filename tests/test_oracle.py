"""The oracle against the recorded trajectories and against tables made by hand."""

import numpy as np
import pytest

import goldens
import oracle

nan, inf = float("nan"), float("inf")


def close(got, want):
    np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", goldens.cases("cg", "cm"), ids=repr)
def test_replays_the_recorded_trajectory(case):
    name, kwargs = goldens.ours(case)
    stores_decayed = "l2_before_buffer" in case.quirks
    params = oracle.run(
        name, case.params0, case.grads, l2_before_buffer=stores_decayed, **kwargs
    )
    assert goldens.deviation(case, params) <= goldens.tolerance(case)


@pytest.mark.parametrize(
    "case",
    [c for c in goldens.cases("cg", "cm") if c.decisions is not None],
    ids=repr,
)
def test_accepts_and_rejects_as_recorded(case):
    _, kwargs = goldens.ours(case)
    memory = oracle.Memory(kwargs["topc"], kwargs["decay"], synced=kwargs["synced"])
    for t, recorded in enumerate(case.decisions):
        grads = {leaf: g[t].astype(np.float64) for leaf, g in case.grads.items()}
        memory.step(grads, memory.keys(grads))
        # The originals count per leaf, and only once the buffer is full.
        counts = np.zeros(2, int)
        for group, buffer in memory.buffers.items():
            replaced = buffer.accepted - len(buffer.values)
            rejected = buffer.offered - buffer.accepted
            counts += len(group) * np.array([replaced, rejected])
        assert counts.tolist() == recorded.tolist()


def test_one_slot_by_hand():
    # decay .5                  key to beat:  -  2   1  .5   .5  1.5
    grads = [4.0, 1.0, -1.0, 1.0, 3.0, 0.0]
    # stored before the step:   -    4     4    4    1    3
    want = {
        "sum": [4.0, 5.0, 3.0, 5.0, 4.0, 3.0],
        "mid": [4.0, 2.5, 1.5, 2.5, 2.0, 1.5],
        "mean": [4.0, 2.5, 1.5, 2.5, 2.0, 1.5],
    }
    for aggr, updates in want.items():
        stream = ([g] for g in grads)
        got = oracle.critical_gradients(stream, topc=1, decay=0.5, aggr=aggr)
        close([update for [update] in got], updates)


def test_two_slots_by_hand():
    # decay .5, mean; one key for both leaves: |x| + ||y||
    table = [
        # x     y           key   keys before      updates
        (0.0, (3.0, 4.0)),  # 5    -                g
        (1.0, (0.0, 0.0)),  # 1    2.5              (g + 1 entry) / 2
        (-1.0, (0.0, 0.0)),  # 1   1.25, .5         replaces the second
        (0.5, (0.0, 0.0)),  # .5   .625, .5         a tie: rejected
        (0.0, (0.0, 0.3)),  # .3   .3125, .25       replaces the second
        (0.0, (0.0, 0.2)),  # .2   .15625, .15      replaces the second
        (6.0, (0.0, 0.0)),  # 6    .078125, .1      replaces the first
        (0.0, (0.0, 0.0)),  # 0    3, .05           rejected
    ]
    want = [
        (0.0, (3.0, 4.0)),
        (0.5, (1.5, 2.0)),
        (0.0, (1.0, 4 / 3)),
        (-1 / 6, (1.0, 4 / 3)),
        (-1 / 3, (1.0, 4.3 / 3)),
        (0.0, (1.0, 1.5)),
        (2.0, (1.0, 1.4)),
        (2.0, (0.0, 0.2 / 3)),
    ]
    stream = ({"x": x, "y": y} for x, y in table)
    got = list(oracle.critical_gradients(stream, topc=2, decay=0.5, aggr="mean"))
    close([u["x"] for u in got], [x for x, _ in want])
    close([u["y"] for u in got], [y for _, y in want])


def fill(buffer, *values, fifo=False):
    for value in values:
        buffer.offer(abs(value), {"x": value}, fifo)
    return [entry["x"].item() for entry in buffer.values]


def test_equal_minima_leave_lowest_slot_first():
    buffer = oracle.Buffer(topc=3, decay=1.0)
    assert fill(buffer, 1.0, -1.0, 1.0) == [1.0, -1.0, 1.0]
    assert fill(buffer, 2.0) == [2.0, -1.0, 1.0]
    assert fill(buffer, 3.0) == [2.0, 3.0, 1.0]


def test_new_key_decays_at_once_and_zero_decay_forgets():
    buffer = oracle.Buffer(topc=2, decay=0.5)
    fill(buffer, 4.0, 6.0)
    assert buffer.keys == [1.0, 3.0]
    forgetful = oracle.Buffer(topc=1, decay=0.0)
    assert fill(forgetful, 5.0, 1.0) == [1.0]


def test_fifo_replaces_the_oldest_entry_for_any_key():
    buffer = oracle.Buffer(topc=3, decay=1.0)
    fill(buffer, 8.0, 7.0, 6.0, fifo=True)
    assert fill(buffer, 5.0, fifo=True) == [5.0, 7.0, 6.0]
    assert fill(buffer, 9.0) == [9.0, 7.0, 6.0]
    assert buffer.ages == [0, 3, 2]
    assert fill(buffer, 1.0, 2.0, fifo=True) == [9.0, 1.0, 2.0]


def test_non_finite_offer_changes_nothing():
    buffer = oracle.Buffer(topc=2, decay=0.5)
    fill(buffer, 4.0, 2.0, 1.5, 0.1)
    before = (list(buffer.keys), list(buffer.ages), buffer.accepted, buffer.offered)
    assert before == ([0.375, 0.25], [1, 2], 3, 4)
    for key, value in [(nan, nan), (inf, inf), (9.0, nan), (nan, 1.0)]:
        buffer.offer(key, {"x": value}, fifo=True)
    assert before == (buffer.keys, buffer.ages, buffer.accepted, buffer.offered)


def test_slots_are_rounded():
    buffer = oracle.Buffer(topc=2, decay=1.0, round_to="bfloat16")
    assert fill(buffer, 1.001, 3.0) == [1.0, 3.0]
    assert buffer.keys == [1.001, 3.0]


def test_int8_slots_have_a_scale_per_row():
    x = [[1.1, 0.3, -127.0], [0.0, 0.0, 0.0], [2e-6, -1.2e-6, 0.0]]
    want = [[1, 0, -127], [0, 0, 0], [2e-6, -2e-6 * 76 / 127, 0]]
    np.testing.assert_allclose(oracle.stored(x, "int8"), want, rtol=3e-5, atol=1e-12)
    assert oracle.stored(-3.0, "int8") == pytest.approx(-3.0, rel=3e-5)


def test_kappa_scales_the_buffer_term():
    entries = [np.array(2.0), np.array(4.0)]
    for aggr, want in [("sum", 11.5), ("mid", 5.75), ("mean", 13 / 3)]:
        close(oracle.aggregate(10.0, entries, 0.5, aggr), want)
    seen = oracle.aggregate(10.0, entries, 0.5, lambda *arguments: arguments)
    assert seen == (10.0, 1.5, 2)
    assert oracle.aggregate(10.0, entries, 0.0, "mid") == 10.0
    assert oracle.aggregate(10.0, [], 1.0, "mid") == 10.0


def test_one_key_for_the_tree_or_one_per_leaf():
    stream = [{"a": 3.0, "b": 1.0}, {"a": 1.0, "b": 3.0}, {"a": 0.0, "b": 0.0}]
    options = {"topc": 1, "decay": 1.0}
    *_, synced = oracle.critical_gradients(stream, **options)
    *_, apart = oracle.critical_gradients(stream, synced=False, **options)
    assert synced == {"a": 3.0, "b": 1.0}  # 4 against 4: a tie
    assert apart == {"a": 3.0, "b": 3.0}


def test_sum_of_norms_and_global_norm_decide_differently():
    stream = [[1.0, 1.0], [1.9, 0.0], [0.0, 0.0]]
    options = {"topc": 1, "decay": 0.99}
    *_, last = oracle.critical_gradients(stream, **options)
    assert last == [1.0, 1.0]  # 1.9 < 1.98

    def global_norm(tree):
        return np.sqrt(sum(np.sum(x**2) for x in tree.values()))

    *_, last = oracle.critical_gradients(stream, priority_fn=global_norm, **options)
    assert last == [1.9, 0.0]  # 1.9 > 1.40


def test_momenta_by_hand():
    # b1 = .5: m = 2, 2, 1; keys are the gradients' norms 4, 2, 0
    grads = [[4.0], [2.0], [0.0]]
    options = {"b1": 0.5, "topc": 1, "decay": 1.0}
    got = [m for [m] in oracle.critical_momenta(grads, **options)]
    assert got == [2.0, 4.0, 3.0]
    # m = 0, 1, .5, and the bare first gradient is stored
    released = oracle.critical_momenta(grads, skip_first=True, **options)
    assert [m for [m] in released] == [0.0, 5.0, 4.5]


def test_non_finite_step_leaves_momentum_alone():
    grads = [[4.0], [nan], [2.0]]
    got = oracle.critical_momenta(grads, b1=0.5, topc=1, decay=1.0)
    [[first], [second], [third]] = got
    assert (first, third) == (2.0, 4.0)
    assert np.isnan(second)


def replay(name, grads, p=0.0, **kwargs):
    return oracle.run(name, {"x": p}, {"x": np.array(grads, float)}, **kwargs)["x"]


def test_sgd_by_hand():
    plain = {"learning_rate": 0.1, "kappa": 0.0}
    ramp = [1, 2, 3, 4, 5, 6]
    close(replay("sgd_c", ramp, momentum=0.9, **plain)[-1], -4.953279)
    damped = replay("sgd_c", [1, 1], momentum=0.5, dampening=0.5, **plain)
    close(damped, [-0.1, -0.2])
    nesterov = replay("sgd_c", [1, 1], momentum=0.5, nesterov=True, **plain)
    close(nesterov, [-0.15, -0.325])


def test_constant_gradient_by_hand():
    ones = [1, 1, 1, 1]
    close(replay("sgd_c", ones, learning_rate=0.1), [-0.1, -0.3, -0.5, -0.7])
    half = replay("sgd_c", ones, learning_rate=0.1, aggr="mean", kappa=0.5)
    close(half, [-0.1, -0.175, -0.175 - 0.2 / 3, -0.175 - 0.2 / 3 - 0.0625])


def test_weight_decay_by_hand():
    # p = 10, wd = 1, lr = .1. L2 joins the gradient: -.1 * (4 + 10).
    options = {"p": 10.0, "learning_rate": 0.1, "weight_decay": 1.0}
    close(replay("sgd_c", [4], **options), [8.6])
    # Decoupled: -.1 * 10, added to a step of m / sqrt(v) = 1 for Adam. For Adam_CM,
    # whose v averages m^2, the step is (m / (1 - b1)) / m = 2.
    options |= {"b1": 0.5, "eps": 0.0}
    close(replay("adamw_c", [4], **options), [8.9])
    close(replay("adamw_cm", [4], **options), [8.8])


def test_l2_joins_after_the_buffer_or_before():
    # g = 1, 1 from p = 10, wd = .5, lr = .1: the step 1 + 5 leads to 9.4, and then
    # after:  1 + 1 + 4.7 = 6.7;   before:  (1 + 4.7) + (1 + 5) = 11.7.
    options = {"p": 10.0, "learning_rate": 0.1, "weight_decay": 0.5}
    close(replay("sgd_c", [1, 1], **options), [9.4, 8.73])
    close(replay("sgd_c", [1, 1], l2_before_buffer=True, **options), [9.4, 8.23])


def test_centered_variance_is_clamped():
    # The variance of a constant gradient tends to 0, and rounding makes it negative.
    grads = np.full(100, 0.7)
    kwargs = {"alpha": 0.5, "centered": True, "kappa": 0.0, "learning_rate": 1.0}
    assert np.isfinite(replay("rmsprop_c", grads, **kwargs)).all()
