"""Every service's pools as the documents have them, kept so that a small change costs what that change costs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Self

from hookline.control._errors import Conflict
from hookline.control.compiling import compile_redirect, compile_service
from hookline.control.inventory import Address, Here, Inventory
from hookline.control.pools import Frontend, Pool
from hookline.model import (
    EndpointSlice,
    ExternalHost,
    LocalRedirectPolicy,
    Node,
    Pod,
    Resource,
    Service,
    ServicePolicy,
    VirtualService,
)

Pools = dict[str, tuple[Pool, ...]]


@dataclass(frozen=True, slots=True)
class Catalogue:
    """The pools of every service and redirect, and who has which frontend. Never changed: `changed` gives the next.

    Attributes:
        owners: Who has a frontend, by it.
        yielded: Services that would have a frontend of scope inside which a redirect has.
    """

    inventory: Inventory = field(default_factory=Inventory)
    pools: Pools = field(default_factory=dict)
    owners: dict[Frontend, str] = field(default_factory=dict)
    yielded: dict[Frontend, str] = field(default_factory=dict)

    @classmethod
    def of(cls, resources: Iterable[Resource], here: Here) -> Catalogue:
        """Compiles everything.

        Raises:
            Conflict: Two services want the same address, port and protocol; or one cannot be as it asks.
        """
        return cls(Inventory(here)).changed((), tuple(resources))

    def changed(self, gone: Iterable[Resource], come: Iterable[Resource], here: Here | None = None) -> Self:
        """What follows when some objects go (the former forms of changed ones among them) and others come.

        Only what these touch is compiled again; the pools of all others are the same objects as before.

        Args:
            gone: Objects that it has.
            come: Objects that are new.
            here: This node as it is now; None: as it was.

        Raises:
            Conflict: As for `of`.
        """
        gone, come = tuple(gone), tuple(come)
        inventory = self.inventory.changed(gone, come)
        affected = self._affected(inventory, gone, come)
        if here is not None and here != inventory.here:
            inventory = replace(inventory, here=here)
            affected = tuple(dict.fromkeys((*affected, *inventory.services, *inventory.redirects)))
        if not affected:
            return (
                self
                if inventory is self.inventory
                else type(self)(inventory, self.pools, self.owners, self.yielded)
            )
        redirects = {
            reference: _compile(reference, inventory)
            for reference in affected
            if reference.startswith(LocalRedirectPolicy.kind)
        }
        affected = tuple(dict.fromkeys((*affected, *self._displaced(redirects))))
        pools, owners = dict(self.pools), dict(self.owners)
        touched = frozenset(affected)
        yielded = {frontend: name for frontend, name in self.yielded.items() if name not in touched}
        for reference in affected:
            for pool in pools.get(reference, ()):
                for frontend in pool.frontends:
                    if owners.get(frontend) == reference:
                        del owners[frontend]
        for reference, made in redirects.items():
            _claim(owners, reference, made or ())
        for reference in affected:
            if reference in redirects:
                made = redirects[reference]
            else:
                made = _compile(reference, inventory)
                if made is not None:
                    made = tuple(_without_redirected(reference, made, owners, yielded))
                    _claim(owners, reference, made)
            if made is None:
                pools.pop(reference, None)
                continue
            # What says the same is the same object, so that nobody looks at it again.
            pools[reference] = made if made != pools.get(reference) else pools[reference]
        return type(self)(inventory, pools, owners, yielded)

    def _displaced(self, redirects: Mapping[str, tuple[Pool, ...] | None]) -> Iterable[str]:
        """Services that give way to redirects, or no longer have to."""
        for reference, made in redirects.items():
            now = {frontend for pool in made or () for frontend in pool.frontends}
            before = {frontend for pool in self.pools.get(reference, ()) for frontend in pool.frontends}
            for frontend in (*(now - before), *(before - now)):
                for service in (self.owners.get(frontend), self.yielded.get(frontend)):
                    if service is not None and not service.startswith(LocalRedirectPolicy.kind):
                        yield service

    def unheeded(self, resources: Iterable[Resource]) -> Iterable[str]:
        """What these objects ask for and nothing comes of, in words."""
        for resource in resources:
            match resource:
                case Service() if resource.spec.load_balancer_source_ranges:
                    yield f"{resource.reference}: loadBalancerSourceRanges is not enforced: everybody is let in"
                case ServicePolicy() if resource.service_reference not in self.inventory.services:
                    yield f"{resource.reference}: there is no {resource.service_reference} yet"
                case LocalRedirectPolicy() if (
                    resource.service_reference or ""
                ) and resource.service_reference not in self.inventory.services:
                    yield f"{resource.reference}: there is no {resource.service_reference} yet"

    def _affected(
        self, inventory: Inventory, gone: tuple[Resource, ...], come: tuple[Resource, ...]
    ) -> tuple[str, ...]:
        """References of the services and redirects to compile again, in the order of their documents."""
        found: dict[str, None] = {}
        pods: list[Pod] = []
        for resource in (*gone, *come):
            match resource:
                case Service() | VirtualService() | LocalRedirectPolicy():
                    found[resource.reference] = None
                case EndpointSlice() | ServicePolicy():
                    reference = resource.service_reference
                    if reference is not None and reference in inventory.services:
                        found[reference] = None
                case Pod():
                    pods.append(resource)
                case Node():  # beside those that go in the same change
                    found.update(dict.fromkeys((*inventory.services, *inventory.redirects)))
        found.update(dict.fromkeys(self._selecting(inventory, pods)))
        found.update(dict.fromkeys(self._naming(inventory, (*gone, *come))))
        found.update(
            (reference, None)
            for reference, policy in inventory.redirects.items()
            if policy.service_reference in found
            or any(pod.metadata.namespace == policy.metadata.namespace for pod in pods)
        )
        return tuple(found)

    @staticmethod
    def _selecting(inventory: Inventory, pods: list[Pod]) -> Iterable[str]:
        """Services that select one of the pods."""
        if not pods:
            return
        namespaces = {pod.metadata.namespace for pod in pods}
        for reference, service in inventory.services.items():
            if service.metadata.namespace not in namespaces:
                continue
            selectors = (
                [backend.selector for backend in service.spec.backends if backend.selector]
                if isinstance(service, VirtualService)
                else [service.spec.selector]
                if service.spec.selector and reference not in inventory.slices
                else []
            )
            if any(
                pod.metadata.namespace == service.metadata.namespace and pod.matches(selector)
                for selector in selectors
                for pod in pods
            ):
                yield reference

    def _naming(self, inventory: Inventory, touched: tuple[Resource, ...]) -> Iterable[str]:
        """Services with a backend whose address is somebody else's now."""
        addresses: set[Address] = {
            address
            for resource in touched
            if isinstance(resource, Pod | ExternalHost)
            for address in resource.addresses
            if self.inventory.names.get(address) != inventory.names.get(address)
        }
        if not addresses:
            return
        for reference, pools in self.pools.items():
            if any(target.address in addresses for pool in pools for target in pool.targets):
                yield reference


