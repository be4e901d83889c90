"""`Resource`, the base of every kind, and the registry of kinds.

A kind is one class: it derives from `OwnResource`, `NativeResource` or `StrictNativeResource`, which differ in their manners
towards unknown fields, and names its `api_version`, `kind` and `plural`. Defining the class registers it.

Objects are frozen. They are equal when they say the same, hash by reference, and remember where they were
read (`origin`), which takes no part in equality.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, PrivateAttr

from hookline.model._fields import Labels, NamespaceName, ObjectName, WholeNumber
from hookline.model._problems import InvalidResource, Origin, Problem, did_you_mean, value_text

HOOKLINE = "hookline.dev/v1alpha1"

# Words that Kubernetes writes in capitals inside a name: podIP, clusterIPs, podCIDR.
CAPITALS = {"ip": "IP", "ips": "IPs", "cidr": "CIDR", "cidrs": "CIDRs", "uid": "UID"}

_registry: dict[tuple[str, str], type[Resource]] = {}


def camel_case(name: str) -> str:
    """A field's name as Kubernetes writes it: ``target_port`` → ``targetPort``, ``pod_ips`` → ``podIPs``."""
    first, *rest = name.split("_")
    return first + "".join(CAPITALS.get(word, word.capitalize()) for word in rest)


class Native(BaseModel):
    """Part of a Kubernetes object: unknown fields are accepted and kept."""

    model_config = ConfigDict(
        frozen=True,
        extra="allow",
        alias_generator=camel_case,
        validate_by_alias=True,
        validate_by_name=True,
        serialize_by_alias=True,
        defer_build=True,
    )


class Own(BaseModel):
    """Part of one of Hookline's own objects: unknown fields are refused."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        alias_generator=camel_case,
        validate_by_alias=True,
        validate_by_name=True,
        serialize_by_alias=True,
        defer_build=True,
    )


class Metadata(Native):
    """Kubernetes' ObjectMeta of an object in a namespace."""

    name: ObjectName
    namespace: NamespaceName = "default"
    labels: Labels = {}
    annotations: dict[str, str] = {}
    uid: str = ""
    resource_version: str = ""
    generation: WholeNumber = 0
    generate_name: str = ""
    creation_timestamp: str | None = None
    deletion_timestamp: str | None = None
    deletion_grace_period_seconds: WholeNumber | None = None
    finalizers: tuple[str, ...] = ()
    owner_references: tuple[dict[str, Any], ...] = ()
    managed_fields: tuple[dict[str, Any], ...] = ()
    self_link: str = ""


class ClusterMetadata(Metadata):
    """Kubernetes' ObjectMeta of an object that belongs to the whole cluster."""

    namespace: Literal[""] = ""


class OwnMetadata(Metadata, extra="forbid"):
    """`Metadata` of one of Hookline's own kinds."""


class OwnClusterMetadata(ClusterMetadata, extra="forbid"):
    """`ClusterMetadata` of one of Hookline's own kinds."""


class Resource(BaseModel):
    """An object that a user writes: its kind, its metadata and what it asks for.

    Attributes:
        api_version: ``v1``, ``hookline.dev/v1alpha1`` …
        kind: ``Service``, ``VirtualService`` …
        plural: The kind's name in commands and in Kubernetes' API, ``virtualservices``.
        short_names: Other names that commands accept.
    """

    model_config = ConfigDict(
        frozen=True,
        alias_generator=camel_case,
        validate_by_alias=True,
        validate_by_name=True,
        serialize_by_alias=True,
        defer_build=True,
    )

    api_version: ClassVar[str]
    kind: ClassVar[str]
    plural: ClassVar[str]
    short_names: ClassVar[tuple[str, ...]] = ()

    metadata: Metadata

    _origin: Origin | None = PrivateAttr(default=None)

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        if "kind" in cls.__dict__:
            _registry[cls.api_version, cls.kind] = cls

    @property
    def name(self) -> str:
        """``metadata.name``."""
        return self.metadata.name

    @property
    def namespace(self) -> str:
        """``metadata.namespace``; empty for a kind that belongs to the whole cluster."""
        return self.metadata.namespace

    @property
    def labels(self) -> Mapping[str, str]:
        """``metadata.labels``."""
        return self.metadata.labels

    @property
    def reference(self) -> str:
        """``Kind/namespace/name``, or ``Kind/name`` for a kind that belongs to the whole cluster."""
        metadata = self.metadata
        return "/".join(part for part in (self.kind, metadata.namespace, metadata.name) if part)

    @property
    def origin(self) -> Origin | None:
        """Where the object was read; None where it was made in Python."""
        return self._origin

    @classmethod
    def is_namespaced(cls) -> bool:
        """Whether objects of this kind live in a namespace."""
        metadata = cls.model_fields["metadata"].annotation
        return not (isinstance(metadata, type) and issubclass(metadata, ClusterMetadata))

    def matches(self, selector: Mapping[str, str]) -> bool:
        """Whether the labels have every key and value of the selector; an empty selector matches nothing."""
        labels = self.metadata.labels
        return bool(selector) and all(labels.get(key) == value for key, value in selector.items())

    def to_document(self) -> dict[str, Any]:
        """The object as Kubernetes writes it: plain values, camelCase, only the fields that were set."""
        fields = self.model_dump(mode="json", by_alias=True, exclude_unset=True)
        return {"apiVersion": self.api_version, "kind": self.kind, **fields}

    def __hash__(self) -> int:
        return hash(self.reference)

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return self.__dict__ == other.__dict__ and self.__pydantic_extra__ == other.__pydantic_extra__

    def __str__(self) -> str:
        return self.reference

    def __repr__(self) -> str:
        return f"<{self.reference}>"


class NativeResource(Resource, extra="allow"):
    """A Kubernetes object, accepted as it is."""


class StrictNativeResource(Resource, extra="forbid"):
    """A Kubernetes object of which every field matters: unknown ones are refused, as the API's strict validation does."""


class OwnResource(Resource, extra="forbid"):
    """An object of ``hookline.dev/v1alpha1``."""

    api_version = HOOKLINE


def supported_kinds() -> tuple[type[Resource], ...]:
    """Every kind that can be read, in alphabetical order of its name."""
    return tuple(sorted(_registry.values(), key=lambda kind: kind.kind))


def find_kind(word: str) -> type[Resource]:
    """The kind of a name that a user typed: ``VirtualService``, ``virtualservices``, ``vs``.

    Raises:
        InvalidResource: There is no such kind; the supported ones are named.
    """
    wanted = word.lower()
    for kind in supported_kinds():
        if wanted in (kind.kind.lower(), kind.plural, *kind.short_names):
            return kind
    names = [kind.kind for kind in supported_kinds()]
    raise InvalidResource(
        Problem(
            f"{value_text(word)} is not a kind that Hookline knows",
            remedy=" ".join(filter(None, (did_you_mean(word, names), f"Supported: {', '.join(names)}"))),
            field="kind",
        )
    )


def registered(api_version: str, kind: str) -> type[Resource] | None:
    """The class of a kind, None where there is none."""
    return _registry.get((api_version, kind))
