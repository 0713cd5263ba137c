#!/bin/bash
# The first process of a host that hosts.py starts in namespaces of its own: a root file system whose changes are kept in
# memory, empty /tmp, /dev/shm and home, the given folders of the machine, and sshd.
#   host.sh NAME STATE_FOLDER READ_ONLY_FOLDER… -- SHARED_FOLDER…
set -euo pipefail
name=$1 state=$2
shift 2

mount --make-rprivate /
layers=$(mktemp -d)
mount -t tmpfs -o size=4g tmpfs "$layers"
root=$layers/root
mkdir "$layers/changes" "$layers/work" "$root"
mount -t overlay -o "lowerdir=/,upperdir=$layers/changes,workdir=$layers/work" overlay "$root"
mount -t proc proc "$root/proc"
mount --rbind /sys "$root/sys"
mount --rbind /dev "$root/dev"
mount -t tmpfs -o size=8g tmpfs "$root/dev/shm"
mount -t tmpfs -o size=2g,mode=1777 tmpfs "$root/tmp"
mount -t tmpfs -o size=1g,mode=700 tmpfs "$root/root"
read_only=,ro
for folder; do
    if [ "$folder" = -- ]; then
        read_only=
        continue
    fi
    mkdir -p "$root$folder"
    mount --bind "$folder" "$root$folder"
    [ -z "$read_only" ] || mount -o "remount,bind$read_only" "$root$folder"
done

mkdir -p "$root/root/.ssh" "$root/run/sshd" "$root/oldroot"
install -m 600 "$state/key.pub" "$root/root/.ssh/authorized_keys"
# As on a Debian host: a login shell reads what an interactive one does.
echo '[ ! -e ~/.bashrc ] || . ~/.bashrc' >"$root/root/.profile"
hostname "$name"
echo "127.0.0.1 localhost $name" >"$root/etc/hosts"
grep -q ^sshd: "$root/etc/passwd" || echo 'sshd:x:990:65534::/run/sshd:/usr/sbin/nologin' >>"$root/etc/passwd"
ssh-keygen -q -t ed25519 -N '' -f "$root/root/.ssh/host_key"
cat >"$root/etc/ssh/sshd_config" <<CONFIG
HostKey /root/.ssh/host_key
PermitRootLogin prohibit-password
StrictModes no
MaxStartups 100
MaxSessions 100
PidFile none
CONFIG
cd "$root"
pivot_root . oldroot
umount -l /oldroot
cd /
/usr/sbin/sshd -D -e &
while :; do wait -n 2>/dev/null || sleep 0.5; done # orphans come here to be buried
