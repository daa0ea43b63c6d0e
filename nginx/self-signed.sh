#!/bin/sh
# self-signed.sh [FOLDER]: make a self-signed certificate for the first start, unless FOLDER (/etc/nginx/tls) has one.
# It is valid for localhost, 127.0.0.1 and SERVER_NAME (a host name or an IPv4 address). It needs openssl.
set -eu
folder=${1:-/etc/nginx/tls}
name=${SERVER_NAME:-localhost}
chain=$folder/fullchain.pem key=$folder/privkey.pem

if [ -s "$chain" ] && [ -s "$key" ]; then
    echo "certificate: $chain is there and stays"
    exit
fi
if [ -s "$chain" ] || [ -s "$key" ]; then
    echo "certificate: $folder needs both fullchain.pem and privkey.pem, or neither" >&2
    exit 1
fi
case $name in
    *[!A-Za-z0-9.-]*) echo "certificate: SERVER_NAME is one host name or IPv4 address, not '$name'" >&2 && exit 1 ;;
    *[!0-9.]*) names="DNS:$name,DNS:localhost,IP:127.0.0.1" ;;
    *) names="IP:$name,DNS:localhost,IP:127.0.0.1" ;;
esac

mkdir -p "$folder"
umask 077
trap 'rm -f "$chain.new" "$key.new"' EXIT
# CA:FALSE: rustls, which Codex uses, accepts no certificate authority as a server's own certificate.
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -sha256 -days 3650 -subj "/CN=$name" \
    -addext "subjectAltName=$names" -addext "basicConstraints=critical,CA:FALSE" -keyout "$key.new" -out "$chain.new" 2>/dev/null
chmod 644 "$chain.new"
if [ "$(id -u)" -eq 0 ]; then
    chown 101:101 "$key.new" # the user of nginx's images
fi
mv "$key.new" "$key"
mv "$chain.new" "$chain"
echo "certificate: made a self-signed one for $name; clients have to trust $chain"
