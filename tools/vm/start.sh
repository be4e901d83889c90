#!/bin/sh
# The first process of a virtual machine: puts a writable layer over the host's files, which are read-only, and goes on
# with second.sh there. Everything it uses is busybox's.
PATH=/bin
/bin/busybox mkdir -p /proc /sys /dev /host /layer /root
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
for module in /modules/*; do insmod "$module"; done

share() { # TAG PATH OPTIONS
	mount -t 9p -o "trans=virtio,version=9p2000.L,msize=524288,$3" "$1" "$2" || { echo "no $1"; poweroff -f; }
}
share host /host cache=loose,ro
mount -t tmpfs -o size=75% tmpfs /layer
mkdir /layer/upper /layer/work
mount -t overlay -o lowerdir=/host,upperdir=/layer/upper,workdir=/layer/work overlay /root

read -r modules </modules.path
mkdir -p /root/lib/modules
mount --bind "/host$modules" /root/lib/modules
for kind in proc sysfs devtmpfs; do
	case $kind in sysfs) place=sys ;; devtmpfs) place=dev ;; *) place=$kind ;; esac
	mount -t "$kind" "$kind" "/root/$place"
done
# The command's folder may lie in one of the places that get a file system of their own.
read -r folder </folder.path
mkdir /kept
mount --bind "/root$folder" /kept
mount -t tmpfs -o mode=755 tmpfs /root/run
mount -t tmpfs -o mode=1777 tmpfs /root/tmp
mkdir -p "/root$folder"
mount --move /kept "/root$folder"
mkdir /root/run/hookline-vm
share job /root/run/hookline-vm cache=none
exec switch_root /root /bin/sh /run/hookline-vm/second.sh
