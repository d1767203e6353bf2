"""What programs find in a sandbox beyond the system's own: images."""

from palestra.sandbox.backends.root import Root, system_root


async def root_of(image: str | None, packages: tuple[str, ...] = ()) -> Root:
    if image is None:
        return system_root(packages)
    raise NotImplementedError
