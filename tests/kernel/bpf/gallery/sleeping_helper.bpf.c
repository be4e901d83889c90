// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
// A helper that may sleep, called where the kernel cannot wait.
#include "types.h"

#ifdef MENDED
SEC("syscall") int example(void *ctx)
#else
SEC("raw_tp/sys_enter") int example(void *ctx)
#endif
{
	__u64 word = 0;
	bpf_copy_from_user(&word, sizeof(word), (void *)4096); // refused
	return word != 0;
}

char _license[] SEC("license") = "GPL";
