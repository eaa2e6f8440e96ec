"""How many programs XLA compiles."""

import contextlib

import jax.monitoring


@contextlib.contextmanager
def counted():
    """Yields a list with an entry for each program that is compiled within the block."""
    programs, is_open = [], True

    def listener(event, seconds, **_):
        if is_open and event == "/jax/core/compile/backend_compile_duration":
            programs.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        yield programs
    finally:
        is_open = False
        # jax 0.7 has no name for it that is public; the listener is then deaf.
        forget = getattr(jax.monitoring, "unregister_event_duration_listener", lambda _: None)
        forget(listener)
