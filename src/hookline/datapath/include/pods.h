/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Pods of this node as the programs of sockets know them: by the cookie of their network namespace. A row is
 * there only for what the pod is treated differently in; the control plane writes it.
 */
#pragma once

#include "packet.h"

struct pod_key {
	__u64 netns; /* SO_NETNS_COOKIE */
	__u64 pool;  /* 0: the pod's own row; else that of a local redirect whose backend the pod is */
};

enum pod_flags {
	POD_CAPTURE_DNS = 1, /* its queries go to the resolver */
};

/* One for each family. */
struct resolver {
	struct address address;
	__be16 port; /* 0: it has no address of this family, and queries in it are refused */
	__u16 pad;
};

struct pod {
	struct resolver resolvers[2]; /* IPv4, IPv6 */
	__u32 flags;
};