def _claim(owners: dict[Frontend, str], reference: str, pools: Iterable[Pool]) -> None:
    """Notes whose the frontends of these pools are.

    Raises:
        Conflict: One is somebody else's.
    """
    for pool in pools:
        for frontend in pool.frontends:
            first = owners.setdefault(frontend, reference)
            if first != reference:
                raise Conflict(
                    f"{frontend} is wanted twice",
                    why=f"{first} and {reference} both have it",
                    remedy="give one of them another address or port",
                )


def _without_redirected(
    reference: str, pools: Iterable[Pool], owners: Mapping[Frontend, str], yielded: dict[Frontend, str]
) -> Iterable[Pool]:
    """A service's pools without the frontends for this node's sockets whose place a redirect takes, which are noted."""
    for pool in pools:
        taken = {
            frontend
            for frontend in pool.frontends
            if frontend.scope == "inside" and owners.get(frontend, "").startswith(LocalRedirectPolicy.kind)
        }
        if not taken:
            yield pool
            continue
        yielded.update(dict.fromkeys(taken, reference))
        left = tuple(frontend for frontend in pool.frontends if frontend not in taken)
        if left:
            yield replace(pool, frontends=left)


def _compile(reference: str, inventory: Inventory) -> tuple[Pool, ...] | None:
    """The pools of a service or redirect; None where it is there no longer."""
    service = inventory.services.get(reference)
    if service is not None:
        return compile_service(service, inventory)
    policy = inventory.redirects.get(reference)
    return compile_redirect(policy, inventory) if policy is not None else None
