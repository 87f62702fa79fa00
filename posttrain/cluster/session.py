"""Starting Ray or joining a cluster, without output of Ray's own and with a quick start on one machine."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import re
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from posttrain.errors import ConfigError, StepError

_NO_BARS = "RAY_DATA_DISABLE_PROGRESS_BARS"

# Measured on one machine: with these a run is quiet and starts fastest. Set before Ray starts, and never over what the
# user has set.
_ENVIRONMENT = {
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    _NO_BARS: "1",
    # every new worker process imports torch again: keep those that are there
    "RAY_idle_worker_killing_time_threshold_ms": "600000",
    "RAY_num_workers_soft_limit": "16",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}


def cluster_address(configured: str | None) -> str | None:
    """The address of the cluster to join: the run file's, or RAY_ADDRESS, which `ray job submit` sets; else None."""
    address = configured or os.environ.get("RAY_ADDRESS")
    return None if address in (None, "", "local") else address


def refuse_unreachable(address: str) -> None:
    """Raises ConfigError where nothing listens at the address: Ray itself tries for minutes, in silence."""
    found = re.fullmatch(r"(?:ray://)?([^/:]+):(\d+)", address)
    if found is None:
        return
    try:
        socket.create_connection((found[1], int(found[2])), timeout=5).close()
    except OSError as error:
        raise ConfigError(
            f"ray.address = {address}: nothing answers there ({error.strerror or error}); "
            "correct it, or leave it out to compute on this machine"
        ) from None


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Nothing reaches standard error: Ray's C++ side writes its log level there; errors come as exceptions."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


@contextmanager
def _on_loopback() -> Iterator[None]:
    """A Ray that starts in here can be reached from this machine alone; by default it listens on all addresses.

    Ray has no option for it: it turns `_node_ip_address="127.0.0.1"` into the machine's own address. On macOS and
    Windows it listens on loopback by itself; here it is made to do so everywhere, unless the user has set its variable.
    """
    from ray._private import ray_constants

    before = ray_constants.ENABLE_RAY_CLUSTER
    if ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR not in os.environ:
        ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


@contextmanager
def _sigterm_left_to_caller() -> Iterator[None]:
    """A Ray that starts in here leaves it to the caller how SIGTERM ends the program.

    The caller's handler stays, where there is one: Ray's own prints a stack and aborts. And Ray's processes are in
    process groups of their own: a signal to the program's group, as `timeout` sends it, would end them first, and they
    would take the driver with them before it can report anything.
    """
    from ray._private import services, utils

    handler = signal.getsignal(signal.SIGTERM)
    mine = threading.current_thread() is threading.main_thread() and callable(handler)
    before = services.ConsolePopen, utils.set_sigterm_handler
    if os.name == "posix":
        services.ConsolePopen = functools.partial(services.ConsolePopen, process_group=0)
    if mine:
        utils.set_sigterm_handler = lambda _: None
    try:
        yield
    finally:
        services.ConsolePopen, utils.set_sigterm_handler = before
        if mine:
            # Ray's C++ side has set its own
            signal.signal(signal.SIGTERM, handler)


@contextmanager
def session(
    *,
    address: str | None = None,
    num_cpus: int | None = None,
    object_store_gb: float | None = None,
    verbose: bool = False,
) -> Iterator[None]:
    """A Ray session: joined where this process has one or `address` names one, else started and ended here.

    Without `verbose` neither Ray nor its workers write to the console.
    """
    for name, value in _ENVIRONMENT.items():
        if not (verbose and name in ("RAY_BACKEND_LOG_LEVEL", _NO_BARS)):
            os.environ.setdefault(name, value)
    import ray

    started = not ray.is_initialized()
    if started:
        options: dict[str, Any] = {
            "log_to_driver": verbose,
            "logging_level": logging.INFO if verbose else logging.CRITICAL,
        }
        if address:
            _join(address, options, verbose=verbose)
        else:
            _start(options, num_cpus=num_cpus, object_store_gb=object_store_gb, verbose=verbose)
    if not verbose:
        _silence_loggers()
    try:
        yield
    finally:
        if started:
            ray.shutdown()


def _join(address: str, options: dict[str, Any], *, verbose: bool) -> None:
    import ray

    refuse_unreachable(address)
    try:
        with _undisturbed(verbose=verbose):
            # the same code on every node, whatever is installed there
            package = str(Path(__file__).parents[1])
            ray.init(**options, address=address, runtime_env={"py_modules": [package]})
    except KeyboardInterrupt:
        ray.shutdown()
        raise
    except (ConnectionError, RuntimeError) as error:
        raise ConfigError(
            f"ray.address = {address}: no Ray cluster can be joined there ({str(error).splitlines()[0]}); "
            "start one with `ray start --head`, or leave ray.address out"
        ) from None


def _start(options: dict[str, Any], *, num_cpus: int | None, object_store_gb: float | None, verbose: bool) -> None:
    import ray

    # else Ray Train waits for notices that a spot node is about to go: there are none on one machine
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    options = {**options, "address": "local", "num_cpus": num_cpus, "include_dashboard": False}
    if object_store_gb:
        options["object_store_memory"] = int(object_store_gb * 1e9)
    try:
        with _undisturbed(verbose=verbose), _on_loopback():
            try:
                ray.init(**options)
            except Exception:
                # Ray gives its processes half a minute to start, which is too little on a busy machine
                ray.shutdown()
                ray.init(**options)
    except KeyboardInterrupt:
        ray.shutdown()
        raise
    except Exception as error:  # Ray raises a plain Exception where one of its processes does not start
        raise StepError(
            f"Ray has not started on this machine ({str(error).splitlines()[0]}); "
            "start the same command again once there is less load or more memory"
        ) from error


@contextmanager
def _undisturbed(*, verbose: bool) -> Iterator[None]:
    """A Ray that starts in here leaves SIGTERM to the caller, and the console alone unless `verbose`."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(_sigterm_left_to_caller())
        if not verbose:
            stack.enter_context(_silent_stderr())
        yield


def _silence_loggers() -> None:
    # ray.data sets up its loggers when it is imported, and would overwrite a level set before
    import ray.data

    for name in ("ray.data", "ray.train", "ray.tune", "ray"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    # ray.data reads its variable only when it is imported, which may be long before a session
    ray.data.DataContext.get_current().enable_progress_bars = os.environ[_NO_BARS] == "0"
