#!/bin/bash
# The init of a guest: mounts what a machine has, runs the tests, hands back what came of them, and switches off.
# Whatever it prints is the serial log.
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8 TERM=dumb
. /settings

mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/pts /dev/shm
mount -t devpts pts /dev/pts
mount -t tmpfs shm /dev/shm
mount -t tmpfs run /run
chmod 1777 /tmp # no mount: this tree may be below it
mount -t cgroup2 cgroup /sys/fs/cgroup
echo +memory >/sys/fs/cgroup/cgroup.subtree_control
mount -t bpf bpf /sys/fs/bpf
mount -t tracefs tracing /sys/kernel/tracing
mount -t debugfs debug /sys/kernel/debug
ip link set lo up
ulimit -n 65536 # as many as systemd gives to whoever asks

echo "guest: up"
cd "$HOUSE" || exit
export PYTHONPATH="$HOUSE/src" HITLESS_SLOWNESS="$SLOWNESS" HITLESS_OBJECTS="$OBJECTS"
"$PYTHON" -m pytest "${PYTEST[@]}" --junitxml=/back/junit.xml
code=$?; echo $code >/back/code
echo "guest: pytest ended with $code"
"$PYTHON" -m hitless doctor --json >/back/doctor.json 2>/run/doctor || { cat /run/doctor; rm /back/doctor.json; }

stty -F /dev/ttyS1 raw -echo
set -o pipefail
tar -C /back -cz . | cat >/dev/ttyS1 && echo "guest: done"  # tar writes to no terminal
echo o >/proc/sysrq-trigger
sleep 60
