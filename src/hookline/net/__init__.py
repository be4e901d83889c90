"""Network namespaces, interfaces, routes and neighbours, through netlink (pyroute2); cgroups (`hookline.net.cgroups`).

Functions act on the calling thread's network namespace; ``with net.inside(path):`` moves the thread for a
while.
"""

from hookline.net import cgroups
from hookline.net._errors import NetworkError, NetworkNotPermitted
from hookline.net._links import (
    Interface,
    Offloads,
    interface_index,
    interfaces,
    link_numbers,
    offloads,
    set_offloads,
)
from hookline.net._lookup import routes_to
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
    "add_address",
    "add_bridge",
    "add_route",
    "add_veth",
    "cgroups",
    "create",
    "default_interface",
    "delete",
    "delete_address",
    "delete_link",
    "delete_route",
    "enter",
    "find",
    "forget",
    "has_address",
    "id_here",
    "inside",
    "interface_index",
    "interfaces",
    "ipv6_available",
    "keep_resolved",
    "link_numbers",
    "list_names",
    "neighbours",
    "offloads",
    "own_cookie",
    "own_number",
    "processes_hidden",
    "route_to",
    "routes_to",
    "set_offloads",
    "set_up",
    "write_sysctls",
]
