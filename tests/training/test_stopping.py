"""Stop rules: each stops when it says, in a loop and in a scan, alone and joined."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxclip.training.stopping import (
    Progress,
    StopReason,
    StopRule,
    max_seconds,
    max_steps,
    nonfinite,
    plateau,
    reached,
)


def progress_at(step: int, **values: float) -> Progress:
    seconds, skipped = values.pop("seconds", 0.0), values.pop("num_skipped", 0)
    return Progress(step, seconds, skipped, values)


def stops_at(rule: StopRule, sequence: list[Progress]) -> tuple[int | None, StopReason | None]:
    """The place of the first look that stops, and the reason."""
    memory = rule.init()
    for place, progress in enumerate(sequence):
        memory, code = rule.update(memory, progress)
        if rule.reason(code) is not None:
            return place, rule.reason(code)
    return None, None


LOSSES = [3.0, 2.0, np.nan, 2.0, 1.99, 1.0, 1.0, 1.0, np.nan, 1.5]


@pytest.mark.parametrize(
    ("rule", "place"),
    [
        (max_steps(4), 3),
        (max_steps(11), None),
        (reached("loss", 1.0, mode="min"), 5),
        (reached("loss", 3.0), 0),
        (reached("loss", 3.5), None),
        (reached("other", 0.0), None),
        (plateau("loss", 1), 2),
        (plateau("loss", 3), 8),
        (plateau("loss", 3, min_delta=0.5), 4),
        (plateau("loss", 1, mode="max"), 1),
        (plateau("other", 1), None),
    ],
)
def test_a_rule_stops_at_the_step_that_meets_it(rule: StopRule, place: int | None):
    sequence = [progress_at(i + 1, loss=x) for i, x in enumerate(LOSSES)]
    assert stops_at(rule, sequence)[0] == place


def test_time_and_skipped_steps_stop_too():
    sequence = [progress_at(i, seconds=s) for i, s in enumerate([1.0, 9.9, 10.0])]
    assert stops_at(max_seconds(10.0), sequence) == (2, StopReason.MAX_SECONDS)
    sequence = [progress_at(i, num_skipped=n) for i, n in enumerate([1, 1, 2, 3, 3, 6])]
    assert stops_at(nonfinite(2), sequence) == (3, StopReason.NONFINITE)
    assert stops_at(nonfinite(3), sequence) == (5, StopReason.NONFINITE)
    assert stops_at(nonfinite(4), sequence) == (None, None)


def test_of_joined_rules_the_first_that_is_met_gives_the_reason():
    rule = reached("loss", 1.0, mode="min") | plateau("loss", 4) | max_steps(9) | max_steps(20)
    sequence = [progress_at(i + 1, loss=x) for i, x in enumerate(LOSSES)]
    assert stops_at(rule, sequence) == (5, StopReason.REACHED)
    assert rule.num_steps == 9
    assert rule.metrics == {"loss"}
    both = reached("loss", 1.0, mode="min") | max_steps(1)
    assert stops_at(both, [progress_at(1, loss=0.5)])[1] == StopReason.REACHED
    with pytest.raises(TypeError):
        max_steps(3) | 5


def test_a_joined_rule_uses_the_clock_if_one_of_its_rules_does():
    rule = max_steps(3) | plateau("loss", 4) | nonfinite(2) | reached("loss", 1.0)
    assert not rule.uses_clock
    assert (rule | max_seconds(1.0)).uses_clock
    assert (max_seconds(1.0) | rule).uses_clock


@pytest.mark.thorough
def test_a_rule_inside_a_jitted_scan_gives_the_codes_of_the_loop():
    rule = plateau("loss", 3) | reached("loss", 0.5, mode="min") | nonfinite(2) | max_steps(9)
    losses = jnp.asarray(LOSSES)
    skipped = jnp.cumsum(~jnp.isfinite(losses)).astype(jnp.int32)

    def body(memory, row):
        step, loss, num_skipped = row
        return rule.update(memory, Progress(step, 0.0, num_skipped, {"loss": loss}))

    rows = (jnp.arange(1, 11, dtype=jnp.int32), losses, skipped)
    _, codes = jax.jit(lambda rows: jax.lax.scan(body, rule.init(), rows))(rows)
    memory, expected = rule.init(), []
    for row in zip(*rows, strict=True):
        memory, code = body(memory, row)
        expected.append(int(code))
    assert codes.tolist() == expected
    assert rule.reason(codes[8]) == StopReason.PLATEAU


def test_rules_remember_the_same_whatever_their_limits_and_stateless_ones_nothing():
    assert (max_steps(3) | reached("loss", 0.1) | max_seconds(1.0)).remembers == ()
    rule = plateau("loss", 4, np.float32(0.5)) | nonfinite(2)
    assert rule.remembers == (max_steps(1) | plateau("loss", 9, 0.5) | nonfinite(7)).remembers
    others = [plateau("error", 4, 0.5), plateau("loss", 4), plateau("loss", 4, 0.5, mode="max")]
    others = [nonfinite(2) | plateau("loss", 4, 0.5)] + [other | nonfinite(2) for other in others]
    assert all(other.remembers != rule.remembers for other in others)


def test_every_reason_reads_as_a_sentence():
    for reason in StopReason:
        assert str(reason)[0].isupper()
        assert str(reason).endswith(".")


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: max_steps(0), ValueError),
        (lambda: max_steps(2.5), ValueError),
        (lambda: max_seconds(0.0), ValueError),
        (lambda: max_seconds("1"), TypeError),
        (lambda: reached(3, 0.5), TypeError),
        (lambda: reached("accuracy", np.nan), ValueError),
        (lambda: reached("accuracy", 0.5, mode="up"), ValueError),
        (lambda: plateau("loss", 0), ValueError),
        (lambda: plateau("loss", 3, -0.1), ValueError),
        (lambda: nonfinite(True), ValueError),
    ],
)
def test_a_wrong_argument_is_refused(make, error):
    with pytest.raises(error):
        make()
