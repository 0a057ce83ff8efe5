#!/bin/bash
# A real systemd as process 1 of a container made by hand: bash boot_systemd.sh ROOT PYTHON SITE UNITS WHEEL MODEL
#
# Started by `unshare` with its own mounts, processes, cgroups, network, host name and IPC (booted_systemd.py). What it sees
# of this machine is /usr, one Python, one site-packages, the wheel and a model, all read-only; everything else is new and in
# memory, and the old root is let go before systemd starts. Units are looked for in one directory, which holds ours and
# empty targets: nothing of the distribution's runs (its systemd-tmpfiles would empty /tmp).
set -euo pipefail
[ $$ = 1 ] || { echo "only as the first process of namespaces of its own" >&2; exit 1; }
root=$1 python=$2 site=$3 units=$4 wheel=$5 model=$6

mount --make-rprivate /
mount -t tmpfs -o mode=755 tmpfs "$root"
cd "$root"
mkdir -p usr etc dev proc sys run tmp var/lib var/log var/cache root home srv opt/python opt/site opt/wheel old

read_only() { mount --bind "$1" "$2" && mount -o remount,bind,ro,nosuid "$2"; }
read_only /usr usr
for name in bin sbin lib lib64; do
    if [ -L "/$name" ]; then cp -a "/$name" .; elif [ -d "/$name" ]; then mkdir "$name" && read_only "/$name" "$name"; fi
done
read_only "$python" opt/python
read_only "$site" opt/site
read_only "$(dirname "$wheel")" opt/wheel
cp -r "$model" srv/ && mv "srv/$(basename "$model")" srv/model
chmod -R a+rX srv/model  # safetensors writes 0600, which a service of another user cannot read

mount -t proc -o nosuid,nodev,noexec proc proc
mount --bind proc/sys proc/sys && mount -o remount,bind,ro proc/sys
mount -t tmpfs -o mode=755,nosuid tmpfs dev
for name in null zero full random urandom tty; do touch "dev/$name" && mount --bind "/dev/$name" "dev/$name"; done
mkdir dev/shm dev/pts
mount -t tmpfs -o mode=1777 tmpfs dev/shm
mount -t devpts -o newinstance,ptmxmode=0666,mode=620 devpts dev/pts
ln -s pts/ptmx dev/ptmx
ln -s /proc/self/fd dev/fd
for name in run tmp; do mount -t tmpfs -o mode=755 tmpfs "$name"; done
chmod 1777 tmp
mount -t sysfs -o ro,nosuid,nodev,noexec sysfs sys
if [ -e /sys/fs/cgroup/cgroup.controllers ]; then
    mount -t cgroup2 cgroup2 sys/fs/cgroup
else
    mount -t tmpfs -o mode=755 tmpfs sys/fs/cgroup
    mkdir sys/fs/cgroup/systemd sys/fs/cgroup/unified
    mount -t cgroup -o none,name=systemd,xattr cgroup sys/fs/cgroup/systemd
    mount -t cgroup2 cgroup2 sys/fs/cgroup/unified
fi

printf 'root:x:0:0::/root:/bin/sh\nnobody:x:65534:65534::/:/bin/false\n' > etc/passwd
printf 'root:x:0:\nnogroup:x:65534:\n' > etc/group
printf 'root:*::::::: \n' > etc/shadow && printf 'root:*::\n' > etc/gshadow
printf '127.0.0.1 localhost\n' > etc/hosts
printf 'passwd: files\ngroup: files\nhosts: files\n' > etc/nsswitch.conf
[ ! -d /etc/alternatives ] || cp -a /etc/alternatives etc/
printf '/opt/python/lib\n' > etc/ld.so.conf
cat /etc/ld.so.conf.d/*.conf >> etc/ld.so.conf 2> /dev/null || true
ldconfig -r "$root"
tr -d - < /proc/sys/kernel/random/uuid > etc/machine-id

# As deploy/systemd says, but for the wheel's dependencies, which are those of the tests' environment.
mkdir -p etc/systemd/system etc/microserve
chroot . /opt/python/bin/python3 -m venv --without-pip /opt/microserve
PYTHONPATH=/opt/site chroot . /opt/microserve/bin/python -m pip install --quiet --no-index --no-deps --no-compile \
    "/opt/wheel/$(basename "$wheel")"
# As `make install`: the CPU's kernels are in the package.
[ ! -d opt/wheel/prebuilt ] || cp -r opt/wheel/prebuilt "$(echo opt/microserve/lib/python3*/site-packages)/microserve/kernels/cpu/"
echo /opt/site > "$(echo opt/microserve/lib/python3*/site-packages)/environment_of_the_tests.pth"
chroot . /usr/sbin/useradd --system --user-group microserve
cp "$units"/* etc/systemd/system/
for name in journald.service journald.socket journald-dev-log.socket; do
    cp "usr/lib/systemd/system/systemd-$name" etc/systemd/system/
done
for name in basic sysinit network shutdown multi-user; do
    printf '[Unit]\nDescription=%s\nDefaultDependencies=no\n' "$name" > "etc/systemd/system/$name.target"
done
echo 'Wants=systemd-journald.service' >> etc/systemd/system/sysinit.target
echo 'Requires=sysinit.target' >> etc/systemd/system/basic.target

pivot_root . old
cd /
umount -l /old
rmdir /old
# What can be written is in memory, or nothing is started.
awk '$3 !~ /^(tmpfs|devtmpfs|devpts|proc|cgroup2?)$/ && $4 !~ /(^|,)ro(,|$)/ {print "writable: " $0; found = 1} END {exit found}' /proc/self/mounts
export container=test SYSTEMD_UNIT_PATH=/etc/systemd/system SYSTEMD_GENERATOR_PATH=/etc/systemd/no-generators
export SYSTEMD_ENVIRONMENT_GENERATOR_PATH=/etc/systemd/no-generators
exec /lib/systemd/systemd --system --unit=basic.target --log-target=journal --log-level=info --show-status=0
