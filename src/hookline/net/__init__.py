"""Network namespaces, interfaces, routes and neighbours, through netlink (pyroute2); cgroups (`hookline.net.cgroups`).

Functions act on the calling thread's network namespace; ``with net.inside(path):`` moves the thread for a
while.
"""

from hookline.net import cgroups
from hookline.net._diag import Connected, SocketName, connected_sockets, destroy_sockets
from hookline.net._errors import NetworkError, NetworkNotPermitted
from hookline.net._links import (
    Interface,
    Offloads,
    interface_index,
    interface_indexes,
    interfaces,
    link_numbers,
    offloads,
    set_offloads,
)
from hookline.net._lookup import own_addresses, routes_to
from hookline.net._monitor import Happening, Monitor
from hookline.net._namespaces import (
    NETNS_DIR,
    create,
    delete,
    enter,
    find,
    has_address,
    id_here,
    inside,
    list_names,
    namespaces_by_id,
    own_cookie,
    own_number,
    processes_hidden,
)
from hookline.net._netlink import (
    ROUTE_PROTOCOL,
    Address,
    Change,
    Netlink,
    Network,
    add_address,
    add_bridge,
    add_route,
    add_veth,
    delete_address,
    delete_link,
    delete_route,
    set_up,
)
from hookline.net._routes import (
    Neighbour,
    Route,
    default_interface,
    forget,
    keep_resolved,
    neighbours,
    route_to,
)
from hookline.net._sysctl import ipv6_available, write_sysctls

__all__ = [
    "NETNS_DIR",
    "ROUTE_PROTOCOL",
    "Address",
    "Change",
    "Connected",
    "Happening",
    "Interface",
    "Monitor",
    "Neighbour",
    "Netlink",
    "Network",
    "NetworkError",
    "NetworkNotPermitted",
    "Offloads",
    "Route",
    "SocketName",
    "add_address",
    "add_bridge",
    "add_route",
    "add_veth",
    "cgroups",
    "connected_sockets",
    "create",
    "default_interface",
    "delete",
    "delete_address",
    "delete_link",
    "delete_route",
    "destroy_sockets",
    "enter",
    "find",
    "forget",
    "has_address",
    "id_here",
    "inside",
    "interface_index",
    "interface_indexes",
    "interfaces",
    "ipv6_available",
    "keep_resolved",
    "link_numbers",
    "list_names",
    "namespaces_by_id",
    "neighbours",
    "offloads",
    "own_addresses",
    "own_cookie",
    "own_number",
    "processes_hidden",
    "route_to",
    "routes_to",
    "set_offloads",
    "set_up",
    "write_sysctls",
]
