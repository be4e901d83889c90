"""Every second, each flow of an interface and what it sent and received: ``flows.py eth0 [flows.bpf.o]``."""

import socket
import sys
import time
from ipaddress import IPv6Address

from hookline import bpf

interface, path = [*sys.argv[1:], "flows.bpf.o"][:2]
with bpf.Object.open(path).load() as obj:
    programs, flows = obj.programs, obj.maps["flows"]
    with (
        programs["count_received"].attach_tc(interface, "ingress"),
        programs["count_sent"].attach_tc(interface, "egress"),
    ):
        while True:
            time.sleep(1)
            for flow, counts in flows.items():  # counts: one for each CPU
                ends = [IPv6Address(flow[end].tobytes()) for end in ("source", "destination")]
                addresses = [end.ipv4_mapped or end for end in ends]
                ports = [socket.ntohs(int(flow[port])) for port in ("source_port", "destination_port")]
                sent, received = (counts[way]["packets"].sum() for way in ("sent", "received"))
                print(
                    f"{addresses[0]} {ports[0]} {addresses[1]} {ports[1]} sent {sent} received {received}",
                    flush=True,
                )
