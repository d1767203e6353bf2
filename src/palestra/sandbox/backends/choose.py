"""Which backend works here: each is tried as it would be used, and the first that isolates enough is taken."""

import os
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from palestra.core.errors import DeadlineError, UserError
from palestra.sandbox.backends.base import Backend
from palestra.sandbox.records import Isolation, IsolationError, SandboxStartError

if TYPE_CHECKING:
    from palestra.sandbox.backends.kept import KeptBackend
    from palestra.sandbox.host import Options

Opener = Callable[["Options"], Awaitable[Backend]]


async def _local(options: "Options") -> Backend:
    from palestra.sandbox.backends.local import LAYERS, Local
    from palestra.sandbox.images import root_of

    unknown = set(options.without) - set(LAYERS)
    if unknown:
        raise UserError(f"there is no wall {sorted(unknown)[0]!r}; there are {', '.join(LAYERS)}")
    root = await root_of(options.image, options.packages)
    backend = Local(root, preload=options.preload, without=options.without)
    await backend.open()
    return backend


async def _bwrap(options: "Options") -> Backend:
    from palestra.sandbox.backends.bwrap import Bwrap
    from palestra.sandbox.images import root_of

    return await _opened(Bwrap(await root_of(options.image, options.packages)))


async def _gvisor(options: "Options") -> Backend:
    from palestra.sandbox.backends.bundle import Gvisor
    from palestra.sandbox.images import root_of

    return await _opened(Gvisor(await root_of(options.image, options.packages)))


async def _oci(options: "Options") -> Backend:
    from palestra.sandbox.backends.bundle import Runc, find_runc
    from palestra.sandbox.backends.engine import Engine, find_engine
    from palestra.sandbox.images import root_of

    runc = find_runc()
    if runc is not None and os.geteuid() == 0:
        return await _opened(Runc(runc, await root_of(options.image, options.packages)))
    return await _opened(Engine(find_engine(), options.image))


async def _opened(backend: "KeptBackend") -> Backend:
    await backend.open()
    return backend


async def _process(options: "Options") -> Backend:
    from palestra.sandbox.backends.plain import Process

    _require_no_image("process", options)
    _require_no_packages("process", options)
    return await _opened(Process())


async def _unsafe(options: "Options") -> Backend:
    from palestra.sandbox.backends.plain import Unsafe

    _require_no_image("unsafe", options)
    _require_no_packages("unsafe", options)
    return await _opened(Unsafe())


async def _kubernetes(options: "Options") -> Backend:
    from palestra.sandbox.backends.kubernetes import Kubernetes

    if options.image is not None:
        raise UserError(f"the sandbox 'kubernetes' has the image of its pool, and no {options.image!r}; omit `image`")
    _require_no_packages("kubernetes", options)
    backend = Kubernetes()
    await backend.open()
    return backend


def _of_provider(name: str) -> Opener:
    async def opened(options: "Options") -> Backend:
        from palestra.sandbox.backends.providers import PROVIDERS
        from palestra.sandbox.backends.remote import Remote

        _require_no_packages(name, options)
        return Remote(PROVIDERS[name](options.image))

    return opened


def _require_no_packages(name: str, options: "Options") -> None:
    if options.packages:
        raise UserError(
            f"the sandbox {name!r} has packages of its own, and takes none: omit packages={options.packages}"
        )


def _require_no_image(name: str, options: "Options") -> None:
    if options.image is not None:
        raise UserError(f"the sandbox {name!r} has this machine's files, and no image {options.image!r}; 'local' has")


BACKENDS: dict[str, tuple[Isolation, Opener]] = {
    "local": (Isolation.NAMESPACES, _local),
    "bwrap": (Isolation.NAMESPACES, _bwrap),
    "gvisor": (Isolation.KERNEL, _gvisor),
    "oci": (Isolation.NAMESPACES, _oci),
    "process": (Isolation.PROCESS, _process),
    "unsafe": (Isolation.NONE, _unsafe),
    "kubernetes": (Isolation.KERNEL, _kubernetes),
    "prime": (Isolation.NAMESPACES, _of_provider("prime")),
    "e2b": (Isolation.KERNEL, _of_provider("e2b")),
    "modal": (Isolation.KERNEL, _of_provider("modal")),
    "daytona": (Isolation.NAMESPACES, _of_provider("daytona")),
}
"""By name, best first: how much it isolates, and how it is opened."""

ELSEWHERE = {"kubernetes", "prime", "e2b", "modal", "daytona"}
"""Not on this machine: they need a cluster or an account, and cost money."""
_ONLY_BY_NAME = {"unsafe", *ELSEWHERE}


async def open_backend(options: "Options") -> Backend:
    """Errors: UserError, for a name that there is not; IsolationError; SandboxStartError, if it does not work."""
    if options.backend is not None:
        if options.backend not in BACKENDS:
            raise UserError(f"there is no sandbox {options.backend!r}; there are {', '.join(BACKENDS)}")
        isolation, opener = BACKENDS[options.backend]
        _require(options.backend, isolation, options.min_isolation or Isolation.NONE)
        if options.backend != "local" and (options.without or options.preload):
            wish = f"without={options.without}" if options.without else f"preload={options.preload}"
            raise UserError(f"the sandbox {options.backend!r} knows no {wish}; 'local' does")
        return await opener(options)
    least = Isolation.NAMESPACES if options.min_isolation is None else options.min_isolation
    reasons = []
    for name, (isolation, opener) in BACKENDS.items():
        if isolation < least or name in _ONLY_BY_NAME:
            continue
        try:
            return await opener(options)
        except (SandboxStartError, DeadlineError) as error:
            reasons.append(f"{name}: {error}")
    raise IsolationError(
        f"no sandbox here isolates by {least.name.lower()} or more: {'; '.join(reasons) or 'none does'}"
    )


def _require(name: str, isolation: Isolation, least: Isolation) -> None:
    if isolation < least:
        raise IsolationError(
            f"the sandbox {name!r} isolates by {isolation.name.lower()}, less than min_isolation="
            f"{least.name.lower()}; choose another, or lower min_isolation"
        )
