"""Every second, each flow of an interface and what it sent and received: ``flows.py eth0 [flows.bpf.o]``."""

import socket
import sys
import time
from contextlib import suppress
from ipaddress import IPv6Address

from hookline import bpf

interface, path = [*sys.argv[1:], "flows.bpf.o", "flows.bpf.o"][:2]
try:
    with suppress(KeyboardInterrupt), bpf.Object.open(path).load() as obj:
        flows, received, sent = obj.maps["flows"], obj.programs["count_received"], obj.programs["count_sent"]
        with received.attach_tc(interface, "ingress"), sent.attach_tc(interface, "egress"):
            while True:
                time.sleep(1)
                for flow, counts in flows.items():  # counts: one for each CPU
                    ends = [IPv6Address(flow[end].tobytes()) for end in ("source", "destination")]
                    here, there = (end.ipv4_mapped or end for end in ends)
                    ports = [socket.ntohs(int(flow[end])) for end in ("source_port", "destination_port")]
                    packets = [counts[way]["packets"].sum() for way in ("sent", "received")]
                    print(
                        here,
                        ports[0],
                        there,
                        ports[1],
                        "sent",
                        packets[0],
                        "received",
                        packets[1],
                        flush=True,
                    )
except bpf.BpfError as error:
    sys.exit(f"flows.py: {error}")
