#!/bin/sh
# Two networks and a cable between them: `networks.sh COMMAND ...` runs a command in the first, which knows of the
# other by MICROSERVE_TEST_OTHER (a process in it, which ends with us) and MICROSERVE_TEST_OTHER_HOST. Needs root.
# The networks have no names, and go with their processes.
set -e
if [ -z "$MICROSERVE_TEST_NETWORKS" ]; then
    export MICROSERVE_TEST_NETWORKS=yes
    exec unshare --net --mount sh "$0" "$@"
fi
mount -t sysfs sysfs /sys  # where UCX looks for cards
ip link set lo up
unshare --net setpriv --pdeathsig KILL sleep infinity >/dev/null &
other=$!
while [ "$(readlink /proc/$other/ns/net)" = "$(readlink /proc/self/ns/net)" ]; do :; done
ip link add heap-a type veth peer name heap-b
ip link set heap-b netns $other
ip address add 10.78.0.1/24 dev heap-a
ip link set heap-a up
nsenter --target $other --net sh -ec '
    ip link set lo up
    ip address add 10.78.0.2/24 dev heap-b
    ip link set heap-b up'
export MICROSERVE_TEST_DOOR_HOST=10.78.0.1 MICROSERVE_TEST_OTHER_HOST=10.78.0.2 MICROSERVE_TEST_OTHER=$other
code=0
"$@" || code=$?
kill $other
exit $code
