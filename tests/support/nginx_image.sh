#!/usr/bin/env bash
# nginx_image.sh TAG: makes a test image of that name where no registry can be reached: a recent nginx from the Debian mirror
# that apt uses here, with sh, curl and openssl as in the official image. Does nothing if the image exists or can be
# pulled. Needs docker; without a registry also mmdebstrap and root.
set -euo pipefail
tag=$1
suite=forky # the first with nginx >= 1.27.3, which resolves an upstream's names again

docker image inspect "$tag" >/dev/null 2>&1 && exit
timeout 60 docker pull -q "$tag" 2>/dev/null && exit

mirror=$(cat /etc/apt/sources.list /etc/apt/sources.list.d/*.sources /etc/apt/sources.list.d/*.list 2>/dev/null |
    grep -oE 'https?://[^ ]+/debian/?( |$)' | head -n 1) || true
[ -n "$mirror" ] || { echo "$0: apt has no Debian mirror on this machine, and $tag cannot be pulled" >&2; exit 1; }
echo "$0: $tag cannot be pulled, so it is made from Debian's nginx: a minute" >&2

# A mirror may be a frozen one, whose Release file is past its date; its signature is checked all the same.
rootfs=$(mktemp)
trap 'rm -f "$rootfs"' EXIT
mmdebstrap --quiet --variant=essential --include=nginx,curl,openssl,ca-certificates --format=tar \
    --aptopt='Acquire::Check-Valid-Until "false"' \
    --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
    "$suite" "$rootfs" "deb $mirror $suite main"
docker import - "$tag-rootfs" <"$rootfs" >/dev/null
docker build --quiet --tag "$tag" - <<DOCKERFILE
FROM $tag-rootfs
RUN printf 'nginx:x:101:101::/nonexistent:/bin/false\n' >>/etc/passwd
EXPOSE 80
STOPSIGNAL SIGQUIT
CMD ["nginx", "-g", "daemon off;"]
DOCKERFILE
